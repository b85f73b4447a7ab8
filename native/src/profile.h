// What a block took, for those who ask: dejavu_profile. Without one each call here is a test of a pointer.
//
// In: the end of each op, and the neurons whose rows of down are read. Out: seconds of the profile, and how many neurons that were.
// Times are thread 0's. Its wait at a barrier belongs to the op before it, so an op ends when the last thread has done it; the
// predictor has no barrier of its own, and a thread that selects longer is waited for in the attention or the MLP.
#pragma once
#include <chrono>

#include "../dejavu_native.h"
#include "buffer.h"

class Profiler {
 public:
  // Before a block runs, by the caller. profile NULL: none.
  void prepare(dejavu_profile *profile, int64_t neurons);
  dejavu_profile *profile() const { return profile_; }

  // By every thread; thread 0's are taken. The time from `resume` or the last lap to a lap went into its op.
  void start(int thread);
  void lap(int thread, int op) {
    if (profile_ != nullptr && thread == 0) add_lap(op);
  }
  void resume(int thread);

  // Neurons of one thread's chunks: no other thread writes their marks.
  void mark_fired(const int32_t *idx, int64_t count) {
    if (profile_ == nullptr) return;
    for (int64_t k = 0; k < count; k++) fired_[idx[k]] = 1;
  }
  // How many neurons were marked since the last call, by thread 0.
  int64_t take_fired();

 private:
  void add_lap(int op);

  dejavu_profile *profile_ = nullptr;
  Buffer<uint8_t> fired_;  // [neurons]: whether some row's activation was not zero
  std::chrono::steady_clock::time_point last_;
};
