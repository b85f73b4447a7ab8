"""Thresholds for a target density: how sparse is fast how, whatever it costs in quality.

In: a model, an adapter's layers, a text's token ids, a density. Out: the same layers, each predictor and gate with the threshold that
selects that share of its outputs on these tokens; where inputs are selected each point keeps that share of them, those of the MLP by its
density, those of attention by the heads'. Layer by layer in one forward pass, each layer seeing what the sparse layers before it give. A
part that does not select stays dense. Nothing here keeps a loss budget: `offline/calibrate.py` does.

Letters: B batch  T tokens  F neurons  G head groups
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dejavu.config import require
from dejavu.model.masked import MaskedSelection
from dejavu.model.selectors import MLP_POINTS, LayerAdapter
from dejavu.model.transformer import LayerInputs, Transformer

MAX_TOKENS = 256  # of the pass


class _Rethreshold(MaskedSelection):
    """Masks as MaskedSelection does, after moving the layer's thresholds."""

    def __init__(self, layers: Sequence[LayerAdapter], mlp_density: float | None, head_density: float | None) -> None:
        super().__init__(tuple(layers))
        self.mlp_density, self.head_density = mlp_density, head_density

    def inputs(self, layer: int, point: str, x: Tensor) -> Tensor:
        density = self.mlp_density if point in MLP_POINTS else self.head_density
        if density is not None:
            self._replace(layer, inputs=self.layers[layer].inputs.at_density(point, x, self._norms[layer], density))
        return super().inputs(layer, point, x)

    def heads(self, layer: int, inputs: LayerInputs, mixed_BTHK: Tensor) -> Tensor:
        if self.head_density is not None:
            self._replace(layer, heads=self.layers[layer].heads.at_density(inputs, self.head_density))
        return super().heads(layer, inputs, mixed_BTHK)

    def neurons(self, layer: int, inputs: LayerInputs, act_BTF: Tensor) -> Tensor:
        if self.mlp_density is not None:
            self._replace(layer, neurons=self.layers[layer].neurons.at_density(inputs, self.mlp_density))
        return super().neurons(layer, inputs, act_BTF)

    def _replace(self, layer: int, **changed: Any) -> None:
        self.layers = (*self.layers[:layer], dataclasses.replace(self.layers[layer], **changed), *self.layers[layer + 1 :])


@torch.inference_mode()
def rethresholded(
    model: Transformer,
    layers: Sequence[LayerAdapter],
    ids: Sequence[int],
    *,
    mlp_density: float | None = None,
    head_density: float | None = None,
) -> tuple[LayerAdapter, ...]:
    """The layers with thresholds for these densities (None: as they are) on the first MAX_TOKENS of the ids.

    Raises ValueError for a density outside (0, 1], one below a single head group, or one of a part that no layer selects in.
    """
    groups, by_inputs = model.config.num_kv_heads, any(layer.inputs.selects for layer in layers)
    for what, density, least, has in (
        ("density", mlp_density, 0.0, by_inputs or any(layer.neurons.selects for layer in layers)),
        ("head density", head_density, 0.0 if by_inputs else 1 / groups, by_inputs or any(layer.heads.selects for layer in layers)),
    ):
        if density is None:
            continue
        require(0 < density <= 1, f"{what} must lie in (0, 1], not {density:g}")
        require(has, f"{what} {density:g} needs predictors of that part, or a gate or inputs that select, and the adapter has none")
        require(density >= least, f"{what} {density:g} is less than one of {groups} head groups; give at least {least:.3f}")
    selection = _Rethreshold(layers, mlp_density, head_density)
    ids_BT = torch.tensor([list(ids[: min(MAX_TOKENS, model.config.max_positions)])], device=model.device)
    model.hidden(ids_BT, selection)
    return selection.layers
