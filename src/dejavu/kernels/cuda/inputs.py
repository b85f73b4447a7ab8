"""Products with the inputs that are kept at a point: |x_i| n_i > threshold (model/selectors.py), the matrix having a row per input.

    keep_normed      x = norm(y + delta);  the list of kept inputs, in order, and its length
    keep_heads       x = the heads' outputs, put together from the splits of attention;  list and length, in no order
    keep_activated   x = act(gate) * up (or act(up));  list and length, in no order
    sum_inputs       out_O += sum over the list of x_i W[i, :], + bias
    mask_rows        x of several rows with the inputs left out set to zero, and how many are kept

x is rounded to the dtype of the weights before it is looked at. A NaN is kept: a mask leaves it what it is. A list in no order is made
by atomic additions to its length, which an earlier kernel has set to zero (`keep_normed` does, for the points behind it).

A program of `sum_inputs` has a share of the list and some columns. It keeps a sum for each of R places, adds them up once, at its end, and
loads the places two steps ahead of the rows' use and the rows one step ahead.

Bytes that any implementation moves: rows of the matrix of the kept inputs; x, its norms and the list.

Letters: B rows  D model  F neurons  H heads  K head_dim  I inputs  O outputs of a map  S shares of a list  R inputs at a time
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dejavu.kernels.activation import ACTIVATION_CODES
from dejavu.kernels.activation import activate as activate_definition
from dejavu.kernels.cuda.attention import Partials, combined
from dejavu.kernels.cuda.common import (
    AS_IT_IS,
    BlockOutput,
    NormWeights,
    activate,
    begin,
    exceeds,
    launch,
    multiprocessors,
    norm_parts,
    normed,
    or_any,
    parts,
    residual,
)

BLOCK = 256
CLEARED = 1024
FEW = 1 << 24  # weights of a matrix with too little work for six programs of a multiprocessor


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptInputs:
    """One point of one layer: norm fp32 [I], threshold fp32 [1]; where x [I], in the dtype of the weights, and the selection go:
    inputs int32 [I], count int32 [1]."""

    norm: Tensor
    threshold: Tensor
    x: Tensor
    inputs: Tensor
    count: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SumShape:
    """Inputs at a time, columns of a program, warps, programs of a multiprocessor."""

    rows: int
    columns: int
    warps: int = 4
    programs: int = 6


@triton.jit
def _keep_part(x, norm, threshold, out, inputs, base, D: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr):
    """Store a part of x and list what is kept of it behind the first `base` places; the places taken then."""
    if FIRST >= D:
        return base
    else:
        i = FIRST + tl.arange(0, SIZE)
        live = i < D
        weighed = tl.abs(x.to(tl.float32)) * tl.load(norm + i, mask=live, other=0.0)
        chosen = (exceeds(weighed, threshold) & live).to(tl.int32)
        tl.store(out + i, x, mask=live)
        tl.store(inputs + base + tl.cumsum(chosen, 0) - 1, i, mask=chosen == 1)
        return base + tl.sum(chosen, 0)


@triton.jit
def _keep_normed(
    y, delta, out_weight, out_eps, out_scale, y_out, norm_weight, norm_bias, eps, norm, threshold, out, inputs, count, cleared, cleared_size, counter, other_counter,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, D3: tl.constexpr, RMS: tl.constexpr, AFFINE: tl.constexpr, CLEARED: tl.constexpr,
    COUNTERS: tl.constexpr, OUT_NORM: tl.constexpr, programmatic: tl.constexpr,
):  # fmt: skip
    """Program 0 does all but clearing, which the others do."""
    pid = tl.program_id(0)
    if pid == 0:
        w, b = norm_parts(norm_weight, norm_bias, D, D1, D2, D3, RMS, AFFINE)
        begin(programmatic)
        y1, y2, y3 = residual(y, delta, out_weight, out_eps, out_scale, y_out, True, D, D1, D2, D3, OUT_NORM, True)
        x1, x2, x3 = normed(y1, y2, y3, w, b, eps, D, D1, D2, D3, RMS, AFFINE, out.dtype.element_ty)
        least = tl.load(threshold)
        total = _keep_part(x1, norm, least, out, inputs, 0, D, 0, D1)
        total = _keep_part(x2, norm, least, out, inputs, total, D, D1, D2)
        total = _keep_part(x3, norm, least, out, inputs, total, D, D1 + D2, D3)
        tl.store(count, total)
        if COUNTERS:
            tl.store(counter, 0)
            tl.store(other_counter, 0)
    else:
        begin(programmatic)
        c = (pid - 1) * CLEARED + tl.arange(0, CLEARED)
        tl.store(cleared + c, tl.zeros([CLEARED], tl.float32), mask=c < cleared_size)


@triton.jit
def _listed(value, at, live, norm, threshold, out, inputs, count):
    """Store values and append those that are kept to the list."""
    x = value.to(out.dtype.element_ty)
    weighed = tl.abs(x.to(tl.float32)) * tl.load(norm + at, mask=live, other=0.0)
    chosen = (exceeds(weighed, tl.load(threshold)) & live).to(tl.int32)
    tl.store(out + at, x, mask=live)
    place = tl.cumsum(chosen, 0) - 1
    first = tl.atomic_add(count, tl.sum(chosen, 0), sem="relaxed")
    tl.store(inputs + first + place, at, mask=chosen == 1)


@triton.jit
def _keep_heads(
    mixed, stats, norm, threshold, out, inputs, count, K: tl.constexpr, KP: tl.constexpr, SPLITS: tl.constexpr, programmatic: tl.constexpr
):
    head = tl.program_id(0)
    k = tl.arange(0, KP)
    begin(programmatic)
    _listed(combined(mixed, stats, head, k, K, SPLITS), head * K + k, k < K, norm, threshold, out, inputs, count)


@triton.jit
def _keep_activated(
    sums, norm, threshold, out, inputs, count, F, activation_threshold, GATED: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
    programmatic: tl.constexpr,
):  # fmt: skip
    f = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = f < F
    begin(programmatic)
    v = activate(tl.load(sums + f, mask=live, other=0.0), ACTIVATION, activation_threshold)
    if GATED:
        v = v * tl.load(sums + F + f, mask=live, other=0.0)
    _listed(v, f, live, norm, threshold, out, inputs, count)


@triton.jit
def _places(x, inputs, first, hi, R: tl.constexpr):
    """R places of the list from `first` on: inputs, their values (0 beyond its end), and which are in it."""
    r = first + tl.arange(0, R)
    live = r < hi
    row = tl.load(inputs + r, mask=live, other=0)
    return row, tl.load(x + row, mask=live, other=0.0), live


@triton.jit
def _weights(weight, places, column, WIDTH: tl.constexpr):
    row, _, live = places
    return tl.load(
        weight + row.to(tl.int64)[:, None] * WIDTH + column[None, :], mask=live[:, None] & (column < WIDTH)[None, :], other=0.0,
        eviction_policy="evict_first",
    )  # fmt: skip


@triton.jit
def _sum_inputs(
    x, weight, bias, inputs, count, out, WIDTH: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr, BIAS: tl.constexpr,
    PARTIAL: tl.constexpr, programmatic: tl.constexpr,
):  # fmt: skip
    share = tl.program_id(1)
    shares = tl.num_programs(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    begin(programmatic)
    total = tl.load(count)
    lo = (total * share) // shares
    hi = (total * (share + 1)) // shares
    sums = tl.zeros([R, COLUMNS], tl.float32)
    now = _places(x, inputs, lo, hi, R)
    new = _places(x, inputs, lo + R, hi, R)
    w = _weights(weight, now, column, WIDTH)
    for first in tl.range(lo, hi, R, num_stages=1):
        next_w = _weights(weight, new, column, WIDTH)
        after = _places(x, inputs, first + 2 * R, hi, R)
        sums += w.to(tl.float32) * now[1].to(tl.float32)[:, None]
        w = next_w
        now = new
        new = after
    acc = tl.sum(sums, 0)
    if BIAS:
        if share == 0:
            acc += tl.load(bias + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    if PARTIAL:
        tl.store(out + share * WIDTH + column, acc, mask=column < WIDTH)
    elif (lo < hi) | (share == 0):
        tl.atomic_add(out + column, acc, mask=column < WIDTH, sem="relaxed")


@triton.jit
def _mask_rows(x, norm, threshold, out, row_count, row_stride, size, BLOCK: tl.constexpr, programmatic: tl.constexpr):
    b = tl.program_id(1)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < size
    v = tl.load(x + b * size + i, mask=live, other=0.0)
    weighed = tl.abs(v.to(tl.float32)) * tl.load(norm + i, mask=live, other=0.0)
    chosen = exceeds(weighed, tl.load(threshold)) & live
    tl.store(out + b * size + i, tl.where(chosen, v, 0.0), mask=live)
    tl.atomic_add(row_count + b * row_stride, tl.sum(chosen.to(tl.int32), 0), sem="relaxed")


def keep_normed(
    y_D: Tensor,
    delta_D: Tensor,
    y_out_D: Tensor,
    norm: NormWeights,
    kept: KeptInputs,
    *,
    added: BlockOutput = AS_IT_IS,
    cleared: Tensor | None = None,
    counters: tuple[Tensor, Tensor] | None = None,
    programmatic: bool = False,
) -> None:
    """Write y + delta (fp32), this as of `added`, to y_out; fill kept.x with its norm, and kept.inputs, in order, and kept.count.

    cleared: contiguous fp32 memory that is set to zero, and counters int32 [1] likewise, for the kernels that follow.
    """
    size = y_D.shape[0]
    first, second, third = parts(size)
    counter, other_counter = (kept.count, kept.count) if counters is None else counters
    launch(
        _keep_normed, (1 + (triton.cdiv(cleared.numel(), CLEARED) if cleared is not None else 0),),
        y_D, delta_D, *added.arguments(y_D), y_out_D, or_any(norm.weight, y_D), or_any(norm.bias, y_D), norm.eps, kept.norm, kept.threshold, kept.x, kept.inputs,
        kept.count, or_any(cleared, y_D), 0 if cleared is None else cleared.numel(), counter, other_counter,
        D=size, D1=first, D2=second, D3=third, RMS=norm.rms, AFFINE=norm.weight is not None, CLEARED=CLEARED,
        COUNTERS=counters is not None, OUT_NORM=added.weight is not None, num_warps=8, programmatic=programmatic,
    )  # fmt: skip


def keep_heads(partials: Partials, kept: KeptInputs, *, programmatic: bool = False) -> None:
    """One row's heads put together: fill kept.x [H K], kept.inputs and kept.count, which must hold 0."""
    rows, heads, splits, head_dim = partials.mixed.shape
    assert rows == 1
    launch(
        _keep_heads, (heads,), partials.mixed, partials.stats, kept.norm, kept.threshold, kept.x, kept.inputs, kept.count, K=head_dim,
        KP=max(16, triton.next_power_of_2(head_dim)), SPLITS=splits, num_warps=1, programmatic=programmatic,
    )  # fmt: skip


