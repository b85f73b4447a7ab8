// Counts and masks of a layer: see report.h.
#include "report.h"

#include <algorithm>
#include <array>

namespace {

// How many inputs there are at each point.
std::array<int64_t, DEJAVU_POINTS> sizes_of(const dejavu_config &c) { return {c.hidden_size, c.num_heads * c.head_dim, c.hidden_size, c.intermediate_size}; }

void report_inputs(const Context &ctx, int64_t layer, const Replicated &own, const Selected &selected, const InputMaps &inputs) {
  const auto sizes = sizes_of(ctx.config);
  const int64_t all = sizes[0] + sizes[1] + sizes[2] + sizes[3];
  const InputSelector *selectors = ctx.selector(layer).inputs;
  for (int64_t r = 0; r < ctx.rows; r++) {
    const int64_t at = r * ctx.config.num_layers + layer;
    int64_t *counts = ctx.block.inputs + at * DEJAVU_POINTS, start = 0, starts[DEJAVU_POINTS];
    uint8_t *mask = ctx.block.input_mask == nullptr ? nullptr : ctx.block.input_mask + at * all;
    for (size_t point = 0; point < DEJAVU_POINTS; start += sizes[point++]) {
      starts[point] = start;
      counts[point] = selectors[point].present() ? 0 : sizes[point];
      if (mask != nullptr) std::fill_n(mask + start, sizes[point], (uint8_t)!selectors[point].present());
    }
    inputs.visit(ctx, layer, r, own, selected, [&](int point, const int32_t *list, int64_t count) {
      counts[point] += count;
      for (int64_t k = 0; mask != nullptr && k < count; k++) mask[starts[point] + list[k]] = 1;
    });
  }
}

void profile_inputs(const Context &ctx, int64_t layer, const Replicated &own, const Selected &selected, const InputMaps &inputs) {
  const auto sizes = sizes_of(ctx.config);
  std::vector<uint8_t> seen[DEJAVU_POINTS];  // by some row
  for (size_t point = 0; point < DEJAVU_POINTS; point++)
    seen[point].assign((size_t)sizes[point], (uint8_t)!ctx.selector(layer).inputs[point].present());
  for (int64_t r = 0; r < ctx.rows; r++)
    inputs.visit(ctx, layer, r, own, selected, [&](int point, const int32_t *list, int64_t count) {
      for (int64_t k = 0; k < count; k++) seen[point][(size_t)list[k]] = 1;
    });
  int64_t *counts = ctx.profiler.profile()->inputs + layer * DEJAVU_POINTS;
  for (int point = 0; point < DEJAVU_POINTS; point++) counts[point] = std::count(seen[point].begin(), seen[point].end(), (uint8_t)1);
}

}  // namespace

void report_layer(const Context &ctx, int64_t layer, const Replicated &own, const Selected &selected, const Mlp &mlp, const InputMaps &inputs) {
  const dejavu_block &block = ctx.block;
  const int64_t layers = ctx.config.num_layers, total = ctx.config.intermediate_size, groups = ctx.config.num_kv_heads;
  const bool selects = ctx.selector(layer).neurons();
  for (int64_t r = 0; r < ctx.rows; r++) {
    int64_t neurons = total, heads = 0;
    uint8_t *mask = block.neuron_mask == nullptr ? nullptr : block.neuron_mask + (r * layers + layer) * total;
    if (mask != nullptr) std::fill_n(mask, total, (uint8_t)!selects);
    if (selects) {
      neurons = 0;
      for (int64_t c = 0; c < selected.chunks; c++) {
        const int64_t count = selected.count(layer, r, c);
        const int32_t *list = selected.list(layer, r) + selected.start(c);
        neurons += count;
        for (int64_t k = 0; mask != nullptr && k < count; k++) mask[list[k]] = 1;
      }
    }
    for (int64_t g = 0; g < groups; g++) {
      heads += own.groups[r * groups + g];
      if (block.group_mask != nullptr) block.group_mask[(r * layers + layer) * groups + g] = own.groups[r * groups + g];
    }
    block.neurons[r * layers + layer] = neurons;
    block.heads[r * layers + layer] = heads * (ctx.config.num_heads / groups);
  }
  block.unions[layer] = selects ? mlp.unions(layer) : total;
  block.in_order[layer] = selects ? mlp.in_order(layer) : 0;
  if (block.inputs != nullptr) report_inputs(ctx, layer, own, selected, inputs);
}

void profile_layer(const Context &ctx, int64_t layer, const Replicated &own, const Selected &selected, const Mlp &mlp, const InputMaps &inputs) {
  const dejavu_profile &profile = *ctx.profiler.profile();
  const int64_t groups = ctx.config.num_kv_heads;
  profile.fired[layer] = ctx.config.intermediate_size;
  if (ctx.selector(layer).lists()) {
    const int64_t fired = ctx.profiler.take_fired();
    // Where no activation is exactly zero every row of down is read.
    profile.fired[layer] = ctx.config.activation > DEJAVU_FATRELU ? mlp.unions(layer) : fired;
  }
  if (profile.inputs != nullptr) profile_inputs(ctx, layer, own, selected, inputs);
  profile.groups[layer] = 0;
  for (int64_t g = 0; g < groups; g++) {
    bool active = false;
    for (int64_t r = 0; r < ctx.rows; r++) active = active || own.groups[r * groups + g] != 0;
    profile.groups[layer] += active;
  }
}
