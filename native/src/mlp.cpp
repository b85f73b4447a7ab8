// The MLP of a block of tokens, over all neurons or each token's own:
//   a_f = activation(up_f m + b_f), or activation(gate_f m + b_f) * (up_f m + b_f);   part of the chunk += sum over f of a_f down_f
// A chunk's neurons are one thread's: its rows are read once, for one token after another.
#include <algorithm>

#include "pass.h"

namespace {

constexpr int64_t FETCHED_BYTES = 384 << 10;  // for each thread

}  // namespace

// y += the neurons idx[0 .. count) (or first, first + 1, ...; of these where `kept` is given only kept[0 .. num_kept)) of one token.
void Pass::neurons(const Layer &layer, Known known, int64_t r, const int32_t *idx, int64_t first, int64_t count, bool skip_zeros, float *y,
                   const int32_t *kept, int64_t num_kept) {
  const Vector &x = own.mlp_in[r];
  float *values = own.values.data();
  float *gate = config.gated && known != Known::ALL ? values + config.intermediate_size + PAD : values;
  // Selected rows are fetched as whole records, ahead of their first use; of rows in order each matrix fetches its share of the
  // records that come next, and a gate that lies apart its own rows.
  const bool reads_gate = config.gated && known == Known::NOTHING, reads_up = known == Known::NOTHING || gate != values;
  const bool skipped_late = skip_zeros && known == Known::NOTHING;  // which rows of down are read is known once those of up were
  const int64_t bytes = layer.up.row_bytes(), matrices = 1 + reads_gate + reads_up, whole = (skipped_late ? matrices - 1 : matrices) * bytes;
  const Matrix &leading = reads_gate ? layer.gate : reads_up ? layer.up : layer.down;
  const int64_t apart = known == Known::NOTHING && config.layout == DEJAVU_GATE_APART;
  const Matrix &record = !apart ? leading : config.gated ? layer.up : layer.down;
  int64_t matrix = 0;
  const auto fetched = [&]() -> Fetch {
    const int64_t part = matrix++ - apart, parts = matrices - apart;
    if (idx != nullptr) return {part + apart == 0 ? whole : 0};
    if (rows > 1) return {};
    if (part < 0) return rows_after(leading, first, count);
    const Fetch after = rows_after(record, first, count);
    const int64_t begin = after.bytes * part / parts, end = after.bytes * (part + 1) / parts;
    return {end - begin, after.next + begin};
  };
  if (known == Known::NOTHING) {
    dots(config.gated ? layer.gate : layer.up, x, idx, first, count, gate, fetched());
    kernels.activate(gate, count, config.activation, config.activation_threshold);
  } else {
    const float *found = engine.activated.data() + r * config.intermediate_size;
    for (int64_t k = 0; k < count; k++) gate[k] = found[idx == nullptr ? first + k : idx[k]];
  }
  if (gate != values) {
    dots(layer.up, x, idx, first, count, values, fetched());
    for (int64_t k = 0; k < count; k++) values[k] = gate[k] * values[k];
  }
  if (kept != nullptr) {
    for (int64_t k = 0, next = 0; k < count; k++) {
      const bool keep = next < num_kept && kept[next] == first + k;
      next += keep;
      if (!keep)
        values[k] = 0.0f;
      else if (!skip_zeros || values[k] != 0.0f)
        note_fired(kept + next - 1, 1);
    }
  }
  layer.down.scale_rows(idx, first, count, values);
  // An activation of exactly zero adds nothing: its row of down is not read.
  const bool lists = skip_zeros && (idx != nullptr || !dense_is_faster(count - std::count(values, values + count, 0.0f), count));
  if (!lists) return axpys(layer.down, values, idx, first, count, y, fetched());
  int32_t *fired = own.fired.data();
  int64_t n = 0;
  for (int64_t k = 0; k < count; k++) {
    fired[n] = idx == nullptr ? (int32_t)(first + k) : idx[k];
    values[n] = values[k];
    n += values[k] != 0.0f;
  }
  note_fired(fired, n);
  axpys(layer.down, values, fired, 0, n, y, skipped_late ? Fetch{bytes} : fetched());
}

