"""Selection without predictors: thresholds for a tiny model from what a dense pass over it has."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dejavu.model.selectors import POINTS, GateThreshold, InputThresholds, LayerAdapter, column_norms
from dejavu.model.transformer import LayerInputs, Selection, Transformer
from helpers.engines import ids_of, random_layers


class Seen(Selection):
    """What a dense pass has at the points of every layer, and its activated gates."""

    def __init__(self) -> None:
        self.gate: dict[int, Tensor] = {}
        self.read: dict[tuple[int, str], Tensor] = {}

    def inputs(self, layer: int, point: str, x: Tensor) -> Tensor:
        self.read[layer, point] = x
        return x

    def neurons(self, layer: int, inputs: LayerInputs, act_BTF: Tensor) -> Tensor:
        assert inputs.gate is not None
        self.gate[layer] = inputs.gate
        return act_BTF


def seen(model: Transformer) -> Seen:
    found = Seen()
    with torch.inference_mode():
        model(torch.tensor([ids_of(1)], device=model.device), found)
    return found


def gate_layers(model: Transformer, density: float) -> tuple[LayerAdapter, ...]:
    """Thresholds that about this share of the activated gates exceed; the last layer also predicts heads."""
    gates = seen(model).gate
    chosen = [LayerAdapter(neurons=GateThreshold(threshold=float(gates[i].abs().quantile(1 - density)))) for i in sorted(gates)]
    return (*chosen[:-1], dataclasses.replace(chosen[-1], heads=random_layers(model, mlp=None, heads=0)[-1].heads))


def input_layers(model: Transformer, density: float, *, without: str | None = None) -> tuple[LayerAdapter, ...]:
    """Thresholds that about this share of the inputs of every point exceed; `without` keeps all of its."""
    read, layers = seen(model).read, []
    for index, block in enumerate(model.blocks):
        norms = column_norms(block)
        weighed = {point: read[index, point].abs() * norms[point] for point in POINTS if point != without}
        thresholds = {point: float(values.quantile(1 - density)) for point, values in weighed.items()}
        layers.append(LayerAdapter(inputs=InputThresholds(**thresholds)))
    return tuple(layers)
