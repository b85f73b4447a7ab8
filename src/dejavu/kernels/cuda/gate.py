"""The MLP of one token whose neurons its own gate selects, in one kernel: each program reads some rows of the gate, and at once the rows
of up and down that they select.

    x = norm(y + delta);  v_f = act(gate_f . x + c_f);  kept: |v_f| > threshold
    out += sum over the kept f of v_f (up_f . x + b_f) down_f, + down_bias

An MLP without a gate has up in its place, and v_f down_f is added up. A NaN is kept, as a mask leaves it what it is.

A program takes R rows at a time. While it computes with those of the gate, the next ones are loaded, and the rows of up and down that the
last ones selected arrive.

Bytes that any implementation moves: the gate for every neuron, the other one or two matrices' rows for those kept.

Letters: D model  F neurons  R neurons at a time
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dejavu.kernels.activation import ACTIVATION_CODES
from dejavu.kernels.activation import activate as activate_definition
from dejavu.kernels.cuda.common import (
    AS_IT_IS,
    BlockOutput,
    GridShape,
    NormWeights,
    Side,
    activate,
    add_part,
    begin,
    exceeds,
    launch,
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
from dejavu.kernels.cuda.mlp import programs_of
from dejavu.kernels.cuda.shapes import grid_shape
from dejavu.kernels.sparse_mlp import MlpWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class GateNeurons:
    """What a gate selects: threshold fp32 [1]; marks int32 [F], 1 where a neuron is; count int32 [1], which holds 0."""

    threshold: Tensor
    marks: Tensor
    count: Tensor


@triton.jit
def _rows_of(chunk, F, R: tl.constexpr):
    row = chunk * R + tl.arange(0, R)
    return row, row < F


@triton.jit
def _mlp_by_gate(
    y, delta, out_weight, out_eps, out_scale, y_out, norm_weight, norm_bias, eps, gate, gate_bias, up, up_bias, down, down_bias, threshold,
    activation_threshold, marks, count, out, side, side_scale, side_out, side_count, F,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, D3: tl.constexpr, R: tl.constexpr, RMS: tl.constexpr, AFFINE: tl.constexpr,
    GATED: tl.constexpr, UP_BIAS: tl.constexpr, GATE_BIAS: tl.constexpr, DOWN_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    SIDE: tl.constexpr, PARTIAL: tl.constexpr, OUT_NORM: tl.constexpr, programmatic: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    chunks = tl.cdiv(F, R)
    row, live = _rows_of(pid, F, R)
    g1, g2, g3 = tiles(gate, row, live, D, D1, D2, D3)
    g_b = row_bias(gate_bias, row, live, GATE_BIAS)
    w, b = norm_parts(norm_weight, norm_bias, D, D1, D2, D3, RMS, AFFINE)
    least = tl.load(threshold)
    begin(programmatic)
    y1, y2, y3 = residual(y, delta, out_weight, out_eps, out_scale, y_out, pid == 0, D, D1, D2, D3, OUT_NORM, True, 1, 0)
    x1, x2, x3 = normed(y1, y2, y3, w, b, eps, D, D1, D2, D3, RMS, AFFINE, down.dtype.element_ty)
    if SIDE:
        side_rows(side, side_scale, side_out, pid, programs, side_count, x1, x2, x3, D, D1, D2, D3)
    acc1 = tl.zeros([D1], tl.float32)
    acc2 = tl.zeros([D2], tl.float32)
    acc3 = tl.zeros([D3], tl.float32)
    selected = 0
    # What the last chunk selected, on its way: nothing yet.
    act = tl.zeros([R], tl.float32)
    nothing = row < 0
    d1, d2, d3 = tiles(down, row, nothing, D, D1, D2, D3)
    u1, u2, u3 = d1, d2, d3
    if GATED:
        u1, u2, u3 = tiles(up, row, nothing, D, D1, D2, D3)
    u_b = row_bias(up_bias, row, nothing, UP_BIAS)
    for chunk in tl.range(pid, chunks, programs, num_stages=1):
        row, live = _rows_of(chunk, F, R)
        v = activate(products(g1, g2, g3, x1, x2, x3) + g_b.to(tl.float32), ACTIVATION, activation_threshold)
        next_row, next_live = _rows_of(chunk + programs, F, R)
        g1, g2, g3 = tiles(gate, next_row, next_live, D, D1, D2, D3)
        g_b = row_bias(gate_bias, next_row, next_live, GATE_BIAS)
        chosen = exceeds(tl.abs(v), least) & live
        tl.store(marks + row, chosen.to(tl.int32), mask=live)
        selected += tl.sum(chosen.to(tl.int32), 0)
        if GATED:
            act = act * (products(u1, u2, u3, x1, x2, x3) + u_b.to(tl.float32))
        acc1 += tl.sum(d1.to(tl.float32) * act[:, None], 0)
        acc2 += tl.sum(d2.to(tl.float32) * act[:, None], 0)
        acc3 += tl.sum(d3.to(tl.float32) * act[:, None], 0)
        act = tl.where(chosen, v, 0.0)
        d1, d2, d3 = tiles(down, row, chosen, D, D1, D2, D3)
        if GATED:
            u1, u2, u3 = tiles(up, row, chosen, D, D1, D2, D3)
            u_b = row_bias(up_bias, row, chosen, UP_BIAS)
    if GATED:
        act = act * (products(u1, u2, u3, x1, x2, x3) + u_b.to(tl.float32))
    acc1 += tl.sum(d1.to(tl.float32) * act[:, None], 0)
    acc2 += tl.sum(d2.to(tl.float32) * act[:, None], 0)
    acc3 += tl.sum(d3.to(tl.float32) * act[:, None], 0)
    tl.atomic_add(count, selected, sem="relaxed")
    if DOWN_BIAS:
        if pid == 0:
            acc1 += part(down_bias, D, 0, D1)
            acc2 += part(down_bias, D, D1, D2)
            acc3 += part(down_bias, D, D1 + D2, D3)
    if PARTIAL:
        store_part(out + pid * D, acc1, D, 0, D1)
        store_part(out + pid * D, acc2, D, D1, D2)
        store_part(out + pid * D, acc3, D, D1 + D2, D3)
    elif (selected > 0) | (pid == 0):
        add_part(out, acc1, D, 0, D1)
        add_part(out, acc2, D, D1, D2)
        add_part(out, acc3, D, D1 + D2, D3)


def mlp_by_gate(
    y_D: Tensor,
    delta_D: Tensor,
    y_out_D: Tensor,
    out: Tensor,
    norm: NormWeights,
    weights: MlpWeights,
    gate: GateNeurons,
    *,
    added: BlockOutput = AS_IT_IS,
    side: Side | None = None,
    shape: GridShape | None = None,
    partial: bool = False,
    programmatic: bool = False,
) -> None:
    """Write y + delta, this as of `added`, to y_out [D], add the MLP of its norm over what its gate selects to out [D], all fp32, and say
    in `gate` what that was.

    partial: `out` is [programs, D] and gets each program's own sum, to be added up in a fixed order. y, y_out and out are different memory.
    """
    down_FD, gated = weights.down_FD, weights.gate_FD is not None
    first_FD = weights.up_FD if weights.gate_FD is None else weights.gate_FD
    first_bias_F = weights.gate_bias_F if gated else weights.up_bias_F
    neurons, size = down_FD.shape
    shape = shape or grid_shape("mlp by gate", size, down_FD.device)
    first, second, third = parts(size)
    assert all(matrix.is_contiguous() for matrix in (first_FD, weights.up_FD, down_FD))
    launch(
        _mlp_by_gate,
        (programs_of(shape, down_FD.device),),
        y_D, delta_D, *added.arguments(y_D), y_out_D, or_any(norm.weight, y_D), or_any(norm.bias, y_D), norm.eps, first_FD,
        or_any(first_bias_F, y_D), weights.up_FD, or_any(weights.up_bias_F, y_D), down_FD, or_any(weights.down_bias_D, y_D),
        gate.threshold, weights.activation_threshold, gate.marks, gate.count, out,
        down_FD if side is None else side.matrix, y_D if side is None else side.scale, y_D if side is None else side.out,
        0 if side is None else side.matrix.shape[0], neurons,
        D=size, D1=first, D2=second, D3=third, R=shape.rows, RMS=norm.rms, AFFINE=norm.weight is not None, GATED=gated,
        UP_BIAS=gated and weights.up_bias_F is not None, GATE_BIAS=first_bias_F is not None, DOWN_BIAS=weights.down_bias_D is not None,
        ACTIVATION=ACTIVATION_CODES[weights.activation], SIDE=side is not None, PARTIAL=partial, OUT_NORM=added.weight is not None,
        num_warps=shape.warps, programmatic=programmatic,
    )  # fmt: skip


def select_gate_definition(product: Tensor, threshold: float, activation: str, activation_threshold: float) -> tuple[Tensor, Tensor]:
    """Activated gates and which are kept (bool), of products of any shape."""
    value = activate_definition(product, activation, activation_threshold)
    return value, ~(value.abs() <= threshold)


def mlp_given_definition(x: Tensor, weights: MlpWeights, value: Tensor, keep: Tensor) -> Tensor:
    """What is added to out for each normed x [.., D], in the dtype of the weights, of gates [.., F] and the kept neurons [.., F]."""
    act = value.to(x.dtype)
    if weights.gate_FD is not None:
        act = act * torch.nn.functional.linear(x, weights.up_FD, weights.up_bias_F)
    y = torch.where(keep, act, 0) @ weights.down_FD
    return y if weights.down_bias_D is None else y + weights.down_bias_D


def mlp_by_gate_definition(y_D: Tensor, delta_D: Tensor, norm: NormWeights, weights: MlpWeights, threshold: float) -> tuple[Tensor, Tensor]:
    """What `mlp_by_gate` adds to out, in the dtype of the weights, and what is kept, bool [F]."""
    x_D = norm_definition((y_D + delta_D).to(weights.down_FD.dtype), norm)
    matrix, bias = (weights.up_FD, weights.up_bias_F) if weights.gate_FD is None else (weights.gate_FD, weights.gate_bias_F)
    product_F = torch.nn.functional.linear(x_D, matrix, bias)
    value_F, keep_F = select_gate_definition(product_F, threshold, weights.activation, weights.activation_threshold)
    return mlp_given_definition(x_D, weights, value_F, keep_F), keep_F


def mlp_by_gate_bytes(weights: MlpWeights, kept: int) -> int:
    """All of the gate (of up, where there is none) and its bias; rows of up (where gated) and down of so many neurons, the biases."""
    gated = weights.gate_FD is not None
    first = [weights.gate_FD, weights.gate_bias_F] if gated else [weights.up_FD, weights.up_bias_F]
    width, (neurons, size) = weights.down_FD.element_size(), weights.down_FD.shape
    rest = size + gated * (size + (weights.up_bias_F is not None))
    down_bias = 0 if weights.down_bias_D is None else weights.down_bias_D.nbytes
    return sum(each.nbytes for each in first if each is not None) + kept * rest * width + down_bias + 4 * neurons
