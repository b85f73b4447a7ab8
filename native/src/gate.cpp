// Selection by gates: see gate.h.
#include "gate.h"

#include <algorithm>
#include <cmath>

void select_by_gate(const Context &ctx, int64_t layer, int64_t chunk, const Vectors &mlp_in, float *values, Selected &selected) {
  const Matrix &gate = ctx.model.gate_of(ctx.model.layers[(size_t)layer]);
  const float threshold = ctx.selector(layer).gate;
  const int64_t begin = selected.start(chunk), end = selected.start(chunk + 1);
  for (int64_t r = 0; r < ctx.rows; r++) selected.count(layer, r, chunk) = 0;
  for (int64_t first = begin; first < end; first += TILE) {
    const int64_t count = std::min(TILE, end - first);
    for (int64_t r = 0; r < ctx.rows; r++) {
      dots(ctx.kernels, gate, mlp_in[r], nullptr, first, count, values, ctx.after(gate, first, count));
      ctx.kernels.activate(values, count, ctx.config.activation, ctx.config.activation_threshold);
      std::copy_n(values, count, selected.activated(r) + first);
      int32_t *list = selected.list(layer, r) + begin;
      int64_t n = selected.count(layer, r, chunk);
      for (int64_t k = 0; k < count; k++) {
        list[n] = (int32_t)(first + k);
        n += !(std::fabs(values[k]) <= threshold);  // NaN is kept, and found in the logits
      }
      selected.count(layer, r, chunk) = n;
    }
  }
}