// One of `parts` parts of this thread's selected neurons is fetched, while attention computes: where they are known by then and
// few enough to stay in the second-level cache.
void Pass::fetch_neurons(int64_t index, int64_t part, int64_t parts) const {
  const Predictor &predictor = engine.selectors[(size_t)index].mlp;
  if (rows > 1 || !block.sparse || !predictor.present() || predictor.lookahead == 0) return;
  const Layer &layer = model.layers[(size_t)index];
  const Matrix &first = config.gated ? layer.gate : layer.up;
  const int64_t chunks = engine.neuron_chunks, begin = share(chunks), end = share_end(chunks);
  const int64_t matrices = (config.gated ? 2 : 1) + (config.activation > DEJAVU_FATRELU), bytes = matrices * first.row_bytes();
  for (int64_t c = begin; c < end; c++) {
    const int64_t count = std::min(engine.counts[index & 1][c], FETCHED_BYTES / bytes / (end - begin));
    const int32_t *list = engine.lists[index & 1].data() + chunk_start(config.intermediate_size, c, chunks);
    const int64_t from = count * part / parts, stop = count * (part + 1) / parts;
    kernels.fetch({first.data, first.stride, list + from, stop - from, bytes, 0, nullptr});
  }
}

// How many eighths of the neurons must be selected for all of them to be read in order, as measured (docs/log.md). Where a predictor selects
// for one row and most activations are zero, rows of down are few and those of up never enough: 8 is more than there can be.
// For several rows, of int8 above all, what is near is computed for one after another, and lists cost little.
int64_t Pass::eighths_in_order(Known known) const {
  const bool skip_zeros = config.activation <= DEJAVU_FATRELU;
  if (known != Known::NOTHING) return 5;
  if (rows == 1) return skip_zeros ? 8 : 5;
  return config.dtype == DEJAVU_INT8 ? 7 : 5;
}

void Pass::mlp(int64_t index) {
  const Layer &layer = model.layers[(size_t)index];
  const int64_t chunks = engine.neuron_chunks, total = config.intermediate_size;
  const bool sparse = sparse_mlp(index), skip_zeros = config.activation <= DEJAVU_FATRELU;
  const Known known = model.input_major() || (by_gate(index) && !config.gated) ? Known::ALL : by_gate(index) ? Known::GATES : Known::NOTHING;
  const int64_t eighths = eighths_in_order(known);
  for (int64_t c = share(chunks); c < share_end(chunks); c++) {
    const int64_t begin = chunk_start(total, c, chunks), end = chunk_start(total, c + 1, chunks);
    float *part = engine.mlp_parts.data() + c * engine.max_rows * width;
    for (int64_t r = 0; r < rows; r++) std::fill_n(part + r * width, width, 0.0f);
    if (by_gate(index)) select_by_gate(index, c);
    if (model.input_major()) activate_inputs(index, c);
    if (sparse && rows == 1 && !dense_is_faster(engine.counts[index & 1][c], end - begin, eighths)) {
      engine.unions[index & 1][c] = engine.counts[index & 1][c], engine.in_order[index & 1][c] = 0;
      neurons(layer, known, 0, engine.lists[index & 1].data() + begin, 0, engine.counts[index & 1][c], skip_zeros, part);
      continue;
    }
    // Sparse rows walk their own lists side by side, a tile of neuron numbers at a time.
    int64_t done[64] = {0}, in_union = 0, in_order = 0;
    const int64_t tile = sparse && rows > 1 ? 4 * TILE : TILE;
    static_assert(4 * TILE <= 64, "a tile's neurons are the bits of a word");
    for (int64_t first = begin; first < end; first += tile) {
      const int64_t stop = std::min(first + tile, end);
      uint64_t selected = 0;  // by some row, a bit for each neuron of the tile
      for (int64_t r = 0; r < rows; r++) {
        if (!sparse) {
          neurons(layer, known, r, nullptr, first, stop - first, false, part + r * width);
          continue;
        }
        const int32_t *list = engine.lists[index & 1].data() + r * total + begin;
        const int64_t from = done[r], length = engine.counts[index & 1][r * chunks + c];
        while (done[r] < length && list[done[r]] < stop) selected |= UINT64_C(1) << (list[done[r]++] - first);
        if (dense_is_faster(done[r] - from, stop - first, eighths)) {
          in_order += stop - first;
          neurons(layer, known, r, nullptr, first, stop - first, skip_zeros, part + r * width, list + from, done[r] - from);
        } else {
          neurons(layer, known, r, list + from, 0, done[r] - from, skip_zeros, part + r * width);
        }
      }
      in_union += __builtin_popcountll(selected);
    }
    engine.unions[index & 1][c] = in_union, engine.in_order[index & 1][c] = in_order;
  }
}
