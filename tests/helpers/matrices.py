"""Matrices to quantise."""

from __future__ import annotations

import torch
from torch import Tensor

from dejavu.kernels.quantize import GROUP
from dejavu.kernels.quantized import SCALES_AT, QuantizedMatrix, gguf_block


def random_matrix(rows: int, columns: int, seed: int) -> Tensor:
    """Rows of very different sizes, a row and a group of zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator) * 10 ** torch.linspace(-7, 3, rows)[:, None]
    matrix[rows // 2] = 0
    matrix[-1, : min(GROUP, columns)] = 0
    return matrix


def random_blocks(grid: str, rows: int, columns: int, seed: int = 0) -> QuantizedMatrix:
    """A matrix of a type of GGUF: blocks of random bytes, whose fp16 scales are small."""
    size, size_bytes = gguf_block(grid)
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (rows, columns // size, size_bytes), generator=generator, dtype=torch.uint8)
    begin, end = SCALES_AT.get(grid, (0, 2))
    scales = torch.randn(rows, columns // size, (end - begin) // 2, generator=generator).mul_(0.01).half()
    raw[:, :, begin:end] = scales.view(torch.uint8)
    return QuantizedMatrix(grid, raw.flatten(1), None, columns)
