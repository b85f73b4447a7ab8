// The screened head: low-rank scores B (A x) of every token choose a shortlist, which alone gets its exact logits.
//
// Every other logit is -inf. What is drawn is then what the full head with top-k over the shortlist would draw: estimates beside
// exact values would let a token be drawn for an error of its estimate. The shortlist is the `count` largest scores, of equal ones
// the first tokens: a set that depends on its row alone, however threads share the vocabulary.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "pass.h"

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

void dejavu_engine::set_screen(const dejavu_matrix &A, const dejavu_matrix &B, int64_t count) {
  const dejavu_config &c = model->config;
  require(count >= 1 && count < c.vocab_size, "a shortlist must lie between 1 and the vocabulary of " + std::to_string(c.vocab_size));
  require(A.rows > 0 && A.rows <= c.embed_size, "the rank of a screen must lie between 1 and the width of the head");
  for (const dejavu_matrix *given : {&A, &B}) require(given->dtype == DEJAVU_FP32 || given->dtype == DEJAVU_INT8, "a screen must be fp32 or int8");
  std::lock_guard<std::mutex> lock(mutex);
  screen = Screen();  // what fails below leaves none
  Screen made;
  made.A.allocate(arena, A.dtype, A.rows, c.embed_size);
  made.A.fill(A, "a screen's A");
  made.B.allocate(arena, B.dtype, c.vocab_size, A.rows);
  made.B.fill(B, "a screen's B");
  made.count = count;
  made.best = Buffer<uint64_t>(product({max_rows, pool.threads(), count}));
  made.found = Buffer<int64_t>(max_rows * pool.threads());
  for (auto &own : scratch) {
    own->ranks = Buffer<uint64_t>(std::max<int64_t>(2 * count, pool.threads() * count));
    own->tokens = Buffer<int32_t>(count);
    own->exact = Buffer<float>(count);
  }
  screen = std::move(made);
  grow_low();
}

// This thread's best of its share of the vocabulary, and -inf for all of it.
void Pass::shortlist(const Vector &x, int64_t r) {
  Screen &screen = engine.screen;
  Vector &low = own.low[0];
  std::fill_n(low.f, screen.B.width, 0.0f);
  dots(screen.A, x, nullptr, 0, screen.A.rows, low.f);
  quantize(low, screen.B.width);
  const int64_t begin = share(config.vocab_size, TILE), end = share_end(config.vocab_size, TILE);
  std::fill(block.logits + (r - block.first_logits) * config.vocab_size + begin, block.logits + (r - block.first_logits) * config.vocab_size + end, -INFINITY);
  uint64_t *ranks = own.ranks.data(), least = 0;
  int64_t n = 0;
  bool finite = true;
  for (int64_t tile = begin; tile < end; tile += TILE) {
    float scores[TILE];
    const int64_t count = std::min(TILE, end - tile);
    dots(screen.B, low, nullptr, tile, count, scores, rows_after(screen.B, tile, count));
    finite = finite && kernels.finite(scores, count);
    for (int64_t k = 0; k < count; k++) {
      const uint64_t rank = rank_of(scores[k], tile + k);
      if (rank <= least) continue;
      ranks[n++] = rank;
      if (n < 2 * screen.count) continue;
      n = keep_largest(ranks, n, screen.count);
      least = ranks[n - 1];  // nth_element leaves the smallest of those kept here
    }
  }
  n = keep_largest(ranks, n, screen.count);
  std::copy_n(ranks, n, screen.best.data() + (r * threads + thread) * screen.count);
  screen.found[r * threads + thread] = n;
  if (!finite) engine.finite.store(false);
}

// Exact logits of this thread's share of the shortlist, once every thread has found its best.
void Pass::exact_logits(const Vector &x, int64_t r) {
  const Screen &screen = engine.screen;
  const Matrix &head = model.output_head();
  uint64_t *ranks = own.ranks.data();
  int64_t n = 0;
  for (int64_t t = 0; t < threads; t++) {
    const int64_t found = screen.found[r * threads + t];
    std::copy_n(screen.best.data() + (r * threads + t) * screen.count, found, ranks + n);
    n += found;
  }
  n = keep_largest(ranks, n, screen.count);  // in the same order in every thread
  const int64_t begin = share(n), count = share_end(n) - begin;
  for (int64_t k = 0; k < count; k++) own.tokens[k] = (int32_t)token_of(ranks[begin + k]);
  dots(head, x, own.tokens.data(), 0, count, own.exact.data(), {head.row_bytes()});
  if (!kernels.finite(own.exact.data(), count)) engine.finite.store(false);
  float *logits = block.logits + (r - block.first_logits) * config.vocab_size;
  for (int64_t k = 0; k < count; k++) logits[own.tokens[k]] = own.exact[k];
}
