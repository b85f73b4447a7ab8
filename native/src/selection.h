// How a layer selects, and what it selected: what those that select (predictors.h, gate.h, inputs.h) write, and those that compute read.
#pragma once
#include <cmath>

#include "model.h"

// Scores B (A x) + B's bias; selected where score > threshold.
struct Predictor {
  Matrix A, B;
  float threshold = 0.0f;
  int lookahead = 0;
  bool present() const { return A.present(); }
};

// Inputs of one point that are kept.
struct InputSelector {
  Buffer<float> norms;
  float threshold = 0.0f;
  bool present() const { return !norms.empty(); }
  // NaN is kept, and found in the logits.
  bool keeps(float x, int64_t i) const { return !(std::fabs(x) * norms[i] <= threshold); }
};

// How a layer selects. gate: the threshold of its activated gates; negative: they select nothing.
struct LayerSelectors {
  Predictor mlp, heads;
  float gate = -1.0f;
  InputSelector inputs[DEJAVU_POINTS];

  bool by_gate() const { return gate >= 0; }
  bool neurons() const { return by_gate() || mlp.present(); }
  // Whether the MLP runs over lists of neurons: those selected, or the inputs of down that are kept.
  bool lists() const { return neurons() || inputs[DEJAVU_AT_DOWN].present(); }
};

// The inputs of one point that each row keeps, in order, and their values. whole: of all inputs, zero where they are not kept.
struct Kept {
  Kept() = default;
  Kept(int64_t rows, int64_t size) : idx(rows * size), value(rows * size), whole(rows * size), count(rows) {}
  Buffer<int32_t> idx;         // [rows, size]
  Buffer<float> value, whole;  // [rows, size]
  Buffer<int64_t> count;       // [rows]
};

// The neurons that rows selected in a layer, by chunks of neurons, and what of their activations is known before the MLP runs. Shared: a
// chunk is one thread's. Lists are kept by the layer's parity, so that thread 0 still reports one layer while others select for the next.
class Selected {
 public:
  Selected(const dejavu_model &model, int64_t max_rows) : neurons(model.config.intermediate_size), chunks(chunks_of_neurons(model.config)), max_rows_(max_rows) {
    for (Buffer<int32_t> &list : lists_) list = Buffer<int32_t>(product({max_rows, neurons}));
    for (Buffer<int64_t> &count : counts_) count = Buffer<int64_t>(max_rows * chunks);
    if (model.input_major()) know_activated();
  }
  // Gives `activated` its memory.
  void know_activated() {
    if (activated_.empty()) activated_ = Buffer<float>(product({max_rows_, neurons}));
  }

  int64_t start(int64_t chunk) const { return first_neuron(neurons, chunk, chunks); }
  // Of one row: the list of a chunk starts at the chunk's first neuron and has `count` of them.
  int32_t *list(int64_t layer, int64_t row) const { return lists_[layer & 1].data() + row * neurons; }
  int64_t &count(int64_t layer, int64_t row, int64_t chunk) const { return counts_[layer & 1][row * chunks + chunk]; }
  // Of one row, [neurons]: of the layer that runs, activated gates (by_gate of a gated MLP), or whole activations.
  float *activated(int64_t row) const { return activated_.data() + row * neurons; }

  const int64_t neurons, chunks;

 private:
  int64_t max_rows_;
  Buffer<int32_t> lists_[2];   // [rows, neurons]
  Buffer<int64_t> counts_[2];  // [rows, chunks]
  Buffer<float> activated_;    // [rows, neurons]
};
