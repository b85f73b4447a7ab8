// Spin, then sleep: see pool.h.
#include "pool.h"

#include <algorithm>

#if defined(__linux__)
#include <sched.h>
#endif

#if defined(DEJAVU_X86)
#include <immintrin.h>
#endif

namespace {

inline void pause() {
#if defined(DEJAVU_X86)
  _mm_pause();
#elif defined(DEJAVU_ARM64)
  asm volatile("yield");
#endif
}

}  // namespace

void Signal::wait_past(unsigned seen) {
  for (int spin = 0; spin < SPINS; spin++) {
    if (value_.load(std::memory_order_acquire) != seen) return;
    pause();
  }
  std::unique_lock<std::mutex> lock(mutex_);
  sleepers_.fetch_add(1);  // before the value is looked at again: raise() sees the sleeper or the sleeper sees the value
  wake_.wait(lock, [&] { return value_.load() != seen; });
  sleepers_.fetch_sub(1);
}

void Signal::raise() {
  value_.fetch_add(1);
  if (sleepers_.load() == 0) return;
  { std::lock_guard<std::mutex> lock(mutex_); }
  wake_.notify_all();
}

void Barrier::wait() {
  if (threads_ == 1) return;
  const unsigned seen = signal_.value();
  if (arrived_.fetch_add(1) == threads_ - 1) {
    arrived_.store(0);
    signal_.raise();
  } else {
    signal_.wait_past(seen);
  }
}

#if defined(__linux__)

Placement::Placement(int threads) : processor_((size_t)threads) {
  for (auto &processor : processor_) processor.store(-1);
  cpu_set_t set;
  if (threads == 1 || sched_getaffinity(0, sizeof(set), &set) != 0 || CPU_COUNT(&set) < threads) return;
  for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
    if (CPU_ISSET(cpu, &set)) allowed_.push_back(cpu);
}

void Placement::note(int thread) {
  if (!allowed_.empty()) processor_[(size_t)thread].store(sched_getcpu(), std::memory_order_relaxed);
}

void Placement::settle(int thread) {
  note(thread);
  const auto taken = [&](int cpu) {
    return std::any_of(processor_.begin(), processor_.begin() + thread, [&](const std::atomic<int> &other) { return other.load() == cpu; });
  };
  if (allowed_.empty() || !taken(processor_[(size_t)thread].load())) return;
  cpu_set_t others, all;
  CPU_ZERO(&others);
  CPU_ZERO(&all);
  for (int cpu : allowed_) {
    CPU_SET(cpu, &all);
    if (!taken(cpu)) CPU_SET(cpu, &others);
  }
  if (CPU_COUNT(&others) == 0 || sched_setaffinity(0, sizeof(others), &others) != 0) return;
  note(thread);
  sched_setaffinity(0, sizeof(all), &all);  // moved, and free to be moved again
}

#else

Placement::Placement(int threads) : processor_((size_t)threads) {}
void Placement::note(int) {}
void Placement::settle(int) {}

#endif

Pool::Pool(int threads) : threads_(threads), placement_(threads) {
  barrier_.resize(threads);
  try {
    for (int thread = 1; thread < threads; thread++) workers_.emplace_back([this, thread] { work(thread); });
  } catch (...) {
    stop();
    throw;
  }
}

Pool::~Pool() { stop(); }

void Pool::stop() {
  stopping_.store(true);
  start_.raise();
  for (std::thread &worker : workers_) worker.join();
  workers_.clear();
}

void Pool::work(int thread) {
  unsigned seen = 0;
  for (;;) {
    start_.wait_past(seen);
    if (stopping_.load()) return;
    seen++;
    placement_.settle(thread);
    (*job_)(thread);
    barrier_.wait();
  }
}

void Pool::run(const std::function<void(int)> &job) {
  job_ = &job;
  if (threads_ > 1) {
    placement_.note(0);
    start_.raise();
  }
  job(0);
  barrier_.wait();
}
