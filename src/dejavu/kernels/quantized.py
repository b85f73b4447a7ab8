"""A matrix that keeps the form it is stored in, from the file to the engine that packs it.

In: the numbers of a grid as a file, an adapter or an engine's dtype has them. Out: fp32 values, of all rows or of some. A grid is

    int8      int8 [rows, columns] and an fp32 scale for each row (quantize.py)
    int4      two values in a byte, uint8 [rows, half the columns], and an fp16 scale for each group of a row (quantize.py)
    fp16      fp16 [rows, columns]
    bf16      bf16 [rows, columns]
    q4_1 ...  any type of GGUF by its name in lower case: the bytes of each row as the file has them, uint8 [rows, bytes]
    w4_fp16   and w4_bf16, w8_fp16, w8_bf16, with zero points, as GPTQ, AWQ and compressed-tensors have them: uint8 [rows, bytes], for 32
              values scale * (q - zero) the scale, fp16 or bf16, zero as int8, and q: 16 bytes of 0 .. 15 as in q4_1, or int8

What only has these fp32 values computes with the same numbers as what reads the grid. What is stored may be a view of a mapped file:
nobody writes into it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dejavu.kernels.memory import give_back_pages
from dejavu.kernels.quantize import GROUP, dequantize_groups, dequantize_rows, quantize_groups, quantize_rows

FLOATS = {"fp16": torch.float16, "bf16": torch.bfloat16}
BLOCKS = ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1")  # types of GGUF that a matrix is rounded to: 32 values of a row have a scale
VALUE_BYTES = {"fp64": 8.0, "fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5 + 2 / GROUP}
ZERO_POINTS = {  # grids with zero points: bits of a value, and the type of its scale
    "w4_fp16": (4, torch.float16),
    "w4_bf16": (4, torch.bfloat16),
    "w8_fp16": (8, torch.float16),
    "w8_bf16": (8, torch.bfloat16),
}
GGUF_ROW = 1 << 14  # values of a row that the gguf package is given, at most
BLOCK = 1 << 22  # values that are dequantised at a time where a product is made row by row


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class QuantizedMatrix:
    """grid, values, scales (None: within the values): see above. columns: of a stored row.

    order: int64, the stored row that each row is; None: all of them in order. transposed: the matrix is the transpose of these rows, as
    `down` of a checkpoint that holds a row for each output.
    """

    grid: str
    values: Tensor
    scales: Tensor | None
    columns: int
    transposed: bool = False
    order: Tensor | None = None

    @staticmethod
    def of(matrix: Matrix, grid: str) -> QuantizedMatrix:
        """A matrix [rows, columns] rounded to int8, int4, fp16, bf16 or one of BLOCKS, some rows at a time."""
        if isinstance(matrix, Tensor) or matrix.transposed:
            whole = wide(matrix)
            parts = [QuantizedMatrix._of(whole[rows], grid) for rows in blocks(*matrix.shape)]
        else:
            parts = [QuantizedMatrix._of(matrix.dequantize(rows), grid) for rows in blocks(*matrix.shape)]
        if isinstance(matrix, QuantizedMatrix):  # read once
            for tensor in matrix.tensors:
                give_back_pages(tensor)
        found = parts[0] if len(parts) == 1 else stacked(parts)
        assert isinstance(found, QuantizedMatrix)
        return found

    @staticmethod
    def _of(matrix: Tensor, grid: str) -> QuantizedMatrix:
        columns = matrix.shape[1]
        match grid:
            case "int8":
                q, scale = quantize_rows(matrix)
                return QuantizedMatrix(grid, q, scale, columns)
            case "int4":
                q, scale = quantize_groups(matrix)
                return QuantizedMatrix(grid, packed_nibbles(q), scale, columns)
            case "fp16" | "bf16":
                return QuantizedMatrix(grid, matrix.to(FLOATS[grid]), None, columns)
        return QuantizedMatrix(grid, _blocks_of(matrix, grid), None, columns)

    @property
    def shape(self) -> tuple[int, int]:
        rows = self.values.shape[0] if self.order is None else len(self.order)
        return (self.columns, rows) if self.transposed else (rows, self.columns)

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.values,) if self.scales is None else (self.values, self.scales)

    def int8_tensors(self, name: str) -> dict[str, Tensor]:
        """What an adapter's file holds of an int8 matrix: its rows, and their scales."""
        assert self.grid == "int8" and self.scales is not None and self.order is None, f"{name} is {self.grid}"
        return {name: self.values.cpu().contiguous(), f"{name}.scale": self.scales.cpu().contiguous()}

    def numel(self) -> int:
        return math.prod(self.shape)

    def to(self, device: torch.device) -> QuantizedMatrix:
        """The matrix on that device; itself where it is there already."""
        if self.device == device:
            return self
        values, scales, order = (None if part is None else part.to(device) for part in (self.values, self.scales, self.order))
        return dataclasses.replace(self, values=values, scales=scales, order=order)

    def swapped(self) -> QuantizedMatrix:
        """Its transpose, of the same stored rows."""
        return dataclasses.replace(self, transposed=not self.transposed)

    def rows(self, rows: slice | Tensor) -> QuantizedMatrix:
        """Some rows, as a view of what is stored."""
        assert not self.transposed, "rows of a transposed matrix lie in no order"
        if self.order is not None or isinstance(rows, Tensor):
            return dataclasses.replace(self, order=rows if self.order is None else self.order[rows])
        return dataclasses.replace(self, values=self.values[rows], scales=None if self.scales is None else self.scales[rows])

    def in_order(self) -> QuantizedMatrix:
        """The same with its rows stored in their order: itself, or a copy."""
        if self.order is None:
            return self
        values, scales = self.values[self.order], None if self.scales is None else self.scales[self.order]
        return dataclasses.replace(self, values=values, scales=scales, order=None)

    def dequantize(self, rows: slice | Tensor | None = None) -> Tensor:
        """The values fp32, all or of some rows."""
        if self.transposed:
            whole = self.swapped().in_order()._stored().T
            return (whole if rows is None else whole[rows]).contiguous()
        return (self if rows is None else self.rows(rows)).in_order()._stored()

    def at(self, row_N: Tensor, column_N: Tensor) -> Tensor:
        """The values fp32 [N] at these places: of a type of GGUF only the blocks that they lie in are dequantised."""
        if self.transposed:
            return self.swapped().at(column_N, row_N)
        row_N = row_N if self.order is None else self.order[row_N]
        match self.grid:
            case "int8":
                assert self.scales is not None
                return self.values[row_N, column_N].float() * self.scales[row_N]
            case "int4":
                assert self.scales is not None
                nibbles = self.values[row_N, column_N // 2] >> column_N % 2 * 4 & 15
                return (nibbles.float() - 8) * self.scales[row_N, column_N // GROUP].float()
            case "fp16" | "bf16":
                return self.values[row_N, column_N].float()
        size, size_bytes = gguf_block(self.grid)
        blocks_N = self.values.unflatten(1, (-1, size_bytes))[row_N, column_N // size]
        return dataclasses.replace(self, values=blocks_N, columns=size, order=None)._stored()[torch.arange(len(row_N)), column_N % size]

    def is_finite(self) -> bool:
        """Whether no value is NaN or infinite."""
        match self.grid:
            case "int8" | "int4":
                assert self.scales is not None
                return bool(self.scales.isfinite().all())
            case "fp16" | "bf16":
                parts = (self.values[rows] for rows in blocks(*self.values.shape))
                return all(bool(torch.stack(torch.aminmax(part)).isfinite().all()) for part in parts)
        if self.grid in SCALES_AT:  # integers times scales are finite where the scales are
            begin, end = SCALES_AT[self.grid]
            scales = self.values.unflatten(1, (-1, gguf_block(self.grid)[1]))[:, :, begin:end]
            return all(bool(_halves(scales[rows]).isfinite().all()) for rows in blocks(*self.values.shape))
        stored = dataclasses.replace(self, transposed=False, order=None)
        return all(bool(stored.dequantize(rows).isfinite().all()) for rows in blocks(len(self.values), self.columns))

    def _stored(self) -> Tensor:
        match self.grid:
            case "int8":
                assert self.scales is not None
                return dequantize_rows(self.values, self.scales)
            case "int4":
                assert self.scales is not None
                return dequantize_groups(self.integers(), self.scales)
            case "fp16" | "bf16":
                return self.values.float()
        return _GGUF.get(self.grid, _by_gguf(self.grid))(self.values)

    def integers(self) -> Tensor:
        """The int8 [stored rows, columns] of int8 and int4."""
        return self.values if self.grid == "int8" else unpacked_nibbles(self.values, self.columns)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Stacked:
    """The rows of several matrices one below the other, each as it is held: q, k and v of a layer."""

    parts: tuple[Matrix, ...]

    @property
    def grid(self) -> str:
        return "/".join(dict.fromkeys(part.grid if isinstance(part, QuantizedMatrix) else "fp32" for part in self.parts))

    @property
    def shape(self) -> tuple[int, int]:
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(each for part in self.parts for each in ((part,) if isinstance(part, Tensor) else part.tensors))

    def numel(self) -> int:
        return math.prod(self.shape)

    def to(self, device: torch.device) -> Stacked:
        return Stacked(tuple(part.to(device) for part in self.parts))

    def rows(self, rows: slice) -> Matrix:
        """Rows of one part, as a view."""
        first, last = rows.start, rows.stop
        for part in self.parts:
            if first >= 0 and last <= part.shape[0]:
                within = slice(first, last)
                return part[within] if isinstance(part, Tensor) else part.rows(within)
            first, last = first - part.shape[0], last - part.shape[0]
        raise AssertionError(f"rows {rows.start} .. {rows.stop} lie in more than one part")

    def dequantize(self) -> Tensor:
        """The values fp32."""
        return torch.cat([wide(part).float() for part in self.parts])


Matrix = Tensor | QuantizedMatrix
AnyMatrix = Matrix | Stacked


def wide(matrix: AnyMatrix) -> Tensor:
    """The matrix as a tensor: itself, or its values dequantised to fp32."""
    return matrix if isinstance(matrix, Tensor) else matrix.dequantize()


def cast(matrix: Matrix, dtype: torch.dtype, *, copy: bool = False) -> Tensor:
    """The values as a tensor of that dtype, those of fp16 and bf16 without fp32 in between. copy: always in memory of its own."""
    if not isinstance(matrix, QuantizedMatrix) or matrix.grid not in FLOATS:
        return wide(matrix).to(dtype, copy=copy)
    rows = matrix.in_order().values
    if not (copy or matrix.transposed):
        return rows.to(dtype)
    return torch.empty(matrix.shape, dtype=dtype, device=matrix.device).copy_(rows.T if matrix.transposed else rows)


def rounded_to(matrix: Matrix, dtype: str) -> Matrix:
    """The matrix with the values that an engine of that dtype computes with; itself where it has them.

    dtype: fp32, fp16, bf16, int8, int4, one of BLOCKS, or stored: as the matrix is held.
    """
    # Scales of int8 and int4 belong to rows: those of a matrix that is held by columns are others.
    as_held = dtype in (*FLOATS, *BLOCKS) or not (isinstance(matrix, QuantizedMatrix) and matrix.transposed)
    if dtype in ("fp32", "stored") or (isinstance(matrix, QuantizedMatrix) and matrix.grid == dtype and as_held):
        return matrix
    if isinstance(matrix, QuantizedMatrix) and matrix.transposed and dtype in FLOATS:  # a block of stored rows at a time
        return QuantizedMatrix.of(matrix.swapped(), dtype).swapped()
    return QuantizedMatrix.of(matrix, dtype)


def all_rounded_to(matrix: AnyMatrix, dtype: str) -> AnyMatrix:
    """`rounded_to` of each part of a Stacked, or of the one matrix."""
    if not isinstance(matrix, Stacked):
        return rounded_to(matrix, dtype)
    parts = tuple(rounded_to(part, dtype) for part in matrix.parts)
    return matrix if all(new is old for new, old in zip(parts, matrix.parts, strict=True)) else Stacked(parts)


def rounded_by_output(matrix: AnyMatrix, dtype: str) -> AnyMatrix:
    """`rounded_to` of a matrix [inputs, outputs]: blocks of GGUF lie along the inputs, so it becomes the transpose of their rows."""
    assert not isinstance(matrix, Stacked), "a map with a row for each input is one matrix"
    if dtype not in BLOCKS or (isinstance(matrix, QuantizedMatrix) and matrix.transposed and matrix.grid == dtype):
        return rounded_to(matrix, dtype)
    return QuantizedMatrix.of(matrix.T if isinstance(matrix, Tensor) else matrix.swapped(), dtype).swapped()


def same_values(one: Matrix, other: Matrix) -> bool:
    """Whether two matrices of one shape are equal, a block of rows at a time."""

    def part(matrix: Matrix, rows: slice) -> Tensor:
        return matrix[rows] if isinstance(matrix, Tensor) else matrix.dequantize(rows)

    return all(torch.equal(part(one, rows), part(other, rows)) for rows in blocks(*one.shape))


def stacked(parts: Sequence[Matrix]) -> Matrix:
    """The rows of several matrices as one: in their grid where all have the same, else as a tensor."""
    held = [part.in_order() for part in parts if isinstance(part, QuantizedMatrix) and not part.transposed]
    if len(held) < len(parts) or len({part.grid for part in held}) > 1:
        return torch.cat([wide(part) for part in parts])
    scales = [part.scales for part in held if part.scales is not None]
    values = torch.cat([part.values for part in held])
    return dataclasses.replace(held[0], values=values, scales=torch.cat(scales) if scales else None)


def joined(parts: Sequence[Matrix]) -> AnyMatrix:
    """The same without a copy of what is held in a grid: a Stacked, or one tensor."""
    return torch.cat([wide(part) for part in parts]) if all(isinstance(part, Tensor) for part in parts) else Stacked(tuple(parts))


def linear(x: Tensor, matrix: AnyMatrix, bias: Tensor | None) -> Tensor:
    """x [.., I] times the rows of a matrix [O, I]: [.., O]. Of a quantised one a block of rows is dequantised at a time."""
    if isinstance(matrix, Tensor):
        return F.linear(x, matrix, bias)
    if isinstance(matrix, Stacked):
        sizes = [part.shape[0] for part in matrix.parts]
        biases = [None] * len(sizes) if bias is None else bias.split(sizes)
        return torch.cat([linear(x, part, own) for part, own in zip(matrix.parts, biases, strict=True)], dim=-1)
    if matrix.transposed:
        return F.linear(x, matrix.dequantize(), bias)
    parts = [F.linear(x, matrix.dequantize(rows), None if bias is None else bias[rows]) for rows in blocks(*matrix.shape)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def linear_by_input(x: Tensor, matrix: AnyMatrix, bias: Tensor | None) -> Tensor:
    """x [.., I] times a matrix [I, O]: [.., O]. Of one that is stored by output a block of outputs is dequantised at a time."""
    if isinstance(matrix, QuantizedMatrix) and matrix.transposed:
        return linear(x, matrix.swapped(), bias)
    y = x @ wide(matrix)
    return y if bias is None else y + bias


def blocks(rows: int, columns: int) -> Iterator[slice]:
    """The rows in parts of at most BLOCK values, each of a power of two: a product then has the bits of the whole one (MKL's edges are rows
    that do not fill a vector)."""
    step = 1 << (max(1, BLOCK // columns).bit_length() - 1)
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def packed_nibbles(q: Tensor) -> Tensor:
    """uint8 [rows, half the columns] of int8 [rows, columns] of -8 .. 7: each byte has two columns, the first one in its low half."""
    even, odd = (F.pad(q, (0, q.shape[1] % 2)) + 8).to(torch.uint8).unflatten(1, (-1, 2)).unbind(2)
    return even | odd << 4


def unpacked_nibbles(packed: Tensor, columns: int) -> Tensor:
    """The int8 [rows, columns] that `packed_nibbles` packed."""
    return (torch.stack([packed & 15, packed >> 4], dim=2).flatten(1)[:, :columns].to(torch.int8) - 8).contiguous()


def packed_blocks(grid: str, q: Tensor, scale: Tensor, minimum: Tensor) -> QuantizedMatrix:
    """Blocks of q4_0, q4_1 or q8_0 of int8 [rows, columns] (-8 .. 7, 0 .. 15, any), fp16 scales and minima [rows, blocks]."""
    heads = [scale, minimum] if grid == "q4_1" else [scale]
    body = q.unflatten(1, (-1, 32))
    if grid == "q8_0":
        quants = body.view(torch.uint8)
    else:
        low, high = (body + (8 if grid == "q4_0" else 0)).view(torch.uint8).split(16, dim=2)
        quants = low | high << 4
    raw = torch.cat([*(part.half()[:, :, None].view(torch.uint8) for part in heads), quants], dim=2)
    return QuantizedMatrix(grid, raw.flatten(1), None, q.shape[1])


def packed_groups(q: Tensor, scale: Tensor, zero: Tensor, bits: int) -> QuantizedMatrix:
    """A grid with zero points of int8 q [rows, columns] (of 4 bits 0 .. 15), fp16 or bf16 scales and int8 zeros [rows, blocks]."""
    grid = next(name for name, form in ZERO_POINTS.items() if form == (bits, scale.dtype))
    quants = q.unflatten(1, (-1, 32)).view(torch.uint8)
    if bits == 4:
        low, high = quants.split(16, dim=2)
        quants = low | high << 4
    raw = torch.cat([scale.contiguous()[:, :, None].view(torch.uint8), zero.contiguous()[:, :, None].view(torch.uint8), quants], dim=2)
    return QuantizedMatrix(grid, raw.flatten(1), None, q.shape[1])


def _zero_points(grid: str) -> Callable[[Tensor], Tensor]:
    """Blocks of 32 values: scale, zero as int8, then 16 bytes, whose low halves are the first 16 values, or int8."""
    bits, kind = ZERO_POINTS[grid]

    def dequantized(raw: Tensor) -> Tensor:
        scale, zero, q = raw.unflatten(1, (-1, 3 + 4 * bits)).split((2, 1, 4 * bits), dim=2)
        values = torch.stack([q & 15, q >> 4], dim=2).flatten(2) if bits == 4 else q.view(torch.int8)
        return values.float().sub_(zero.view(torch.int8).float()).mul_(scale.contiguous().view(kind).float()).flatten(1)

    return dequantized


def _q4_0(raw: Tensor) -> Tensor:
    """Blocks of 32 values: scale fp16, then 16 bytes, whose low halves are the first 16 values, each 8 more."""
    scale, q = raw.unflatten(1, (-1, 18)).split((2, 16), dim=2)
    return torch.stack([q & 15, q >> 4], dim=2).flatten(2).float().sub_(8).mul_(_halves(scale)).flatten(1)


def _q4_1(raw: Tensor) -> Tensor:
    """Blocks of 32 values: scale and minimum fp16, then 16 bytes, whose low halves are the first 16 values."""
    scale, minimum, q = raw.unflatten(1, (-1, 20)).split((2, 2, 16), dim=2)
    values = torch.stack([q & 15, q >> 4], dim=2).flatten(2).float()
    return values.mul_(_halves(scale)).add_(_halves(minimum)).flatten(1)


def _q8_0(raw: Tensor) -> Tensor:
    """Blocks of 32 values: scale fp16, then int8."""
    scale, q = raw.unflatten(1, (-1, 34)).split((2, 32), dim=2)
    return q.view(torch.int8).float().mul_(_halves(scale)).flatten(1)


def _q4_k(raw: Tensor) -> Tensor:
    """Blocks of 256 values: fp16 scales of scales and of minima, 8 + 8 of 6 bits each, then nibbles, of 64 values in 32 bytes."""
    scale, minimum, sub, q = raw.unflatten(1, (-1, 144)).split((2, 2, 12, 128), dim=2)
    q = q.unflatten(2, (4, 32))
    values = torch.stack([q & 15, q >> 4], dim=3).flatten(2, 3).float()
    return _two_levels(values, scale, minimum, sub)


def _q5_k(raw: Tensor) -> Tensor:
    """The same with a fifth bit: bit b of byte i belongs to value i of the b-th 32."""
    scale, minimum, sub, high, q = raw.unflatten(1, (-1, 176)).split((2, 2, 12, 32, 128), dim=2)
    q = q.unflatten(2, (4, 32))
    bits = high[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=raw.device)[:, None] & 1
    values = (torch.stack([q & 15, q >> 4], dim=3).flatten(2, 3) | bits << 4).float()
    return _two_levels(values, scale, minimum, sub)


def _two_levels(values: Tensor, scale: Tensor, minimum: Tensor, sub: Tensor) -> Tensor:
    """values [.., 8, 32] times their scales, less their minima. Four of each have a byte, whose upper bits belong to the other four."""
    first, second, rest = sub.split(4, dim=2)
    scales = torch.cat([first & 63, (rest & 15) | (first >> 6) << 4], dim=2).float() * _halves(scale)
    minima = torch.cat([second & 63, (rest >> 4) | (second >> 6) << 4], dim=2).float() * _halves(minimum)
    return values.mul_(scales[..., None]).sub_(minima[..., None]).flatten(1)


def _q6_k(raw: Tensor) -> Tensor:
    """Blocks of 256 values in two halves: nibbles, two more bits, an int8 scale for each 16 values, and one fp16 for all."""
    low, high, sub, scale = raw.unflatten(1, (-1, 210)).split((128, 64, 16, 2), dim=2)
    low, high = low.unflatten(2, (2, 2, 32)), high.unflatten(2, (2, 1, 32))
    nibbles = torch.stack([low & 15, low >> 4], dim=3).flatten(3, 4)  # [.., half, 4, 32]
    bits = high >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=raw.device)[:, None] & 3
    values = (nibbles | bits << 4).flatten(2).float().sub_(32).unflatten(2, (16, 16))
    return values.mul_((sub.view(torch.int8).float() * _halves(scale))[..., None]).flatten(1)


def gguf_block(grid: str) -> tuple[int, int]:
    """How many values, and how many bytes, a block of a type of GGUF, or of a grid with zero points, has."""
    if grid in ZERO_POINTS:
        return 32, 3 + 4 * ZERO_POINTS[grid][0]
    import gguf  # whoever has such values has the package that knows them

    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[grid.upper()]]


def bytes_of_value(kind: str) -> float:
    """What a value of a large matrix takes in memory, its share of scales included; a K type's small scales are bytes there, not 6 bits."""
    if kind in VALUE_BYTES:
        return VALUE_BYTES[kind]
    size, size_bytes = gguf_block(kind)
    return size_bytes / size + (1 / 64 if kind in ("q4_k", "q5_k") else 0)


def check_blocks(columns: int, grid: str) -> None:
    """Raise ValueError where rows of so many values are not whole blocks of one of BLOCKS."""
    size, _ = gguf_block(grid)
    if columns % size:
        raise ValueError(f"rows of {columns} values are not cut into the blocks of {size} that {grid} has; choose int8 or int4")


def _blocks_of(matrix: Tensor, grid: str) -> Tensor:
    """uint8 [rows, bytes] of a matrix rounded to one of BLOCKS by the package's rule."""
    import gguf

    check_blocks(matrix.shape[1], grid)
    raw = gguf.quants.quantize(matrix.float().cpu().numpy(), gguf.GGMLQuantizationType[grid.upper()])
    return torch.from_numpy(raw).to(matrix.device)


def _halves(pairs: Tensor) -> Tensor:
    """The fp16 that the two bytes of the last axis are, in fp32."""
    return pairs.contiguous().view(torch.float16).float()


def _by_gguf(grid: str) -> Callable[[Tensor], Tensor]:
    def dequantized(raw: Tensor) -> Tensor:
        import gguf

        size, size_bytes = gguf_block(grid)
        # The package takes 16 rows at a time, whatever their length: short ones are put behind one another.
        together = math.gcd(raw.numel() // size_bytes, max(1, GGUF_ROW // size)) * size_bytes
        with np.errstate(all="ignore"):  # infinite scales are the caller's to find
            values = gguf.quants.dequantize(raw.cpu().numpy().reshape(-1, together), gguf.GGMLQuantizationType[grid.upper()])
        return torch.from_numpy(values).view(len(raw), -1).to(raw.device)

    return dequantized


# The others are read by the package itself, which is slower.
_GGUF: dict[str, Callable[[Tensor], Tensor]] = {
    "q4_0": _q4_0, "q4_1": _q4_1, "q8_0": _q8_0, "q4_k": _q4_k, "q5_k": _q5_k, "q6_k": _q6_k,
}  # fmt: skip
_GGUF |= {grid: _zero_points(grid) for grid in ZERO_POINTS}

# Where in a block the fp16 lie that all of its values are multiples of.
SCALES_AT = {
    "q4_0": (0, 2),
    "q4_1": (0, 4),
    "q5_0": (0, 2),
    "q5_1": (0, 4),
    "q8_0": (0, 2),
    "q2_k": (80, 84),
    "q3_k": (108, 110),
    "q4_k": (0, 4),
    "q5_k": (0, 4),
    "q6_k": (208, 210),
    "w4_fp16": (0, 2),
    "w8_fp16": (0, 2),
}
