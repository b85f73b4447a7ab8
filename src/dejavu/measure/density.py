"""Thresholds for a wanted density: how sparse is fast how, whatever it costs in quality.

In: a model, predictors, a text's token ids, a density. Out: the same predictors, each with the threshold that selects that
share of its outputs on these tokens. Layer by layer in one forward pass, each layer seeing what the sparse layers before it
give. A part without a predictor stays dense. Nothing here keeps a loss budget: `offline/calibrate.py` does.

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
from dejavu.model.transformer import LayerInputs, Transformer

MAX_TOKENS = 256  # of the pass


class _Rethreshold(MaskedSelection):
    """Masks as MaskedSelection does, after moving the threshold of the layer's predictors."""

    def __init__(self, layers: Sequence[LayerAdapter], mlp_density: float | None, head_density: float | None) -> None:
        super().__init__(tuple(layers))
        self.mlp_density, self.head_density = mlp_density, head_density

    def _replace(self, layer: int, changed: LayerAdapter) -> None:
        self.layers = (*self.layers[:layer], changed, *self.layers[layer + 1 :])

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
    """The predictors with thresholds for these densities (None: as they are) on the first MAX_TOKENS of the ids.

    Raises ValueError for a density outside (0, 1], one below a single head group, or one of a part that no layer predicts.
    """
    groups = model.config.num_kv_heads
    for what, density, least, has in (
        ("density", mlp_density, 0.0, any(layer.mlp is not None for layer in layers)),
        ("head density", head_density, 1 / groups, any(layer.heads is not None for layer in layers)),
    ):
        if density is None:
            continue
        require(0 < density <= 1, f"{what} must lie in (0, 1], not {density:g}")
        require(has, f"{what} {density:g} needs predictors of that part, and the adapter has none")
        require(density >= least, f"{what} {density:g} is less than one of {groups} head groups; give at least {least:.3f}")
    selection = _Rethreshold(layers, mlp_density, head_density)
    ids_BT = torch.tensor([list(ids[: min(MAX_TOKENS, model.config.max_positions)])], device=model.embed.weight.device)
    model.hidden(ids_BT, selection)
    return selection.layers
