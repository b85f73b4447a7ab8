"""What every kernel shares: how a row is cut into powers of two, the norm before a product, activations, launches.

Triton's tensors have sizes that are powers of two, and a row of D values does not. A row is cut into up to three of them,
D1 + D2 + D3 >= D, the last one masked: 7168 = 4096 + 2048 + 1024. A part that is not needed has size 1 and lies beyond D; the
compiler drops it.

The residual stream is y_D + delta_D, both fp32: kernels add to delta atomically, and the next one that reads the sum writes
it out as the new y. No kernel adds to what another program of it still reads. Where a model norms or scales what a block adds, delta is
the block's output before that, and who reads it does so: y + scale norm(delta).

A kernel that is launched with `programmatic` starts while the one before it still runs. Before `gdc_wait` it may read weights,
and whatever was written by the kernel before the previous one or earlier, because every kernel waits before it lets the next start. What it
reads so is loaded past the first-level cache (.cg), which may hold what the same memory was before.

Letters: D model  R rows at a time
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LEAST_SHARED = 99 << 10  # of compute capability 8.6, 8.9 and 12.0: CUDA programming guide, technical specifications
REGISTERS = 1 << 16  # of a multiprocessor from compute capability 8.0 on
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own switch: it decides when a kernel is defined


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """Side rows of a product: matrix [R, D] of any dtype, scale fp32 [R], out fp32 [R]."""

    matrix: Tensor
    scale: Tensor
    out: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class NormWeights:
    """weight and bias [D] or None, eps; rms: RMSNorm instead of LayerNorm."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    rms: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockOutput:
    """How what a block gave joins the residual stream: y + scale norm(delta), or y + scale delta where weight is None. The norm is an
    RMSNorm, of weight [D]."""

    weight: Tensor | None = None
    eps: float = 0.0
    scale: float = 1.0

    def arguments(self, other: Tensor) -> tuple[Tensor, float, float]:
        """What `residual` takes of it; any tensor in the place of one that is not read."""
        return or_any(self.weight, other), self.eps, self.scale


AS_IT_IS = BlockOutput()


@dataclass(frozen=True, slots=True, kw_only=True)
class GridShape:
    """How a persistent kernel runs: rows at a time, warps of a program, programs of a multiprocessor."""

    rows: int
    warps: int
    programs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictorScores:
    """The second half of a predictor: matrix [O, P] of any dtype, scale and bias fp32 [O], threshold fp32 [1], h fp32 [P] or [B, P]."""

    matrix: Tensor
    scale: Tensor
    bias: Tensor
    threshold: Tensor
    h: Tensor


def parts(size: int) -> tuple[int, int, int]:
    """Sizes of the three parts of a row of `size` values: powers of two, 1 where not needed."""
    found, left = [], size
    while left > 0 and len(found) < 2:
        part = max(16, 1 << (left.bit_length() - 1))
        found.append(part)
        left -= part
    if left > 0:
        found.append(max(16, triton.next_power_of_2(left)))
    return tuple([*found, 1, 1][:3])  # pyrefly: ignore[bad-return]


@cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of the device; 1 under the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program can have; off the GPU those of the cards that have least."""
    if device.type != "cuda":
        return LEAST_SHARED
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)  # pyrefly: ignore[missing-attribute]
    return properties["max_shared_mem"]


@cache
def overlaps(device: int) -> bool:
    """Whether kernels of the device can start before the one before has ended: from compute capability 9.0 (Hopper) on."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    num_warps: int,
    programmatic: bool = False,
    max_registers: int | None = None,
    **constants: Any,
) -> None:
    """Start a kernel. programmatic: it may begin before the one before it has ended (see above). max_registers: of a thread.

    Products are not fused into sums: lanes that hold the same value then compute the same one, and what they write is no race."""
    assert min(grid) > 0, f"an empty grid {grid}"
    if INTERPRETED:
        kernel[grid](*arguments, programmatic=False, **constants)
    else:
        programmatic = programmatic and overlaps(torch.cuda.current_device())
        extra = compile_options(programmatic=programmatic, max_registers=max_registers)
        kernel[grid](*arguments, programmatic=programmatic, num_warps=num_warps, **extra, **constants)


