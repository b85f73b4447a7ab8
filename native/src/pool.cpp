// Spin, then sleep: see pool.h.
#include "pool.h"

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

Pool::Pool(int threads) : threads_(threads) {
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
    (*job_)(thread);
    barrier_.wait();
  }
}

void Pool::run(const std::function<void(int)> &job) {
  job_ = &job;
  if (threads_ > 1) start_.raise();
  job(0);
  barrier_.wait();
}
