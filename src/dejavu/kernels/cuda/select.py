"""The second half of a neuron predictor, its threshold and the compaction of what exceeds it, in one kernel.

    score_f = scale_f (B_f . h) + bias_f;   the list of f with score_f > threshold, in no order, and its length

h [P] is what the A of the predictor gave. A program scores BLOCK neurons and takes its place in the list by one atomic addition
to the counter, which an earlier kernel has set to zero. `ordered` sorts the list afterwards, for runs that must repeat bit for bit.

Bytes that any implementation moves: B, scale and bias of every neuron, and the list.

Letters: F neurons  P predictor rank
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from dejavu.kernels.cuda.common import PredictorScores, begin, exceeds, launch

SCORES = 4096  # products that a warp makes at a time
WARPS = 4
SORT_BLOCK = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class NeuronScores(PredictorScores):
    """Of a neuron predictor, O = F; and where the selection goes: neurons int32 [F], count int32 [1], which holds 0."""

    neurons: Tensor
    count: Tensor


@triton.jit
def select_block(
    block, matrix, scale, bias, threshold, h, neurons, count, F,
    P: tl.constexpr, PP: tl.constexpr, BLOCK: tl.constexpr, programmatic: tl.constexpr,
):  # fmt: skip
    """One program's neurons. Weights are loaded before the kernel before has ended."""
    f = block * BLOCK + tl.arange(0, BLOCK)
    p = tl.arange(0, PP)
    live = f < F
    m = tl.load(matrix + f.to(tl.int64)[:, None] * P + p[None, :], mask=live[:, None] & (p < P)[None, :], other=0)
    row_scale = tl.load(scale + f, mask=live, other=0.0)
    row_bias = tl.load(bias + f, mask=live, other=0.0)
    least = tl.load(threshold)
    begin(programmatic)
    s = tl.sum(m.to(tl.float32) * tl.load(h + p, mask=p < P, other=0.0)[None, :], 1) * row_scale + row_bias
    chosen = (exceeds(s, least) & live).to(tl.int32)
    place = tl.cumsum(chosen, 0) - 1
    first = tl.atomic_add(count, tl.sum(chosen, 0), sem="relaxed")
    tl.store(neurons + first + place, f, mask=chosen == 1)


@triton.jit
def _select(
    matrix, scale, bias, threshold, h, neurons, count, F,
    P: tl.constexpr, PP: tl.constexpr, BLOCK: tl.constexpr, programmatic: tl.constexpr,
):  # fmt: skip
    select_block(tl.program_id(0), matrix, scale, bias, threshold, h, neurons, count, F, P, PP, BLOCK, programmatic)


@triton.jit
def _ordered(neurons, count, marks, out, F, BLOCK: tl.constexpr, programmatic: tl.constexpr):
    """One program: marks what is listed, then lists the marks in order. marks int32 [F] are zero before and after."""
    begin(programmatic)
    total = tl.load(count)
    for first in range(0, total, BLOCK):
        r = first + tl.arange(0, BLOCK)
        tl.store(marks + tl.load(neurons + r, mask=r < total, other=0), 1, mask=r < total)
    tl.debug_barrier()
    base = 0
    for first in range(0, F, BLOCK):
        f = first + tl.arange(0, BLOCK)
        mark = tl.load(marks + f, mask=f < F, other=0)
        tl.store(out + base + tl.cumsum(mark, 0) - 1, f, mask=mark == 1)
        tl.store(marks + f, 0, mask=f < F)
        base += tl.sum(mark, 0)


def select_blocks(scores: PredictorScores, warps: int) -> int:
    """Programs of so many warps that score all neurons."""
    return triton.cdiv(scores.matrix.shape[0], select_constants(scores, warps)["BLOCK"])


def select_constants(scores: PredictorScores, warps: int) -> dict[str, int]:
    """The compile-time sizes of a selection by programs of so many warps, for the kernels that contain one."""
    rank = scores.matrix.shape[1]
    padded = max(16, triton.next_power_of_2(rank))
    return {"P": rank, "PP": padded, "BLOCK": min(256, max(16, warps * SCORES // padded))}


def select_arguments(scores: NeuronScores) -> tuple[Tensor | int, ...]:
    return (
        scores.matrix, scores.scale, scores.bias, scores.threshold, scores.h, scores.neurons, scores.count, scores.matrix.shape[0],
    )  # fmt: skip


def select_token(scores: NeuronScores, *, programmatic: bool = False) -> None:
    """Fill scores.neurons and scores.count, which must hold 0."""
    grid = (select_blocks(scores, WARPS),)
    launch(_select, grid, *select_arguments(scores), **select_constants(scores, WARPS), num_warps=WARPS, programmatic=programmatic)


def order_list(listed_F: Tensor, count: Tensor, marks_F: Tensor, out_F: Tensor) -> None:
    """The first `count` int32 [1] of indices below F in rising order, into out_F int32. marks_F int32 [F] holds zeros, and does again
    afterwards."""
    launch(_ordered, (1,), listed_F, count, marks_F, out_F, marks_F.shape[0], BLOCK=SORT_BLOCK, num_warps=4)


def select_definition(scores: NeuronScores) -> Tensor:
    """The selected neurons, int64, in order."""
    score_F = (scores.matrix.float() @ scores.h) * scores.scale + scores.bias
    return (~(score_F <= scores.threshold)).nonzero().squeeze(1)
