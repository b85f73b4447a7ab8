"""The MLP of one token in one kernel: norm, selected rows of up (and gate), activation, selected rows of down.

    x = norm(y + delta);  a_f = act(up_f . x + b_f)  or  act(gate_f . x + c_f) (up_f . x + b_f);  out += sum_f a_f down_f + down_bias

over the neurons f of a list on the device, or all of them. A persistent grid shares the list evenly; a program keeps x and its
part of the sum in registers, loads the rows of its next neurons while it computes with the last ones, and adds its sum to `out`
at the end. `side` rows are products of the same x: the A of predictors that read this block's input.

Bytes that any implementation moves: 2 (3 where gated) rows of D for each neuron of the list, and the list.

Letters: D model  F neurons  A selected  R neurons at a time
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dejavu.kernels.activation import ACTIVATION_CODES
from dejavu.kernels.cuda.common import (
    AS_IT_IS,
    BlockOutput,
    GridShape,
    NormWeights,
    Side,
    activate,
    add_part,
    begin,
    launch,
    multiprocessors,
    norm_definition,
    norm_parts,
    normed,
    or_any,
    part,
    parts,
    products,
    residual,
    row_bias,
    side_rows,
    store_part,
    tiles,
)
from dejavu.kernels.cuda.shapes import grid_shape
from dejavu.kernels.sparse_mlp import MlpWeights, masked_mlp


@triton.jit
def _rows(
    up, gate, down, up_bias, gate_bias, idx, first, hi, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, D3: tl.constexpr,
    R: tl.constexpr, GATED: tl.constexpr, UP_BIAS: tl.constexpr, GATE_BIAS: tl.constexpr, LISTED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """What R places of the list from `first` on need of the weights: which are live, rows of up, gate (or up) and down, biases."""
    r = first + tl.arange(0, R)
    live = r < hi
    row = r
    if LISTED:
        if EARLY:
            row = tl.load(idx + r, mask=live, other=0, cache_modifier=".cg")
        else:
            row = tl.load(idx + r, mask=live, other=0)
    a = tiles(up, row, live, D, D1, D2, D3)
    g = a
    if GATED:
        g = tiles(gate, row, live, D, D1, D2, D3)
    v = tiles(down, row, live, D, D1, D2, D3)
    return live, a, g, v, row_bias(up_bias, row, live, UP_BIAS), row_bias(gate_bias, row, live, GATE_BIAS)


@triton.jit
def _mlp(
    y, delta, out_weight, out_eps, out_scale, y_out, norm_weight, norm_bias, eps, up, gate, down, up_bias, gate_bias, down_bias, idx, count, out, threshold,
    side, side_scale, side_out, side_count, F,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, D3: tl.constexpr, R: tl.constexpr, RMS: tl.constexpr,
    AFFINE: tl.constexpr, GATED: tl.constexpr, UP_BIAS: tl.constexpr, GATE_BIAS: tl.constexpr, DOWN_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, LISTED: tl.constexpr, SIDE: tl.constexpr, PARTIAL: tl.constexpr, OUT_NORM: tl.constexpr,
    programmatic: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    total = F
    if LISTED:
        total = tl.load(count, cache_modifier=".cg")
    lo = (total * pid) // programs
    hi = (total * (pid + 1)) // programs
    # These rows do not depend on the kernel before: the list was there before it (see common.py).
    now = _rows(up, gate, down, up_bias, gate_bias, idx, lo, hi, D, D1, D2, D3, R, GATED, UP_BIAS, GATE_BIAS, LISTED, True)
    w, b = norm_parts(norm_weight, norm_bias, D, D1, D2, D3, RMS, AFFINE)
    begin(programmatic)
    y1, y2, y3 = residual(y, delta, out_weight, out_eps, out_scale, y_out, pid == 0, D, D1, D2, D3, OUT_NORM, True, 1, 0)
    x1, x2, x3 = normed(y1, y2, y3, w, b, eps, D, D1, D2, D3, RMS, AFFINE, up.dtype.element_ty)
    if SIDE:
        side_rows(side, side_scale, side_out, pid, programs, side_count, x1, x2, x3, D, D1, D2, D3)
    acc1 = tl.zeros([D1], tl.float32)
    acc2 = tl.zeros([D2], tl.float32)
    acc3 = tl.zeros([D3], tl.float32)
    for first in tl.range(lo, hi, R, num_stages=1):
        new = _rows(
            up, gate, down, up_bias, gate_bias, idx, first + R, hi, D, D1, D2, D3, R, GATED, UP_BIAS, GATE_BIAS, LISTED, False
        )  # fmt: skip
        live, a, g, v, up_b, gate_b = now
        act = products(a[0], a[1], a[2], x1, x2, x3) + up_b.to(tl.float32)
        if GATED:
            act = activate(products(g[0], g[1], g[2], x1, x2, x3) + gate_b.to(tl.float32), ACTIVATION, threshold) * act
        else:
            act = activate(act, ACTIVATION, threshold)
        act = tl.where(live, act, 0.0)
        acc1 += tl.sum(v[0].to(tl.float32) * act[:, None], 0)
        acc2 += tl.sum(v[1].to(tl.float32) * act[:, None], 0)
        acc3 += tl.sum(v[2].to(tl.float32) * act[:, None], 0)
        now = new
    if DOWN_BIAS:
        if pid == 0:
            acc1 += part(down_bias, D, 0, D1)
            acc2 += part(down_bias, D, D1, D2)
            acc3 += part(down_bias, D, D1 + D2, D3)
    if PARTIAL:
        store_part(out + pid * D, acc1, D, 0, D1)
        store_part(out + pid * D, acc2, D, D1, D2)
        store_part(out + pid * D, acc3, D, D1 + D2, D3)
    elif (lo < hi) | (pid == 0):
        add_part(out, acc1, D, 0, D1)
        add_part(out, acc2, D, D1, D2)
        add_part(out, acc3, D, D1 + D2, D3)


def programs_of(shape: GridShape, device: torch.device) -> int:
    return multiprocessors(device) * shape.programs


def mlp_token(
    y_D: Tensor,
    delta_D: Tensor,
    y_out_D: Tensor,
    out: Tensor,
    norm: NormWeights,
    weights: MlpWeights,
    idx_F: Tensor | None = None,
    count: Tensor | None = None,
    *,
    added: BlockOutput = AS_IT_IS,
    side: Side | None = None,
    shape: GridShape | None = None,
    partial: bool = False,
    programmatic: bool = False,
) -> None:
    """Write y + delta, this as of `added`, to y_out [D] and add the MLP of its norm to out [D]; all fp32.

    idx_F int32 [F], of which the first count int32 [1] are the neurons (both on the device; None: all neurons). partial: `out`
    is [programs, D] and gets each program's own sum, to be added up in a fixed order. y, y_out and out are different memory.
    """
    up_FD = weights.up_FD
    neurons, size = up_FD.shape
    shape = shape or grid_shape("mlp" if weights.gate_FD is None else "gated mlp", size, up_FD.device)
    first, second, third = parts(size)
    assert (idx_F is None) == (count is None)
    assert all(matrix is None or matrix.is_contiguous() for matrix in (up_FD, weights.gate_FD, weights.down_FD))
    launch(
        _mlp,
        (programs_of(shape, up_FD.device),),
        y_D, delta_D, *added.arguments(y_D), y_out_D, or_any(norm.weight, y_D), or_any(norm.bias, y_D), norm.eps,
        up_FD, or_any(weights.gate_FD, up_FD), weights.down_FD,
        or_any(weights.up_bias_F, y_D), or_any(weights.gate_bias_F, y_D), or_any(weights.down_bias_D, y_D),
        or_any(idx_F, y_D), or_any(count, y_D), out, weights.activation_threshold,
        up_FD if side is None else side.matrix, y_D if side is None else side.scale, y_D if side is None else side.out,
        0 if side is None else side.matrix.shape[0], neurons,
        D=size, D1=first, D2=second, D3=third, R=shape.rows, RMS=norm.rms, AFFINE=norm.weight is not None,
        GATED=weights.gate_FD is not None, UP_BIAS=weights.up_bias_F is not None, GATE_BIAS=weights.gate_bias_F is not None,
        DOWN_BIAS=weights.down_bias_D is not None, ACTIVATION=ACTIVATION_CODES[weights.activation], LISTED=idx_F is not None,
        SIDE=side is not None, PARTIAL=partial, OUT_NORM=added.weight is not None, num_warps=shape.warps, programmatic=programmatic,
    )  # fmt: skip


def mlp_token_definition(y_D: Tensor, delta_D: Tensor, norm: NormWeights, weights: MlpWeights, idx_A: Tensor) -> Tensor:
    """What `mlp_token` adds to out, of the neurons idx_A (int64), in the dtype of the weights."""
    x_D = norm_definition((y_D + delta_D).to(weights.up_FD.dtype), norm)
    return masked_mlp(x_D, weights, idx_A)
