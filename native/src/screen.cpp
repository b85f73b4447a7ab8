// The screened head: see screen.h.
#include "screen.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace {

// Larger for a larger score, and for the lower token where scores are equal.
uint64_t rank_of(float score, int64_t token) {
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof bits);
  bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return (uint64_t)bits << 32 | (0xffffffffu - (uint32_t)token);
}

int64_t token_of(uint64_t rank) { return (int64_t)(0xffffffffu - (uint32_t)rank); }

// The `count` largest first, in any order.
int64_t keep_largest(uint64_t *ranks, int64_t n, int64_t count) {
  if (n <= count) return n;
  std::nth_element(ranks, ranks + count - 1, ranks + n, [](uint64_t a, uint64_t b) { return a > b; });
  return count;
}

}  // namespace

void Screen::check(const dejavu_model &model, const dejavu_matrix &A, const dejavu_matrix &B, int64_t count) {
  const dejavu_config &c = model.config;
  require(count >= 1 && count < c.vocab_size, "a shortlist must lie between 1 and the vocabulary of " + std::to_string(c.vocab_size));
  require(A.rows > 0 && A.rows <= c.embed_size, "the rank of a screen must lie between 1 and the width of the head");
  for (const dejavu_matrix *given : {&A, &B}) require(given->dtype == DEJAVU_FP32 || given->dtype == DEJAVU_INT8, "a screen must be fp32 or int8");
}

Screen::Screen(const dejavu_model &model, Arena &arena, int threads, int64_t max_rows, const dejavu_matrix &A, const dejavu_matrix &B, int64_t count)
    : count_(count), best_(product({max_rows, threads, count})), found_(max_rows * threads), scratch_((size_t)threads) {
  check_matrix(A, A.rows, model.config.embed_size, "a screen's A");
  check_matrix(B, model.config.vocab_size, A.rows, "a screen's B");
  A_.allocate(arena, A.dtype, A.rows, A.columns);
  A_.fill(A, "a screen's A");
  B_.allocate(arena, B.dtype, B.rows, B.columns);
  B_.fill(B, "a screen's B");
  for (Scratch &own : scratch_) {
    own.low = Vectors(1, B_.width, rank_forms(model));
    own.ranks = Buffer<uint64_t>(std::max<int64_t>(2 * count, threads * count));
    own.tokens = Buffer<int32_t>(count);
    own.exact = Buffer<float>(count);
  }
}

void Screen::shortlist(const Context &ctx, const Vector &x, int64_t r) {
  const int64_t vocab_size = ctx.config.vocab_size;
  Scratch &own = scratch_[(size_t)ctx.thread];
  Vector &low = own.low[0];
  std::fill_n(low.f, B_.width, 0.0f);
  dots(ctx.kernels, A_, x, nullptr, 0, A_.rows, low.f);
  quantize(ctx.kernels, low, B_.width);
  const int64_t begin = ctx.share(vocab_size, TILE), end = ctx.share_end(vocab_size, TILE);
  float *logits = ctx.block.logits + (r - ctx.block.first_logits) * vocab_size;
  std::fill(logits + begin, logits + end, -INFINITY);
  uint64_t *ranks = own.ranks.data(), least = 0;
  int64_t n = 0;
  bool finite = true;
  for (int64_t tile = begin; tile < end; tile += TILE) {
    float scores[TILE];
    const int64_t count = std::min(TILE, end - tile);
    dots(ctx.kernels, B_, low, nullptr, tile, count, scores, rows_after(B_, tile, count));
    finite = finite && ctx.kernels.finite(scores, count);
    for (int64_t k = 0; k < count; k++) {
      const uint64_t rank = rank_of(scores[k], tile + k);
      if (rank <= least) continue;
      ranks[n++] = rank;
      if (n < 2 * count_) continue;
      n = keep_largest(ranks, n, count_);
      least = ranks[n - 1];  // nth_element leaves the smallest of those kept here
    }
  }
  n = keep_largest(ranks, n, count_);
  std::copy_n(ranks, n, best_.data() + (r * ctx.threads + ctx.thread) * count_);
  found_[r * ctx.threads + ctx.thread] = n;
  if (!finite) ctx.finite.store(false);
}

void Screen::write_logits(const Context &ctx, const Vector &x, int64_t r) {
  const Matrix &head = ctx.model.output_head();
  Scratch &own = scratch_[(size_t)ctx.thread];
  uint64_t *ranks = own.ranks.data();
  int64_t n = 0;
  for (int64_t t = 0; t < ctx.threads; t++) {
    const int64_t found = found_[r * ctx.threads + t];
    std::copy_n(best_.data() + (r * ctx.threads + t) * count_, found, ranks + n);
    n += found;
  }
  n = keep_largest(ranks, n, count_);  // in the same order in every thread
  const int64_t begin = ctx.share(n), count = ctx.share_end(n) - begin;
  for (int64_t k = 0; k < count; k++) own.tokens[k] = (int32_t)token_of(ranks[begin + k]);
  dots(ctx.kernels, head, x, own.tokens.data(), 0, count, own.exact.data(), {head.row_bytes()});
  if (ctx.config.logit_cap > 0) ctx.kernels.cap(own.exact.data(), count, ctx.config.logit_cap);
  if (!ctx.kernels.finite(own.exact.data(), count)) ctx.finite.store(false);
  float *logits = ctx.block.logits + (r - ctx.block.first_logits) * ctx.config.vocab_size;
  for (int64_t k = 0; k < count; k++) logits[own.tokens[k]] = own.exact[k];
}
