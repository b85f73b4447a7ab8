// The screened head: low-rank scores B (A x) of every token choose a shortlist, which alone gets its exact logits.
//
// Every other logit is -inf. What is drawn is then what the full head with top-k over the shortlist would draw: estimates among
// exact values would let a token be drawn for an error of its estimate. The shortlist is the `count` largest scores, of equal ones
// the first tokens: a set that depends on its row alone, however threads share the vocabulary.
// In: the input of the head. Out: logits of the block.
#pragma once
#include "context.h"

class Screen {
 public:
  Screen() = default;
  // Of what `check` let pass; raises BadValue for sizes or values that do not fit. The matrices' memory is the arena's.
  Screen(const dejavu_model &model, Arena &arena, int threads, int64_t max_rows, const dejavu_matrix &A, const dejavu_matrix &B, int64_t count);
  // Raises BadValue where the model cannot take them.
  static void check(const dejavu_model &model, const dejavu_matrix &A, const dejavu_matrix &B, int64_t count);
  bool present() const { return count_ > 0; }

  // This thread's best of its share of the vocabulary, and -inf for all of it. A barrier comes next.
  void shortlist(const Context &context, const Vector &x, int64_t row);
  // Exact logits of this thread's share of the shortlist, once every thread has found its best.
  void write_logits(const Context &context, const Vector &x, int64_t row);

 private:
  struct alignas(64) Scratch {
    Vectors low;  // one, of the rank
    Buffer<uint64_t> ranks;
    Buffer<int32_t> tokens;
    Buffer<float> exact;
  };
  Matrix A_, B_;
  int64_t count_ = 0;
  // Shared: the ranks that each thread found, `found_` of them.
  Buffer<uint64_t> best_;  // [rows, threads, count]
  Buffer<int64_t> found_;  // [rows, threads]
  std::vector<Scratch> scratch_;  // by thread
};
