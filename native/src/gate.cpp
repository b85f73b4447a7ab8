// Neurons that the layer's own gate selects: every gate is computed, and those with |activation(gate m)| > threshold are kept.
//
// Of an MLP without a gate it is |activation(up m)|. What was activated stays in engine.activated: the MLP computes only the rest,
// rows of up and down of the neurons that were kept. Fetching those as soon as they are known gained nothing (docs/log.md).
#include <algorithm>
#include <cmath>

#include "pass.h"

// The lists of one chunk.
void Pass::select_by_gate(int64_t index, int64_t chunk) {
  const Layer &layer = model.layers[(size_t)index];
  const Matrix &gate = model.gate_of(layer);
  const float threshold = engine.selectors[(size_t)index].gate;
  const int64_t chunks = engine.neuron_chunks, total = config.intermediate_size;
  const int64_t begin = chunk_start(total, chunk, chunks), end = chunk_start(total, chunk + 1, chunks);
  float *values = own.values.data();
  for (int64_t r = 0; r < rows; r++) engine.counts[index & 1][r * chunks + chunk] = 0;
  for (int64_t first = begin; first < end; first += TILE) {
    const int64_t count = std::min(TILE, end - first);
    for (int64_t r = 0; r < rows; r++) {
      dots(gate, own.mlp_in[r], nullptr, first, count, values, rows == 1 ? rows_after(gate, first, count) : Fetch());
      kernels.activate(values, count, config.activation, config.activation_threshold);
      std::copy_n(values, count, engine.activated.data() + r * total + first);
      int32_t *list = engine.lists[index & 1].data() + r * total + begin;
      int64_t n = engine.counts[index & 1][r * chunks + chunk];
      for (int64_t k = 0; k < count; k++) {
        list[n] = (int32_t)(first + k);
        n += !(std::fabs(values[k]) <= threshold);  // NaN is kept, and found in the logits
      }
      engine.counts[index & 1][r * chunks + chunk] = n;
    }
  }
}
