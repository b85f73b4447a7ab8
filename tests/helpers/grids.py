"""Tiny models whose matrices are blocks, of GGUF or with zero points: random bytes, at the size that keeps activations near 1."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dejavu.kernels.quantized import SCALES_AT, Matrix, QuantizedMatrix, gguf_block, joined
from dejavu.model.layers import Held
from dejavu.model.transformer import Transformer
from helpers.matrices import random_blocks, scale_type

GRIDS = ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k", "q5_k", "q6_k", "w4_fp16", "w8_bf16")
ALL = ("embed", "head", "q", "k", "v", "o", "gate", "up", "down")
# No size is another one, and but for the K types none is a multiple of a vector.
_SIZES = {"hidden_size": 96, "num_heads": 5, "num_kv_heads": 5, "head_dim": 32, "intermediate_size": 224, "vocab_size": 101}
_K_SIZES = {"hidden_size": 512, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "intermediate_size": 768, "vocab_size": 101}


def sizes_of(grid: str) -> dict[str, Any]:
    """Fields of a ModelConfig that this grid can hold."""
    return dict(_K_SIZES if gguf_block(grid)[0] == 256 else _SIZES)


def blocks_of(grid: str, rows: int, columns: int, seed: int) -> QuantizedMatrix:
    """`random_blocks` with values of about columns^-0.5."""
    made = random_blocks(grid, rows, columns, seed)
    begin, end = SCALES_AT.get(grid, (0, 2))
    raw = made.values.unflatten(1, (-1, gguf_block(grid)[1])).clone()
    scales = raw[:, :, begin:end].contiguous().view(scale_type(grid)).float() * (columns**-0.5 / made.dequantize().std())
    raw[:, :, begin:end] = scales.to(scale_type(grid)).view(torch.uint8)
    return dataclasses.replace(made, values=raw.flatten(1))


def floats_of(grid: str, rows: int, columns: int, seed: int) -> QuantizedMatrix:
    """The same of fp16, bf16, int8 or int4, drawn as fp32 and rounded."""
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * columns**-0.5
    return QuantizedMatrix.of(values, grid)


def in_grid(model: Transformer, grid: str, parts: Sequence[str] = ALL) -> Transformer:
    """The model, these matrices of it in that grid: o and down with a row for each output, q and k with their rows in another order."""
    return held_as(model, {part: grid for part in parts}, blocks_of)


def held_as(model: Transformer, grids: dict[str, str], make: Callable[[str, int, int, int], QuantizedMatrix]) -> Transformer:
    """The same, each part in a grid of its own. make: of (grid, rows, columns, seed)."""
    seeds = iter(range(1, 1000))

    def held(part: str, matrix: Tensor, *, by_input: bool = False) -> Matrix:
        if part not in grids:
            return matrix
        rows, columns = matrix.shape[::-1] if by_input else matrix.shape
        made = make(grids[part], rows, columns, next(seeds))
        if part in ("q", "k"):
            order = torch.randperm(rows, generator=torch.Generator().manual_seed(rows))
            made = dataclasses.replace(made, order=order)
        return made.swapped() if by_input else made

    tables: tuple[tuple[str, Held | None], ...] = (("embed", model.embed), ("head", model.head))
    for part, module in tables:
        if module is not None:
            module.hold(held(part, module.weight))
    for block in model.blocks:
        block.qkv.hold(joined([held(part, rows.weight) for part, rows in (("q", block.q), ("k", block.k), ("v", block.v))]))
        for part, module in (("gate", block.gate), ("up", block.up), ("o", block.o), ("down", block.down)):
            if module is not None:
                module.hold(held(part, module.weight, by_input=part in ("o", "down")))
    return model
