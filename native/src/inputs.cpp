// Maps of which inputs are selected: at each point (q, k, v; o; gate and up; down) those with |x_i| n_i > threshold are kept.
//
// Matrices hold a row for each input, and a map is a sum of the kept rows. A thread computes columns of its own, a chunk's neurons
// or whole heads, over all inputs in their order: no sums to be added up afterwards, and no bit that depends on the number of threads.
// A dense block keeps all inputs. int8 values have the scale of their column, which the sum takes at its end.
#include <algorithm>

#include "pass.h"

namespace {

constexpr int64_t LANES = 16;          // columns begin and end at a multiple of this: of any vector's width
constexpr int64_t WIDE = 4096;         // columns that one row sums up side by side
constexpr int64_t NARROW = 256;        // and several rows: their sums stay in the second-level cache,
constexpr int64_t INPUTS = 4 * TILE;   // these rows of the matrix in the first-level one

}  // namespace

void Pass::keep_inputs(int64_t layer, int point, Vectors &x, Kept &kept) const {
  const InputSelector &selector = engine.selectors[(size_t)layer].inputs[point];
  const int64_t size = config.hidden_size;
  const bool all = !selects(layer, point);
  for (int64_t r = 0; r < rows; r++) {
    const float *from = x[r].f;
    int32_t *idx = kept.idx.data() + r * size;
    float *value = kept.value.data() + r * size;
    int64_t n = 0;
    for (int64_t i = 0; i < size; i++) {
      idx[n] = (int32_t)i;
      value[n] = from[i];
      n += all || selector.keeps(from[i], i);
    }
    kept.count[r] = n;
  }
}

// out[r * engine.columns + c] = the kept inputs of row r times column c, and its bias, for columns [begin, end), multiples of LANES.
void Pass::columns(const Matrix &matrix, const Kept &kept, int64_t begin, int64_t end, float *out) const {
  const int64_t size = matrix.rows, value_bytes = bytes_of(matrix.dtype, 1), wide = rows == 1 ? WIDE : NARROW;
  const auto axpys_of = matrix.dtype == DEJAVU_INT8 ? kernels.axpys_i8 : matrix.dtype == DEJAVU_BF16 ? kernels.axpys_bf16 : kernels.axpys_f32;
  for (int64_t first = begin; first < end; first += wide) {
    const int64_t n = std::min(wide, end - first), bytes = n * value_bytes;
    const int64_t ahead = std::min(std::max<int64_t>(24576 / bytes / 4 * 4, 4), INPUTS);
    for (int64_t r = 0; r < rows; r++) std::fill_n(out + r * engine.columns + first, n, 0.0f);
    int64_t done[64] = {0};
    const int64_t tile = rows == 1 ? size : INPUTS;
    for (int64_t stop = std::min(tile, size), last = 0; last < size; last = stop, stop = std::min(stop + tile, size))
      for (int64_t r = 0; r < rows; r++) {
        const int32_t *idx = kept.idx.data() + r * size;
        const int64_t from = done[r], count = kept.count[r];
        if (stop == size)
          done[r] = count;
        else
          while (done[r] < count && idx[done[r]] < stop) done[r]++;
        const RowList list = {matrix.data + first * value_bytes, matrix.stride, idx + from, done[r] - from, rows == 1 ? bytes : 0, ahead, nullptr};
        axpys_of(list, kept.value.data() + r * size + from, n, out + r * engine.columns + first);
      }
    for (int64_t r = 0; r < rows; r++) {
      float *to = out + r * engine.columns;
      for (int64_t c = first; matrix.dtype == DEJAVU_INT8 && c < first + n; c++) to[c] *= matrix.scale[c];
      for (int64_t c = first; !matrix.bias.empty() && c < first + n; c++) to[c] += matrix.bias[c];
    }
  }
}

// q, k and v of this thread's heads into own.columns: those of head h (queries, then keys, then values) from h * head_dim on.
void Pass::project_inputs(int64_t layer) {
  const Matrix &matrix = model.layers[(size_t)layer].qkv;
  const int64_t heads = config.num_heads + 2 * config.num_kv_heads, begin = share(heads), end = share_end(heads);
  if (begin == end) return;
  columns(matrix, own.attention_kept, begin * config.head_dim / LANES * LANES, round_up(end * config.head_dim, LANES), own.columns.data());
}

// Activations of this thread's chunks into engine.activated, and of these the inputs of down that are kept: lists of neurons, as others select.
void Pass::activate_inputs(int64_t index) {
  const Layer &layer = model.layers[(size_t)index];
  const int64_t chunks = engine.neuron_chunks, total = config.intermediate_size;
  const int64_t first_chunk = share(chunks), last_chunk = share_end(chunks);
  if (first_chunk == last_chunk) return;
  const int64_t begin = chunk_start(total, first_chunk, chunks), end = chunk_start(total, last_chunk, chunks);
  const int64_t first = begin / LANES * LANES, last = round_up(end, LANES);
  float *gates = own.columns.data(), *ups = config.gated ? gates + engine.max_rows * engine.columns : gates;
  if (config.gated) columns(layer.gate, own.mlp_kept, first, last, gates);
  columns(layer.up, own.mlp_kept, first, last, ups);
  const InputSelector &selector = engine.selectors[(size_t)index].inputs[DEJAVU_AT_DOWN];
  for (int64_t r = 0; r < rows; r++) {
    float *gate = gates + r * engine.columns, *up = ups + r * engine.columns, *to = engine.activated.data() + r * total;
    kernels.activate(gate + begin, end - begin, config.activation, config.activation_threshold);
    for (int64_t f = begin; f < end; f++) to[f] = config.gated ? gate[f] * up[f] : gate[f];
    if (!selects(index, DEJAVU_AT_DOWN)) continue;
    for (int64_t c = first_chunk; c < last_chunk; c++) {
      const int64_t start = chunk_start(total, c, chunks), stop = chunk_start(total, c + 1, chunks);
      int32_t *list = engine.lists[index & 1].data() + r * total + start;
      int64_t n = 0;
      for (int64_t f = start; f < stop; f++) {
        list[n] = (int32_t)f;
        n += selector.keeps(to[f], f);
      }
      engine.counts[index & 1][r * chunks + c] = n;
    }
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
