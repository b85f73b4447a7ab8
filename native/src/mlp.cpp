// The MLP of a block of tokens: see mlp.h.
#include "mlp.h"

#include <algorithm>
#include <numeric>

#include "gate.h"

namespace {

constexpr int64_t FETCHED_BYTES = 384 << 10;  // for each thread

}  // namespace

Mlp::Mlp(const dejavu_model &model, int threads, int64_t max_rows)
    : parts_(chunks_of_neurons(model.config), max_rows, model.width), scratch_((size_t)threads) {
  for (auto *of_chunk : {&unions_[0], &unions_[1], &in_order_[0], &in_order_[1]}) *of_chunk = Buffer<int64_t>(chunks_of_neurons(model.config));
  for (Scratch &own : scratch_) {
    own.values = Buffer<float>(2 * (model.config.intermediate_size + PAD));
    own.fired = Buffer<int32_t>(model.config.intermediate_size);
    own.tile = Buffer<float>(2 * max_rows * TILE + PAD);
    own.x.resize((size_t)max_rows), own.up.resize((size_t)max_rows), own.gate.resize((size_t)max_rows);
    own.coef.resize((size_t)max_rows), own.y.resize((size_t)max_rows);
  }
}

int64_t Mlp::sum(const Buffer<int64_t> &of_chunk) { return std::accumulate(of_chunk.data(), of_chunk.data() + of_chunk.size(), INT64_C(0)); }

float *Mlp::values_of(const Run &run, int64_t r, const Neurons &neurons, Fetch of_gate, Fetch of_up) {
  const Kernels &kernels = run.ctx.kernels;
  const dejavu_config &config = run.ctx.config;
  const Layer &layer = run.layer;
  const int32_t *idx = neurons.idx;
  const int64_t first = neurons.first, count = neurons.count;
  const Vector &x = run.in[r];
  float *values = run.own.values.data();
  float *gate = reads_both(run) ? values + config.intermediate_size + PAD : values;
  if (run.known == Known::NOTHING) {
    dots(kernels, run.ctx.model.gate_of(layer), x, idx, first, count, gate, of_gate);
    kernels.activate(gate, count, config.activation, config.activation_threshold);
  } else {
    const float *found = run.selected.activated(r);
    for (int64_t k = 0; k < count; k++) gate[k] = found[idx == nullptr ? first + k : idx[k]];
  }
  if (gate != values) {
    dots(kernels, layer.up, x, idx, first, count, values, of_up);
    for (int64_t k = 0; k < count; k++) values[k] = gate[k] * values[k];
  }
  return values;
}

void Mlp::compute_tile(const Run &run, int64_t c, int64_t first, int64_t count) {
  Scratch &own = run.own;
  const Kernels &kernels = run.ctx.kernels;
  const dejavu_config &config = run.ctx.config;
  const int64_t rows = run.ctx.rows;
  float *values = own.tile.data(), *gates = reads_both(run) ? values + rows * TILE : values;
  for (int64_t r = 0; r < rows; r++) {
    own.x[(size_t)r] = &run.in[r], own.up[(size_t)r] = values + r * TILE, own.gate[(size_t)r] = gates + r * TILE;
    own.coef[(size_t)r] = values + r * TILE, own.y[(size_t)r] = parts_.of(c, r);
  }
  if (run.known == Known::NOTHING) {
    products(kernels, run.ctx.model.gate_of(run.layer), {own.x.data(), own.gate.data(), rows, run.ctx.prompt()}, first, count);
    kernels.activate(gates, rows * TILE, config.activation, config.activation_threshold);
  } else {
    for (int64_t r = 0; r < rows; r++) std::copy_n(run.selected.activated(r) + first, count, own.gate[(size_t)r]);
  }
  if (gates != values) {
    products(kernels, run.layer.up, {own.x.data(), own.up.data(), rows, run.ctx.prompt()}, first, count);
    for (int64_t k = 0; k < rows * TILE; k++) values[k] = gates[k] * values[k];
  }
  for (int64_t r = 0; r < rows; r++) run.layer.down.scale_rows(nullptr, first, count, own.up[(size_t)r]);
  sums(kernels, run.layer.down, {own.coef.data(), own.y.data(), rows}, first, count);
}

