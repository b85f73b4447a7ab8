"""The kernels of selection by inputs, against their definitions: on the CPU under Triton's interpreter, on a GPU with -m gpu.

As test_cuda_kernels.py: rows of inputs that are left out are NaN, and so is the memory around everything that is read.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dejavu.kernels.cuda.attention import Partials
from dejavu.kernels.cuda.common import norm_definition
from dejavu.kernels.cuda.inputs import (
    KeptInputs,
    SumShape,
    activated_definition,
    keep_activated,
    keep_heads,
    keep_inputs_bytes,
    keep_normed,
    kept_definition,
    mask_rows,
    mask_rows_bytes,
    sum_inputs,
    sum_inputs_bytes,
    sum_inputs_definition,
    sum_shape,
    sum_shares,
)
from helpers.cuda import DEVICES
from helpers.kernel_memory import CANARY, Memory, check_rule, midway, poisoned_rows
from helpers.kernels import BF16, FP16, FP32, converted, norm_of, placed

INT = torch.int32


def room_for(memory: Memory, norm_I: Tensor, threshold: float, *, counted: bool) -> KeptInputs:
    """counted: the counter holds 0, else nothing that counts."""
    size = len(norm_I)
    return KeptInputs(
        norm=memory.given(norm_I), threshold=memory.given(torch.tensor([threshold])), x=memory.room(size, dtype=memory.dtype),
        inputs=memory.room(size, dtype=INT), count=memory.room(1, dtype=INT, holds=0.0 if counted else None),
    )  # fmt: skip


def check_kept(kept: KeptInputs, threshold: float, *, in_order: bool) -> int:
    """The list is what the definition keeps of the x that was stored; their number."""
    keep_I = kept_definition(kept.x.cpu(), kept.norm.cpu(), threshold)
    expected, found = keep_I.nonzero().squeeze(1).tolist(), kept.inputs.tolist()
    assert kept.count.item() == len(expected)
    assert (found if in_order else sorted(found[: len(expected)]))[: len(expected)] == expected and set(found[len(expected) :]) <= {CANARY}
    return len(expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("size", "dtype", "count", "rms", "affine", "cleared", "counters"),
    [
        (16, FP32, 0, True, True, 0, True),
        (17, FP16, 17, False, True, 1, False),
        (96, BF16, 40, True, False, 1030, True),
        (129, FP32, 128, False, False, 0, False),
        (250, FP16, 1, True, True, 2048, True),
        (300, BF16, 150, False, True, 77, True),
    ],
)
def test_keep_normed(size: int, dtype: torch.dtype, count: int, rms: bool, affine: bool, cleared: int, counters: bool, device: str) -> None:
    memory = Memory(device, dtype, seed=size)
    norm, norm_I = norm_of(memory, size, rms=rms, affine=affine), memory.positive(size).float() + 0.1
    y_D, delta_D = (memory.normal(size, dtype=FP32) for _ in range(2))
    plain_D = norm_definition((y_D + delta_D).to(dtype), norm)
    threshold = midway(plain_D.float().abs() * norm_I, count)
    kept, y_out_D = room_for(memory, norm_I, threshold, counted=False), memory.room(size)
    sums, counts = memory.room(cleared), [memory.room(1, dtype=INT) for _ in range(2)]
    keep_normed(
        memory.given(y_D), memory.given(delta_D), y_out_D, placed(norm, memory), kept, cleared=sums if cleared else None,
        counters=(counts[0], counts[1]) if counters else None,
    )  # fmt: skip
    memory.check()
    assert torch.equal(y_out_D.cpu(), y_D + delta_D) and not sums.any()
    assert [value.item() for value in counts] == ([0, 0] if counters else [CANARY] * 2)
    truth_D = norm_definition(y_D.double() + delta_D.double(), converted(norm, torch.float64))
    check_rule(kept.x, plain_D, truth_D, dtype)
    assert abs(check_kept(kept, threshold, in_order=True) - count) <= size // 10


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("heads", "head_dim", "splits", "dtype", "count"),
    [(1, 16, 1, FP32, 0), (3, 6, 2, FP16, 18), (5, 20, 4, BF16, 50), (2, 128, 8, FP16, 17)],
)
def test_keep_heads(heads: int, head_dim: int, splits: int, dtype: torch.dtype, count: int, device: str) -> None:
    memory = Memory(device, dtype, seed=heads)
    mixed, top = memory.normal(1, heads, splits, head_dim, dtype=FP32), memory.normal(1, heads, splits, dtype=FP32)
    total = memory.normal(1, heads, splits, dtype=FP32).abs() + 1
    weight = (top.double() - top.double().amax(-1, keepdim=True)).exp()
    truth = ((mixed.double() * weight[..., None]).sum(2) / (total.double() * weight).sum(2)[..., None]).flatten()
    norm_I = memory.positive(heads * head_dim).float() + 0.1
    threshold = midway(truth.to(dtype).float().abs() * norm_I, count)
    kept = room_for(memory, norm_I, threshold, counted=True)
    keep_heads(Partials(mixed=memory.given(mixed), stats=memory.given(torch.stack([top, total], -1))), kept)
    memory.check()
    check_rule(kept.x, truth.float().to(dtype), truth, dtype)
    assert abs(check_kept(kept, threshold, in_order=False) - count) <= 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("neurons", "dtype", "gated", "activation", "count"),
    [
        (7, FP32, True, "silu", 0),
        (256, FP16, False, "gelu", 255),
        (300, BF16, True, "relu", 100),
        (515, FP32, True, "gelu_tanh", 200),
        (64, FP16, False, "fatrelu", 20),
    ],
)
def test_keep_activated(neurons: int, dtype: torch.dtype, gated: bool, activation: str, count: int, device: str) -> None:
    memory = Memory(device, dtype, seed=neurons)
    sums_O, norm_I = memory.normal(neurons * (2 if gated else 1), dtype=FP32), memory.positive(neurons).float() + 0.1
    if activation in ("relu", "fatrelu"):
        sums_O = sums_O.abs()
    truth_F = activated_definition(sums_O.double(), activation, 0.2, gated=gated)
    plain_F = activated_definition(sums_O, activation, 0.2, gated=gated).to(dtype)
    threshold = midway(plain_F.float().abs() * norm_I, count)
    kept = room_for(memory, norm_I, threshold, counted=True)
    keep_activated(memory.given(sums_O), kept, activation, 0.2, gated=gated)
    memory.check()
    check_rule(kept.x, plain_F, truth_F, dtype)
    assert abs(check_kept(kept, threshold, in_order=False) - count) <= 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize(
    ("inputs", "outputs", "count", "dtype", "biased", "shape"),
    [
        (7, 16, 0, FP32, True, sum_shape(7, 16)),
        (64, 17, 1, FP16, False, SumShape(rows=4, columns=16)),
        (127, 300, 126, BF16, True, SumShape(rows=16, columns=128, programs=9)),
        (300, 129, 300, FP32, True, SumShape(rows=8, columns=64, programs=7)),
        (250, 1030, 61, FP16, False, sum_shape(250, 1030)),
        (250, 1030, 61, FP16, False, sum_shape(8192, 8192)),
    ],
)
def test_sum_inputs(
    inputs: int, outputs: int, count: int, dtype: torch.dtype, biased: bool, shape: SumShape, partial: bool, device: str
) -> None:
    """Several shares of the list where there are several programs for a column."""
    memory = Memory(device, dtype)
    weight_IO, bias_O = memory.normal(inputs, outputs, scale=max(count, 1) ** -0.5), memory.normal(outputs) if biased else None
    x_I, idx_A = memory.normal(inputs), memory.choice(inputs, count)
    keep_I = torch.zeros(inputs, dtype=torch.bool).index_fill(0, idx_A, True)
    truth_O = sum_inputs_definition(x_I.double(), keep_I, weight_IO.double(), None if bias_O is None else bias_O.double())
    unlisted = (~keep_I).nonzero().squeeze(1)[:1].repeat(inputs - count)  # behind the list: what is NaN
    listed, none = memory.given(torch.cat([idx_A, unlisted]).int()), torch.empty(0)
    kept = KeptInputs(
        norm=none, threshold=none, x=memory.given(torch.where(keep_I, x_I, torch.nan)), inputs=listed,
        count=memory.given(torch.tensor([count], dtype=INT)),
    )  # fmt: skip
    shares, start_O = sum_shares(outputs, torch.device(device), shape), memory.normal(outputs, dtype=FP32)
    out = memory.room(shares, outputs) if partial else memory.room(outputs, holds=start_O)
    given_bias = None if bias_O is None else memory.given(bias_O)
    sum_inputs(kept, listed, memory.given(poisoned_rows(weight_IO, idx_A)), given_bias, out, shape=shape, partial=partial)
    memory.check()
    found_O = out.double().sum(0) if partial else out.double().cpu() - start_O.double()
    check_rule(found_O, sum_inputs_definition(x_I, keep_I, weight_IO, bias_O), truth_O, dtype)


@pytest.mark.parametrize("device", DEVICES)
def test_a_sum_of_several_shares(device: str) -> None:
    """A grid of one processor has one share where a matrix is wide; here it has five."""
    shape = SumShape(rows=4, columns=16, programs=5)
    shares = sum_shares(16, torch.device(device), shape)
    assert shares >= 5
    memory = Memory(device)
    weight_IO, x_I = memory.normal(100, 16), memory.normal(100)
    listed = memory.given(torch.arange(100, dtype=INT))
    count = memory.given(torch.tensor([83], dtype=INT))
    kept = KeptInputs(norm=torch.empty(0), threshold=torch.empty(0), x=memory.given(x_I), inputs=listed, count=count)
    out_SO = memory.room(shares, 16)
    sum_inputs(kept, listed, memory.given(weight_IO), None, out_SO, shape=shape, partial=True)
    memory.check()
    bounds = [83 * share // shares for share in range(shares + 1)]
    for share, (lo, hi) in enumerate(itertools.pairwise(bounds)):
        torch.testing.assert_close(out_SO[share].cpu(), x_I[lo:hi] @ weight_IO[lo:hi], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rows", "size", "dtype"), [(1, 16, FP32), (3, 257, FP16), (5, 300, BF16), (2, 1030, FP32)])
def test_mask_rows(rows: int, size: int, dtype: torch.dtype, device: str) -> None:
    memory = Memory(device, dtype, seed=rows)
    x_BI, norm_I = memory.normal(rows, size), memory.positive(size).float() + 0.1
    x_BI[0, 5] = torch.nan  # no number exceeds a threshold, and a mask leaves it
    threshold = float((x_BI.float().abs() * norm_I).nanmedian())
    counts, out_BI = memory.room(rows, 3, dtype=INT, holds=0.0), memory.room(rows, size, dtype=dtype)
    mask_rows(memory.given(x_BI), memory.given(norm_I), memory.given(torch.tensor([threshold])), out_BI, counts[:, 1:2])
    memory.check()
    keep_BI = kept_definition(x_BI, norm_I, threshold)
    assert keep_BI[0, 5] and 0 < keep_BI.sum() < keep_BI.numel()
    torch.testing.assert_close(out_BI.cpu(), torch.where(keep_BI, x_BI, 0), rtol=0, atol=0, equal_nan=True)
    assert counts.tolist() == [[0, int(kept.sum()), 0] for kept in keep_BI]


def test_bytes_are_those_of_the_tensors() -> None:
    """With every input kept: what is read and written in full."""
    weight_IO, bias_O = torch.empty(40, 24, dtype=FP16), torch.empty(24, dtype=FP16)
    x_I, norm_I, list_I, out_O = torch.empty(40, dtype=FP16), torch.empty(40), torch.empty(40, dtype=INT), torch.empty(24)
    read = weight_IO.nbytes + x_I.nbytes + list_I.nbytes + out_O.nbytes
    assert sum_inputs_bytes(weight_IO, None, 40) == read and sum_inputs_bytes(weight_IO, bias_O, 40) == read + bias_O.nbytes
    assert keep_inputs_bytes(40, 40, 2) == 2 * x_I.nbytes + norm_I.nbytes + list_I.nbytes
    assert mask_rows_bytes(torch.empty(3, 40, dtype=FP16)) == 6 * x_I.nbytes + norm_I.nbytes
