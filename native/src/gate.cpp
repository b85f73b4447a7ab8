// Neurons that the layer's own gate selects: every gate is computed, and those with |activation(gate m)| > threshold are kept.
//
// Of an MLP without a gate it is |activation(up m)|. What was activated stays in engine.activated: the MLP computes only the rest,
// rows of up and down of the neurons that were kept. A chunk's neurons are one thread's, here as there: no barrier between.
#include <algorithm>
#include <cmath>

#include "pass.h"

void Pass::select_by_gate(int64_t index) {
  if (!by_gate(index)) return;
  const Layer &layer = model.layers[(size_t)index];
  const Matrix &gate = config.gated ? layer.gate : layer.up;
  const float threshold = engine.selectors[(size_t)index].gate;
  const int64_t chunks = engine.neuron_chunks, total = config.intermediate_size;
  float *values = own.values.data();
  for (int64_t c = share(chunks); c < share_end(chunks); c++) {
    const int64_t begin = chunk_start(total, c, chunks), end = chunk_start(total, c + 1, chunks);
    for (int64_t r = 0; r < rows; r++) engine.counts[index & 1][r * chunks + c] = 0;
    for (int64_t first = begin; first < end; first += TILE) {
      const int64_t count = std::min(TILE, end - first);
      for (int64_t r = 0; r < rows; r++) {
        dots(gate, own.mlp_in[r], nullptr, first, count, values, rows == 1 ? rows_after(gate, first, count) : Fetch());
        kernels.activate(values, count, config.activation, config.activation_threshold);
        std::copy_n(values, count, engine.activated.data() + r * total + first);
        int32_t *list = engine.lists[index & 1].data() + r * total + begin;
        int64_t n = engine.counts[index & 1][r * chunks + c];
        for (int64_t k = 0; k < count; k++) {
          list[n] = (int32_t)(first + k);
          n += !(std::fabs(values[k]) <= threshold);  // NaN is kept, and found in the logits
        }
        engine.counts[index & 1][r * chunks + c] = n;
      }
    }
  }
}
