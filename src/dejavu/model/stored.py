"""Tensors as files hold them, and folders in a format of our own.

In: an open safetensors file of a checkpoint, or a folder whose config.json has `dejavu_format`. Out: StoredTensors, fp32 or in a grid of
their own. What another folder of ours is, says bundle.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dejavu.config import require
from dejavu.kernels.dtypes import DTYPE_NAMES
from dejavu.kernels.quantized import Matrix, QuantizedMatrix
from dejavu.model.mapped import mapped_safetensors

FILE_DTYPES = ("fp32", "fp16", "bf16")
FORMAT_KEY, INT8_ROWS = "dejavu_format", "int8-rows"


class StoredTensor(NamedTuple):
    """One tensor on disk: its name there, its values, fp32 or in a grid of their own, and its type there."""

    name: str
    values: Matrix
    dtype: str


def as_stored(name: str, tensor: Tensor, where: Path) -> StoredTensor:
    """A plain tensor of a file. Raises ValueError for a type that is none of FILE_DTYPES."""
    dtype = DTYPE_NAMES.get(tensor.dtype)
    if dtype not in FILE_DTYPES:
        raise ValueError(f"tensor {name!r} in {where} is {tensor.dtype}; supported: {', '.join(FILE_DTYPES)}")
    if tensor.dim() == 2 and dtype != "fp32":
        return StoredTensor(name, QuantizedMatrix(dtype, tensor.contiguous(), None, tensor.shape[1]), dtype)
    return StoredTensor(name, tensor.float(), dtype)


def in_our_format(hf: Mapping[str, Any], folder: Path) -> bool:
    """Whether config.json says that the folder has our names and layout. Raises ValueError for a format that is not known."""
    if FORMAT_KEY not in hf:
        return False
    found = hf[FORMAT_KEY]
    require(found == INT8_ROWS, f"{folder / 'config.json'}: {FORMAT_KEY} {found!r} is not supported; supported: {INT8_ROWS}")
    return True


def our_tensors(folder: Path) -> Iterator[StoredTensor]:
    """Tensors of a folder in our format, by our names. Raises ValueError for scales that are missing, misshapen or left over."""
    path = folder / "model.safetensors"
    tensors = mapped_safetensors(path)
    scales = {name.removesuffix(".scale"): tensors.pop(name) for name in list(tensors) if name.endswith(".scale")}
    for name, tensor in tensors.items():
        if tensor.dtype != torch.int8:
            yield as_stored(name, tensor, path)
            continue
        scale = scales.pop(name, None)
        if scale is None or scale.shape != tensor.shape[:1]:
            raise ValueError(f"{path}: {name!r} is int8 [{', '.join(map(str, tensor.shape))}] without a scale for each row")
        yield StoredTensor(name, QuantizedMatrix("int8", tensor, scale, tensor.shape[1]), "int8")
    require(not scales, f"{path}: scales without their tensor: {', '.join(sorted(scales)[:5])}")
