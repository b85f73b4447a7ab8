// An engine: selectors, scratch memory and threads around a model. In: a block of tokens. Out: logits and counts.
//
// One layer takes three barriers. A row's sums are cut into chunks that depend on the model alone and added in the order of
// the chunks, so that its result depends neither on the rows beside it nor on the number of threads.
#pragma once
#include <atomic>
#include <cmath>
#include <memory>
#include <mutex>
#include <vector>

#include "model.h"
#include "pool.h"

struct Predictor {
  Matrix A, B;
  float threshold = 0.0f;
  int lookahead = 0;
  bool present() const { return A.present(); }
};

// Inputs of one point that are kept: see inputs.cpp.
struct InputSelector {
  Buffer<float> norms;
  float threshold = 0.0f;
  bool present() const { return !norms.empty(); }
  // NaN is kept, and found in the logits.
  bool keeps(float x, int64_t i) const { return !(std::fabs(x) * norms[i] <= threshold); }
};

// How a layer selects. gate: the threshold of its activated gates, see gate.cpp; negative: they select nothing.
struct LayerSelectors {
  Predictor mlp, heads;
  float gate = -1.0f;
  InputSelector inputs[DEJAVU_POINTS];
};

// The inputs of some width that are kept, of every row in order, and their values. whole: of all inputs, zero where they are not kept.
struct Kept {
  Buffer<int32_t> idx;
  Buffer<float> value, whole;
  Buffer<int64_t> count;
};

// The screened head: see screen.cpp. best: [rows, threads, count], the ranks that each thread found, `found` of them.
struct Screen {
  Matrix A, B;
  int64_t count = 0;
  Buffer<uint64_t> best;
  Buffer<int64_t> found;
};

// A padded vector; where some matrix that it meets is of integers, also in the form that their products take.
struct Vector {
  float *f;
  int16_t *q;    // int16 times a scale, for int8
  float scale;
  Grouped groups;  // for int4
};

// `rows` vectors of `width` values that meet matrices of these dtypes.
class Vectors {
 public:
  Vectors() = default;
  Vectors(int64_t rows, int64_t width, bool int8, bool int4);
  Vector &operator[](int64_t row) { return list_[(size_t)row]; }

 private:
  Buffer<float> floats_;
  Buffer<int16_t> ints_;
  Buffer<int8_t> bytes_;
  Buffer<float> scales_;
  std::vector<Vector> list_;
};

// What one thread keeps for itself. Residual streams and norms are computed by every thread: cheaper than another barrier.
struct Scratch {
  Vectors x, attention_in, mlp_in, final_in, projected;
  Vectors low, query;
  Buffer<float> values, scores, probabilities, mixed;
  Buffer<int16_t> cached;
  Buffer<int32_t> fired;
  Buffer<uint8_t> groups;        // [rows, groups]: selected
  Kept attention_kept, mlp_kept;  // these two: where inputs are selected
  Buffer<float> columns;          // [rows, columns]: sums of the columns of a panel
  Buffer<uint64_t> ranks;        // these three: for a screen
  Buffer<int32_t> tokens;
  Buffer<float> exact;
  std::vector<int64_t> units;  // heads to project: queries, then keys, then values
};

struct dejavu_engine {
  dejavu_engine(const dejavu_model *model, int threads, int64_t max_rows, const Kernels *kernels);
  void set_predictor(int64_t layer, int predicted, const dejavu_matrix &A, const dejavu_matrix &B, float threshold, int lookahead);
  void set_gate(int64_t layer, float threshold);
  void set_inputs(int64_t layer, int point, const float *norms, int64_t count, float threshold);
  void set_screen(const dejavu_matrix &A, const dejavu_matrix &B, int64_t count);
  // Raises BadValue for a block that this model cannot run. Returns whether every logit is finite.
  bool run(const dejavu_block &block, dejavu_profile *profile = nullptr);
  // The sum of count values, read in order by all threads: see read.cpp.
  double read(const float *data, int64_t count);

  const dejavu_model *model;
  const Kernels *kernels;
  const int64_t max_rows, neuron_chunks, head_chunks;
  int64_t columns = 0;  // of Scratch::columns: more than any panel has
  Arena arena;  // of predictors and screen; what is set anew lies there until the end
  std::vector<LayerSelectors> selectors;
  Screen screen;
  // Shared by the threads. activated: [rows, neurons], what of activations is
  // known before an MLP runs: see pass.h. output_kept: inputs of o, a head's from its first on, with counts [rows, heads].
  Buffer<float> residual, query, attention_parts, mlp_parts, cosine, sine, projected, activated;
  Buffer<int32_t> output_kept;
  Buffer<int64_t> output_counts;
  // By the layer's parity, so that thread 0 still reports one layer while others select for the next.
  Buffer<int32_t> lists[2];   // [rows, neurons]: the selected neurons of chunk c start at the chunk's first neuron
  Buffer<int64_t> counts[2];  // [rows, neuron_chunks]
  Buffer<int64_t> unions[2], in_order[2];  // [neuron_chunks], of dejavu_block
  std::atomic<bool> finite{true};
  dejavu_profile *profile = nullptr;  // of the block that runs, NULL: none
  Buffer<uint8_t> fired;              // [neurons], while a block is profiled: whether some row's activation was not zero
  std::vector<std::unique_ptr<Scratch>> scratch;
  std::mutex mutex;
  Pool pool;

 private:
  void check(const dejavu_block &block) const;
  void check_layer(int64_t layer) const;
  void grow_low();
};
