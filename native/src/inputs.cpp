// Selection by inputs: see inputs.h.
#include "inputs.h"

#include <algorithm>

namespace {

constexpr int64_t EIGHTHS_IN_ORDER = 7;  // rows of panels are long: lists are slower only where they hold nearly all (docs/log.md)

}  // namespace

InputMaps::InputMaps(const dejavu_model &model, int threads, int64_t max_rows) {
  if (!model.input_major()) return;
  const dejavu_config &c = model.config;
  for (const Layer &layer : model.layers) {
    for (const NeuronPanel &panel : layer.neuron_panels) num_columns_ = std::max(num_columns_, 2 * panel.up.width + PAD);
    for (const HeadPanel &panel : layer.head_panels) num_columns_ = std::max(num_columns_, (panel.end - panel.first) * c.head_dim + PAD);
  }
  coef_.resize((size_t)threads), y_.resize((size_t)threads);
  for (auto &each : coef_) each.resize((size_t)max_rows);
  for (auto &each : y_) each.resize((size_t)max_rows);
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

void InputMaps::sum_columns(const Context &ctx, const Matrix &panel, const Kept &kept, int64_t at) {
  const int64_t rows = ctx.rows, size = panel.rows, n = panel.width;
  const auto sums_of = [&](int64_t r) { return columns(ctx.thread, r) + at; };
  for (int64_t r = 0; r < rows; r++) std::fill_n(sums_of(r), n, 0.0f);
  if (rows == 1) {
    const bool in_order = dense_is_faster(kept.count[0], size, EIGHTHS_IN_ORDER);
    for (int64_t first = 0; in_order && first < size; first += TILE) {
      const int64_t count = std::min(TILE, size - first);
      axpys(ctx.kernels, panel, kept.whole.data() + first, nullptr, first, count, sums_of(0), ctx.after(panel, first, count));
    }
    if (!in_order) axpys(ctx.kernels, panel, kept.value.data(), kept.idx.data(), 0, kept.count[0], sums_of(0), {panel.row_bytes()});
  } else {
    sum_tiles(ctx, panel, kept, at);
  }
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t c = 0; !panel.scale.empty() && c < n; c++) sums_of(r)[c] *= panel.scale[c];
    for (int64_t c = 0; !panel.bias.empty() && c < n; c++) sums_of(r)[c] += panel.bias[c];
  }
}

// Several rows take turns while some of the panel is near: those that keep most of a tile read all of it, together.
void InputMaps::sum_tiles(const Context &ctx, const Matrix &panel, const Kept &kept, int64_t at) {
  const int64_t size = panel.rows;
  std::vector<const float *> &coef = coef_[(size_t)ctx.thread];
  std::vector<float *> &y = y_[(size_t)ctx.thread];
  int64_t done[64] = {0};
  for (int64_t first = 0; first < size; first += TILE) {
    const int64_t count = std::min(TILE, size - first);
    size_t tokens = 0;
    for (int64_t r = 0; r < ctx.rows; r++) {
      const int32_t *idx = kept.idx.data() + r * size;
      const int64_t from = done[r];
      while (done[r] < kept.count[r] && idx[done[r]] < first + count) done[r]++;
      float *sum = columns(ctx.thread, r) + at;
      if (dense_is_faster(done[r] - from, count)) coef[tokens] = kept.whole.data() + r * size + first, y[tokens++] = sum;
      else axpys(ctx.kernels, panel, kept.value.data() + r * size + from, idx + from, 0, done[r] - from, sum);
    }
    sums(ctx.kernels, panel, {coef.data(), y.data(), (int64_t)tokens}, first, count);
  }
}

void InputMaps::project(const Context &ctx, const HeadPanel &panel, const Kept &kept) {
  int64_t at = 0;  // the padding of one part lies where the next one begins
  for (const Matrix &part : panel.parts) {
    if (!part.present()) continue;
    sum_columns(ctx, part, kept, at);
    at += part.columns;
  }
}

void InputMaps::activate(const Context &ctx, int64_t layer, int64_t panel, const Kept &kept, Selected &selected) {
  const int64_t per_panel = chunks_of_panel(ctx, layer, selected), first = panel * per_panel, end = first + per_panel;
  const int64_t begin = selected.start(first), count = selected.start(end) - begin;
  const InputSelector &selector = ctx.selector(layer).inputs[DEJAVU_AT_DOWN];
  const NeuronPanel &matrices = ctx.model.layers[(size_t)layer].neuron_panels[(size_t)panel];
  const int64_t second = ctx.config.gated ? round_up(count, LANES) : 0;  // activations are whole vectors
  if (ctx.config.gated) sum_columns(ctx, matrices.gate, kept, 0);
  sum_columns(ctx, matrices.up, kept, second);
  for (int64_t r = 0; r < ctx.rows; r++) {
    float *gate = columns(ctx.thread, r), *to = selected.activated(r) + begin;
    const float *up = gate + second;
    ctx.kernels.activate(gate, count, ctx.config.activation, ctx.config.activation_threshold);
    for (int64_t k = 0; k < count; k++) to[k] = ctx.config.gated ? gate[k] * up[k] : gate[k];
    for (int64_t chunk = first; selector.present() && chunk < end; chunk++) {
      int32_t *list = selected.list(layer, r) + selected.start(chunk);
      int64_t n = 0;
      for (int64_t k = selected.start(chunk); k < selected.start(chunk + 1); k++) {
        list[n] = (int32_t)k;
        n += selector.keeps(to[k - begin], k);
      }
      selected.count(layer, r, chunk) = n;
    }
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
