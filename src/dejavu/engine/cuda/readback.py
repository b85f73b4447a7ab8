"""What a step of the GPU selected, read back from the memory that it leaves: for tests and traces, which may wait for the device.

Letters: A selected  L layers  B rows
"""

from __future__ import annotations

import torch
from torch import Tensor

from dejavu.engine.cuda.bucket import Step
from dejavu.engine.interface import LayerSelection
from dejavu.model.selectors import POINTS


def selections(step: Step, row: int) -> tuple[LayerSelection, ...]:
    """What a row of the last run selected, by layer, in order. neurons_A is None where a layer selects none, and where one with a predictor
    ran dense."""
    layers = range(step.config.num_layers)
    return tuple(
        LayerSelection(neurons_A=step.neurons_of(at, row), heads_A=_heads(step, at, row), inputs_P=_inputs(step, at, row)).cpu()
        for at in layers
    )


def _heads(step: Step, index: int, row: int) -> Tensor | None:
    groups_A, per = step.groups_of(index, row), step.config.heads_per_group
    return None if groups_A is None else (groups_A[:, None] * per + torch.arange(per, device=groups_A.device)).flatten()


def _inputs(step: Step, index: int, row: int) -> tuple[Tensor | None, ...] | None:
    layer = step.model.inputs[index]
    if layer is None or not any(layer.selects):
        return None
    points = zip(POINTS, layer.selects, strict=True)
    return tuple(step.inputs_of(index, point, row) if selects else None for point, selects in points)
