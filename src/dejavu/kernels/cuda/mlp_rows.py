"""The MLP of several rows over the neurons that some row selects, on tensor cores, in two kernels.

    a[f, b] = act(up_f . x_b + c_f) (or gated), 0 where row b did not select f;   out_b += sum_f a[f, b] down_f + down_bias

Weights of the union's neurons are read once for all rows; each row computes with its own. `dense_mlp_rows` is of prompts: products of
cuBLAS, and one kernel between them.

Bytes that any implementation moves: 2 (3 where gated) rows of D for each neuron of the union, and the list.

Letters: B rows, BP the next power of two from 16  D model  F neurons  A neurons of the union  R neurons at a time
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dejavu.kernels.activation import ACTIVATION_CODES
from dejavu.kernels.activation import activate as activate_definition
from dejavu.kernels.cuda.common import activate, begin, launch, multiprocessors, or_any, row_bias, shared_memory
from dejavu.kernels.cuda.linear_rows import activated_rows_definition, padded_rows
from dejavu.kernels.sparse_mlp import MlpWeights

BLOCK = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class UpShape:
    """Neurons at a time, columns at a time, warps, stages of the pipeline, programs of a multiprocessor."""

    rows: int = 16
    columns: int = 256
    warps: int = 2
    stages: int = 5
    programs: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class DownShape:
    """Neurons at a time, columns of a program, warps, stages of the pipeline, programs of a multiprocessor."""

    rows: int = 32
    columns: int = 128
    warps: int = 4
    stages: int = 6
    programs: int = 3


def up_shape_for(x_BD: Tensor, matrices: int) -> UpShape:
    """As many stages as the device's shared memory holds: each tile of x and of the matrices waits there while others are loaded."""
    shape = UpShape()
    stage = (padded_rows(x_BD.shape[0]) + matrices * shape.rows) * shape.columns * x_BD.element_size()
    return dataclasses.replace(shape, stages=max(1, min(shape.stages, 1 + shared_memory(x_BD.device) // stage)))


def down_shape_for(act_FB: Tensor) -> DownShape:
    """Likewise, of tiles of the activations and of down."""
    shape = DownShape()
    stage = shape.rows * (act_FB.shape[1] + shape.columns) * act_FB.element_size()
    return dataclasses.replace(shape, stages=max(1, min(shape.stages, shared_memory(act_FB.device) // stage)))


@triton.jit
def _up_rows(
    x, up, gate, up_bias, gate_bias, row_mask_F, union, count, act, threshold, B, D: tl.constexpr, BP: tl.constexpr, R: tl.constexpr,
    COLUMNS: tl.constexpr, STAGES: tl.constexpr, GATED: tl.constexpr, UP_BIAS: tl.constexpr, GATE_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, EARLY: tl.constexpr, programmatic: tl.constexpr,
):  # fmt: skip
    if EARLY:  # the list was there before the kernel before this one (see common.py)
        total = tl.load(count, cache_modifier=".cg")
        r = tl.program_id(0) * R + tl.arange(0, R)
        row = tl.load(union + r, mask=r < total, other=0, cache_modifier=".cg")
        begin(programmatic)
    else:
        begin(programmatic)
        total = tl.load(count)
        r = tl.program_id(0) * R + tl.arange(0, R)
        row = tl.load(union + r, mask=r < total, other=0)
    b = tl.arange(0, BP)
    for block in range(tl.program_id(0), tl.cdiv(total, R), tl.num_programs(0)):
        r = block * R + tl.arange(0, R)
        live = r < total
        next_r = r + tl.num_programs(0) * R
        next_row = tl.load(union + next_r, mask=next_r < total, other=0)
        at = row.to(tl.int64)[:, None] * D
        acc = tl.zeros([R, BP], tl.float32)
        gated = tl.zeros([R, BP], tl.float32)
        for first in tl.range(0, D, COLUMNS, num_stages=STAGES):
            c = first + tl.arange(0, COLUMNS)
            mask = live[:, None] & (c < D)[None, :]
            xv = tl.load(x + b[:, None] * D + c[None, :], mask=(b < B)[:, None] & (c < D)[None, :], other=0.0)
            w = tl.load(up + at + c[None, :], mask=mask, other=0.0)
            acc = tl.dot(w, tl.trans(xv), acc, input_precision="ieee")
            if GATED:
                g = tl.load(gate + at + c[None, :], mask=mask, other=0.0)
                gated = tl.dot(g, tl.trans(xv), gated, input_precision="ieee")
        v = acc + row_bias(up_bias, row, live, UP_BIAS).to(tl.float32)[:, None]
        if GATED:
            v = activate(gated + row_bias(gate_bias, row, live, GATE_BIAS).to(tl.float32)[:, None], ACTIVATION, threshold) * v
        else:
            v = activate(v, ACTIVATION, threshold)
        mask_bits = tl.load(row_mask_F + row, mask=live, other=0)
        v = tl.where(((mask_bits[:, None] >> b[None, :]) & 1) == 1, v, 0.0)
        tl.store(act + r[:, None] * BP + b[None, :], v.to(act.dtype.element_ty), mask=live[:, None])
        row = next_row


@triton.jit
def _down_rows(
    act, down, bias, union, count, out, B, D: tl.constexpr, BP: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr,
    STAGES: tl.constexpr, BIAS: tl.constexpr, PARTIAL: tl.constexpr, programmatic: tl.constexpr,
):  # fmt: skip
    total = tl.load(count, cache_modifier=".cg")  # of a kernel before the one before this one
    begin(programmatic)
    share = tl.program_id(1)
    lo = (total * share) // tl.num_programs(1)
    hi = (total * (share + 1)) // tl.num_programs(1)
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    b = tl.arange(0, BP)
    acc = tl.zeros([BP, COLUMNS], tl.float32)
    for first in tl.range(lo, hi, R, num_stages=STAGES):
        r = first + tl.arange(0, R)
        live = r < hi
        row = tl.load(union + r, mask=live, other=0)
        a = tl.load(act + r[None, :] * BP + b[:, None], mask=live[None, :], other=0.0)
        w = tl.load(down + row.to(tl.int64)[:, None] * D + c[None, :], mask=live[:, None] & (c < D)[None, :], other=0.0)
        acc = tl.dot(a, w, acc, input_precision="ieee")
    if BIAS:
        if share == 0:
            acc += tl.load(bias + c, mask=c < D, other=0.0).to(tl.float32)[None, :]
    mask = (b < B)[:, None] & (c < D)[None, :]
    if PARTIAL:
        tl.store(out + share * B * D + b[:, None] * D + c[None, :], acc, mask=mask)
    else:
        tl.atomic_add(out + b[:, None] * D + c[None, :], acc, mask=mask, sem="relaxed")


@triton.jit
def _activate_rows(
    gate, up, out, size, threshold, GATED: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr, programmatic: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = i < size
    v = activate(tl.load(gate + i, mask=live, other=0.0).to(tl.float32), ACTIVATION, threshold)
    if GATED:
        v = v * tl.load(up + i, mask=live, other=0.0).to(tl.float32)
    tl.store(out + i, v.to(out.dtype.element_ty), mask=live)


def shares_of(size: int, shape: DownShape, device: torch.device) -> int:
    """Parts that the list is cut into by the second kernel."""
    return max(1, multiprocessors(device) * shape.programs // triton.cdiv(size, shape.columns))


def mlp_rows(
    x_BD: Tensor,
    weights: MlpWeights,
    row_mask_F: Tensor,
    union_F: Tensor,
    count: Tensor,
    act_FB: Tensor,
    out: Tensor,
    *,
    up_shape: UpShape | None = None,
    down_shape: DownShape | None = None,
    partial: bool = False,
    early: bool = False,
    programmatic: bool = False,
) -> None:
    """Add the MLP of each x to out fp32 [B, D]; partial: out is [shares, B, D]. act_FB [F, BP], in the dtype of x, is scratch. early: the
    list was there before the kernel before this one."""
    rows, size = x_BD.shape
    up_shape = up_shape or up_shape_for(x_BD, 1 if weights.gate_FD is None else 2)
    padded, device = padded_rows(rows), x_BD.device
    columns = min(up_shape.columns, max(16, triton.next_power_of_2(size)))
    launch(
        _up_rows,
        (multiprocessors(device) * up_shape.programs,),
        x_BD, weights.up_FD, or_any(weights.gate_FD, x_BD), or_any(weights.up_bias_F, x_BD), or_any(weights.gate_bias_F, x_BD), row_mask_F,
        union_F, count, act_FB, weights.activation_threshold, rows,
        D=size, BP=padded, R=up_shape.rows, COLUMNS=columns, STAGES=up_shape.stages, GATED=weights.gate_FD is not None,
        UP_BIAS=weights.up_bias_F is not None, GATE_BIAS=weights.gate_bias_F is not None,
        ACTIVATION=ACTIVATION_CODES[weights.activation], EARLY=early, num_warps=up_shape.warps, programmatic=programmatic,
    )  # fmt: skip
    down_rows(act_FB, weights, union_F, count, out, shape=down_shape, partial=partial, programmatic=programmatic)


def down_rows(
    act_FB: Tensor,
    weights: MlpWeights,
    union_F: Tensor,
    count: Tensor,
    out: Tensor,
    *,
    shape: DownShape | None = None,
    partial: bool = False,
    programmatic: bool = False,
) -> None:
    """Add to out fp32 [B, D] the rows of down of the union, times the activations act_FB [F, BP] by place in the list, and the bias;
    partial: out is [shares, B, D]."""
    rows, size = out.shape[-2:]
    shape = shape or down_shape_for(act_FB)
    columns = min(shape.columns, max(16, triton.next_power_of_2(size)))
    launch(
        _down_rows,
        (triton.cdiv(size, columns), shares_of(size, shape, out.device)),
        act_FB, weights.down_FD, or_any(weights.down_bias_D, out), union_F, count, out, rows,
        D=size, BP=act_FB.shape[1], R=shape.rows, COLUMNS=columns, STAGES=shape.stages, BIAS=weights.down_bias_D is not None,
        PARTIAL=partial, num_warps=shape.warps, programmatic=programmatic,
    )  # fmt: skip


def activate_rows(first: Tensor, up: Tensor | None, activation: str, threshold: float) -> Tensor:
    """act(first) * up, or act(first): products of any one shape, contiguous; in the place of `first`."""
    assert first.is_contiguous() and (up is None or (up.is_contiguous() and up.shape == first.shape))
    launch(
        _activate_rows, (triton.cdiv(first.numel(), BLOCK),), first, or_any(up, first), first, first.numel(), threshold,
        GATED=up is not None, ACTIVATION=ACTIVATION_CODES[activation], BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return first


def dense_mlp_rows(x_BD: Tensor, weights: MlpWeights) -> Tensor:
    """The MLP of each x with every neuron, in the dtype of x; products are those of cuBLAS."""
    first_BF = up_BF = torch.nn.functional.linear(x_BD, weights.up_FD, weights.up_bias_F)
    if weights.gate_FD is not None:
        first_BF = torch.nn.functional.linear(x_BD, weights.gate_FD, weights.gate_bias_F)
    act_BF = activate_rows(
        first_BF, None if weights.gate_FD is None else up_BF, weights.activation, weights.activation_threshold
    )  # fmt: skip
    bias_D = weights.down_bias_D
    return act_BF @ weights.down_FD if bias_D is None else torch.addmm(bias_D, act_BF, weights.down_FD)


def mlp_rows_definition(x_BD: Tensor, weights: MlpWeights, keep_BF: Tensor) -> Tensor:
    """What `mlp_rows` adds to out, in the dtype of x; keep_BF: what each row selects."""
    act_BF = activated_rows_definition(x_BD, weights)
    y_BD = (act_BF * keep_BF.to(x_BD.dtype)) @ weights.down_FD
    return y_BD if weights.down_bias_D is None else y_BD + weights.down_bias_D


def activate_rows_definition(first: Tensor, up: Tensor | None, activation: str, threshold: float) -> Tensor:
    act = activate_definition(first, activation, threshold)
    return act if up is None else act * up
