// What each token computes, told by predictors: scores = B (A x) + B's bias, selected where > threshold.
//
// In: the input of the attention or of the MLP, by the predictor's lookahead. Out: groups of heads, and lists of neurons.
#pragma once
#include "context.h"

class Predictors {
 public:
  Predictors(const dejavu_model &model, int threads);
  // Room for the largest rank, once a layer has another predictor.
  void make_room(const std::vector<LayerSelectors> &selectors);

  // Writes groups [rows, key/value heads]: 1 where selected, the best one always. Every thread works them out for itself. Lookahead 1
  // reads mlp_in, which is still that of the layer before. A layer without a predictor selects all.
  void select_groups(const Context &context, int64_t layer, const Vectors &attention_in, const Vectors &mlp_in, Buffer<uint8_t> &groups);
  // Writes the lists of this thread's chunks, where the layer's predictor has this lookahead; `in` is what that reads: mlp_in (0),
  // attention_in (1), or mlp_in while it is still that of the layer before (2).
  void select_neurons(const Context &context, int64_t layer, int lookahead, const Vectors &in, Selected &selected);

 private:
  struct alignas(64) Scratch {
    Vectors low;           // one, of a rank
    Buffer<float> scores;  // of neurons or groups
  };
  // own.scores[0 .. count) of outputs first, first + 1, ...
  static void score(const Context &context, const Predictor &predictor, const Vector &x, int64_t first, int64_t count, Scratch &own);

  Forms forms_;  // rank_forms
  std::vector<Scratch> scratch_;
};
