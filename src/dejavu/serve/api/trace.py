"""What fired in a step, small enough to send with every token. In: the selections of a row. Out: a StepTrace, by layer in BINS bins.

Letters: F neurons  N bins  L layers  H query heads
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dejavu.engine.interface import EngineInfo, LayerSelection
from dejavu.serve.api.requests import Served

BINS = 64  # into which a trace divides the neurons of a layer


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTrace:
    """What fired in the step that led to a token, by layer.

    neurons: BINS bytes for each of L layers, the share of each bin that was selected, 0 to 255; heads: H bytes of 0 or 1 for each. A
    layer that ran dense is all 255, and all 1.
    """

    neurons: tuple[bytes, ...]
    heads: tuple[bytes, ...]


def step_trace(model: EngineInfo | Served, layers: Sequence[LayerSelection] | None) -> StepTrace:
    """The trace of a row: neuron n of N lies in bin n * BINS // N. layers: None where all of them ran dense."""
    chosen = [LayerSelection(neurons_A=None, heads_A=None)] * model.num_layers if layers is None else layers
    return StepTrace(
        neurons=tuple(_binned(model.num_neurons, layer) for layer in chosen),
        heads=tuple(_heads(model.num_heads, layer) for layer in chosen),
    )


def _binned(neurons: int, layer: LayerSelection) -> bytes:
    if layer.neurons_A is None:
        return b"\xff" * BINS
    bin_F, size_N = _bins(neurons)
    count_N = np.bincount(bin_F[layer.neurons_A.numpy()], minlength=BINS)
    return np.rint(255 * count_N / size_N).astype(np.uint8).tobytes()


@functools.cache
def _bins(neurons: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The bin of each neuron, and the size of each bin (of an empty one: 1). The same for every layer of every token."""
    bin_F = np.arange(neurons) * BINS // neurons
    return bin_F, np.maximum(np.bincount(bin_F, minlength=BINS), 1)


def _heads(heads: int, layer: LayerSelection) -> bytes:
    fired = np.zeros(heads, dtype=np.uint8)
    fired[slice(None) if layer.heads_A is None else layer.heads_A.numpy()] = 1
    return fired.tobytes()
