// What a layer selected and read, told by thread 0 after the barrier that ends the MLP. In: the lists and groups that were computed with.
// Out: counts and masks of dejavu_block, and those of dejavu_profile.
#pragma once
#include "context.h"
#include "inputs.h"
#include "mlp.h"

void report_layer(const Context &context, int64_t layer, const Replicated &own, const Selected &selected, const Mlp &mlp, const InputMaps &inputs);
// The profile's counts: over all rows together.
void profile_layer(const Context &context, int64_t layer, const Replicated &own, const Selected &selected, const Mlp &mlp, const InputMaps &inputs);
