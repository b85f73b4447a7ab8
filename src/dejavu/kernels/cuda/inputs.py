"""Products with the inputs that are kept at a point: |x_i| n_i > threshold (model/selectors.py), the matrix having a row per input.

    sum_inputs    out_O += sum over the kept i of x_i W[i, :], + bias;  the list of what is kept, in no order, and its length
    mask_rows     x of several rows with the inputs left out set to zero, and how many are kept

x of `sum_inputs` is made where it is read, and rounded to the dtype of the weights before it is looked at:

    NormedInputs      norm(y + delta)
    HeadInputs        the heads' outputs, put together from the splits of attention
    ActivatedInputs   act(gate) * up (or act(up)), of their products

A program has a slice of the inputs and some columns. It lists what it keeps of its slice in memory of its own, and sums those rows: it keeps
a sum for each of R rows, adds them up once, at its end, and loads places two steps ahead of the rows' use and rows one step ahead. A
NaN is kept: a mask leaves it what it is.

Bytes that any implementation moves: rows of the matrix of the kept inputs; x and its norms; the list.

Letters: B rows  D model  F neurons  H heads  K head_dim  I inputs  O outputs of a map  S slices of the inputs  R inputs at a time
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dejavu.kernels.activation import ACTIVATION_CODES
from dejavu.kernels.activation import activate as activate_definition
from dejavu.kernels.cuda.attention import Partials, combined_at
from dejavu.kernels.cuda.common import (
    AS_IT_IS,
    BlockOutput,
    NormWeights,
    activate,
    begin,
    exceeds,
    join_scale,
    launch,
    moments,
    multiprocessors,
    or_any,
    part,
    parts,
    registers_for,
    residual,
)

BLOCK = 256
FEW = 1 << 24  # weights of a matrix with too little work for more programs of a multiprocessor
NORMED, HEADS, ACTIVATED = 0, 1, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptInputs:
    """One point of one layer: norm fp32 [I], threshold fp32 [1]; where the selection goes: inputs int32 [I], count int32 [1], which holds
    0."""

    norm: Tensor
    threshold: Tensor
    inputs: Tensor
    count: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class NormedInputs:
    """x = norm(y + delta), fp32 [D] both, delta as of `added`; the sum goes to y_out [D], which is different memory."""

    y: Tensor
    delta: Tensor
    y_out: Tensor
    norm: NormWeights
    added: BlockOutput = AS_IT_IS


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadInputs:
    """x [H K] of one row's splits of attention."""

    partials: Partials


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivatedInputs:
    """x [F] of fp32 products with gate and up, [2F], or with up alone, [F]."""

    sums: Tensor
    activation: str
    activation_threshold: float
    gated: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SumShape:
    """Inputs at a time, columns of a program, warps, programs of a multiprocessor."""

    rows: int
    columns: int
    warps: int
    programs: int


@triton.jit
def _normed_inputs(
    i, live, y, delta, out_weight, out_eps, out_scale, y_out, weight, bias, eps, writes,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, D3: tl.constexpr, RMS: tl.constexpr, AFFINE: tl.constexpr, OUT_NORM: tl.constexpr,
):  # fmt: skip
    """The norm's values at i: its moments are of the whole row, which every program reads."""
    v1, v2, v3 = residual(y, delta, out_weight, out_eps, out_scale, y_out, writes, D, D1, D2, D3, OUT_NORM, True, 1, 0)
    mean, scale = moments(v1, v2, v3, eps, D, D1, D2, D3, RMS)
    d = tl.load(delta + i, mask=live, other=0.0)
    if OUT_NORM:
        d1 = part(delta, D, 0, D1)
        d2 = part(delta, D, D1, D2)
        d3 = part(delta, D, D1 + D2, D3)
        d = d * tl.load(out_weight + i, mask=live, other=0.0).to(tl.float32) * join_scale(d1, d2, d3, out_eps, out_scale, D, OUT_NORM)
    else:
        d = d * out_scale
    v = (tl.load(y + i, mask=live, other=0.0) + d - mean) * scale
    if AFFINE:
        v = v * tl.load(weight + i, mask=live, other=0.0).to(tl.float32)
        if not RMS:
            v = v + tl.load(bias + i, mask=live, other=0.0).to(tl.float32)
    return v


