"""Shapes of kernels on a device that no table has: timed at the first use of a hidden size, and kept in Triton's cache folder.

In: a model's weights on the device. Out: shapes in use (kernels/cuda/shapes.py) for its kernels; a line of the log where something was
timed. A shape that the device has no room for is left out. Times are of the layers' weights, one after another, so that they come from
memory where the model is larger than the cache.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.runtime.cache import get_cache_manager
from triton.runtime.errors import OutOfResources

from dejavu.engine.cuda.crossover import milliseconds
from dejavu.engine.cuda.weights import LayerWeights, StepModel
from dejavu.kernels.activation import activate
from dejavu.kernels.cuda.common import GridShape, norm_definition
from dejavu.kernels.cuda.gate import GateNeurons, mlp_by_gate
from dejavu.kernels.cuda.mlp import mlp_token
from dejavu.kernels.cuda.project import project_token
from dejavu.kernels.cuda.shapes import CANDIDATES, MEASURED, device_name, is_known, measured_shape, shape_of, use_shape
from dejavu.version import __version__

FILE = "shapes.json"
SHAPES = {*CANDIDATES, *(numbers for sizes in MEASURED.values() for numbers in sizes.values())}  # that a file may name
log = logging.getLogger(__name__)


def tune(model: StepModel) -> None:
    """Have the fastest shapes in use for this model; nothing to do on a known device."""
    device = model.head.device
    name = device_name(device)
    if device.type != "cuda" or is_known(name):
        return
    about = f"{name} {triton.__version__} {__version__} {model.head.dtype} {CANDIDATES}"
    cache = get_cache_manager(hashlib.sha256(about.encode()).hexdigest())
    kept = read(cache.get_file(FILE))
    size, work = model.config.hidden_size, works(model)
    missing = [kernel for kernel in work if place(kernel, size) not in kept]
    if missing:
        log.warning("%s: timing the shapes of %d kernels at hidden size %d, which is done once", name, len(missing), size)
        started = time.perf_counter()
        for kernel in missing:
            kept[place(kernel, size)] = fastest(kernel, size, lambda shape, kernel=kernel: milliseconds(lambda: work[kernel](shape)))
        log.warning("done in %.0f s, kept in %s", time.perf_counter() - started, cache.put(json.dumps(kept), FILE, binary=False))
    for kernel in work:
        use_shape(kernel, size, device, shape_of(kept[place(kernel, size)]))


def place(kernel: str, size: int) -> str:
    return f"{kernel}, {size}"


def read(path: str | None) -> dict[str, tuple[int, int, int]]:
    """Kept shapes; none where there is no file, or one that is damaged."""
    if path is None:
        return {}
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError:
        return {}
    if not isinstance(found, dict):
        return {}
    by_list = {str(list(numbers)): numbers for numbers in SHAPES}
    return {key: by_list[str(value)] for key, value in found.items() if str(value) in by_list}


def fastest(kernel: str, size: int, timed: Callable[[GridShape], float]) -> tuple[int, int, int]:
    """The measured shape of the known devices, or a candidate that is faster by more than 1 %; timed raises OutOfResources."""
    known = measured_shape(kernel, size)
    first = known.rows, known.warps, known.programs
    best, least = first, _time(timed, known)
    for numbers in CANDIDATES:
        if numbers != first:
            found = _time(timed, shape_of(numbers))
            if found < 0.99 * least:
                best, least = numbers, found
    return best


def _time(timed: Callable[[GridShape], float], shape: GridShape) -> float:
    try:
        return timed(shape)
    except OutOfResources:
        return float("inf")


def works(model: StepModel) -> Mapping[str, Callable[[GridShape], None]]:
    """What starts each kernel of the model's steps once for every layer, in a shape."""
    config, device = model.config, model.head.device
    size, neurons = config.hidden_size, config.intermediate_size
    delta_D, y_out_D, out_D = torch.zeros(3, size, device=device).unbind(0)
    y_D = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(device)
    width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    qkv = torch.zeros(width, device=device)
    # By inputs these matrices have kernels of their own; the head, which has not, keeps the table's shape.
    layers = [layer for layer in model.weights if layer.qkv.is_contiguous() and layer.mlp.up_FD.is_contiguous()]

    def project(shape: GridShape) -> None:
        for layer in layers:
            project_token(y_D, delta_D, layer.norm1, layer.qkv, layer.qkv_bias, qkv, shape=shape)

    def mlp(shape: GridShape) -> None:
        for layer in layers:
            mlp_token(y_D, delta_D, y_out_D, out_D, layer.norm2, layer.mlp, shape=shape)

    marks, count = torch.zeros(neurons, dtype=torch.int32, device=device), torch.zeros(1, dtype=torch.int32, device=device)

    def by_gate(shape: GridShape) -> None:
        for layer, gate in zip(layers, gates, strict=True):
            mlp_by_gate(y_D, delta_D, y_out_D, out_D, layer.norm2, layer.mlp, gate, shape=shape)

    found: dict[str, Callable[[GridShape], None]] = {}
    if layers:
        found |= {"project": project, "gated mlp" if config.gated else "mlp": mlp}
    if any(own.gate_neurons is not None for own in model.predictors):
        gates = [GateNeurons(threshold=_half(y_D, layer), marks=marks, count=count) for layer in layers]
        found["mlp by gate"] = by_gate
    return found


def _half(y_D: Tensor, layer: LayerWeights) -> Tensor:
    """The threshold fp32 [1] that half of the layer's gates exceed."""
    mlp = layer.mlp
    matrix, bias = (mlp.up_FD, mlp.up_bias_F) if mlp.gate_FD is None else (mlp.gate_FD, mlp.gate_bias_F)
    product_F = torch.nn.functional.linear(norm_definition(y_D.to(matrix.dtype), layer.norm2), matrix, bias)
    return activate(product_F, mlp.activation, mlp.activation_threshold).abs().float().median().view(1)
