// A pool of threads that runs one function on each, with barriers inside it.
//
// A waiting thread spins for a few microseconds and then sleeps: on a busy machine a long spin takes the core from the thread
// that is waited for. Thread 0 is the caller.
#pragma once
#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

// A counter that threads wait on until it moves past what they saw.
class Signal {
 public:
  unsigned value() const { return value_.load(); }
  void wait_past(unsigned seen);
  void raise();

 private:
  static constexpr int SPINS = 500;
  std::atomic<unsigned> value_{0};
  std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
};

class Barrier {
 public:
  void resize(int threads) { threads_ = threads; }
  void wait();

 private:
  int threads_ = 1;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) Signal signal_;
};

// Keeps the threads of a pool on processors of their own. A scheduler may leave two threads that sleep and wake often on one
// processor, where each spins while the other should run; a thread that finds itself on the processor of one with a lower number moves.
class Placement {
 public:
  explicit Placement(int threads);
  void note(int thread);    // where this thread is
  void settle(int thread);  // as note, and away from the threads of lower numbers

 private:
  std::vector<std::atomic<int>> processor_;
  std::vector<int> allowed_;  // empty: nothing to be done on this system
};

class Pool {
 public:
  // Throws std::system_error where the system has no thread to give.
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool &) = delete;
  Pool &operator=(const Pool &) = delete;

  int threads() const { return threads_; }
  // job(thread) on every thread; returns when all are done. The job must not throw.
  void run(const std::function<void(int)> &job);
  // For use inside a job, by every thread.
  void barrier() { barrier_.wait(); }

 private:
  void work(int thread);
  void stop();

  int threads_;
  Placement placement_;
  Barrier barrier_;
  alignas(64) Signal start_;
  const std::function<void(int)> *job_ = nullptr;
  std::atomic<bool> stopping_{false};
  std::vector<std::thread> workers_;
};
