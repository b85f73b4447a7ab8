// Selection by inputs: see inputs.h.
#include "inputs.h"

#include <algorithm>

InputMaps::InputMaps(const dejavu_model &model, int threads, int64_t max_rows) {
  if (!model.input_major()) return;
  const dejavu_config &c = model.config;
  for (const auto *panels : {&model.layers[0].head_panels, &model.layers[0].neuron_panels})
    for (const Matrix &panel : *panels) num_columns_ = std::max(num_columns_, panel.width + PAD);
  output_kept_ = Buffer<int32_t>(product({max_rows, c.num_heads, c.head_dim}));
  output_counts_ = Buffer<int64_t>(max_rows * c.num_heads);
  for (int thread = 0; thread < threads; thread++) columns_.emplace_back(product({max_rows, num_columns_}));
}

void InputMaps::keep(const Context &ctx, int64_t layer, int point, const Vectors &x, Kept &kept) {
  const InputSelector &selector = ctx.selector(layer).inputs[point];
  const int64_t size = ctx.config.hidden_size;
  const bool all = !selector.present();
  for (int64_t r = 0; r < ctx.rows; r++) {
    const float *from = x[r].f;
    int32_t *idx = kept.idx.data() + r * size;
    float *value = kept.value.data() + r * size, *whole = kept.whole.data() + r * size;
    int64_t n = 0;
    for (int64_t i = 0; i < size; i++) {
      idx[n] = (int32_t)i;
      value[n] = from[i];
      const bool keeps = all || selector.keeps(from[i], i);
      whole[i] = keeps ? from[i] : 0.0f;
      n += keeps;
    }
    kept.count[r] = n;
  }
}

void InputMaps::sum_columns(const Context &ctx, const Matrix &panel, const Kept &kept) {
  const int64_t rows = ctx.rows, size = panel.rows, n = panel.width;
  const auto sums = [&](int64_t r) { return columns(ctx.thread, r); };
  for (int64_t r = 0; r < rows; r++) std::fill_n(sums(r), n, 0.0f);
  int64_t done[64] = {0};
  // Several rows take turns while some of the panel is near.
  const bool alone = rows == 1, alone_in_order = dense_is_faster(kept.count[0], size);
  const int64_t tile = !alone ? 4 * TILE : alone_in_order ? TILE : size;
  for (int64_t first = 0; first < size; first += tile)
    for (int64_t r = 0; r < rows; r++) {
      const int32_t *idx = kept.idx.data() + r * size;
      const int64_t from = done[r], count = std::min(tile, size - first);
      while (done[r] < kept.count[r] && idx[done[r]] < first + tile) done[r]++;
      if (alone ? alone_in_order : dense_is_faster(done[r] - from, count))
        axpys(ctx.kernels, panel, kept.whole.data() + r * size + first, nullptr, first, count, sums(r), ctx.after(panel, first, count));
      else
        axpys(ctx.kernels, panel, kept.value.data() + r * size + from, idx + from, 0, done[r] - from, sums(r), {alone ? panel.row_bytes() : 0});
    }
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t c = 0; !panel.scale.empty() && c < n; c++) sums(r)[c] *= panel.scale[c];
    for (int64_t c = 0; !panel.bias.empty() && c < n; c++) sums(r)[c] += panel.bias[c];
  }
}

void InputMaps::activate(const Context &ctx, int64_t layer, int64_t chunk, const Kept &kept, Selected &selected) {
  const int64_t begin = selected.start(chunk), count = selected.start(chunk + 1) - begin;
  const InputSelector &selector = ctx.selector(layer).inputs[DEJAVU_AT_DOWN];
  sum_columns(ctx, ctx.model.layers[(size_t)layer].neuron_panels[(size_t)chunk], kept);
  for (int64_t r = 0; r < ctx.rows; r++) {
    float *gate = columns(ctx.thread, r), *to = selected.activated(r) + begin;
    const float *up = gate + round_up(count, LANES);
    ctx.kernels.activate(gate, count, ctx.config.activation, ctx.config.activation_threshold);
    for (int64_t k = 0; k < count; k++) to[k] = ctx.config.gated ? gate[k] * up[k] : gate[k];
    if (!selector.present()) continue;
    int32_t *list = selected.list(layer, r) + begin;
    int64_t n = 0;
    for (int64_t k = 0; k < count; k++) {
      list[n] = (int32_t)(begin + k);
      n += selector.keeps(to[k], begin + k);
    }
    selected.count(layer, r, chunk) = n;
  }
}

void InputMaps::add_outputs(const Context &ctx, int64_t layer, int64_t r, int64_t head, float *mixed, float *part) {
  const Matrix &o = ctx.model.layers[(size_t)layer].o;
  const InputSelector &selector = ctx.selector(layer).inputs[DEJAVU_AT_OUTPUT];
  const int64_t heads = ctx.config.num_heads, size = ctx.config.head_dim, first = head * size;
  int32_t *idx = output_kept_.data() + r * heads * size + first;
  int64_t n = 0;
  for (int64_t i = 0; i < size; i++) {
    idx[n] = (int32_t)(first + i);
    mixed[n] = mixed[i];
    n += selector.keeps(mixed[i], first + i);
  }
  output_counts_[r * heads + head] = n;
  o.scale_rows(idx, 0, n, mixed);
  axpys(ctx.kernels, o, mixed, idx, 0, n, part, {ctx.rows == 1 ? o.row_bytes() : 0});
}
