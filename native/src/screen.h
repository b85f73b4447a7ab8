// The screened head: clusters of the vocabulary, of which likely ones alone get exact logits.
//
//   mass = softmax(M x + b);   kept: clusters with mass_c >= threshold * size_c, and the one whose mass_c / size_c is largest
//
// Every other logit is -inf: estimates among exact values would let a token be drawn for an error of its estimate. Every thread chooses
// the clusters for itself, all alike: a choice that depends on its row alone.
// In: the input of the head. Out: logits of the block.
#pragma once
#include "context.h"

class Screen {
 public:
  Screen() = default;
  // Of what `check` let pass; raises BadValue for sizes or values that do not fit. The centroids' memory is the arena's.
  Screen(const dejavu_model &model, Arena &arena, int threads, int64_t max_rows, const dejavu_matrix &centroids, const int32_t *members, const int32_t *sizes, float threshold);
  // Raises BadValue where the model cannot take them, or members are not each token once.
  static void check(const dejavu_model &model, const dejavu_matrix &centroids, const int32_t *members, const int32_t *sizes, float threshold);
  bool present() const { return centroids_.present(); }

  // M x + b of this thread's share of the clusters, and -inf for its share of the vocabulary. A barrier comes next.
  void score(const Context &context, const Vector &x, int64_t row);
  // Exact logits of this thread's share of the shortlist, once every cluster has its score.
  void write_logits(const Context &context, const Vector &x, int64_t row);

 private:
  struct alignas(64) Scratch {
    Buffer<float> mass, exact;  // of all clusters, and of a shortlist
    Buffer<int32_t> tokens;
    Buffer<uint64_t> kept;  // a bit for each token
  };
  Matrix centroids_;  // int8, with b
  Buffer<int32_t> members_, begin_;  // tokens, one cluster after the other, and where each begins
  float threshold_ = 0;
  Buffer<float> scores_;          // shared: [rows, clusters]
  std::vector<Scratch> scratch_;  // by thread
};
