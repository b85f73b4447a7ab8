// The screened head: see screen.h.
#include "screen.h"

#include <algorithm>
#include <cmath>

void Screen::check(const dejavu_model &model, const dejavu_matrix &centroids, const int32_t *members, const int32_t *sizes, float threshold) {
  const int64_t vocab_size = model.config.vocab_size;
  require(threshold > 0 && threshold < 1, "a screen's threshold must lie between 0 and 1, not " + std::to_string(threshold));
  require(centroids.rows >= 1 && centroids.rows <= vocab_size, "a screen must have between 1 cluster and one for each token");
  require(centroids.dtype == DEJAVU_FP32 || centroids.dtype == DEJAVU_INT8, "a screen must be fp32 or int8");
  int64_t total = 0;
  for (int64_t c = 0; c < centroids.rows; c++) {
    require(sizes[c] >= 1, "a cluster of a screen must have a token");
    total += sizes[c];
  }
  require(total == vocab_size, "the clusters of a screen have " + std::to_string(total) + " tokens, expected " + std::to_string(vocab_size));
  std::vector<bool> seen((size_t)vocab_size);
  for (int64_t k = 0; k < vocab_size; k++) {
    require(members[k] >= 0 && members[k] < vocab_size && !seen[(size_t)members[k]], "the clusters of a screen must have each token once");
    seen[(size_t)members[k]] = true;
  }
}

Screen::Screen(const dejavu_model &model, Arena &arena, int threads, int64_t max_rows, const dejavu_matrix &centroids, const int32_t *members, const int32_t *sizes, float threshold)
    : members_(model.config.vocab_size), begin_(centroids.rows + 1), threshold_(threshold), scores_(product({max_rows, centroids.rows})), scratch_((size_t)threads) {
  check_matrix(centroids, centroids.rows, model.config.embed_size, "a screen's centroids");
  centroids_.allocate(arena, centroids.dtype, centroids.rows, centroids.columns);
  centroids_.fill(centroids, "a screen's centroids");
  std::copy_n(members, model.config.vocab_size, members_.data());
  for (int64_t c = 0; c < centroids.rows; c++) begin_[c + 1] = begin_[c] + sizes[c];
  for (Scratch &own : scratch_) {
    own.mass = Buffer<float>(round_up(centroids.rows, PAD) + PAD);
    own.exact = Buffer<float>(model.config.vocab_size / threads + 1);
    own.tokens = Buffer<int32_t>(own.exact.size());
    own.kept = Buffer<uint64_t>((model.config.vocab_size + 63) / 64);
  }
}

void Screen::score(const Context &ctx, const Vector &x, int64_t r) {
  const int64_t begin = ctx.share(centroids_.rows, TILE), end = ctx.share_end(centroids_.rows, TILE);
  for (int64_t tile = begin; tile < end; tile += TILE) {
    const int64_t count = std::min(TILE, end - tile);
    dots(ctx.kernels, centroids_, x, nullptr, tile, count, scores_.data() + r * centroids_.rows + tile, rows_after(centroids_, tile, count));
  }
  const int64_t vocab_size = ctx.config.vocab_size, first = ctx.share(vocab_size, TILE), last = ctx.share_end(vocab_size, TILE);
  float *logits = ctx.block.logits + (r - ctx.block.first_logits) * vocab_size;
  std::fill(logits + first, logits + last, -INFINITY);
}

void Screen::write_logits(const Context &ctx, const Vector &x, int64_t r) {
  const Matrix &head = ctx.model.output_head();
  const int64_t clusters = centroids_.rows;
  Scratch &own = scratch_[(size_t)ctx.thread];
  float *mass = own.mass.data();
  std::copy_n(scores_.data() + r * clusters, clusters, mass);
  ctx.kernels.softmax(mass, clusters);
  if (!ctx.kernels.finite(mass, clusters)) return ctx.finite.store(false);
  int64_t best = 0, kept = 0;
  for (int64_t c = 0; c < clusters; c++) {
    mass[c] /= (float)(begin_[c + 1] - begin_[c]);
    if (mass[c] > mass[best]) best = c;
  }
  mass[best] = 1.0f;
  std::fill_n(own.kept.data(), own.kept.size(), 0);
  for (int64_t c = 0; c < clusters; c++) {
    if (mass[c] < threshold_) continue;
    for (int64_t k = begin_[c]; k < begin_[c + 1]; k++) own.kept[members_[k] / 64] |= UINT64_C(1) << members_[k] % 64;
    kept += begin_[c + 1] - begin_[c];
  }
  // This thread's share of them in ascending order: memory is faster the nearer rows lie to one another.
  const int64_t begin = ctx.share(kept), count = ctx.share_end(kept) - begin;
  int64_t passed = 0, n = 0;
  for (int64_t w = 0; n < count; w++) {
    uint64_t left = own.kept[w];
    const int64_t here = __builtin_popcountll(left);
    for (; left != 0 && passed + here > begin && n < count; left &= left - 1) {
      const int64_t rank = passed + here - __builtin_popcountll(left);
      if (rank >= begin) own.tokens[n++] = (int32_t)(64 * w + __builtin_ctzll(left));
    }
    passed += here;
  }
  dots(ctx.kernels, head, x, own.tokens.data(), 0, count, own.exact.data(), {head.row_bytes()});
  if (ctx.config.logit_cap > 0) ctx.kernels.cap(own.exact.data(), count, ctx.config.logit_cap);
  if (!ctx.kernels.finite(own.exact.data(), count)) ctx.finite.store(false);
  float *logits = ctx.block.logits + (r - ctx.block.first_logits) * ctx.config.vocab_size;
  for (int64_t k = 0; k < count; k++) logits[own.tokens[k]] = own.exact[k];
}
