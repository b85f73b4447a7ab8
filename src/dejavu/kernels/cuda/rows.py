"""What a step of several rows does row by row: norms, the selection of heads, and the heads put together.

    norm_rows      y = y + delta, or its parts;  x = norm(y);  cleared = 0
    group_rows     the head groups that each row selects, as in project.py
    combine_rows   m[b, h] from the splits of attention; zero for heads that the row did not select

Letters: B rows  D model  G groups  H heads  K head_dim  P predictor rank
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dejavu.kernels.cuda.attention import Partials, combined
from dejavu.kernels.cuda.common import (
    AS_IT_IS,
    BlockOutput,
    NormWeights,
    begin,
    launch,
    norm_parts,
    normed,
    or_any,
    parts,
    residual,
    store_part,
    zero,
)
from dejavu.kernels.cuda.project import GroupScores, selected_groups


@triton.jit
def _norm_rows(
    y, delta, stride, out_weight, out_eps, out_scale, weight, bias, eps, x, cleared,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, D3: tl.constexpr, RMS: tl.constexpr,
    AFFINE: tl.constexpr, OUT_NORM: tl.constexpr, ADDENDS: tl.constexpr, CLEAR: tl.constexpr, programmatic: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * D
    w, b = norm_parts(weight, bias, D, D1, D2, D3, RMS, AFFINE)
    begin(programmatic)
    v1, v2, v3 = residual(
        y + at, delta + at, out_weight, out_eps, out_scale, y + at, True, D, D1, D2, D3, OUT_NORM, True, ADDENDS, stride
    )  # fmt: skip
    x1, x2, x3 = normed(v1, v2, v3, w, b, eps, D, D1, D2, D3, RMS, AFFINE, x.dtype.element_ty)
    store_part(x + at, x1, D, 0, D1)
    store_part(x + at, x2, D, D1, D2)
    store_part(x + at, x3, D, D1 + D2, D3)
    if CLEAR:
        zero(cleared + at, D, D1, D2, D3)


@triton.jit
def _group_rows(
    matrix, scale, bias, threshold, h, groups, count, count_stride, h_stride, G: tl.constexpr, GP: tl.constexpr, P: tl.constexpr,
    PP: tl.constexpr, programmatic: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    begin(programmatic)
    chosen, place = selected_groups(matrix, scale, bias, threshold, h + b * h_stride, G, GP, P, PP)
    tl.store(groups + b * G + place, tl.arange(0, GP), mask=chosen == 1)
    tl.store(count + b * count_stride, tl.sum(chosen, 0))


@triton.jit
def _combine_rows(
    mixed, stats, groups, count, count_stride, out, H: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, K: tl.constexpr,
    KP: tl.constexpr, SPLITS: tl.constexpr, HEADS: tl.constexpr, programmatic: tl.constexpr,
):  # fmt: skip
    begin(programmatic)
    head = tl.program_id(0)
    b = tl.program_id(1)
    k = tl.arange(0, KP)
    live = True
    if HEADS:
        g = tl.arange(0, GP)
        listed = tl.load(groups + b * G + g, mask=g < tl.load(count + b * count_stride), other=-1)
        live = tl.sum((listed == head // (H // G)).to(tl.int32), 0) > 0
    where = b * H + head
    m = tl.zeros([KP], tl.float32)
    if live:
        m = combined(mixed, stats, where, k, K, SPLITS)
    tl.store(out + where * K + k, m.to(out.dtype.element_ty), mask=k < K)


def norm_rows(
    y_BD: Tensor,
    delta: Tensor,
    norm: NormWeights,
    x_BD: Tensor,
    cleared_BD: Tensor | None = None,
    *,
    added: BlockOutput = AS_IT_IS,
    programmatic: bool = False,
) -> None:
    """Add delta (any dtype), as of `added`, to y in place, and fill x with the norm of the sum, in x's dtype; set `cleared` to zero.

    delta: [B, D], or the parts [slices, B, D] that add up to it."""
    rows, size = y_BD.shape
    first, second, third = parts(size)
    assert delta.shape[-2:] == y_BD.shape and delta.is_contiguous()
    addends = delta.shape[0] if delta.dim() == 3 else 1
    launch(
        _norm_rows, (rows,), y_BD, delta, rows * size, *added.arguments(y_BD), or_any(norm.weight, y_BD), or_any(norm.bias, y_BD), norm.eps, x_BD,
        or_any(cleared_BD, y_BD), D=size, D1=first, D2=second, D3=third, RMS=norm.rms, AFFINE=norm.weight is not None,
        OUT_NORM=added.weight is not None, ADDENDS=addends, CLEAR=cleared_BD is not None, num_warps=8, programmatic=programmatic,
    )  # fmt: skip


def group_rows(scores: GroupScores, *, programmatic: bool = False) -> None:
    """scores.groups [B, G] and scores.count [B, stride] from scores.h [B, P]."""
    groups, rank = scores.matrix.shape
    launch(
        _group_rows, (scores.groups.shape[0],), scores.matrix, scores.scale, scores.bias, scores.threshold, scores.h, scores.groups,
        scores.count, scores.count.stride(0), scores.h.stride(0), G=groups, GP=max(16, triton.next_power_of_2(groups)), P=rank,
        PP=max(16, triton.next_power_of_2(rank)), num_warps=4, programmatic=programmatic,
    )  # fmt: skip


def combine_rows(
    partials: Partials, groups_BG: Tensor | None, count_B: Tensor | None, out_BHK: Tensor, *, programmatic: bool = False
) -> None:
    """The mixed values of each row's heads; zero for heads of groups that it did not select."""
    rows, heads, splits, head_dim = partials.mixed.shape
    groups = heads if groups_BG is None else groups_BG.shape[1]
    launch(
        _combine_rows, (heads, rows), partials.mixed, partials.stats, or_any(groups_BG, out_BHK), or_any(count_B, out_BHK),
        1 if count_B is None else count_B.stride(0), out_BHK, H=heads, G=groups, GP=max(16, triton.next_power_of_2(groups)), K=head_dim,
        KP=max(16, triton.next_power_of_2(head_dim)), SPLITS=splits, HEADS=groups_BG is not None, num_warps=1,
        programmatic=programmatic,
    )  # fmt: skip
