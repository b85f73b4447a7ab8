"""Shapes of the kernels of one row's step: rows at a time, warps of a program, programs of a multiprocessor, by kernel and hidden size.

MEASURED was fastest on an H100 and an H200 (docs/log.md). On other devices `engine/cuda/tuning.py` times what CANDIDATES has, and
`use_shape` keeps the answer for the process.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch

from dejavu.kernels.cuda.common import GridShape

KNOWN = ("NVIDIA H100", "NVIDIA H200")  # how the names of the devices begin that MEASURED is of
# By the largest hidden size that each is for.
MEASURED: Mapping[str, Mapping[int, tuple[int, int, int]]] = {
    "project": {2048: (8, 8, 2), 3072: (2, 4, 4), 4096: (4, 4, 2), 8192: (2, 4, 2), 1 << 31: (1, 4, 2)},
    "mlp": {2048: (8, 8, 1), 3072: (2, 4, 2), 4096: (4, 8, 1), 6144: (1, 8, 2), 8192: (1, 4, 2), 1 << 31: (1, 16, 1)},
    "gated mlp": {2048: (4, 8, 1), 4096: (2, 8, 1), 8192: (1, 4, 2), 1 << 31: (1, 16, 1)},
    "mlp by gate": {1024: (8, 4, 2), 2048: (4, 8, 2), 4096: (2, 8, 2), 8192: (1, 8, 2), 1 << 31: (1, 16, 1)},
}
CANDIDATES = (
    (8, 8, 1),
    (8, 8, 2),
    (4, 4, 2),
    (4, 8, 1),
    (4, 8, 2),
    (2, 4, 2),
    (2, 4, 4),
    (2, 8, 1),
    (2, 8, 2),
    (1, 4, 2),
    (1, 8, 2),
    (1, 16, 1),
)

_used: dict[tuple[str, str, int], GridShape] = {}  # by device, kernel and hidden size


def grid_shape(kernel: str, size: int, device: torch.device) -> GridShape:
    """The shape of that kernel for rows of so many values on the device."""
    return _used.get((device_name(device), kernel, size)) or measured_shape(kernel, size)


def measured_shape(kernel: str, size: int) -> GridShape:
    """What MEASURED has for the smallest size that is not below this one."""
    shapes = MEASURED[kernel]
    return shape_of(shapes[min(limit for limit in shapes if size <= limit)])


def use_shape(kernel: str, size: int, device: torch.device, shape: GridShape) -> None:
    """From now on this is the shape there; kernels that a graph has captured keep theirs."""
    _used[device_name(device), kernel, size] = shape


def shape_of(numbers: tuple[int, int, int]) -> GridShape:
    rows, warps, programs = numbers
    return GridShape(rows=rows, warps=warps, programs=programs)


@cache
def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def is_known(name: str) -> bool:
    return name.startswith(KNOWN)
