"""Thresholds for a wanted density: how sparse is fast how, whatever it costs in quality.

In: a model, an adapter's layers, a text's token ids, a density. Out: the same layers, each predictor and gate with the threshold that
selects that share of its outputs on these tokens; where inputs are selected each point keeps that share of them, those of the MLP by its
density, those of attention by the heads'. Layer by layer in one forward pass, each layer seeing what the sparse layers before it give. A
part that does not select stays dense. Nothing here keeps a loss budget: `offline/calibrate.py` does.

Letters: B batch  T tokens  F neurons  G head groups
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dejavu.config import require
from dejavu.model.predictor import LayerAdapter, MaskedSelection, head_predictor_input, mlp_predictor_input
from dejavu.model.selectors import GateThreshold
from dejavu.model.transformer import LayerInputs, Transformer

MAX_TOKENS = 256  # of the pass


class _Rethreshold(MaskedSelection):
    """Masks as MaskedSelection does, after moving the layer's thresholds."""

    def __init__(self, layers: Sequence[LayerAdapter], mlp_density: float | None, head_density: float | None) -> None:
        super().__init__(tuple(layers))
        self.mlp_density, self.head_density = mlp_density, head_density

    def _replace(self, layer: int, changed: LayerAdapter) -> None:
        self.layers = (*self.layers[:layer], changed, *self.layers[layer + 1 :])

    def inputs(self, layer: int, point: str, x: Tensor) -> Tensor:
        thresholds = self.layers[layer].inputs
        density = self.mlp_density if point in ("mlp", "down") else self.head_density
        if thresholds is not None and density is not None:
            weighed = (x.float().abs() * self._norms[layer][point]).flatten()
            moved = dataclasses.replace(thresholds, **{point: max(0.0, _below(weighed, density * weighed.numel()))})
            self._replace(layer, dataclasses.replace(self.layers[layer], inputs=moved))
        return super().inputs(layer, point, x)

    def heads(self, layer: int, inputs: LayerInputs, mixed_BTHK: Tensor) -> Tensor:
        predictor = self.layers[layer].heads
        if predictor is not None and self.head_density is not None:
            scores = predictor.scores(head_predictor_input(inputs, predictor.lookahead))
            moved = dataclasses.replace(predictor, threshold=_head_threshold(scores, self.head_density))
            self._replace(layer, dataclasses.replace(self.layers[layer], heads=moved))
        return super().heads(layer, inputs, mixed_BTHK)

    def neurons(self, layer: int, inputs: LayerInputs, act_BTF: Tensor) -> Tensor:
        predictor = self.layers[layer].mlp
        if predictor is not None and self.mlp_density is not None:
            scores = predictor.scores(mlp_predictor_input(inputs, predictor.lookahead))
            moved = dataclasses.replace(predictor, threshold=_below(scores.flatten(), self.mlp_density * scores.numel()))
            self._replace(layer, dataclasses.replace(self.layers[layer], mlp=moved))
        gate = self.layers[layer].gate
        if gate is not None and self.mlp_density is not None:
            assert inputs.gate is not None
            values = inputs.gate.float().abs().flatten()
            moved = GateThreshold(threshold=max(0.0, _below(values, self.mlp_density * values.numel())))
            self._replace(layer, dataclasses.replace(self.layers[layer], gate=moved))
        return super().neurons(layer, inputs, act_BTF)


def _below(scores: Tensor, count: float) -> float:
    """A threshold that about `count` of the scores exceed."""
    wanted = round(count)
    if wanted >= scores.numel():
        return float(scores.min()) - 1.0
    ordered = scores.sort(descending=True).values
    return float(ordered[wanted]) if wanted > 0 else float(ordered[0])


def _head_threshold(scores_BTG: Tensor, density: float) -> float:
    """As _below, where the best group of each token is selected whatever its score."""
    scores_NG = scores_BTG.flatten(0, -2)
    tokens, groups = scores_NG.shape
    rest = (
        scores_NG.scatter(1, scores_NG.argmax(1, keepdim=True), -math.inf).flatten().sort(descending=True).values[: tokens * (groups - 1)]
    )
    if rest.numel() == 0:  # one group: it always runs
        return float(scores_NG.max())
    return _below(rest, tokens * (groups * density - 1))


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
    groups, by_inputs = model.config.num_kv_heads, any(layer.inputs is not None for layer in layers)
    for what, density, least, has in (
        ("density", mlp_density, 0.0, any((layer.mlp or layer.gate or layer.inputs) is not None for layer in layers)),
        ("head density", head_density, 0.0 if by_inputs else 1 / groups, by_inputs or any(layer.heads is not None for layer in layers)),
    ):
        if density is None:
            continue
        require(0 < density <= 1, f"{what} must lie in (0, 1], not {density:g}")
        require(has, f"{what} {density:g} needs predictors of that part, or a gate or inputs that select, and the adapter has none")
        require(density >= least, f"{what} {density:g} is less than one of {groups} head groups; give at least {least:.3f}")
    selection = _Rethreshold(layers, mlp_density, head_density)
    ids_BT = torch.tensor([list(ids[: min(MAX_TOKENS, model.config.max_positions)])], device=model.embed.weight.device)
    model.hidden(ids_BT, selection)
    return selection.layers
