"""The MLP of one token whose neurons its own gate selects, in two kernels, of which this is the second.

    project_token    p = products of x with the rows of the gate, or of up where the MLP has no gate: neither is read again
                     v_f = act(p_f);  the list of f with |v_f| > threshold, in no order, its length, and v (`list_activated`)
    mlp_given_token  out += sum over the list of v_f (up_f . x + b_f) down_f (gated)  or  v_f down_f, + down_bias;  x = norm(y + delta)

A NaN is kept, as a mask leaves it what it is.

Bytes that any implementation moves: the gate for every neuron, the other one or two matrices' rows for those kept, and the list.

Letters: D model  F neurons  A selected  R neurons at a time
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dejavu.kernels.activation import activate as activate_definition
from dejavu.kernels.cuda.common import (
    AS_IT_IS,
    BlockOutput,
    GridShape,
    NormWeights,
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
    store_part,
    tiles,
)
from dejavu.kernels.cuda.mlp import default_shape, programs_of
from dejavu.kernels.sparse_mlp import MlpWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class GateNeurons:
    """What a gate selects: by the activation of its code and its threshold; threshold fp32 [1]; value fp32 [F], activations of what is
    selected and products of the rest; neurons int32 [F] and count int32 [1], which holds 0."""

    activation: str
    activation_threshold: float
    threshold: Tensor
    value: Tensor
    neurons: Tensor
    count: Tensor


@triton.jit
def list_activated(value, f, live, threshold, neurons, count, activation_threshold, ACTIVATION: tl.constexpr):
    """Of a program's own products value[f]: activate those that are selected, and append them to the list."""
    v = activate(tl.load(value + f, mask=live, other=0.0), ACTIVATION, activation_threshold)
    chosen = (exceeds(tl.abs(v), tl.load(threshold)) & live).to(tl.int32)
    place = tl.cumsum(chosen, 0) - 1
    first = tl.atomic_add(count, tl.sum(chosen, 0), sem="relaxed")
    tl.store(value + f, v, mask=chosen == 1)
    tl.store(neurons + first + place, f, mask=chosen == 1)


@triton.jit
def _given_rows(
    up, up_bias, down, value, idx, first, hi, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, D3: tl.constexpr, R: tl.constexpr,
    GATED: tl.constexpr, UP_BIAS: tl.constexpr,
):  # fmt: skip
    """What R places of the list from `first` on need: values (0 beyond its end), rows of up (or of down) and of down, biases."""
    r = first + tl.arange(0, R)
    live = r < hi
    row = tl.load(idx + r, mask=live, other=0)
    d = tiles(down, row, live, D, D1, D2, D3)
    u = d
    if GATED:
        u = tiles(up, row, live, D, D1, D2, D3)
    return tl.load(value + row, mask=live, other=0.0), u, d, row_bias(up_bias, row, live, UP_BIAS)


