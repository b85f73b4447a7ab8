"""Products of up to 32 rows with a whole matrix, on tensor cores, and the activation behind them: weights are read once.

    linear_rows      out_b = x_b W^T + c, or its parts: sums over slices of the inputs
    activated_rows   out_b = act(x_b G^T + c) * (x_b U^T + d)  or  act(x_b U^T + d)

A program has some outputs of all rows, and all inputs or a slice of them, which it reads in tiles, several ahead. What a row gives does not
depend on how many rows there are up to 16, nor on the others: every sum has its order, whatever runs beside it. Sums are fp32.

Bytes that any implementation moves: the matrix, x and out once.

Letters: B rows, BP the next power of two from 16  I inputs (IN)  O outputs (OUT)  D model  F neurons
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dejavu.kernels.activation import ACTIVATION_CODES
from dejavu.kernels.activation import activate as activate_definition
from dejavu.kernels.cuda.common import LEAST_SHARED, Side, activate, begin, launch, multiprocessors, or_any, parts, row_bias
from dejavu.kernels.cuda.select_rows import project_block
from dejavu.kernels.sparse_mlp import MlpWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearShape:
    """Outputs of a program, inputs at a time, warps, stages of the pipeline, slices of the inputs."""

    outputs: int
    inputs: int
    warps: int
    stages: int
    slices: int = 1


def padded_rows(rows: int) -> int:
    """Rows as the tensor cores take them."""
    return max(16, triton.next_power_of_2(rows))


@triton.jit
def _tile(weight, stride, o, i, live_o, live_i, BY_INPUT: tl.constexpr):
    """Weights [outputs, inputs]."""
    if BY_INPUT:
        w = tl.load(weight + i.to(tl.int64)[:, None] * stride + o[None, :], mask=live_i[:, None] & live_o[None, :], other=0.0)
        return tl.trans(w)
    else:
        return tl.load(weight + o.to(tl.int64)[:, None] * stride + i[None, :], mask=live_o[:, None] & live_i[None, :], other=0.0)


@triton.jit
def _linear_rows(
    x, weight, stride, bias, second, second_stride, second_bias, out, B, threshold, blocks, side, side_scale, side_out, side_count,
    IN: tl.constexpr, OUT: tl.constexpr, BP: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, SLICE: tl.constexpr,
    STAGES: tl.constexpr, BY_INPUT: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    SECOND_BIAS: tl.constexpr, SIDE: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, D3: tl.constexpr, programmatic: tl.constexpr,
):  # fmt: skip
    """The matrix is the gate where there is one, and `second` then is up. Programs from `blocks` on have a row of the side each."""
    if SIDE:
        if tl.program_id(0) >= blocks:
            project_block(
                tl.program_id(0) - blocks, side, side_scale, x, side_out, B, side_count, IN, D1, D2, D3, programmatic
            )  # fmt: skip
            return
    o = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    part = tl.program_id(1)
    b = tl.arange(0, BP)
    live_o = o < OUT
    hi = tl.minimum(IN, (part + 1) * SLICE)
    c = row_bias(bias, o, live_o, BIAS).to(tl.float32)
    d = row_bias(second_bias, o, live_o, SECOND_BIAS).to(tl.float32)
    begin(programmatic)
    acc = tl.zeros([OUTPUTS, BP], tl.float32)
    up = tl.zeros([OUTPUTS, BP], tl.float32)
    for first in tl.range(part * SLICE, hi, INPUTS, num_stages=STAGES):
        i = first + tl.arange(0, INPUTS)
        live_i = i < hi
        xv = tl.load(x + b[None, :] * IN + i[:, None], mask=(b < B)[None, :] & live_i[:, None], other=0.0)
        acc = tl.dot(_tile(weight, stride, o, i, live_o, live_i, BY_INPUT), xv, acc, input_precision="ieee")
        if GATED:
            up = tl.dot(_tile(second, second_stride, o, i, live_o, live_i, BY_INPUT), xv, up, input_precision="ieee")
    if part == 0:
        acc += c[:, None]
    if ACTIVATION >= 0:
        acc = activate(acc, ACTIVATION, threshold)
    if GATED:
        acc = acc * (up + d[:, None])
    place = (part * B + b).to(tl.int64)[None, :] * OUT + o[:, None]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=(b < B)[None, :] & live_o[:, None])


def linear_shape(inputs: int, outputs: int, rows: int, matrices: int, element: int, device: torch.device) -> LinearShape:
    """What was fastest on an H200 (docs/log.md): 8 KiB or more of a matrix in a tile, so many of them ahead as the least shared memory
    holds, and slices enough for three programs of two multiprocessors."""
    width, columns = 64, 64 if matrices > 1 or element > 2 else 128
    columns = min(columns, max(16, triton.next_power_of_2(inputs)))
    stage = (padded_rows(rows) + matrices * width) * columns * element
    stages = max(1, min(4, LEAST_SHARED // stage))
    slices = 1
    while triton.cdiv(outputs, width) * slices < multiprocessors(device) * 3 // 2 and inputs // (2 * slices) >= 1024:
        slices *= 2
    return LinearShape(outputs=width, inputs=columns, warps=4, stages=stages, slices=slices)


def linear_slices(weight_OI: Tensor) -> int:
    """Sums that `linear_rows` leaves for each output where it may leave several."""
    outputs, inputs = weight_OI.shape
    return linear_shape(inputs, outputs, 1, 1, weight_OI.element_size(), weight_OI.device).slices


def linear_rows(
    x_BI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    out: Tensor,
    *,
    side: Side | None = None,
    shape: LinearShape | None = None,
    programmatic: bool = False,
) -> None:
    """Fill out [B, O] (any float dtype), or the parts [slices, B, O] fp32 that add up to it in order, the first with the bias.

    weight_OI has a row per output, or is the transposed view of a matrix with a row per input. side: further rows [R, I], whose products
    go to side.out [B, R].
    """
    outputs, inputs = weight_OI.shape
    if shape is None:
        shape = linear_shape(inputs, outputs, x_BI.shape[0], 1, weight_OI.element_size(), x_BI.device)
        if out.dim() == 2:
            shape = LinearShape(outputs=shape.outputs, inputs=shape.inputs, warps=shape.warps, stages=shape.stages)
    assert out.shape == (x_BI.shape[0], outputs) if out.dim() == 2 else out.shape == (shape.slices, x_BI.shape[0], outputs)
    assert shape.slices == 1 or (out.dim() == 3 and side is None)
    _launch(x_BI, weight_OI, bias_O, None, None, out, shape, side=side, activation=None, threshold=0.0, programmatic=programmatic)


def activated_rows(
    x_BD: Tensor, weights: MlpWeights, out_BF: Tensor, *, shape: LinearShape | None = None, programmatic: bool = False
) -> None:
    """Fill out [B, F] with the activations of every neuron."""
    gated = weights.gate_FD is not None
    first_FD, first_bias_F = (weights.gate_FD, weights.gate_bias_F) if gated else (weights.up_FD, weights.up_bias_F)
    assert first_FD is not None
    neurons, size = first_FD.shape
    if shape is None:
        given = linear_shape(size, neurons, x_BD.shape[0], 1 + gated, first_FD.element_size(), x_BD.device)
        shape = LinearShape(outputs=given.outputs, inputs=given.inputs, warps=given.warps, stages=given.stages)
    assert shape.slices == 1, "an activation is of the whole sum"
    _launch(
        x_BD, first_FD, first_bias_F, weights.up_FD if gated else None, weights.up_bias_F if gated else None, out_BF, shape,
        activation=weights.activation, threshold=weights.activation_threshold, programmatic=programmatic,
    )  # fmt: skip


def _launch(
    x_BI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, second_OI: Tensor | None, second_bias_O: Tensor | None, out: Tensor,
    shape: LinearShape, *, side: Side | None = None, activation: str | None, threshold: float, programmatic: bool,
) -> None:  # fmt: skip
    outputs, inputs = weight_OI.shape
    by_input = weight_OI.stride(1) != 1
    rows, other = x_BI.shape[0], weight_OI if second_OI is None else second_OI
    assert x_BI.is_contiguous() and out.is_contiguous() and x_BI.shape[1] == inputs
    assert all(matrix.stride(0 if by_input else 1) == 1 for matrix in (weight_OI, other))
    blocks, extra = triton.cdiv(outputs, shape.outputs), 0 if side is None else side.matrix.shape[0]
    first, second, third = (1, 1, 1) if side is None else parts(inputs)
    launch(
        _linear_rows, (blocks + extra, shape.slices), x_BI, weight_OI, weight_OI.stride(1 if by_input else 0),
        or_any(bias_O, weight_OI), other, other.stride(1 if by_input else 0), or_any(second_bias_O, weight_OI), out, rows, threshold,
        blocks, weight_OI if side is None else side.matrix, out if side is None else side.scale, out if side is None else side.out, extra,
        IN=inputs, OUT=outputs, BP=padded_rows(rows), OUTPUTS=shape.outputs, INPUTS=shape.inputs,
        SLICE=triton.cdiv(triton.cdiv(inputs, shape.slices), shape.inputs) * shape.inputs, STAGES=shape.stages, BY_INPUT=by_input,
        BIAS=bias_O is not None, ACTIVATION=-1 if activation is None else ACTIVATION_CODES[activation], GATED=second_OI is not None,
        SECOND_BIAS=second_bias_O is not None, SIDE=side is not None, D1=first, D2=second, D3=third, num_warps=shape.warps, programmatic=programmatic,
    )  # fmt: skip


def linear_rows_definition(x_BI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """What `linear_rows` gives, in the dtype of x."""
    return torch.nn.functional.linear(x_BI, weight_OI, bias_O)


def activated_rows_definition(x_BD: Tensor, weights: MlpWeights) -> Tensor:
    """What `activated_rows` gives, in the dtype of x."""
    up_BF = torch.nn.functional.linear(x_BD, weights.up_FD, weights.up_bias_F)
    if weights.gate_FD is None:
        return activate_definition(up_BF, weights.activation, weights.activation_threshold)
    gate_BF = torch.nn.functional.linear(x_BD, weights.gate_FD, weights.gate_bias_F)
    return activate_definition(gate_BF, weights.activation, weights.activation_threshold) * up_BF


def linear_rows_bytes(x_BI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, out: Tensor) -> int:
    return x_BI.nbytes + weight_OI.nbytes + out.nbytes + (0 if bias_O is None else bias_O.nbytes)
