"""Products of one token's normed residual with the rows of a matrix: q, k and v together, or the head.

    x = norm(y + delta);  out[n] = W[n] . x + bias[n]        for the rows n that are needed

A persistent grid holds x in registers and loads its next rows while it computes with the last ones. The matrix is [Q + N, D]:
the N rows behind the first Q are always computed, and come first, so that their loads need nothing that the kernel before
writes. Of the Q rows of queries only those of selected head groups are: every program scores the groups itself,

    s_g = scale_g (B_g . h) + c_g;   selected: s_g > threshold, or the best one

from the h that the A of their predictor gave, and program 0 writes list and count. `side` rows are products of the same x.

Bytes that any implementation moves: the needed rows.

Letters: D model  G head groups  R rows at a time  P predictor rank
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from dejavu.kernels.cuda.common import (
    AS_IT_IS,
    BlockOutput,
    GridShape,
    NormWeights,
    PredictorScores,
    Side,
    begin,
    exceeds,
    launch,
    multiprocessors,
    norm_definition,
    norm_parts,
    normed,
    or_any,
    parts,
    products,
    residual,
    row_bias,
    side_rows,
    tiles,
    zero,
)
from dejavu.kernels.cuda.shapes import grid_shape


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupScores(PredictorScores):
    """Of a head predictor, O = G; and where the selection goes: groups int32 [G], count int32 [1]."""

    groups: Tensor
    count: Tensor


@triton.jit
def selected_groups(matrix, scale, bias, threshold, h, G: tl.constexpr, GP: tl.constexpr, P: tl.constexpr, PP: tl.constexpr):
    """Mask int32 [GP] of the selected groups, and where each comes in the list."""
    g = tl.arange(0, GP)
    p = tl.arange(0, PP)
    m = tl.load(matrix + g[:, None] * P + p[None, :], mask=(g < G)[:, None] & (p < P)[None, :], other=0).to(tl.float32)
    s = tl.sum(m * tl.load(h + p, mask=p < P, other=0.0)[None, :], 1)
    s = s * tl.load(scale + g, mask=g < G, other=0.0) + tl.load(bias + g, mask=g < G, other=0.0)
    s = tl.where(g < G, s, float("-inf"))
    chosen = (exceeds(s, tl.load(threshold)) & (g < G)) | (g == tl.argmax(s, 0))
    chosen = chosen.to(tl.int32)
    return chosen, tl.cumsum(chosen, 0) - 1


@triton.jit
def _project(
    y, delta, out_weight, out_eps, out_scale, y_out, cleared, counter, norm_weight, norm_bias, eps, matrix, bias, out, side, side_scale, side_out, side_count,
    scorer, scorer_scale, scorer_bias, scorer_threshold, scorer_h, groups, group_count, N,
    Q: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, D3: tl.constexpr, R: tl.constexpr, RMS: tl.constexpr,
    AFFINE: tl.constexpr, BIAS: tl.constexpr, SIDE: tl.constexpr, HEADS: tl.constexpr, G: tl.constexpr, GP: tl.constexpr,
    P: tl.constexpr, PP: tl.constexpr, OUT_NORM: tl.constexpr, WRITE: tl.constexpr, CLEAR: tl.constexpr, COUNTER: tl.constexpr,
    programmatic: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    step = tl.num_programs(0) * R
    # Rows in the order of work: the N that are always needed, then those of queries.
    work = N + Q
    per_group = Q // G
    first = pid * R
    r = first + tl.arange(0, R)
    live = r < (N if HEADS else work)
    row = tl.where(r < N, r + Q, r - N)
    a1, a2, a3 = tiles(matrix, row, live, D, D1, D2, D3)
    added = row_bias(bias, row, live, BIAS)
    w, b = norm_parts(norm_weight, norm_bias, D, D1, D2, D3, RMS, AFFINE)
    begin(programmatic)
    y1, y2, y3 = residual(y, delta, out_weight, out_eps, out_scale, y_out, pid == 0, D, D1, D2, D3, OUT_NORM, WRITE, 1, 0)
    if CLEAR:
        if pid == tl.num_programs(0) - 1:
            zero(cleared, D, D1, D2, D3)
    if COUNTER:
        if pid == 0:
            tl.store(counter, 0)
    x1, x2, x3 = normed(y1, y2, y3, w, b, eps, D, D1, D2, D3, RMS, AFFINE, matrix.dtype.element_ty)
    if HEADS:
        chosen, place = selected_groups(scorer, scorer_scale, scorer_bias, scorer_threshold, scorer_h, G, GP, P, PP)
        g = tl.arange(0, GP)
        selected = tl.sum(chosen, 0)
        work = N + selected * per_group
        if pid == 0:
            tl.store(groups + place, g, mask=chosen == 1)
            tl.store(group_count, selected)
        if first >= N:  # rows of queries were not loaded before the list was known
            live = r < work
            at = (first - N) // per_group
            row = tl.sum(tl.where((chosen == 1) & (place == at), g, 0), 0) * per_group + (r - N) % per_group
            a1, a2, a3 = tiles(matrix, row, live, D, D1, D2, D3)
            added = row_bias(bias, row, live, BIAS)
    if SIDE:
        side_rows(side, side_scale, side_out, pid, tl.num_programs(0), side_count, x1, x2, x3, D, D1, D2, D3)
    for begin_r in tl.range(first, work, step, num_stages=1):
        next_r = begin_r + step + tl.arange(0, R)
        next_live = next_r < work
        if HEADS:
            at = (begin_r + step - N) // per_group
            group = tl.sum(tl.where((chosen == 1) & (place == at), g, 0), 0)
            next_row = tl.where(next_r < N, next_r + Q, group * per_group + (next_r - N) % per_group)
        else:
            next_row = tl.where(next_r < N, next_r + Q, next_r - N)
        b1, b2, b3 = tiles(matrix, next_row, next_live, D, D1, D2, D3)
        next_added = row_bias(bias, next_row, next_live, BIAS)
        tl.store(out + row, products(a1, a2, a3, x1, x2, x3) + added.to(tl.float32), mask=live)
        row = next_row
        live = next_live
        added = next_added
        a1, a2, a3 = b1, b2, b3


def project_token(
    y_D: Tensor,
    delta_D: Tensor,
    norm: NormWeights,
    matrix: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    added: BlockOutput = AS_IT_IS,
    queries: int = 0,
    num_groups: int = 1,
    scores: GroupScores | None = None,
    side: Side | None = None,
    y_out_D: Tensor | None = None,
    cleared_D: Tensor | None = None,
    counter: Tensor | None = None,
    shape: GridShape | None = None,
    programmatic: bool = False,
) -> None:
    """out fp32 [rows] = matrix [rows, D] @ norm(y + delta) + bias, delta as of `added`; of the first `queries` rows only the selected groups' where
    `scores` are given. y_out gets y + delta, cleared zeros [D], counter int32 [1] zero: for the kernels that follow."""
    rows, size = matrix.shape
    shape = grid_shape("project", size, matrix.device) if shape is None else shape
    assert matrix.is_contiguous()
    at_once = shape.rows
    while scores is not None and (queries // num_groups % at_once or (rows - queries) % at_once):
        at_once //= 2  # rows that are computed together belong to one group
    first, second, third = parts(size)
    programs = multiprocessors(matrix.device) * shape.programs
    groups, rank = (1, 1) if scores is None else scores.matrix.shape
    head = (y_D,) * 7 if scores is None else (
        scores.matrix, scores.scale, scores.bias, scores.threshold, scores.h, scores.groups, scores.count,
    )  # fmt: skip
    launch(
        _project,
        (programs,),
        y_D, delta_D, *added.arguments(y_D), or_any(y_out_D, y_D), or_any(cleared_D, y_D), or_any(counter, y_D),
        or_any(norm.weight, y_D), or_any(norm.bias, y_D), norm.eps, matrix, or_any(bias, y_D), out,
        matrix if side is None else side.matrix, y_D if side is None else side.scale, y_D if side is None else side.out,
        0 if side is None else side.matrix.shape[0], *head, rows - queries,
        Q=queries, D=size, D1=first, D2=second, D3=third, R=at_once, RMS=norm.rms, AFFINE=norm.weight is not None,
        BIAS=bias is not None, SIDE=side is not None, HEADS=scores is not None, G=num_groups if scores is None else groups,
        GP=max(16, triton.next_power_of_2(groups)), P=rank, PP=max(16, triton.next_power_of_2(rank)), OUT_NORM=added.weight is not None,
        WRITE=y_out_D is not None,
        CLEAR=cleared_D is not None, COUNTER=counter is not None, num_warps=shape.warps, programmatic=programmatic,
    )  # fmt: skip


def project_token_definition(y_D: Tensor, delta_D: Tensor, norm: NormWeights, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """Every row's product, in the dtype of the matrix."""
    x_D = norm_definition((y_D + delta_D).to(matrix.dtype), norm)
    return matrix @ x_D if bias is None else matrix @ x_D + bias


def selected_groups_definition(scores: GroupScores) -> Tensor:
    """The selected groups, int64, in order."""
    s_G = (scores.matrix.float() @ scores.h) * scores.scale + scores.bias
    mask_G = ~(s_G <= scores.threshold)
    mask_G[s_G.argmax()] = True
    return mask_G.nonzero().squeeze(1)


def side_definition(x_D: Tensor, side: Side) -> Tensor:
    """What `side` rows give for the normed x, fp32."""
    return side.scale * (side.matrix.float() @ x_D.float())
