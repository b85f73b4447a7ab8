"""Which neurons each of several rows selects, by both halves of their predictor, and the list of those that some row selects.

    project_rows   h[b, r] = scale[r] (A[r] . x[b])
    select_rows    for each neuron a row mask, bit b set where row b selects it; the list of neurons that some row selects

A row's selection depends on that row alone; the list is how weights are fetched. Either half may be further programs of another kernel's
grid: `project_block` of the products with q, k and v, `select_rows_block` of attention, beside which it takes no time of its own.

Bytes that any implementation moves: A, B, scales and biases, x of each row, the row masks and the list.

Letters: B rows  D model  R rows of A  F neurons  P predictor rank
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from dejavu.kernels.cuda.common import PredictorScores, Side, begin, exceeds, launch, parts, products, tiles
from dejavu.kernels.cuda.select import WARPS, select_constants

MAX_ROWS = 32  # bits of a row mask


@dataclass(frozen=True, slots=True, kw_only=True)
class UnionScores(PredictorScores):
    """Of a neuron predictor for several rows, O = F; of which slot each row is, int32 [B], where those of `padding` select nothing; and where
    the selection goes: row_mask_F int32 [F], union int32 [F] and count int32 [1] (zero), row_count int32 [B, stride] (zero), of which the
    first column is used."""

    slot_B: Tensor
    padding: int
    row_mask_F: Tensor
    union: Tensor
    count: Tensor
    row_count: Tensor


@triton.jit
def project_block(
    r, matrix, scale, x, out, B, R, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, D3: tl.constexpr, programmatic: tl.constexpr
):
    """One program's row of A, with every x. Weights are loaded before the kernel before has ended."""
    at = r + tl.arange(0, 1)
    live = at < R
    a1, a2, a3 = tiles(matrix, at, live, D, D1, D2, D3)
    factor = tl.load(scale + at)
    begin(programmatic)
    for b in range(0, B):
        x1, x2, x3 = tiles(x, b + tl.arange(0, 1), live, D, D1, D2, D3)
        s = products(a1, a2, a3, tl.reshape(x1, [D1]), tl.reshape(x2, [D2]), tl.reshape(x3, [D3]))
        tl.store(out + b * R + at, s * factor)


@triton.jit
def _project_rows(
    matrix, scale, x, out, B, R, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, D3: tl.constexpr, programmatic: tl.constexpr
):
    project_block(tl.program_id(0), matrix, scale, x, out, B, R, D, D1, D2, D3, programmatic)


@triton.jit
def select_rows_block(
    block, matrix, scale, bias, threshold, h, h_stride, slots, padding, row_mask_F, union, count, row_count, row_stride, B, F,
    P: tl.constexpr, PP: tl.constexpr, BLOCK: tl.constexpr, programmatic: tl.constexpr,
):  # fmt: skip
    """One program's neurons. Weights are loaded before the kernel before has ended."""
    f = block * BLOCK + tl.arange(0, BLOCK)
    p = tl.arange(0, PP)
    live = f < F
    m = tl.load(matrix + f.to(tl.int64)[:, None] * P + p[None, :], mask=live[:, None] & (p < P)[None, :], other=0).to(tl.float32)
    row_scale = tl.load(scale + f, mask=live, other=0.0)
    row_bias = tl.load(bias + f, mask=live, other=0.0)
    least = tl.load(threshold)
    begin(programmatic)
    mask_bits = tl.zeros([BLOCK], tl.int32)
    for b in range(0, B):
        s = tl.sum(m * tl.load(h + b * h_stride + p, mask=p < P, other=0.0)[None, :], 1) * row_scale + row_bias
        # A row that only fills the bucket selects nothing: it would widen the union.
        chosen = (exceeds(s, least) & live & (tl.load(slots + b) != padding)).to(tl.int32)
        mask_bits = mask_bits | (chosen << b)
        tl.atomic_add(row_count + b * row_stride, tl.sum(chosen, 0), sem="relaxed")
    tl.store(row_mask_F + f, mask_bits, mask=live)
    some = (mask_bits != 0).to(tl.int32)
    place = tl.cumsum(some, 0) - 1
    first = tl.atomic_add(count, tl.sum(some, 0), sem="relaxed")
    tl.store(union + first + place, f, mask=some == 1)


@triton.jit
def _select_rows(
    matrix, scale, bias, threshold, h, h_stride, slots, padding, row_mask_F, union, count, row_count, row_stride, B, F,
    P: tl.constexpr, PP: tl.constexpr, BLOCK: tl.constexpr, programmatic: tl.constexpr,
):  # fmt: skip
    select_rows_block(
        tl.program_id(0), matrix, scale, bias, threshold, h, h_stride, slots, padding, row_mask_F, union, count, row_count, row_stride, B, F,
        P, PP, BLOCK, programmatic,
    )  # fmt: skip


def project_rows(side: Side, x_BD: Tensor, *, programmatic: bool = False) -> None:
    """side.out [B, R] = products of the side's rows with each x."""
    rows, size = x_BD.shape
    first, second, third = parts(size)
    count = side.matrix.shape[0]
    launch(
        _project_rows, (count,), side.matrix, side.scale, x_BD, side.out, rows, count, D=size, D1=first, D2=second, D3=third, num_warps=4,
        programmatic=programmatic,
    )  # fmt: skip


def select_rows_arguments(scores: UnionScores) -> tuple[Tensor | int, ...]:
    rows, neurons = scores.h.shape[0], scores.matrix.shape[0]
    assert rows <= MAX_ROWS
    return (
        scores.matrix, scores.scale, scores.bias, scores.threshold, scores.h, scores.h.stride(0), scores.slot_B, scores.padding,
        scores.row_mask_F, scores.union, scores.count, scores.row_count, scores.row_count.stride(0), rows, neurons,
    )  # fmt: skip


def select_rows(scores: UnionScores, *, programmatic: bool = False) -> None:
    """Fill the row masks, the union with its count, and add each row's count."""
    constants = select_constants(scores, WARPS)
    grid = (triton.cdiv(scores.matrix.shape[0], constants["BLOCK"]),)
    launch(_select_rows, grid, *select_rows_arguments(scores), **constants, num_warps=WARPS, programmatic=programmatic)


def select_rows_definition(scores: UnionScores) -> Tensor:
    """Which neuron each row selects, bool [B, F]."""
    score_BF = (scores.h @ scores.matrix.float().T) * scores.scale + scores.bias
    return ~(score_BF <= scores.threshold)