def keep_activated(
    sums_O: Tensor, kept: KeptInputs, activation: str, activation_threshold: float, *, gated: bool, programmatic: bool = False
) -> None:
    """The activations of fp32 products with gate and up, O = 2F, or with up alone: fill kept.x [F], kept.inputs and kept.count, which must
    hold 0."""
    neurons = kept.x.shape[0]
    assert sums_O.is_contiguous() and sums_O.shape == (neurons * (2 if gated else 1),)
    launch(
        _keep_activated, (triton.cdiv(neurons, BLOCK),), sums_O, kept.norm, kept.threshold, kept.x, kept.inputs, kept.count, neurons,
        activation_threshold, GATED=gated, ACTIVATION=ACTIVATION_CODES[activation], BLOCK=BLOCK, num_warps=4, programmatic=programmatic,
    )  # fmt: skip


def sum_shape(inputs: int, outputs: int) -> SumShape:
    """What was fastest on an H200 (docs/log.md): columns of 16 bytes for each thread of a warp, rows as many as fill the registers."""
    columns = min(1024, max(256, triton.next_power_of_2(outputs)))
    return SumShape(rows=4096 // columns, columns=columns, programs=6 if inputs * outputs > FEW else 4)


def sum_shares(outputs: int, device: torch.device, shape: SumShape) -> int:
    """Parts that the list is cut into for a matrix with so many outputs."""
    return max(1, multiprocessors(device) * shape.programs // triton.cdiv(outputs, shape.columns))


def sum_inputs(
    kept: KeptInputs,
    inputs_I: Tensor,
    weight_IO: Tensor,
    bias_O: Tensor | None,
    out: Tensor,
    *,
    shape: SumShape | None = None,
    partial: bool = False,
    programmatic: bool = False,
) -> None:
    """Add the product of the kept inputs with the matrix to out fp32 [O]; partial: out is [shares, O], to be added up in order.

    inputs_I: the list, in what order its sums are to be made.
    """
    inputs, size = weight_IO.shape
    shape = shape or sum_shape(inputs, size)
    assert weight_IO.is_contiguous() and inputs == kept.x.shape[0]
    launch(
        _sum_inputs, (triton.cdiv(size, shape.columns), sum_shares(size, weight_IO.device, shape)),
        kept.x, weight_IO, or_any(bias_O, kept.x), inputs_I, kept.count, out,
        WIDTH=size, R=shape.rows, COLUMNS=shape.columns, BIAS=bias_O is not None, PARTIAL=partial, num_warps=shape.warps,
        programmatic=programmatic,
    )  # fmt: skip


def mask_rows(x_BI: Tensor, norm_I: Tensor, threshold: Tensor, out_BI: Tensor, row_count: Tensor) -> None:
    """out gets x with what each row does not keep set to zero; what it keeps is added to row_count int32 [B, stride]."""
    rows, size = x_BI.shape
    assert x_BI.is_contiguous() and out_BI.is_contiguous()
    launch(
        _mask_rows, (triton.cdiv(size, BLOCK), rows), x_BI, norm_I, threshold, out_BI, row_count, row_count.stride(0), size, BLOCK=BLOCK,
        num_warps=4,
    )  # fmt: skip


def kept_definition(x: Tensor, norm_I: Tensor, threshold: float) -> Tensor:
    """Which inputs [.., I] are kept, bool."""
    return ~(x.float().abs() * norm_I <= threshold)


def activated_definition(sums_O: Tensor, activation: str, activation_threshold: float, *, gated: bool) -> Tensor:
    """The activations [F] that `keep_activated` looks at, in the dtype of the sums."""
    first, *rest = sums_O.chunk(2 if gated else 1)
    act_F = activate_definition(first, activation, activation_threshold)
    return act_F * rest[0] if gated else act_F


def sum_inputs_definition(x: Tensor, keep: Tensor, weight_IO: Tensor, bias_O: Tensor | None) -> Tensor:
    """What `sum_inputs` adds to out, in the dtype of the weights."""
    y = torch.where(keep, x, 0) @ weight_IO
    return y if bias_O is None else y + bias_O


def keep_inputs_bytes(inputs: int, kept: int, element_size: int) -> int:
    """Of listing the kept ones of so many inputs: x and norms in, x and list out."""
    return inputs * (2 * element_size + 4) + 4 * kept


def sum_inputs_bytes(weight_IO: Tensor, bias_O: Tensor | None, kept: int) -> int:
    """Rows of so many inputs, their values and indices, the bias; fp32 sums out."""
    size, width = weight_IO.shape[1], weight_IO.element_size()
    return kept * (size * width + width + 4) + size * 4 + (0 if bias_O is None else bias_O.nbytes)


def mask_rows_bytes(x_BI: Tensor) -> int:
    return 2 * x_BI.nbytes + 4 * x_BI.shape[1]
