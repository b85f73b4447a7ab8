"""The MLP of several rows whose neurons each row's own gate selects, behind the products with the gate (linear_rows.py), in three kernels.

    select_gate_rows  for each neuron a row mask, bit b set where |act(p_bf)| > threshold; the list of neurons that some row selects
    up_given_rows     a[f, b] = act(p_bf) (up_f . x_b + c_f) (gated)  or  act(p_bf); 0 where row b did not select f
    down_rows         out_b += sum_f a[f, b] down_f + down_bias (mlp_rows.py)

p [B, F] are products of x with the gate's rows, or with those of up where the MLP has no gate. A row's selection depends on that
row alone; the list, the union, is how weights are fetched.

Bytes that any implementation moves: the gate for every neuron, rows of up (where gated) and down of the union, products and list.

Letters: B rows, BP the next power of two from 16  D model  F neurons  R neurons at a time
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from dejavu.kernels.activation import ACTIVATION_CODES
from dejavu.kernels.cuda.common import activate, begin, exceeds, launch, multiprocessors, or_any, row_bias
from dejavu.kernels.cuda.mlp_rows import UpShape, padded_rows, up_shape_for
from dejavu.kernels.cuda.select_rows import MAX_ROWS
from dejavu.kernels.sparse_mlp import MlpWeights

BLOCK = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class GateRows:
    """threshold fp32 [1], and where the selections go: row_mask_F int32 [F], union int32 [F] and count int32 [1] (zero), row_count
    int32 [B, stride] (zero), of which the first column is used."""

    threshold: Tensor
    row_mask_F: Tensor
    union: Tensor
    count: Tensor
    row_count: Tensor


@triton.jit
def _select_gate_rows(
    product, threshold, slots, padding, row_mask_F, union, count, row_count, row_stride, B, F, activation_threshold,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr, programmatic: tl.constexpr,
):  # fmt: skip
    f = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = f < F
    least = tl.load(threshold)
    begin(programmatic)
    mask_bits = tl.zeros([BLOCK], tl.int32)
    for b in range(0, B):
        p = tl.load(product + b * F + f, mask=live, other=0.0).to(tl.float32)
        v = activate(p, ACTIVATION, activation_threshold)
        # A row that only fills the bucket selects nothing: it would widen the union.
        chosen = (exceeds(tl.abs(v), least) & live & (tl.load(slots + b) != padding)).to(tl.int32)
        mask_bits = mask_bits | (chosen << b)
        tl.atomic_add(row_count + b * row_stride, tl.sum(chosen, 0), sem="relaxed")
    tl.store(row_mask_F + f, mask_bits, mask=live)
    some = (mask_bits != 0).to(tl.int32)
    place = tl.cumsum(some, 0) - 1
    first = tl.atomic_add(count, tl.sum(some, 0), sem="relaxed")
    tl.store(union + first + place, f, mask=some == 1)


@triton.jit
def _up_given_rows(
    x, product, up, up_bias, row_mask_F, union, count, act, activation_threshold, B, F, D: tl.constexpr, BP: tl.constexpr, R: tl.constexpr,
    COLUMNS: tl.constexpr, STAGES: tl.constexpr, GATED: tl.constexpr, UP_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    programmatic: tl.constexpr,
):  # fmt: skip
    begin(programmatic)
    total = tl.load(count)
    b = tl.arange(0, BP)
    for block in range(tl.program_id(0), tl.cdiv(total, R), tl.num_programs(0)):
        r = block * R + tl.arange(0, R)
        live = r < total
        row = tl.load(union + r, mask=live, other=0)
        there = live[:, None] & (b < B)[None, :]
        p = tl.load(product + b[None, :] * F + row[:, None], mask=there, other=0.0).to(tl.float32)
        v = activate(p, ACTIVATION, activation_threshold)
        if GATED:
            at = row.to(tl.int64)[:, None] * D
            acc = tl.zeros([R, BP], tl.float32)
            for first in tl.range(0, D, COLUMNS, num_stages=STAGES):
                c = first + tl.arange(0, COLUMNS)
                xv = tl.load(x + b[:, None] * D + c[None, :], mask=(b < B)[:, None] & (c < D)[None, :], other=0.0)
                w = tl.load(up + at + c[None, :], mask=live[:, None] & (c < D)[None, :], other=0.0)
                acc = tl.dot(w, tl.trans(xv), acc, input_precision="ieee")
            v = v * (acc + row_bias(up_bias, row, live, UP_BIAS).to(tl.float32)[:, None])
        mask_bits = tl.load(row_mask_F + row, mask=live, other=0)
        v = tl.where(((mask_bits[:, None] >> b[None, :]) & 1) == 1, v, 0.0)
        tl.store(act + r[:, None] * BP + b[None, :], v.to(act.dtype.element_ty), mask=live[:, None])


def select_gate_rows(
    product_BF: Tensor,
    gate: GateRows,
    activation: str,
    activation_threshold: float,
    slot_B: Tensor,
    padding: int,
    *,
    programmatic: bool = False,
) -> None:
    """Fill the row masks, the union with its count, and add each row's count; rows of the slot `padding` select nothing."""
    rows, neurons = product_BF.shape
    assert rows <= MAX_ROWS and product_BF.is_contiguous()
    launch(
        _select_gate_rows, (triton.cdiv(neurons, BLOCK),), product_BF, gate.threshold, slot_B, padding, gate.row_mask_F, gate.union, gate.count,
        gate.row_count, gate.row_count.stride(0), rows, neurons, activation_threshold, ACTIVATION=ACTIVATION_CODES[activation], BLOCK=BLOCK,
        num_warps=4, programmatic=programmatic,
    )  # fmt: skip


def up_given_rows(
    x_BD: Tensor,
    product_BF: Tensor,
    weights: MlpWeights,
    row_mask_F: Tensor,
    union_F: Tensor,
    count: Tensor,
    act_FB: Tensor,
    *,
    shape: UpShape | None = None,
    programmatic: bool = False,
) -> None:
    """Activations of the union, by place in the list, in act_FB [F, BP], of the dtype of x."""
    rows, size = x_BD.shape
    shape, gated = shape or up_shape_for(x_BD, 1), weights.gate_FD is not None
    assert product_BF.is_contiguous() and act_FB.shape[1] == padded_rows(rows)
    launch(
        _up_given_rows,
        (multiprocessors(x_BD.device) * shape.programs,),
        x_BD, product_BF, weights.up_FD, or_any(weights.up_bias_F, x_BD), row_mask_F, union_F, count, act_FB, weights.activation_threshold, rows,
        product_BF.shape[1],
        D=size, BP=padded_rows(rows), R=shape.rows, COLUMNS=min(shape.columns, max(16, triton.next_power_of_2(size))), STAGES=shape.stages,
        GATED=gated, UP_BIAS=gated and weights.up_bias_F is not None, ACTIVATION=ACTIVATION_CODES[weights.activation],
        num_warps=shape.warps, programmatic=programmatic,
    )  # fmt: skip


def gate_rows_bytes(weights: MlpWeights, rows: int, union: int) -> int:
    """Of the three kernels: products of every neuron, rows of up (where gated) and down of the union, the list, biases."""
    size, width = weights.down_FD.shape[1], weights.down_FD.element_size()
    matrices = 1 if weights.gate_FD is None else 2
    bias = matrices == 2 and weights.up_bias_F is not None
    down_bias = 0 if weights.down_bias_D is None else weights.down_bias_D.nbytes
    return rows * weights.down_FD.shape[0] * width + union * ((matrices * size + bias) * width + 4) + down_bias
