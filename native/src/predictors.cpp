// Selection by predictors: see predictors.h.
#include "predictors.h"

#include <algorithm>

Predictors::Predictors(const dejavu_model &model, int threads) : forms_(rank_forms(model)), scratch_((size_t)threads) {
  for (Scratch &own : scratch_) {
    own.low = Vectors(1, PAD, forms_);
    own.scores = Buffer<float>(std::max(model.config.intermediate_size, model.config.num_kv_heads) + PAD);
  }
}

void Predictors::make_room(const std::vector<LayerSelectors> &selectors) {
  int64_t widest = PAD;
  for (const LayerSelectors &each : selectors) widest = std::max({widest, each.mlp.B.width, each.heads.B.width});
  for (Scratch &own : scratch_) own.low = Vectors(1, widest, forms_);
}

void Predictors::score(const Context &ctx, const Predictor &predictor, const Vector &x, int64_t first, int64_t count, Scratch &own) {
  Vector &low = own.low[0];
  std::fill_n(low.f, predictor.B.width, 0.0f);
  dots(ctx.kernels, predictor.A, x, nullptr, 0, predictor.A.rows, low.f);
  quantize(ctx.kernels, low, predictor.B.width);
  dots(ctx.kernels, predictor.B, low, nullptr, first, count, own.scores.data());
}

void Predictors::select_groups(const Context &ctx, int64_t layer, const Vectors &attention_in, const Vectors &mlp_in, Buffer<uint8_t> &selected) {
  const int64_t groups = ctx.config.num_kv_heads;
  const Predictor &predictor = ctx.selector(layer).heads;
  if (!predictor.present()) {
    std::fill_n(selected.data(), ctx.rows * groups, (uint8_t)1);
    return;
  }
  Scratch &own = scratch_[(size_t)ctx.thread];
  for (int64_t r = 0; r < ctx.rows; r++) {
    score(ctx, predictor, predictor.lookahead == 0 ? attention_in[r] : mlp_in[r], 0, groups, own);
    const float *found = own.scores.data();
    int64_t best = 0;
    for (int64_t g = 0; g < groups; g++) {
      selected[r * groups + g] = !(found[g] <= predictor.threshold);  // NaN is kept
      if (found[g] > found[best]) best = g;
    }
    selected[r * groups + best] = 1;
  }
}

void Predictors::select_neurons(const Context &ctx, int64_t layer, int lookahead, const Vectors &in, Selected &selected) {
  const Predictor &predictor = ctx.selector(layer).mlp;
  if (!predictor.present() || predictor.lookahead != lookahead) return;
  const int64_t first_chunk = ctx.share(selected.chunks), last_chunk = ctx.share_end(selected.chunks);
  if (first_chunk == last_chunk) return;
  Scratch &own = scratch_[(size_t)ctx.thread];
  const int64_t first = selected.start(first_chunk), last = selected.start(last_chunk);
  for (int64_t r = 0; r < ctx.rows; r++) {
    score(ctx, predictor, in[r], first, last - first, own);
    const float *found = own.scores.data() - first;
    for (int64_t c = first_chunk; c < last_chunk; c++) {
      const int64_t begin = selected.start(c), end = selected.start(c + 1);
      int32_t *list = selected.list(layer, r) + begin;
      int64_t n = 0;
      for (int64_t f = begin; f < end; f++) {
        list[n] = (int32_t)f;
        n += !(found[f] <= predictor.threshold);
      }
      selected.count(layer, r, c) = n;
    }
  }
}
