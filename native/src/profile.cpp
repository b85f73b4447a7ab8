// Times of a block: see profile.h.
#include "profile.h"

#include <algorithm>

void Profiler::prepare(dejavu_profile *profile, int64_t neurons) {
  profile_ = profile;
  if (profile_ != nullptr && fired_.empty()) fired_ = Buffer<uint8_t>(neurons);
}

void Profiler::start(int thread) {
  if (profile_ == nullptr || thread != 0) return;
  std::fill_n(profile_->seconds, (int)DEJAVU_OPS, 0.0);
  resume(thread);
}

void Profiler::resume(int thread) {
  if (profile_ != nullptr && thread == 0) last_ = std::chrono::steady_clock::now();
}

void Profiler::add_lap(int op) {
  const auto now = std::chrono::steady_clock::now();
  profile_->seconds[op] += std::chrono::duration<double>(now - last_).count();
  last_ = now;
}

int64_t Profiler::take_fired() {
  const int64_t count = std::count(fired_.data(), fired_.data() + fired_.size(), (uint8_t)1);
  std::fill_n(fired_.data(), fired_.size(), (uint8_t)0);
  return count;
}
