"""What fired in a step, small enough to send with every token. In: the selections of a row. Out: a StepTrace, by layer in BINS bins.

Letters: F neurons  N bins
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dejavu.engine.interface import EngineInfo, LayerSelection
from dejavu.serve.core.interface import BINS, StepTrace


def step_trace(info: EngineInfo, layers: Sequence[LayerSelection] | None) -> StepTrace:
    """The trace of a row: neuron n of N lies in bin n * BINS // N. layers: None where all of them ran dense."""
    chosen = [LayerSelection(neurons_A=None, heads_A=None)] * info.num_layers if layers is None else layers
    return StepTrace(
        neurons=tuple(_binned(info.num_neurons, layer) for layer in chosen),
        heads=tuple(_heads(info.num_heads, layer) for layer in chosen),
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