// y += the neurons of one token.
void Mlp::compute(const Run &run, int64_t r, const Neurons &neurons, bool skip_zeros, float *y) {
  const Kernels &kernels = run.ctx.kernels;
  const dejavu_config &config = run.ctx.config;
  const Layer &layer = run.layer;
  const Known known = run.known;
  const int32_t *idx = neurons.idx, *kept = neurons.kept;
  const int64_t first = neurons.first, count = neurons.count;
  // Selected rows are fetched as whole records, ahead of their first use; of rows in order each matrix fetches its share of the
  // records that come next. What lies apart, a gate or panels of down, fetches its own rows.
  const bool reads_gate = config.gated && known == Known::NOTHING, reads_up = known == Known::NOTHING || reads_both(run);
  const bool skipped_late = skip_zeros && known == Known::NOTHING;  // which rows of down are read is known once those of up were
  const auto apart = [&](const Matrix &matrix) {
    return matrix.panels || (config.layout == DEJAVU_GATE_APART && &matrix == &run.ctx.model.gate_of(layer));
  };
  const Matrix *record[3];
  int64_t parts = 0, part = 0, whole = 0;
  const auto is_read = [&](const Matrix &matrix, bool reads, bool late) {
    if (!reads || apart(matrix)) return;
    record[parts++] = &matrix;
    whole += late ? 0 : matrix.row_bytes();
  };
  is_read(layer.gate, reads_gate, false);
  is_read(layer.up, reads_up, false);
  is_read(layer.down, true, skipped_late);
  const auto fetched = [&](const Matrix &matrix) -> Fetch {
    if (apart(matrix)) return idx != nullptr ? Fetch{matrix.row_bytes()} : run.ctx.rows > 1 ? Fetch{} : rows_after(matrix, first, count);
    const int64_t here = part++;
    if (idx != nullptr) return {here == 0 ? whole : 0};
    if (run.ctx.rows > 1) return {};
    const Fetch after = rows_after(*record[0], first, count);
    const int64_t begin = after.bytes * here / parts, end = after.bytes * (here + 1) / parts;
    return {end - begin, after.next + begin};
  };
  const Fetch of_gate = known == Known::NOTHING ? fetched(run.ctx.model.gate_of(layer)) : Fetch{};
  const Fetch of_up = reads_both(run) ? fetched(layer.up) : Fetch{};
  float *values = values_of(run, r, neurons, of_gate, of_up);
  if (kept != nullptr) {
    for (int64_t k = 0, next = 0; k < count; k++) {
      const bool keep = next < neurons.num_kept && kept[next] == first + k;
      next += keep;
      if (!keep)
        values[k] = 0.0f;
      else if (!skip_zeros || values[k] != 0.0f)
        run.ctx.profiler.mark_fired(kept + next - 1, 1);
    }
  }
  layer.down.scale_rows(idx, first, count, values);
  // An activation of exactly zero adds nothing: its row of down is not read.
  const bool lists = skip_zeros && (idx != nullptr || !dense_is_faster(count - std::count(values, values + count, 0.0f), count));
  if (!lists) return axpys(kernels, layer.down, values, idx, first, count, y, fetched(layer.down));
  int32_t *fired = run.own.fired.data();
  int64_t n = 0;
  for (int64_t k = 0; k < count; k++) {
    fired[n] = idx == nullptr ? (int32_t)(first + k) : idx[k];
    values[n] = values[k];
    n += values[k] != 0.0f;
  }
  run.ctx.profiler.mark_fired(fired, n);
  axpys(kernels, layer.down, values, fired, 0, n, y, skipped_late ? Fetch{layer.down.row_bytes()} : fetched(layer.down));
}

void Mlp::fetch(const Context &ctx, int64_t index, const Selected &selected, int64_t part, int64_t parts) {
  const Predictor &predictor = ctx.selector(index).mlp;
  if (ctx.rows > 1 || !predictor.present() || predictor.lookahead == 0) return;
  const Layer &layer = ctx.model.layers[(size_t)index];
  const Matrix &first = ctx.model.gate_of(layer);
  const int64_t begin = ctx.share(selected.chunks), end = ctx.share_end(selected.chunks);
  const int64_t down = ctx.config.activation > DEJAVU_FATRELU && !layer.down.panels ? layer.down.row_bytes() : 0;
  const int64_t bytes = (ctx.config.gated ? layer.gate.row_bytes() : 0) + layer.up.row_bytes() + down;
  for (int64_t c = begin; c < end; c++) {
    const int64_t count = std::min(selected.count(index, 0, c), FETCHED_BYTES / bytes / (end - begin));
    const int32_t *list = selected.list(index, 0) + selected.start(c);
    const int64_t from = count * part / parts, stop = count * (part + 1) / parts;
    ctx.kernels.fetch({first.data, first.stride, list + from, stop - from, bytes, 0, nullptr});
  }
}

