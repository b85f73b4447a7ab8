// Maps of which inputs are selected: at each point (q, k, v; o; gate and up; down) those with |x_i| n_i > threshold are kept.
//
// Matrices hold a row for each input, and a map is a sum of the kept rows. A thread takes panels of columns, a chunk's neurons or some
// heads, over all inputs in their order: no sums to be added up afterwards, and no bit that depends on the number of threads.
// A dense block keeps all inputs. int8 values have the scale of their column, which the sum takes at its end.
#include <algorithm>

#include "pass.h"

void Pass::keep_inputs(int64_t layer, int point, Vectors &x, Kept &kept) const {
  const InputSelector &selector = engine.selectors[(size_t)layer].inputs[point];
  const int64_t size = config.hidden_size;
  const bool all = !selects(layer, point);
  for (int64_t r = 0; r < rows; r++) {
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

// own.columns[r][c] = the kept inputs of row r times column c of a panel, and its bias.
void Pass::sum_columns(const Matrix &panel, const Kept &kept) {
  const int64_t size = panel.rows, n = panel.width;
  const auto sums = [&](int64_t r) { return own.columns.data() + r * engine.columns; };
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
        axpys(panel, kept.whole.data() + r * size + first, nullptr, first, count, sums(r), alone ? rows_after(panel, first, count) : Fetch());
      else
        axpys(panel, kept.value.data() + r * size + from, idx + from, 0, done[r] - from, sums(r), {alone ? panel.row_bytes() : 0});
    }
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t c = 0; !panel.scale.empty() && c < n; c++) sums(r)[c] *= panel.scale[c];
    for (int64_t c = 0; !panel.bias.empty() && c < n; c++) sums(r)[c] += panel.bias[c];
  }
}

// q, k and v of this thread's panels of heads.
void Pass::project_inputs(int64_t layer) {
  const std::vector<Matrix> &panels = model.layers[(size_t)layer].head_panels;
  const int64_t count = (int64_t)panels.size(), heads = config.num_heads + 2 * config.num_kv_heads, size = config.head_dim;
  for (int64_t p = share(count); p < share_end(count); p++) {
    sum_columns(panels[(size_t)p], own.attention_kept);
    const int64_t first = chunk_start(heads, p, count);
    for (int64_t unit = first; unit < chunk_start(heads, p + 1, count); unit++) {
      for (int64_t r = 0; r < rows; r++) std::copy_n(own.columns.data() + r * engine.columns + (unit - first) * size, size, own.query[r].f);
      place_head(layer, unit);
    }
  }
}

// Activations of a chunk into engine.activated, and of these the inputs of down that are kept: a list of neurons, as others select.
void Pass::activate_inputs(int64_t index, int64_t chunk) {
  const int64_t chunks = engine.neuron_chunks, total = config.intermediate_size;
  const int64_t begin = chunk_start(total, chunk, chunks), count = chunk_start(total, chunk + 1, chunks) - begin;
  const InputSelector &selector = engine.selectors[(size_t)index].inputs[DEJAVU_AT_DOWN];
  sum_columns(model.layers[(size_t)index].neuron_panels[(size_t)chunk], own.mlp_kept);
  for (int64_t r = 0; r < rows; r++) {
    float *gate = own.columns.data() + r * engine.columns, *to = engine.activated.data() + r * total + begin;
    const float *up = gate + round_up(count, LANES);
    kernels.activate(gate, count, config.activation, config.activation_threshold);
    for (int64_t k = 0; k < count; k++) to[k] = config.gated ? gate[k] * up[k] : gate[k];
    if (!selects(index, DEJAVU_AT_DOWN)) continue;
    int32_t *list = engine.lists[index & 1].data() + r * total + begin;
    int64_t n = 0;
    for (int64_t k = 0; k < count; k++) {
      list[n] = (int32_t)(begin + k);
      n += selector.keeps(to[k], begin + k);
    }
    engine.counts[index & 1][r * chunks + chunk] = n;
  }
}