@triton.jit
def _activated_inputs(i, live, sums, threshold, F, GATED: tl.constexpr, ACTIVATION: tl.constexpr):
    v = activate(tl.load(sums + i, mask=live, other=0.0), ACTIVATION, threshold)
    if GATED:
        v = v * tl.load(sums + F + i, mask=live, other=0.0)
    return v


@triton.jit
def _places(rows, values, first, hi, R: tl.constexpr):
    """R places of a program's own list from `first` on: inputs, their values (0 beyond its end), and which are in it."""
    r = first + tl.arange(0, R)
    live = r < hi
    return tl.load(rows + r, mask=live, other=0), tl.load(values + r, mask=live, other=0.0), live


@triton.jit
def _weights(weight, places, column, WIDTH: tl.constexpr):
    row, _, live = places
    return tl.load(
        weight + row.to(tl.int64)[:, None] * WIDTH + column[None, :], mask=live[:, None] & (column < WIDTH)[None, :], other=0.0,
        eviction_policy="evict_first",
    )  # fmt: skip


@triton.jit
def _sum_inputs(
    y, delta, out_weight, out_eps, out_scale, y_out, norm_weight, norm_bias, eps, mixed, stats, sums, activation_threshold,
    norm, threshold, inputs, count, rows, values, weight, bias, out, cleared, cleared_size, size_I,
    SOURCE: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, D3: tl.constexpr, RMS: tl.constexpr, AFFINE: tl.constexpr,
    OUT_NORM: tl.constexpr, K: tl.constexpr, SPLITS: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, SLICE: tl.constexpr,
    WIDTH: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr, BIAS: tl.constexpr, PARTIAL: tl.constexpr, BLOCK: tl.constexpr,
    programmatic: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0)
    blocks = tl.num_programs(0)
    share = tl.program_id(1)
    shares = tl.num_programs(1)
    lo = (size_I * share) // shares
    i = lo + tl.arange(0, SLICE)
    live = i < (size_I * (share + 1)) // shares
    column = at * COLUMNS + tl.arange(0, COLUMNS)
    size = tl.load(norm + i, mask=live, other=0.0)
    least = tl.load(threshold)
    begin(programmatic)
    if SOURCE == 0:
        v = _normed_inputs(
            i, live, y, delta, out_weight, out_eps, out_scale, y_out, norm_weight, norm_bias, eps, (at == 0) & (share == 0),
            D, D1, D2, D3, RMS, AFFINE, OUT_NORM,
        )  # fmt: skip
    elif SOURCE == 1:
        v = combined_at(mixed, stats, i // K, i % K, live, K, SPLITS)
    else:
        v = _activated_inputs(i, live, sums, activation_threshold, size_I, GATED, ACTIVATION)
    x = v.to(weight.dtype.element_ty).to(tl.float32)
    chosen = (exceeds(tl.abs(x) * size, least) & live).to(tl.int32)
    place = tl.cumsum(chosen, 0) - 1
    total = tl.sum(chosen, 0)
    own = (share * blocks + at) * SLICE
    tl.store(rows + own + place, i, mask=chosen == 1)
    tl.store(values + own + place, x, mask=chosen == 1)
    if at == 0:
        first = tl.atomic_add(count, total, sem="relaxed")
        tl.store(inputs + first + place, i, mask=chosen == 1)
    number = share * blocks + at
    for start in range(number * BLOCK, cleared_size, blocks * shares * BLOCK):
        c = start + tl.arange(0, BLOCK)
        tl.store(cleared + c, 0.0, mask=c < cleared_size)
    tl.debug_barrier()  # what other threads of the program wrote
    acc = tl.zeros([R, COLUMNS], tl.float32)
    now = _places(rows + own, values + own, 0, total, R)
    new = _places(rows + own, values + own, R, total, R)
    w = _weights(weight, now, column, WIDTH)
    for first_row in tl.range(0, total, R, num_stages=1):
        next_w = _weights(weight, new, column, WIDTH)
        after = _places(rows + own, values + own, first_row + 2 * R, total, R)
        acc += w.to(tl.float32) * now[1][:, None]
        w = next_w
        now = new
        new = after
    out_C = tl.sum(acc, 0)
    if BIAS:
        if share == 0:
            out_C += tl.load(bias + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    if PARTIAL:
        tl.store(out + share * WIDTH + column, out_C, mask=column < WIDTH)
    elif (total > 0) | (share == 0):
        tl.atomic_add(out + column, out_C, mask=column < WIDTH, sem="relaxed")


@triton.jit
def _mask_rows(x, norm, threshold, out, row_count, row_stride, size, BLOCK: tl.constexpr, programmatic: tl.constexpr):
    b = tl.program_id(1)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < size
    norms = tl.load(norm + i, mask=live, other=0.0)
    begin(programmatic)
    v = tl.load(x + b * size + i, mask=live, other=0.0)
    weighed = tl.abs(v.to(tl.float32)) * norms
    chosen = exceeds(weighed, tl.load(threshold)) & live
    tl.store(out + b * size + i, tl.where(chosen, v, 0.0), mask=live)
    tl.atomic_add(row_count + b * row_stride, tl.sum(chosen.to(tl.int32), 0), sem="relaxed")


def sum_shape(inputs: int, outputs: int) -> SumShape:
    """What was fastest on an H200 (docs/log.md): 16 bytes of a row for each thread, and as many rows as fill its registers."""
    columns = min(2048, max(256, triton.next_power_of_2(outputs)))
    return SumShape(rows=8192 // columns, columns=columns, warps=8, programs=3 if inputs * outputs > FEW else 2)


def sum_slices(inputs: int, outputs: int, device: torch.device, shape: SumShape | None = None) -> int:
    """Parts that the inputs of a matrix are cut into."""
    shape = shape or sum_shape(inputs, outputs)
    return max(1, min(inputs, multiprocessors(device) * shape.programs // triton.cdiv(outputs, shape.columns)))


def sum_scratch(inputs: int, outputs: int, device: torch.device, shape: SumShape | None = None) -> int:
    """Values that the programs of a product list at most."""
    shape, slices = shape or sum_shape(inputs, outputs), sum_slices(inputs, outputs, device, shape)
    return slices * triton.cdiv(outputs, shape.columns) * _slice_room(inputs, slices)


def _slice_room(inputs: int, slices: int) -> int:
    return max(16, triton.next_power_of_2(triton.cdiv(inputs, slices)))


def sum_inputs(
    x: NormedInputs | HeadInputs | ActivatedInputs,
    kept: KeptInputs,
    scratch: tuple[Tensor, Tensor],
    weight_IO: Tensor,
    bias_O: Tensor | None,
    out: Tensor,
    *,
    cleared: Tensor | None = None,
    shape: SumShape | None = None,
    partial: bool = False,
    programmatic: bool = False,
) -> None:
    """Add the product of the kept inputs with the matrix to out fp32 [O]; partial: out is [slices, O], to be added up in order.

    scratch: int32 and fp32 [sum_scratch], for nobody else. cleared: contiguous fp32 memory that is set to zero.
    """
    inputs, size = weight_IO.shape
    shape = shape or sum_shape(inputs, size)
    assert weight_IO.is_contiguous() and inputs == kept.norm.shape[0]
    device, source = weight_IO.device, _source(x, inputs, weight_IO)
    slices = sum_slices(inputs, size, device, shape)
    assert inputs * slices < 1 << 31  # the kernel multiplies them
    assert len(scratch[0]) >= sum_scratch(inputs, size, device, shape) <= len(scratch[1])
    launch(
        _sum_inputs, (triton.cdiv(size, shape.columns), slices), *source.arguments, kept.norm, kept.threshold, kept.inputs, kept.count,
        *scratch, weight_IO, or_any(bias_O, weight_IO), out, or_any(cleared, out), 0 if cleared is None else cleared.numel(), inputs,
        **source.constants, SLICE=_slice_room(inputs, slices), WIDTH=size, R=shape.rows, COLUMNS=shape.columns, BIAS=bias_O is not None,
        PARTIAL=partial, BLOCK=BLOCK, num_warps=shape.warps, programmatic=programmatic,
        max_registers=registers_for(shape.warps, shape.programs),
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """Where x comes from, as the kernel takes it."""

    arguments: tuple[Tensor | float, ...]
    constants: dict[str, int | bool]


def _source(x: NormedInputs | HeadInputs | ActivatedInputs, inputs: int, other: Tensor) -> _Source:
    """other: any tensor, in the place of those that are not read."""
    row = (other, other, other, 0.0, 1.0, other, other, other, 0.0)
    constants = {
        "SOURCE": NORMED, "D": 1, "D1": 1, "D2": 1, "D3": 1, "RMS": True, "AFFINE": False, "OUT_NORM": False, "K": 1, "SPLITS": 1,
        "GATED": False, "ACTIVATION": 0,
    }  # fmt: skip
    match x:
        case NormedInputs(y=y, delta=delta, y_out=y_out, norm=norm, added=added):
            assert y.shape == delta.shape == y_out.shape == (inputs,)
            row = (
                y, delta, *added.arguments(y), y_out, or_any(norm.weight, y), or_any(norm.bias, y), norm.eps,
            )  # fmt: skip
            first, second, third = parts(inputs)
            changed = {
                "D": inputs, "D1": first, "D2": second, "D3": third, "RMS": norm.rms, "AFFINE": norm.weight is not None,
                "OUT_NORM": added.weight is not None,
            }  # fmt: skip
            return _Source(arguments=(*row, other, other, other, 0.0), constants=constants | changed)
        case HeadInputs(partials=partials):
            rows, heads, splits, head_dim = partials.mixed.shape
            assert rows == 1 and inputs == heads * head_dim
            changed = {"SOURCE": HEADS, "K": head_dim, "SPLITS": splits}
            return _Source(arguments=(*row, partials.mixed, partials.stats, other, 0.0), constants=constants | changed)
        case ActivatedInputs(sums=sums, activation=activation, activation_threshold=threshold, gated=gated):
            assert sums.is_contiguous() and sums.shape == (inputs * (2 if gated else 1),)
            changed = {"SOURCE": ACTIVATED, "GATED": gated, "ACTIVATION": ACTIVATION_CODES[activation]}
            return _Source(arguments=(*row, other, other, sums, threshold), constants=constants | changed)


def mask_rows(x_BI: Tensor, norm_I: Tensor, threshold: Tensor, out_BI: Tensor, row_count: Tensor, *, programmatic: bool = False) -> None:
    """out gets x with what each row does not keep set to zero; what it keeps is added to row_count int32 [B, stride]."""
    rows, size = x_BI.shape
    assert x_BI.is_contiguous() and out_BI.is_contiguous()
    launch(
        _mask_rows, (triton.cdiv(size, BLOCK), rows), x_BI, norm_I, threshold, out_BI, row_count, row_count.stride(0), size, BLOCK=BLOCK,
        num_warps=4, programmatic=programmatic,
    )  # fmt: skip


def kept_definition(x: Tensor, norm_I: Tensor, threshold: float) -> Tensor:
    """Which inputs [.., I] are kept, bool."""
    return ~(x.float().abs() * norm_I <= threshold)


def activated_definition(sums_O: Tensor, activation: str, activation_threshold: float, *, gated: bool) -> Tensor:
    """The activations [F] of `ActivatedInputs`, in the dtype of the sums."""
    first, *rest = sums_O.chunk(2 if gated else 1)
    act_F = activate_definition(first, activation, activation_threshold)
    return act_F * rest[0] if gated else act_F


def sum_inputs_definition(x: Tensor, keep: Tensor, weight_IO: Tensor, bias_O: Tensor | None) -> Tensor:
    """What `sum_inputs` adds to out, in the dtype of the weights."""
    y = torch.where(keep, x, 0) @ weight_IO
    return y if bias_O is None else y + bias_O


def sum_inputs_bytes(weight_IO: Tensor, bias_O: Tensor | None, kept: int) -> int:
    """Norms of all inputs; rows of so many, their values and indices, the bias; fp32 sums out."""
    inputs, size, width = *weight_IO.shape, weight_IO.element_size()
    return 4 * inputs + kept * (size * width + width + 4) + size * 4 + (0 if bias_O is None else bias_O.nbytes)


def mask_rows_bytes(x_BI: Tensor) -> int:
    return 2 * x_BI.nbytes + 4 * x_BI.shape[1]
