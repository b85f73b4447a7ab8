"""What a step of the GPU selected, read back from the memory that it leaves: for tests and traces, which may wait for the device.

Letters: A selected  F neurons  L layers  B rows
"""

from __future__ import annotations

import torch
from torch import Tensor

from dejavu.engine.cuda.batch_step import BatchStep
from dejavu.engine.cuda.token_step import TokenStep
from dejavu.engine.interface import LayerSelection
from dejavu.model.selectors import POINTS


def selections(step: TokenStep | BatchStep, row: int, words_LF: Tensor) -> tuple[LayerSelection, ...]:
    """What a row of the last step selected, by layer, in order. words_LF int32 [L, F]: of a step of several rows, which rows selected
    a neuron. neurons_A is None where a layer selects none, and where one with a predictor ran dense."""
    layers = range(step.config.num_layers)
    return tuple(
        LayerSelection(neurons_A=_neurons(step, row, at, words_LF), heads_A=_heads(step, row, at), inputs_P=_inputs(step, row, at)).cpu()
        for at in layers
    )


def _neurons(step: TokenStep | BatchStep, row: int, index: int, words_LF: Tensor) -> Tensor | None:
    selector = step.predictors[index].selector
    if selector is None:
        return None
    if isinstance(step, TokenStep):
        return _listed(selector.neurons, selector.count)
    return None if index in step.dense_layers else ((words_LF[index] >> row) & 1).nonzero().squeeze(1)


def _heads(step: TokenStep | BatchStep, row: int, index: int) -> Tensor | None:
    scores, per = step.predictors[index].group_scores, step.config.heads_per_group
    if scores is None:
        return None
    groups_A = scores.groups[: int(scores.count)].long() if isinstance(step, TokenStep) else step.groups(index, row)
    return (groups_A[:, None] * per + torch.arange(per, device=groups_A.device)).flatten()


def _inputs(step: TokenStep | BatchStep, row: int, index: int) -> tuple[Tensor | None, ...] | None:
    layer = step.model.inputs[index]
    if layer is None:
        return None
    found: list[Tensor | None] = []
    for point, selects in zip(POINTS, layer.selects, strict=True):
        kept = layer.points[point]
        if not selects:
            found.append(None)
        else:
            found.append(_listed(kept.inputs, kept.count) if isinstance(step, TokenStep) else step.kept_inputs(index, point, row))
    return tuple(found)


def _listed(listed: Tensor, count: Tensor) -> Tensor:
    return listed[: int(count)].long().sort().values