// How many eighths of the neurons must be selected for all of them to be read in order, as measured (docs/log.md). Where a predictor selects
// for one row and most activations are zero, rows of down are few and those of up never enough: 8 is more than there can be.
// For several rows, of int8 above all, what is near is computed for one after another, and lists cost little.
int64_t Mlp::eighths_in_order(const Context &ctx, const Layer &layer, Known known) {
  const bool skip_zeros = ctx.config.activation <= DEJAVU_FATRELU;
  if (known != Known::NOTHING) return 5;
  if (ctx.rows == 1) return skip_zeros ? 8 : 5;
  return layer.up.dtype == DEJAVU_INT8 ? 7 : 5;
}

void Mlp::run(const Context &ctx, int64_t index, const Vectors &in, const Kept &in_kept, Selected &selected, InputMaps &inputs) {
  const LayerSelectors &selector = ctx.selector(index);
  const int64_t rows = ctx.rows, chunks = selected.chunks;
  const bool sparse = selector.lists(), skip_zeros = ctx.config.activation <= DEJAVU_FATRELU, input_major = ctx.model.input_major();
  const Known known = input_major || (selector.by_gate() && !ctx.config.gated) ? Known::ALL : selector.by_gate() ? Known::GATES : Known::NOTHING;
  const Layer &layer = ctx.model.layers[(size_t)index];
  const int64_t eighths = eighths_in_order(ctx, layer, known);
  const Run run = {ctx, layer, in, selected, known, scratch_[(size_t)ctx.thread]};
  const int64_t unit = input_major ? InputMaps::chunks_of_panel(ctx, index, selected) : 1;
  for (int64_t c = ctx.share(chunks, unit); c < ctx.share_end(chunks, unit); c++) {
    const int64_t begin = selected.start(c), end = selected.start(c + 1);
    parts_.clear(c, rows);
    if (selector.by_gate()) select_by_gate(ctx, index, c, in, run.own.values.data(), selected);
    if (input_major && c % unit == 0) inputs.activate(ctx, index, c / unit, in_kept, selected);
    if (sparse && rows == 1 && !dense_is_faster(selected.count(index, 0, c), end - begin, eighths)) {
      const int64_t count = unions_[index & 1][c] = selected.count(index, 0, c);
      in_order_[index & 1][c] = 0;
      compute(run, 0, {selected.list(index, 0) + begin, 0, count}, skip_zeros, parts_.of(c, 0));
      continue;
    }
    // Sparse rows walk their own lists side by side, a tile of neuron numbers at a time.
    int64_t done[64] = {0}, in_union = 0, in_order = 0;
    const int64_t tile = sparse && rows > 1 ? 2 * TILE : TILE;
    static_assert(2 * TILE <= 64, "a tile's neurons are the bits of a word");
    for (int64_t first = begin; first < end; first += tile) {
      const int64_t stop = std::min(first + tile, end);
      uint64_t some = 0;  // selected by some row, a bit for each neuron of the tile
      if (!sparse && (rows > 1 || ctx.prompt())) {
        compute_tile(run, c, first, stop - first);
        continue;
      }
      for (int64_t r = 0; r < rows; r++) {
        if (!sparse) {
          compute(run, r, {nullptr, first, stop - first}, false, parts_.of(c, r));
          continue;
        }
        const int32_t *list = selected.list(index, r) + begin;
        const int64_t from = done[r], length = selected.count(index, r, c);
        while (done[r] < length && list[done[r]] < stop) some |= UINT64_C(1) << (list[done[r]++] - first);
        if (dense_is_faster(done[r] - from, stop - first, eighths)) {
          in_order += stop - first;
          compute(run, r, {nullptr, first, stop - first, list + from, done[r] - from}, skip_zeros, parts_.of(c, r));
        } else {
          compute(run, r, {list + from, 0, done[r] - from}, skip_zeros, parts_.of(c, r));
        }
      }
      in_union += __builtin_popcountll(some);
    }
    unions_[index & 1][c] = in_union, in_order_[index & 1][c] = in_order;
  }
}

void Mlp::add(const Context &ctx, int64_t layer, Vectors &x) const {
  parts_.add(ctx.kernels, ctx.rows, ctx.model.layers[(size_t)layer].down_bias, x);
}
