// An engine: selectors, the parts of the computation with their buffers, and threads, around a model. In: a block of tokens. Out: logits and
// counts.
//
// One layer takes three barriers. A row's sums are cut into chunks that depend on the model alone and added in the order of
// the chunks, so that its result depends neither on the other rows nor on the number of threads.
#pragma once
#include <mutex>

#include "attention.h"
#include "embedding.h"
#include "head.h"
#include "inputs.h"
#include "mlp.h"
#include "predictors.h"

struct dejavu_engine {
  // Raises BadValue where the model lacks a part.
  dejavu_engine(const dejavu_model *model, int threads, int64_t max_rows, const Kernels *kernels);
  void set_predictor(int64_t layer, int predicted, const dejavu_matrix &A, const dejavu_matrix &B, float threshold, int lookahead);
  void set_gate(int64_t layer, float threshold);
  void set_inputs(int64_t layer, int point, const float *norms, int64_t count, float threshold);
  void set_screen(const dejavu_matrix &centroids, const int32_t *members, const int32_t *sizes, float threshold);
  // Raises BadValue for a block that this model cannot run. Returns whether every logit is finite.
  bool run(const dejavu_block &block, dejavu_profile *profile = nullptr);
  // The sum of count values, read in order by all threads: see read.cpp.
  double read(const float *data, int64_t count);

  const dejavu_model *model;
  const Kernels *kernels;
  const int64_t max_rows;
  Arena arena;  // of predictors and screen; what is set anew lies there until the end
  std::vector<LayerSelectors> selectors;

  // Parts, in the order of a pass, and what goes between them: see pass.cpp.
  Embedding embedding;
  Predictors predictors;
  InputMaps inputs;
  Attention attention;
  Mlp mlp;
  Head head;
  Selected selected;
  std::vector<Replicated> replicated;  // by thread
  Profiler profiler;
  std::atomic<bool> finite{true};

  std::mutex mutex;
  Pool pool;

 private:
  void check(const dejavu_block &block) const;
  void check_layer(int64_t layer) const;
};
