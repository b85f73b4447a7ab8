"""Matrices to quantise."""

from __future__ import annotations

import torch
from torch import Tensor

from dejavu.kernels.quantize import GROUP
from dejavu.kernels.quantized import SCALES_AT, ZERO_POINTS, QuantizedMatrix, gguf_block


def random_matrix(rows: int, columns: int, seed: int) -> Tensor:
    """Rows of very different sizes, a row and a group of zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator) * 10 ** torch.linspace(-7, 3, rows)[:, None]
    matrix[rows // 2] = 0
    matrix[-1, : min(GROUP, columns)] = 0
    return matrix


def random_blocks(grid: str, rows: int, columns: int, seed: int = 0) -> QuantizedMatrix:
    """A matrix of a type of GGUF, or of a grid with zero points: blocks of random bytes, whose scales are small."""
    size, size_bytes = gguf_block(grid)
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (rows, columns // size, size_bytes), generator=generator, dtype=torch.uint8)
    begin, end = SCALES_AT.get(grid, (0, 2))
    scales = torch.randn(rows, columns // size, (end - begin) // 2, generator=generator).mul_(0.01)
    raw[:, :, begin:end] = scales.to(scale_type(grid)).view(torch.uint8)
    if grid in ZERO_POINTS and ZERO_POINTS[grid][0] == 4:
        raw[:, :, end] &= 15  # as files have them
    return QuantizedMatrix(grid, raw.flatten(1), None, columns)


def scale_type(grid: str) -> torch.dtype:
    """Of the scales in a block."""
    return ZERO_POINTS[grid][1] if grid in ZERO_POINTS else torch.float16
