"""Matrices to quantise."""

from __future__ import annotations

import torch
from torch import Tensor

from dejavu.kernels.quantize import GROUP


def random_matrix(rows: int, columns: int, seed: int) -> Tensor:
    """Rows of very different sizes, a row and a group of zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator) * 10 ** torch.linspace(-7, 3, rows)[:, None]
    matrix[rows // 2] = 0
    matrix[-1, : min(GROUP, columns)] = 0
    return matrix