// part += the kept inputs of o of one head times their rows. mixed: what the head gives, written over.
void Pass::add_kept_outputs(int64_t layer, int64_t r, int64_t head, float *mixed, float *part) {
  const Matrix &o = model.layers[(size_t)layer].o;
  const InputSelector &selector = engine.selectors[(size_t)layer].inputs[DEJAVU_AT_OUTPUT];
  const int64_t size = config.head_dim, first = head * size;
  int32_t *idx = engine.output_kept.data() + r * config.num_heads * size + first;
  int64_t n = 0;
  for (int64_t i = 0; i < size; i++) {
    idx[n] = (int32_t)(first + i);
    mixed[n] = mixed[i];
    n += selector.keeps(mixed[i], first + i);
  }
  engine.output_counts[r * config.num_heads + head] = n;
  o.scale_rows(idx, 0, n, mixed);
  axpys(o, mixed, idx, 0, n, part, {rows == 1 ? o.row_bytes() : 0});
}

namespace {

// What is called for every list of kept inputs of one row and layer: (point, list, count). Points that keep all have none.
template <class Visit> void visit_kept(const dejavu_engine &engine, const Scratch &own, int64_t layer, int64_t r, Visit visit) {
  const dejavu_config &c = engine.model->config;
  const int64_t queries = c.num_heads * c.head_dim, chunks = engine.neuron_chunks;
  const auto &selectors = engine.selectors[(size_t)layer].inputs;
  if (selectors[DEJAVU_AT_ATTENTION].present()) visit(DEJAVU_AT_ATTENTION, own.attention_kept.idx.data() + r * c.hidden_size, own.attention_kept.count[r]);
  for (int64_t h = 0; selectors[DEJAVU_AT_OUTPUT].present() && h < c.num_heads; h++)
    visit(DEJAVU_AT_OUTPUT, engine.output_kept.data() + r * queries + h * c.head_dim, engine.output_counts[r * c.num_heads + h]);
  if (selectors[DEJAVU_AT_MLP].present()) visit(DEJAVU_AT_MLP, own.mlp_kept.idx.data() + r * c.hidden_size, own.mlp_kept.count[r]);
  for (int64_t k = 0; selectors[DEJAVU_AT_DOWN].present() && k < chunks; k++)
    visit(DEJAVU_AT_DOWN, engine.lists[layer & 1].data() + r * c.intermediate_size + chunk_start(c.intermediate_size, k, chunks), engine.counts[layer & 1][r * chunks + k]);
}

}  // namespace

// Counts and masks of a layer, by thread 0 after the barrier that ends the MLP.
void Pass::report_inputs(int64_t layer) const {
  const int64_t sizes[] = {config.hidden_size, config.num_heads * config.head_dim, config.hidden_size, config.intermediate_size};
  const int64_t all = sizes[0] + sizes[1] + sizes[2] + sizes[3];
  for (int64_t r = 0; r < rows; r++) {
    const int64_t at = r * config.num_layers + layer;
    int64_t *counts = block.inputs + at * DEJAVU_POINTS, start = 0, starts[DEJAVU_POINTS];
    uint8_t *mask = block.input_mask == nullptr ? nullptr : block.input_mask + at * all;
    for (int point = 0; point < DEJAVU_POINTS; start += sizes[point++]) {
      starts[point] = start;
      counts[point] = selects(layer, point) ? 0 : sizes[point];
      if (mask != nullptr) std::fill_n(mask + start, sizes[point], (uint8_t)!selects(layer, point));
    }
    if (!block.sparse) continue;
    visit_kept(engine, own, layer, r, [&](int point, const int32_t *list, int64_t count) {
      counts[point] += count;
      for (int64_t k = 0; mask != nullptr && k < count; k++) mask[starts[point] + list[k]] = 1;
    });
  }
}

// The inputs that some row kept, for a profile.
void Pass::count_inputs(int64_t layer) const {
  const int64_t sizes[] = {config.hidden_size, config.num_heads * config.head_dim, config.hidden_size, config.intermediate_size};
  std::vector<uint8_t> seen[DEJAVU_POINTS];
  for (int point = 0; point < DEJAVU_POINTS; point++) seen[point].assign((size_t)sizes[point], (uint8_t)!selects(layer, point));
  for (int64_t r = 0; block.sparse && r < rows; r++)
    visit_kept(engine, own, layer, r, [&](int point, const int32_t *list, int64_t count) {
      for (int64_t k = 0; k < count; k++) seen[point][(size_t)list[k]] = 1;
    });
  for (int point = 0; point < DEJAVU_POINTS; point++) engine.profile->inputs[layer * DEJAVU_POINTS + point] = std::count(seen[point].begin(), seen[point].end(), (uint8_t)1);
}
