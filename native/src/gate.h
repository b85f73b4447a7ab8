// Neurons that the layer's own gate selects: every gate is computed, and those with |activation(gate m)| > threshold are kept.
//
// Of an MLP without a gate it is |activation(up m)|. In: the input m of the MLP. Out: lists of neurons, and what was activated: the MLP
// computes only the rest, rows of up and down of the neurons that were kept. Fetching those as soon as they are known gained nothing
// (docs/log.md).
#pragma once
#include "context.h"

// Writes the lists of one chunk and its part of `selected.activated`. values: scratch memory of a tile and PAD.
void select_by_gate(const Context &context, int64_t layer, int64_t chunk, const Vectors &mlp_in, float *values, Selected &selected);
