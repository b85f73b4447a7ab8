"""A matrix that keeps the form it is stored in, from the file to the engine that packs it.

In: the numbers of a grid as a file, an adapter or an engine's dtype has them. Out: fp32 values, of all rows or of some. A grid is

    int8      int8 [rows, columns] and an fp32 scale for each row (quantize.py)
    int4      two values in a byte, uint8 [rows, half the columns], and an fp16 scale for each group of a row (quantize.py)
    bf16      bf16 [rows, columns]
    q4_1 ...  any type of GGUF by its name in lower case: the bytes of each row as the file has them, uint8 [rows, bytes]

What only has these fp32 values computes with the same numbers as what reads the grid.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dejavu.kernels.quantize import dequantize_groups, dequantize_rows, quantize_groups, quantize_rows

BLOCK = 1 << 22  # values that are dequantised at a time where a product is made row by row


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class QuantizedMatrix:
    """grid, values, scales (None: within the values): see above. columns: of a stored row.

    transposed: the matrix is the transpose of what is stored, as of `down` in a GGUF file, whose groups run along the outputs' rows.
    """

    grid: str
    values: Tensor
    scales: Tensor | None
    columns: int
    transposed: bool = False

    @staticmethod
    def of(matrix: Matrix, grid: str) -> QuantizedMatrix:
        """A matrix [rows, columns] rounded to int8, int4 or bf16, a block of rows at a time."""
        if isinstance(matrix, Tensor) or matrix.transposed:
            whole = wide(matrix)
            parts = [QuantizedMatrix._of(whole[rows], grid) for rows in blocks(*matrix.shape)]
        else:
            parts = [QuantizedMatrix._of(matrix.dequantize(rows), grid) for rows in blocks(*matrix.shape)]
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
        assert grid == "bf16", f"{grid=}"
        return QuantizedMatrix(grid, matrix.bfloat16(), None, columns)

    @property
    def shape(self) -> tuple[int, int]:
        stored = self.values.shape[0], self.columns
        return stored[::-1] if self.transposed else stored

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.values,) if self.scales is None else (self.values, self.scales)

    def int8_tensors(self, name: str) -> dict[str, Tensor]:
        """What an adapter's file holds of an int8 matrix: its rows, and their scales."""
        assert self.grid == "int8" and self.scales is not None, f"{name} is {self.grid}"
        return {name: self.values.cpu().contiguous(), f"{name}.scale": self.scales.cpu().contiguous()}

    def numel(self) -> int:
        return self.values.shape[0] * self.columns

    def to(self, device: torch.device) -> QuantizedMatrix:
        """The matrix on that device; itself where it is there already."""
        if self.device == device:
            return self
        return dataclasses.replace(self, values=self.values.to(device), scales=None if self.scales is None else self.scales.to(device))

    def rows(self, rows: slice | Tensor) -> QuantizedMatrix:
        """Some stored rows, of a slice as views."""
        assert not self.transposed, "rows of a transposed matrix lie in no order"
        return dataclasses.replace(self, values=self.values[rows], scales=None if self.scales is None else self.scales[rows])

    def dequantize(self, rows: slice | Tensor | None = None) -> Tensor:
        """The values fp32, all or of some rows."""
        if self.transposed:
            whole = self._stored().T
            return (whole if rows is None else whole[rows]).contiguous()
        return (self if rows is None else self.rows(rows))._stored()

    def _stored(self) -> Tensor:
        match self.grid:
            case "int8":
                assert self.scales is not None
                return dequantize_rows(self.values, self.scales)
            case "int4":
                assert self.scales is not None
                return dequantize_groups(self.integers(), self.scales)
            case "bf16":
                return self.values.float()
        return _GGUF.get(self.grid, _by_gguf(self.grid))(self.values)

    def integers(self) -> Tensor:
        """The int8 [rows, columns] of int8 and int4."""
        return self.values if self.grid == "int8" else unpacked_nibbles(self.values, self.columns)


Matrix = Tensor | QuantizedMatrix


def wide(matrix: Matrix) -> Tensor:
    """The matrix as a tensor: itself, or its values dequantised to fp32."""
    return matrix.dequantize() if isinstance(matrix, QuantizedMatrix) else matrix


def rounded_to(matrix: Matrix, dtype: str) -> Matrix:
    """The matrix with the values that an engine of that dtype (fp32, bf16, int8, int4) computes with; itself where it has them."""
    if dtype == "fp32" or (isinstance(matrix, QuantizedMatrix) and matrix.grid == dtype and not matrix.transposed):
        return matrix
    return QuantizedMatrix.of(matrix, dtype)


def stacked(parts: Sequence[Matrix]) -> Matrix:
    """The rows of several matrices as one: in their grid where all have the same, else as a tensor."""
    held = [part for part in parts if isinstance(part, QuantizedMatrix) and not part.transposed]
    if len(held) < len(parts) or len({part.grid for part in held}) > 1:
        return torch.cat([wide(part) for part in parts])
    scales = [part.scales for part in held if part.scales is not None]
    values = torch.cat([part.values for part in held])
    return dataclasses.replace(held[0], values=values, scales=torch.cat(scales) if scales else None)


def linear(x: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
    """x [.., I] times the rows of a matrix [O, I]: [.., O]. Of a quantised one a block of rows is dequantised at a time."""
    if isinstance(matrix, Tensor):
        return F.linear(x, matrix, bias)
    parts = [F.linear(x, matrix.dequantize(rows), None if bias is None else bias[rows]) for rows in blocks(*matrix.shape)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


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


def _q4_1(raw: Tensor) -> Tensor:
    """Blocks of 32 values: scale and minimum fp16, then 16 bytes, whose low halves are the first 16 values."""
    scale, minimum, q = raw.unflatten(1, (-1, 20)).split((2, 2, 16), dim=2)
    values = torch.stack([q & 15, q >> 4], dim=2).flatten(2).float()
    return values.mul_(_halves(scale)).add_(_halves(minimum)).flatten(1)


def _q8_0(raw: Tensor) -> Tensor:
    """Blocks of 32 values: scale fp16, then int8."""
    scale, q = raw.unflatten(1, (-1, 34)).split((2, 32), dim=2)
    return q.view(torch.int8).float().mul_(_halves(scale)).flatten(1)


def _halves(pairs: Tensor) -> Tensor:
    """The fp16 that the two bytes of the last axis are, in fp32."""
    return pairs.contiguous().view(torch.float16).float()


def _by_gguf(grid: str) -> Callable[[Tensor], Tensor]:
    def dequantized(raw: Tensor) -> Tensor:
        import gguf  # whoever has such values has the package that read them

        return torch.from_numpy(gguf.quants.dequantize(raw.cpu().numpy(), gguf.GGMLQuantizationType[grid.upper()])).to(raw.device)

    return dequantized


_GGUF: dict[str, Callable[[Tensor], Tensor]] = {"q4_1": _q4_1, "q8_0": _q8_0}  # the others by the package itself, which is slower
