// What every part of the computation is given: the block of tokens that runs, as one of the engine's threads sees it.
//
// Parts (embedding.h, attention.h, mlp.h, head.h ...) belong to the engine and own the buffers that they compute in: those that threads
// share, and scratch memory for each. What goes from one part to another is an argument; pass.cpp shows all of it.
#pragma once
#include <atomic>

#include "linear.h"
#include "pool.h"
#include "profile.h"
#include "selection.h"

// Selects nothing: of every layer in a dense block.
inline const LayerSelectors SELECTS_NOTHING{};

struct Context {
  const dejavu_model &model;
  const dejavu_config &config;  // the model's
  const Kernels &kernels;
  const dejavu_block &block;
  const std::vector<LayerSelectors> &selectors;
  Pool &pool;
  Profiler &profiler;
  std::atomic<bool> &finite;  // set to false where a logit is not
  const int thread, threads;
  const int64_t rows, width;  // of the block; of a padded residual stream

  bool prompt() const { return block.prompt != 0; }
  const LayerSelectors &selector(int64_t layer) const { return block.sparse ? selectors[(size_t)layer] : SELECTS_NOTHING; }
  // This thread's share of `total` chunks or rows.
  int64_t share(int64_t total, int64_t unit = 1) const { return total / unit * thread / threads * unit; }
  int64_t share_end(int64_t total, int64_t unit = 1) const {
    return thread + 1 == threads ? total : total / unit * (thread + 1) / threads * unit;
  }
  // What comes after rows of a matrix, where one token is computed; several read one tile after another while it is near.
  Fetch after(const Matrix &matrix, int64_t first, int64_t count) const { return rows == 1 ? rows_after(matrix, first, count) : Fetch(); }
};

// What every thread computes for itself, alike in all: cheaper than another barrier.
struct alignas(64) Replicated {
  Replicated(const dejavu_model &model, int64_t max_rows) : groups(max_rows * model.config.num_kv_heads) {
    for (Vectors *vectors : {&x, &attention_in, &mlp_in}) *vectors = Vectors(max_rows, model.width, model.forms());
    for (Kept *kept : {&attention_kept, &mlp_kept})
      if (model.input_major()) *kept = Kept(max_rows, model.config.hidden_size);
  }
  Vectors x, attention_in, mlp_in;  // the residual stream, and what q, k, v and what gate, up read of it
  Kept attention_kept, mlp_kept;    // of the last two, where inputs are selected
  Buffer<uint8_t> groups;           // [rows, key/value heads]: selected
};
