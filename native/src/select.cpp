// What each token computes: scores = B (A x) + b from the input of the predictor's lookahead, selected where > threshold.
//
// Head groups: at least the best one; every thread works them out for itself. Neurons: each thread for its own chunks.
#include <algorithm>
#include <numeric>

#include "pass.h"

void Pass::scores(const Predictor &predictor, const Vector &x, int64_t first, int64_t count) {
  Vector &low = own.low[0];
  std::fill_n(low.f, predictor.B.width, 0.0f);
  dots(predictor.A, x, nullptr, 0, predictor.A.rows, low.f);
  quantize(low, predictor.B.width);
  dots(predictor.B, low, nullptr, first, count, own.scores.data());
}

void Pass::select_groups(int64_t layer) {
  const int64_t groups = config.num_kv_heads;
  const Predictor &predictor = engine.selectors[(size_t)layer].heads;
  if (!sparse_heads(layer)) {
    std::fill_n(own.groups.data(), rows * groups, (uint8_t)1);
    return;
  }
  for (int64_t r = 0; r < rows; r++) {
    scores(predictor, predictor.lookahead == 0 ? own.attention_in[r] : own.mlp_in[r], 0, groups);
    const float *found = own.scores.data();
    int64_t best = 0;
    for (int64_t g = 0; g < groups; g++) {
      own.groups[r * groups + g] = found[g] > predictor.threshold;
      if (found[g] > found[best]) best = g;
    }
    own.groups[r * groups + best] = 1;
  }
}

// The lists of this thread's chunks, where the layer's predictor has this lookahead. Lookahead 2 reads mlp_in while that is
// still the one of the layer before.
void Pass::select_neurons(int64_t layer, int lookahead) {
  const Predictor &predictor = engine.selectors[(size_t)layer].mlp;
  if (!block.sparse || !predictor.present() || predictor.lookahead != lookahead) return;
  const int64_t chunks = engine.neuron_chunks, total = config.intermediate_size;
  const int64_t first_chunk = share(chunks), last_chunk = share_end(chunks);
  if (first_chunk == last_chunk) return;
  const int64_t first = chunk_start(total, first_chunk, chunks), last = chunk_start(total, last_chunk, chunks);
  for (int64_t r = 0; r < rows; r++) {
    scores(predictor, lookahead == 1 ? own.attention_in[r] : own.mlp_in[r], first, last - first);
    for (int64_t c = first_chunk; c < last_chunk; c++) {
      const int64_t begin = chunk_start(total, c, chunks), end = chunk_start(total, c + 1, chunks);
      int32_t *list = engine.lists[layer & 1].data() + r * total + begin;
      const float *found = own.scores.data() - first;
      int64_t n = 0;
      for (int64_t f = begin; f < end; f++) {
        list[n] = (int32_t)f;
        n += found[f] > predictor.threshold;
      }
      engine.counts[layer & 1][r * chunks + c] = n;
    }
  }
}

int64_t Pass::sum_of_chunks(const Buffer<int64_t> &of_chunk) const {
  return std::accumulate(of_chunk.data(), of_chunk.data() + engine.neuron_chunks, INT64_C(0));
}

// Counts and masks of a layer, by thread 0 after the barrier that ends the MLP.
void Pass::report(int64_t layer) {
  if (thread != 0) return;
  const int64_t layers = config.num_layers, total = config.intermediate_size, groups = config.num_kv_heads, chunks = engine.neuron_chunks;
  for (int64_t r = 0; r < rows; r++) {
    int64_t neurons = total, selected = 0;
    uint8_t *mask = block.neuron_mask == nullptr ? nullptr : block.neuron_mask + (r * layers + layer) * total;
    if (mask != nullptr) std::fill_n(mask, total, (uint8_t)!selects_neurons(layer));
    if (selects_neurons(layer)) {
      neurons = 0;
      for (int64_t c = 0; c < chunks; c++) {
        const int64_t count = engine.counts[layer & 1][r * chunks + c];
        neurons += count;
        if (mask != nullptr)
          for (int64_t k = 0; k < count; k++) mask[engine.lists[layer & 1][r * total + chunk_start(total, c, chunks) + k]] = 1;
      }
    }
    for (int64_t g = 0; g < groups; g++) {
      selected += own.groups[r * groups + g];
      if (block.group_mask != nullptr) block.group_mask[(r * layers + layer) * groups + g] = own.groups[r * groups + g];
    }
    block.neurons[r * layers + layer] = neurons;
    block.heads[r * layers + layer] = selected * (config.num_heads / groups);
  }
  block.unions[layer] = selects_neurons(layer) ? sum_of_chunks(engine.unions[layer & 1]) : total;
  block.in_order[layer] = selects_neurons(layer) ? sum_of_chunks(engine.in_order[layer & 1]) : 0;
  if (block.inputs != nullptr) report_inputs(layer);
}