def compile_options(*, programmatic: bool, max_registers: int | None) -> dict[str, Any]:
    """How Triton compiles a kernel, but for its constants and warps."""
    options: dict[str, Any] = {"enable_fp_fusion": False}
    if programmatic:
        options["launch_pdl"] = True
    if max_registers is not None:
        options["maxnreg"] = max_registers
    return options


def registers_for(warps: int, programs: int) -> int:
    """Of a thread, where a multiprocessor is to hold so many programs, if it can."""
    return min(255, max(32, REGISTERS // (32 * warps * programs) // 8 * 8))


def or_any(value: Tensor | None, other: Tensor) -> Tensor:
    """A pointer for a kernel's argument that is not read."""
    return other if value is None else value


def norm_definition(x_D: Tensor, norm: NormWeights) -> Tensor:
    """LayerNorm or RMSNorm in plain torch, in the dtype of x."""
    if not norm.rms:
        return torch.nn.functional.layer_norm(x_D, x_D.shape[-1:], norm.weight, norm.bias, norm.eps)
    scaled = x_D * torch.rsqrt(x_D.square().mean(-1, keepdim=True) + norm.eps)
    return scaled if norm.weight is None else scaled * norm.weight


def joined_definition(y: Tensor, delta: Tensor, added: BlockOutput) -> Tensor:
    """The residual stream with what a block gave in it, in plain torch."""
    norm = NormWeights(weight=added.weight, bias=None, eps=added.eps, rms=True)
    return y + added.scale * (delta if added.weight is None else norm_definition(delta, norm))


@triton.jit
def begin(programmatic: tl.constexpr):
    """Wait for what the kernel before wrote, then let the next one start."""
    if programmatic:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def tile(matrix, row_R, live_R, D: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr):
    """Columns FIRST..FIRST+SIZE of rows of a [.., D] matrix; zeros beyond D and where a row is not live."""
    if FIRST >= D:
        return tl.zeros([row_R.shape[0], SIZE], matrix.dtype.element_ty)
    else:
        column = FIRST + tl.arange(0, SIZE)
        mask = live_R[:, None]
        if FIRST + SIZE > D:
            mask = mask & (column < D)[None, :]
        return tl.load(matrix + row_R.to(tl.int64)[:, None] * D + column[None, :], mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def tiles(matrix, row_R, live_R, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, D3: tl.constexpr):
    """Rows in their three parts."""
    return (
        tile(matrix, row_R, live_R, D, 0, D1),
        tile(matrix, row_R, live_R, D, D1, D2),
        tile(matrix, row_R, live_R, D, D1 + D2, D3),
    )


@triton.jit
def norm_parts(
    weight, bias, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, D3: tl.constexpr, RMS: tl.constexpr, AFFINE: tl.constexpr
):
    """A norm's weight and bias in their parts, as stored: loaded before the residual is there. Zeros where the norm has none."""
    w = (_raw(weight, D, 0, D1, AFFINE), _raw(weight, D, D1, D2, AFFINE), _raw(weight, D, D1 + D2, D3, AFFINE))
    has_bias: tl.constexpr = AFFINE and not RMS
    b = (_raw(bias, D, 0, D1, has_bias), _raw(bias, D, D1, D2, has_bias), _raw(bias, D, D1 + D2, D3, has_bias))
    return w, b


@triton.jit
def _raw(vector, D: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr, THERE: tl.constexpr):
    if THERE and FIRST < D:
        column = FIRST + tl.arange(0, SIZE)
        return tl.load(vector + column, mask=column < D, other=0.0)
    else:
        return tl.zeros([SIZE], vector.dtype.element_ty)


@triton.jit
def row_bias(bias, row_R, live_R, THERE: tl.constexpr):
    """Biases of rows as stored; zeros without."""
    if THERE:
        return tl.load(bias + row_R, mask=live_R, other=0.0)
    else:
        return tl.zeros([row_R.shape[0]], bias.dtype.element_ty)


@triton.jit
def part(vector, D: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr):
    """Values FIRST..FIRST+SIZE of a vector [D] in fp32, zeros beyond D."""
    if FIRST >= D:
        return tl.zeros([SIZE], tl.float32)
    else:
        column = FIRST + tl.arange(0, SIZE)
        return tl.load(vector + column, mask=column < D, other=0.0).to(tl.float32)


@triton.jit
def store_part(vector, value, D: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr):
    if FIRST < D:
        column = FIRST + tl.arange(0, SIZE)
        tl.store(vector + column, value, mask=column < D)


@triton.jit
def add_part(vector, value, D: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr):
    if FIRST < D:
        column = FIRST + tl.arange(0, SIZE)
        tl.atomic_add(vector + column, value, mask=column < D, sem="relaxed")


@triton.jit
def _centered(v, mean, D: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr):
    return tl.where(FIRST + tl.arange(0, SIZE) < D, v - mean, 0.0)


@triton.jit
def join_scale(d1, d2, d3, out_eps, out_scale, D: tl.constexpr, OUT_NORM: tl.constexpr):
    """What delta, in three parts, is multiplied by where it joins the residual stream."""
    scale = out_scale
    if OUT_NORM:
        square = (tl.sum(d1 * d1, 0) + tl.sum(d2 * d2, 0) + tl.sum(d3 * d3, 0)) / D
        scale = out_scale / tl.sqrt(square + out_eps)
    return scale


@triton.jit
def residual(
    y, delta, out_weight, out_eps, out_scale, y_out, writes,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, D3: tl.constexpr, OUT_NORM: tl.constexpr, WRITE: tl.constexpr,
    ADDENDS: tl.constexpr, stride,
):  # fmt: skip
    """y + delta, this as of BlockOutput, in three parts; the program for which `writes` holds stores it.

    ADDENDS: delta is the sum of so many vectors, `stride` values apart, in order."""
    d1 = part(delta, D, 0, D1)
    d2 = part(delta, D, D1, D2)
    d3 = part(delta, D, D1 + D2, D3)
    for _ in tl.static_range(1, ADDENDS):
        delta += stride
        d1 += part(delta, D, 0, D1)
        d2 += part(delta, D, D1, D2)
        d3 += part(delta, D, D1 + D2, D3)
    scale = join_scale(d1, d2, d3, out_eps, out_scale, D, OUT_NORM)
    if OUT_NORM:
        d1 = d1 * part(out_weight, D, 0, D1)
        d2 = d2 * part(out_weight, D, D1, D2)
        d3 = d3 * part(out_weight, D, D1 + D2, D3)
    v1 = part(y, D, 0, D1) + d1 * scale
    v2 = part(y, D, D1, D2) + d2 * scale
    v3 = part(y, D, D1 + D2, D3) + d3 * scale
    if WRITE:
        if writes:
            store_part(y_out, v1, D, 0, D1)
            store_part(y_out, v2, D, D1, D2)
            store_part(y_out, v3, D, D1 + D2, D3)
    return v1, v2, v3


@triton.jit
def zero(vector, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, D3: tl.constexpr):
    store_part(vector, tl.zeros([D1], tl.float32), D, 0, D1)
    store_part(vector, tl.zeros([D2], tl.float32), D, D1, D2)
    store_part(vector, tl.zeros([D3], tl.float32), D, D1 + D2, D3)


@triton.jit
def moments(v1, v2, v3, eps, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, D3: tl.constexpr, RMS: tl.constexpr):
    """What a norm takes from the values of a row in three parts (0 for RMSNorm), and what it multiplies them by."""
    mean = 0.0
    if not RMS:
        mean = (tl.sum(v1, 0) + tl.sum(v2, 0) + tl.sum(v3, 0)) / D
        v1 = _centered(v1, mean, D, 0, D1)
        v2 = _centered(v2, mean, D, D1, D2)
        v3 = _centered(v3, mean, D, D1 + D2, D3)
    square = (tl.sum(v1 * v1, 0) + tl.sum(v2 * v2, 0) + tl.sum(v3 * v3, 0)) / D
    return mean, 1.0 / tl.sqrt(square + eps)


@triton.jit
def normed(
    v1, v2, v3, w, b, eps, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, D3: tl.constexpr,
    RMS: tl.constexpr, AFFINE: tl.constexpr, TO: tl.constexpr,
):  # fmt: skip
    """LayerNorm or RMSNorm of a row in three parts, by w and b of `norm_parts`, rounded to the dtype that the products read."""
    mean, scale = moments(v1, v2, v3, eps, D, D1, D2, D3, RMS)
    if not RMS:
        v1 = _centered(v1, mean, D, 0, D1)
        v2 = _centered(v2, mean, D, D1, D2)
        v3 = _centered(v3, mean, D, D1 + D2, D3)
    v1 = v1 * scale
    v2 = v2 * scale
    v3 = v3 * scale
    if AFFINE:
        v1 = v1 * w[0].to(tl.float32)
        v2 = v2 * w[1].to(tl.float32)
        v3 = v3 * w[2].to(tl.float32)
        if not RMS:
            v1 = v1 + b[0].to(tl.float32)
            v2 = v2 + b[1].to(tl.float32)
            v3 = v3 + b[2].to(tl.float32)
    return v1.to(TO), v2.to(TO), v3.to(TO)


@triton.jit
def products(a1, a2, a3, x1, x2, x3):
    """Products [R] in fp32 of rows with x, both in three parts."""
    s = tl.sum(a1.to(tl.float32) * x1.to(tl.float32)[None, :], 1)
    s += tl.sum(a2.to(tl.float32) * x2.to(tl.float32)[None, :], 1)
    s += tl.sum(a3.to(tl.float32) * x3.to(tl.float32)[None, :], 1)
    return s


@triton.jit
def side_rows(matrix, scale, out, first, step, count, x1, x2, x3, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, D3: tl.constexpr):
    """out[r] = scale[r] (matrix[r] . x) for rows first, first + step, ..: a predictor's A with products of the same x."""
    for r in range(first, count, step):
        row = r + tl.arange(0, 1)
        live = row < count
        a1, a2, a3 = tiles(matrix, row, live, D, D1, D2, D3)
        tl.store(out + row, products(a1, a2, a3, x1, x2, x3) * tl.load(scale + row))


@triton.jit
def exceeds(v, threshold):
    """Whether what has this score or size is selected; NaN is, so that it is seen in the output."""
    return (v > threshold) | (v != v)


@triton.jit
def tanh(u):
    """NaN stays NaN; from 20 on it is 1 in fp32."""
    return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * tl.where(u > 20.0, 20.0, u)))


@triton.jit
def soft_cap(s, cap, CAPPED: tl.constexpr):
    """cap tanh(s / cap), or s."""
    if CAPPED:
        s = cap * tanh(s / cap)
    return s


@triton.jit
def activate(v, CODE: tl.constexpr, threshold):
    """The activation of that code (ACTIVATION_CODES), of fp32 values."""
    if CODE == 0:
        return tl.where(v <= 0.0, 0.0, v)  # not tl.maximum, which makes 0 of NaN
    elif CODE == 1:
        r = tl.where(v <= 0.0, 0.0, v)
        return r * r
    elif CODE == 2:
        return tl.where(v <= threshold, 0.0, v)
    elif CODE == 3:
        return v / (1.0 + tl.exp(-v))
    elif CODE == 4:
        return 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    else:
        u = 0.7978845608028654 * (v + 0.044715 * v * v * v)
        return 0.5 * v * (1.0 + tanh(u))
