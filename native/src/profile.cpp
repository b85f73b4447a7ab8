// What a block took and read, for those who ask: dejavu_profile. Without one each function here is a test of a pointer.
//
// Times are thread 0's. Its wait at a barrier belongs to the op before it, so an op ends when the last thread has done it; the
// predictor has no barrier of its own, and a thread that selects longer is waited for in the attention or the MLP.
#include <algorithm>

#include "pass.h"

void Pass::begin_laps() {
  if (engine.profile == nullptr || thread != 0) return;
  std::fill_n(engine.profile->seconds, (int)DEJAVU_OPS, 0.0);
  last = std::chrono::steady_clock::now();
}

// The time since the last lap went into this op.
void Pass::lap(int op) {
  if (engine.profile == nullptr || thread != 0) return;
  const auto now = std::chrono::steady_clock::now();
  engine.profile->seconds[op] += std::chrono::duration<double>(now - last).count();
  last = now;
}

// Neurons of one thread's chunks: no other thread writes their marks.
void Pass::note_fired(const int32_t *idx, int64_t count) {
  if (engine.profile == nullptr) return;
  for (int64_t k = 0; k < count; k++) engine.fired[idx[k]] = 1;
}

// The layer's counts, outside the times: the others wait, or they would read the next layer's weights while thread 0 still counts,
// and its share of that layer would be timed alone.
void Pass::note_layer(int64_t layer) {
  if (engine.profile == nullptr) return;
  lap(DEJAVU_OP_OTHER);
  if (thread == 0) count_layer(layer);
  engine.pool.barrier();
  last = std::chrono::steady_clock::now();
}

void Pass::count_layer(int64_t layer) {
  const int64_t total = config.intermediate_size, groups = config.num_kv_heads;
  int64_t read = total, attended = 0;
  if (sparse_mlp(layer)) {
    read = std::count(engine.fired.data(), engine.fired.data() + total, (uint8_t)1);
    std::fill_n(engine.fired.data(), total, (uint8_t)0);
    if (config.activation > DEJAVU_FATRELU) read = sum_of_chunks(engine.unions[layer & 1]);  // none is exactly zero: every row of down is read
  }
  if (engine.profile->inputs != nullptr) count_inputs(layer);
  for (int64_t g = 0; g < groups; g++) {
    bool wanted = false;
    for (int64_t r = 0; r < rows; r++) wanted = wanted || own.groups[r * groups + g] != 0;
    attended += wanted;
  }
  engine.profile->fired[layer] = read, engine.profile->groups[layer] = attended;
}
