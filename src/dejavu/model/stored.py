"""Tensors as files hold them, and folders in a format of our own.

In: an open safetensors file of a checkpoint, or a folder whose config.json has `dejavu_format`. Out: StoredTensors, fp32 or in a grid of
their own. In such a folder a matrix `<name>` [rows, columns] of our names and layout is

    int8 [rows, columns]                with `<name>.scale` fp32 [rows]
    uint8 [rows, half the columns]      with `<name>.scale` fp16 [rows, groups] (int4), and `<name>.columns` where these are odd
    fp16, bf16 or fp32 [rows, columns]
    uint8 [rows, bytes of a row]        named `<name>.q8_0` or another type of GGUF, the blocks as such a file has them;
                                        `<name>.transposed.q8_0` for the rows of the matrix's transpose, as o and down have them

the grids of kernels/quantized.py; vectors are fp32. `int8-rows` has no matrix but int8 ones, `grids` any of these.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dejavu.config import require, shown
from dejavu.kernels.dtypes import DTYPE_NAMES
from dejavu.kernels.quantize import GROUP
from dejavu.kernels.quantized import BLOCKS, FLOATS, Matrix, QuantizedMatrix, gguf_block
from dejavu.model.mapped import mapped_safetensors

FILE_DTYPES = ("fp32", "fp16", "bf16")
FORMAT_KEY, INT8_ROWS, GRIDS = "dejavu_format", "int8-rows", "grids"
FORMATS = (INT8_ROWS, GRIDS)
WEIGHTS_FILE = "model.safetensors"
INTEGERS = {torch.int8: "int8", torch.uint8: "int4"}
SCALES = {"int8": torch.float32, "int4": torch.float16}
ENDS = (".scale", ".columns")  # of the names of what belongs to a matrix
TRANSPOSED = ".transposed"


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
    require(found in FORMATS, f"{folder / 'config.json'}: {FORMAT_KEY} {found!r} is not supported; supported: {', '.join(FORMATS)}")
    return True


def our_tensors(folder: Path) -> Iterator[StoredTensor]:
    """Tensors of a folder in our format, by our names. Raises ValueError for scales that are missing, misshapen or left over."""
    path = folder / WEIGHTS_FILE
    tensors = mapped_safetensors(path)
    scales, columns = ({name.removesuffix(end): tensors.pop(name) for name in list(tensors) if name.endswith(end)} for end in ENDS)
    for name, tensor in tensors.items():
        own, kind = _block_type(name)
        if kind is not None:
            yield StoredTensor(own.removesuffix(TRANSPOSED), _blocks(name, kind, tensor, path, transposed=own.endswith(TRANSPOSED)), kind)
            continue
        grid = INTEGERS.get(tensor.dtype)
        if grid is None:
            yield as_stored(name, tensor, path)
            continue
        require(tensor.dim() == 2, f"{path}: {name!r} is {grid} {list(tensor.shape)}, which is no matrix")
        scale, wide = scales.pop(name, None), tensor.shape[-1] if grid == "int8" else 2 * tensor.shape[-1]
        if name in columns:
            stated = columns.pop(name)
            odd = grid == "int4" and stated.numel() == 1 and int(stated) == wide - 1
            require(odd, f"{path}: {name + ENDS[1]!r} is {shown(stated.tolist())}, and {name!r} has {tensor.shape[-1]} bytes a row")
            wide -= 1
        expected = tensor.shape[:1] if grid == "int8" else (*tensor.shape[:1], -(-wide // GROUP))
        if scale is None or scale.shape != expected or scale.dtype != SCALES[grid]:
            each = "each row" if grid == "int8" else f"each {GROUP} values of a row"
            raise ValueError(f"{path}: {name!r} is {grid} [{', '.join(map(str, tensor.shape))}] without a scale for {each}")
        yield StoredTensor(name, QuantizedMatrix(grid, tensor, scale, wide), grid)
    left = sorted(scales) + sorted(columns)
    require(not left, f"{path}: scales without their tensor: {', '.join(left[:5])}")


def _block_type(name: str) -> tuple[str, str | None]:
    """The name of a tensor without a type of GGUF behind it, and that type."""
    own, _, kind = name.rpartition(".")
    return (own, kind) if kind in BLOCKS else (name, None)


def _blocks(name: str, kind: str, tensor: Tensor, path: Path, *, transposed: bool) -> QuantizedMatrix:
    size, size_bytes = gguf_block(kind)
    if tensor.dtype != torch.uint8 or tensor.dim() != 2 or tensor.shape[1] % size_bytes:
        raise ValueError(f"{path}: {name!r} is {tensor.dtype} {list(tensor.shape)}, not rows of blocks of {size_bytes} bytes")
    return QuantizedMatrix(kind, tensor, None, tensor.shape[1] // size_bytes * size, transposed)


def our_sizes(folder: Path) -> Counter[str]:
    """How many values a folder in our format stores as which type, without reading them."""
    sizes: Counter[str] = Counter()
    for name, tensor in mapped_safetensors(folder / WEIGHTS_FILE).items():
        kind = _block_type(name)[1]
        if kind is not None:
            size, size_bytes = gguf_block(kind)
            sizes[kind] += tensor.numel() // size_bytes * size
        elif not name.endswith(ENDS):
            grid = INTEGERS.get(tensor.dtype) or DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype))
            sizes[grid] += tensor.numel() * (2 if grid == "int4" else 1)
    require(sizes.total() > 0, f"{folder / WEIGHTS_FILE} holds no weights; copy or download it again")
    return sizes


def as_our_tensors(name: str, matrix: Matrix) -> dict[str, Tensor]:
    """What a folder in our format holds of a matrix that is held in one of its grids, or of a vector."""
    if isinstance(matrix, Tensor):
        return {name: matrix.detach().cpu().contiguous()}
    held = matrix.in_order()
    if held.grid in BLOCKS:
        return {f"{name}{TRANSPOSED if held.transposed else ''}.{held.grid}": held.values.cpu().contiguous()}
    assert held.grid in (*SCALES, *FLOATS) and not held.transposed, f"{name} is {held.grid}"
    found = {name: held.values.cpu().contiguous()}
    if held.scales is not None:
        found[name + ENDS[0]] = held.scales.cpu().contiguous()
    if held.grid == "int4" and held.columns % 2:
        found[name + ENDS[1]] = torch.tensor([held.columns])
    return found
