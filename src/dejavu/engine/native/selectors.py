"""Selectors as the native library takes them: the one place of this engine that asks by which method a layer selects.

In: an adapter's layers. Out: predictors, thresholds and norms handed to the library, and the layout of weights that its reads want.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dejavu.config import require
from dejavu.engine.native.weights import NativeModel, predictor_view
from dejavu.kernels import native
from dejavu.model.predictor import Predictor
from dejavu.model.selectors import (
    POINTS,
    GateThreshold,
    InputPoints,
    InputSelector,
    InputThresholds,
    LayerAdapter,
    PredictedHeads,
    PredictedNeurons,
    Selector,
)
from dejavu.model.transformer import Block, Transformer


def layout_of(layers: Sequence[LayerAdapter]) -> str:
    """How the weights of a model that selects in this way lie in memory."""
    if any(layer.inputs.selects for layer in layers):
        others = [index for index, layer in enumerate(layers) if layer.sparse and not layer.inputs.selects]
        require(
            not others,
            f"layers {others} select by other methods than input: backend 'native' takes no other beside it; use --backend torch",
        )
        return "input-major"
    return "gate-apart" if any(isinstance(layer.neurons, GateThreshold) for layer in layers) else "by-neuron"


def set_selectors(library: Any, engine: ctypes.c_void_p, layers: Sequence[LayerAdapter], packed: NativeModel, model: Transformer) -> None:
    """packed: of the model. Raises ValueError for a method that the library does not know."""
    for index, (layer, block) in enumerate(zip(layers, model.blocks, strict=True)):
        for selector in layer.stored.values():
            _set(library, engine, index, selector, packed, block)


def _set(library: Any, engine: ctypes.c_void_p, index: int, selector: Selector, packed: NativeModel, block: Block) -> None:
    match selector:
        case PredictedNeurons():
            _set_predictor(library, engine, index, native.MLP, selector.predictor)
        case PredictedHeads():
            _set_predictor(library, engine, index, native.HEADS, selector.predictor)
        case GateThreshold():
            native.check(library.dejavu_engine_gate(engine, index, selector.threshold))
        case InputThresholds():
            for number, (point, norm_I) in enumerate(packed.column_norms(index, block).items()):
                threshold = selector.of(point)
                if threshold is not None:
                    native.check(library.dejavu_engine_inputs(engine, index, number, norm_I.data_ptr(), norm_I.numel(), threshold))
        case _:
            raise ValueError(f"layer {index} selects by method {selector.method}: backend 'native' does not; use --backend torch")


def _set_predictor(library: Any, engine: ctypes.c_void_p, index: int, part: int, predictor: Predictor) -> None:
    A, B = predictor_view(predictor.A_RD), predictor_view(predictor.B_OR, predictor.bias_O.float().cpu())
    native.check(library.dejavu_engine_predictor(engine, index, part, A.matrix, B.matrix, predictor.threshold, predictor.lookahead))


def kept_inputs(selector: InputSelector, mask_I: Tensor, points: InputPoints | None) -> tuple[Tensor | None, ...] | None:
    """Indices of the inputs that a recorded mask of all points keeps; None where all are kept, and in a layer that selects none."""
    if points is None or not isinstance(selector, InputThresholds):
        return None
    masks = zip(POINTS, mask_I.split(points.sizes), strict=True)
    return tuple(None if selector.of(point) is None else mask.nonzero().squeeze(1) for point, mask in masks)