@triton.jit
def _mlp_given(
    y, delta, out_weight, out_eps, out_scale, y_out, norm_weight, norm_bias, eps, up, up_bias, down, down_bias, value, idx, count, out,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, D3: tl.constexpr, R: tl.constexpr, RMS: tl.constexpr, AFFINE: tl.constexpr,
    GATED: tl.constexpr, UP_BIAS: tl.constexpr, DOWN_BIAS: tl.constexpr, PARTIAL: tl.constexpr, OUT_NORM: tl.constexpr,
    programmatic: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    w, b = norm_parts(norm_weight, norm_bias, D, D1, D2, D3, RMS, AFFINE)
    begin(programmatic)
    total = tl.load(count)
    lo = (total * pid) // programs
    hi = (total * (pid + 1)) // programs
    now = _given_rows(up, up_bias, down, value, idx, lo, hi, D, D1, D2, D3, R, GATED, UP_BIAS)
    y1, y2, y3 = residual(y, delta, out_weight, out_eps, out_scale, y_out, pid == 0, D, D1, D2, D3, OUT_NORM, True)
    x1, x2, x3 = normed(y1, y2, y3, w, b, eps, D, D1, D2, D3, RMS, AFFINE, down.dtype.element_ty)
    acc1 = tl.zeros([D1], tl.float32)
    acc2 = tl.zeros([D2], tl.float32)
    acc3 = tl.zeros([D3], tl.float32)
    for first in tl.range(lo, hi, R, num_stages=1):
        new = _given_rows(up, up_bias, down, value, idx, first + R, hi, D, D1, D2, D3, R, GATED, UP_BIAS)
        act, u, d, up_b = now
        if GATED:
            act = act * (products(u[0], u[1], u[2], x1, x2, x3) + up_b.to(tl.float32))
        acc1 += tl.sum(d[0].to(tl.float32) * act[:, None], 0)
        acc2 += tl.sum(d[1].to(tl.float32) * act[:, None], 0)
        acc3 += tl.sum(d[2].to(tl.float32) * act[:, None], 0)
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


def given_shape(size: int) -> GridShape:
    """A neuron has at most two rows to read, as one of an MLP without a gate has."""
    return default_shape(size, gated=False)


def mlp_given_token(
    y_D: Tensor,
    delta_D: Tensor,
    y_out_D: Tensor,
    out: Tensor,
    norm: NormWeights,
    weights: MlpWeights,
    value_F: Tensor,
    idx_F: Tensor,
    count: Tensor,
    *,
    added: BlockOutput = AS_IT_IS,
    shape: GridShape | None = None,
    partial: bool = False,
    programmatic: bool = False,
) -> None:
    """Write y + delta, this as of `added`, to y_out [D] and add to out [D] the MLP of its norm over the list, its gate (or activation)
    known; all fp32.

    value_F fp32 [F]; idx_F int32 [F], of which the first count int32 [1] are the neurons. partial: `out` is [programs, D] and gets
    each program's own sum, to be added up in a fixed order. y, y_out and out are different memory.
    """
    down_FD, gated = weights.down_FD, weights.gate_FD is not None
    size = down_FD.shape[1]
    shape = given_shape(size) if shape is None else shape
    first, second, third = parts(size)
    assert weights.up_FD.is_contiguous() and down_FD.is_contiguous()
    launch(
        _mlp_given,
        (programs_of(shape, down_FD.device),),
        y_D, delta_D, *added.arguments(y_D), y_out_D, or_any(norm.weight, y_D), or_any(norm.bias, y_D), norm.eps, weights.up_FD, or_any(weights.up_bias_F, y_D),
        down_FD, or_any(weights.down_bias_D, y_D), value_F, idx_F, count, out,
        D=size, D1=first, D2=second, D3=third, R=shape.rows, RMS=norm.rms, AFFINE=norm.weight is not None, GATED=gated,
        UP_BIAS=gated and weights.up_bias_F is not None, DOWN_BIAS=weights.down_bias_D is not None, PARTIAL=partial,
        OUT_NORM=added.weight is not None, num_warps=shape.warps, programmatic=programmatic,
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


def mlp_given_token_definition(
    y_D: Tensor, delta_D: Tensor, norm: NormWeights, weights: MlpWeights, value_F: Tensor, keep_F: Tensor
) -> Tensor:
    """What `mlp_given_token` adds to out, in the dtype of the weights."""
    x_D = norm_definition((y_D + delta_D).to(weights.down_FD.dtype), norm)
    return mlp_given_definition(x_D, weights, value_F, keep_F)


def mlp_given_bytes(weights: MlpWeights, kept: int) -> int:
    """Rows of up (where gated) and down of so many neurons, their values and indices, and the down bias."""
    size, matrices = weights.down_FD.shape[1], 1 if weights.gate_FD is None else 2
    bias = matrices == 2 and weights.up_bias_F is not None
    down_bias = 0 if weights.down_bias_D is None else weights.down_bias_D.nbytes
    return kept * ((matrices * size + bias) * weights.down_FD.element_size() + 8) + down_bias
