"""The kernels of selection by the gate, against their definitions: on the CPU under Triton's interpreter, on a GPU with -m gpu.

As test_cuda_kernels.py: rows of what is not selected are NaN, and so is the memory around everything that is read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dejavu.kernels.cuda.common import GridShape, Side, norm_definition
from dejavu.kernels.cuda.gate import (
    GateNeurons,
    mlp_by_gate,
    mlp_by_gate_bytes,
    mlp_by_gate_definition,
    mlp_given_definition,
    select_gate_definition,
)
from dejavu.kernels.cuda.gate_rows import GateRows, gate_rows_bytes, select_gate_rows, up_given_rows
from dejavu.kernels.cuda.mlp import programs_of
from dejavu.kernels.cuda.mlp_rows import DownShape, UpShape, down_rows, padded_rows, shares_of
from dejavu.kernels.sparse_mlp import MlpWeights
from helpers.cuda import DEVICES
from helpers.kernel_memory import CANARY, Memory, check_rule, poisoned_neurons
from helpers.kernels import BF16, FP16, FP32, check_side, converted, norm_of, placed, side_of

INT = torch.int32


NEAR = 6


def in_a_gap(size_F: Tensor, count: int) -> float:
    """A threshold that about so many values exceed, NEAR more or less, in the widest gap there is: rounding moves none across."""
    ends = torch.tensor([float(size_F.max()) * 2, float(size_F.min()) / 2], dtype=torch.float64)
    ordered = torch.cat([ends[:1], size_F.double().sort(descending=True).values, ends[1:]])
    gaps = ordered[:-1] - ordered[1:]
    exact = count in (0, len(size_F))
    first, last = (count, count + 1) if exact else (max(0, count - NEAR), min(len(size_F), count + NEAR) + 1)
    at = first + int(gaps[first:last].argmax())
    return float((ordered[at] + ordered[at + 1]) / 2)


@dataclass(frozen=True, kw_only=True)
class GateCase:
    """count: neurons kept. rows: neurons at a time. side: rows of a predictor's A."""

    size: int
    neurons: int
    count: int
    dtype: torch.dtype
    activation: str = "silu"
    gated: bool = True
    biased: bool = True
    down_bias: bool = True
    rms: bool = False
    affine: bool = True
    partial: bool = False
    rows: int = 16
    programs: int = 3
    side: int = 0


CASES = [
    GateCase(size=16, neurons=7, count=0, dtype=FP32),
    GateCase(size=17, neurons=64, count=12, dtype=FP16, biased=False, rms=True, rows=2),
    GateCase(size=96, neurons=127, count=100, dtype=BF16, gated=False, down_bias=False, activation="silu", rows=4, programs=1),
    GateCase(size=129, neurons=300, count=300, dtype=FP32, rms=True, side=5, rows=4),
    GateCase(size=250, neurons=300, count=61, dtype=FP16, gated=False, rows=4, programs=2, activation="relu"),
    GateCase(size=129, neurons=64, count=63, dtype=BF16, affine=False, partial=True),
    GateCase(size=17, neurons=64, count=20, dtype=FP32, gated=False, partial=True, activation="relu2", rows=1, side=2),
    GateCase(size=96, neurons=7, count=1, dtype=FP16, biased=False, down_bias=False, partial=True, rows=1, programs=5),
    GateCase(size=250, neurons=515, count=100, dtype=FP32, activation="fatrelu", rows=2, programs=7),
]


def given_weights(memory: Memory, size: int, neurons: int, *, gated: bool, up_bias: bool, down_bias: bool, kept: int) -> MlpWeights:
    """The gate itself is not read: NaN."""
    shape = (neurons, size)
    return MlpWeights(
        up_FD=memory.normal(*shape, scale=size**-0.5),
        down_FD=memory.normal(*shape, scale=max(kept, 1) ** -0.5),
        gate_FD=torch.full(shape, torch.nan, dtype=memory.dtype) if gated else None,
        up_bias_F=memory.normal(neurons) if up_bias else None,
        gate_bias_F=torch.full((neurons,), torch.nan, dtype=memory.dtype) if gated and up_bias else None,
        down_bias_D=memory.normal(size, scale=0.1) if down_bias else None,
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_mlp_by_gate(case: GateCase, device: str) -> None:
    """Rows of up and down that are left out are NaN. Negative values exceed a threshold by their size, where an activation has them."""
    memory = Memory(device, case.dtype, seed=case.neurons)
    shape = (case.neurons, case.size)
    weights = MlpWeights(
        up_FD=memory.normal(*shape, scale=case.size**-0.5),
        down_FD=memory.normal(*shape, scale=max(case.count, 1) ** -0.5),
        gate_FD=memory.normal(*shape, scale=case.size**-0.5) if case.gated else None,
        up_bias_F=memory.normal(case.neurons) if case.biased else None,
        gate_bias_F=memory.normal(case.neurons) if case.gated and case.biased else None,
        down_bias_D=memory.normal(case.size) if case.down_bias else None,
        activation=case.activation,
        activation_threshold=0.4 if case.activation == "fatrelu" else 0.0,
    )
    norm = norm_of(memory, case.size, rms=case.rms, affine=case.affine)
    y_D, delta_D = (memory.normal(case.size, dtype=FP32) for _ in range(2))
    exact = [converted(given, torch.float64) for given in (norm, weights)]
    x_D = norm_definition(y_D.double() + delta_D.double(), exact[0]).to(case.dtype).double()
    first = exact[1].up_FD if exact[1].gate_FD is None else exact[1].gate_FD
    first_bias = exact[1].gate_bias_F if case.gated else exact[1].up_bias_F
    product_F = torch.nn.functional.linear(x_D, first, first_bias)
    size_F = select_gate_definition(product_F, 0.0, case.activation, weights.activation_threshold)[0].abs()
    threshold = in_a_gap(size_F, case.count)
    truth_D, keep_F = mlp_by_gate_definition(y_D.double(), delta_D.double(), exact[0], exact[1], threshold)
    plain_D, _ = mlp_by_gate_definition(y_D, delta_D, norm, weights, threshold)
    idx_A = keep_F.nonzero().squeeze(1)
    assert abs(len(idx_A) - case.count) <= NEAR

    poisoned = poisoned_neurons(weights, idx_A)
    if case.gated:
        poisoned = replace(poisoned, gate_FD=weights.gate_FD, gate_bias_F=weights.gate_bias_F)
    else:
        poisoned = replace(poisoned, up_FD=weights.up_FD, up_bias_F=weights.up_bias_F)
    gate = GateNeurons(
        threshold=memory.given(torch.tensor([threshold])), marks=memory.room(case.neurons, dtype=INT),
        count=memory.room(1, dtype=INT, holds=0.0),
    )  # fmt: skip
    side = side_of(memory, case.side, case.size)
    given_side = Side(matrix=memory.given(side.matrix), scale=memory.given(side.scale), out=memory.room(case.side))
    grid = GridShape(rows=case.rows, warps=4, programs=case.programs)
    start_D, y_out_D = memory.normal(case.size, dtype=FP32), memory.room(case.size)
    programs = programs_of(grid, torch.device(device))
    out = memory.room(programs, case.size) if case.partial else memory.room(case.size, holds=start_D)
    mlp_by_gate(
        memory.given(y_D), memory.given(delta_D), y_out_D, out, placed(norm, memory), placed(poisoned, memory), gate,
        side=given_side if case.side else None, shape=grid, partial=case.partial,
    )  # fmt: skip
    memory.check()
    assert torch.equal(y_out_D.cpu(), y_D + delta_D)
    assert gate.count.item() == len(idx_A) and gate.marks.tolist() == keep_F.int().tolist()
    check_rule(out.double().sum(0) if case.partial else out.double().cpu() - start_D.double(), plain_D, truth_D, case.dtype)
    if case.side:
        plain_x_D, truth_x_D = norm_definition((y_D + delta_D).to(case.dtype), norm), norm_definition(y_D.double() + delta_D, exact[0])
        check_side(side, plain_x_D, truth_x_D, case.dtype, given_side)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", ["relu", "fatrelu", "silu"])
def test_a_gate_that_is_no_number_is_kept(activation: str, device: str) -> None:
    memory = Memory(device)
    weights = MlpWeights(up_FD=memory.normal(9, 16), down_FD=memory.normal(9, 16), gate_FD=memory.normal(9, 16), activation=activation)
    assert weights.gate_FD is not None
    weights.gate_FD[4, 2] = torch.nan
    gate = GateNeurons(
        threshold=memory.given(torch.tensor([1e9])), marks=memory.room(9, dtype=INT), count=memory.room(1, dtype=INT, holds=0.0)
    )
    y_D, delta_D, norm, out_D = memory.normal(16), memory.normal(16), norm_of(memory, 16, rms=True, affine=True), memory.room(16, holds=0.0)
    mlp_by_gate(
        memory.given(y_D), memory.given(delta_D), memory.room(16), out_D, placed(norm, memory), placed(weights, memory), gate,
    )  # fmt: skip
    memory.check()
    assert gate.marks.nonzero().tolist() == [[4]] and out_D.isnan().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("rows", "neurons", "dtype", "count", "padded", "activation"),
    [
        (1, 7, FP32, 0, 0, "silu"),
        (2, 256, FP16, 1, 0, "gelu"),
        (3, 515, BF16, 200, 1, "relu"),
        (5, 300, FP32, 60, 2, "silu"),
        (32, 64, FP32, 9, 0, "relu2"),
        (2, 300, FP32, 300, 1, "gelu_tanh"),
    ],
)
def test_select_gate_rows(rows: int, neurons: int, dtype: torch.dtype, count: int, padded: int, activation: str, device: str) -> None:
    """count: neurons of which about so many exceed, in the first row. The last `padded` rows only fill the bucket."""
    memory = Memory(device, dtype, seed=rows)
    product_BF = memory.positive(rows, neurons) + 0.1
    ordered = select_gate_definition(product_BF[0].float(), 0.0, activation, 0.0)[0].sort(descending=True).values
    threshold = float(ordered[0] * 2 if count == 0 else ordered[-1] / 2 if count == neurons else ordered[count - 1])  # equal is not above
    slots = torch.arange(rows, dtype=INT)
    slots[rows - padded :] = 99
    counts, row_mask_F = memory.room(rows, 3, dtype=INT, holds=0.0), memory.room(neurons, dtype=INT)
    union_F, union = memory.room(neurons, dtype=INT), memory.room(1, dtype=INT, holds=0.0)
    at = memory.given(torch.tensor([threshold]))
    gate = GateRows(threshold=at, row_mask_F=row_mask_F, union=union_F, count=union, row_count=counts[:, 1:2])
    select_gate_rows(memory.given(product_BF), gate, activation, 0.0, memory.given(slots), 99)
    memory.check()
    # In fp32 from products in their dtype, so that a value just at the threshold could only differ by an exponential's rounding.
    value_BF, keep_BF = select_gate_definition(product_BF.float(), threshold, activation, 0.0)
    keep_BF &= (slots != 99)[:, None]
    near_BF = ((value_BF - threshold).abs() <= 1e-6 * threshold) & (slots != 99)[:, None]
    found_BF = (row_mask_F.cpu()[None] >> torch.arange(rows)[:, None]) & 1 == 1
    assert torch.equal(found_BF & ~near_BF, keep_BF & ~near_BF)
    assert counts.tolist() == [[0, int(kept.sum()), 0] for kept in found_BF]
    expected = found_BF.any(0).nonzero().squeeze(1).tolist()
    assert union.item() == len(expected) and sorted(union_F[: len(expected)].tolist()) == expected
    assert set(union_F[len(expected) :].tolist()) <= {CANARY}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("rows", "size", "neurons", "union", "dtype", "gated", "biased", "activation"),
    [
        (1, 16, 7, 0, FP32, True, True, "silu"),
        (2, 17, 64, 1, FP16, True, False, "gelu"),
        (3, 96, 127, 126, FP16, False, True, "gelu_tanh"),
        (5, 129, 300, 300, FP32, True, True, "silu"),
        (17, 300, 127, 60, BF16, True, True, "silu"),
        (32, 17, 64, 64, FP32, False, False, "relu"),
    ],
)
def test_up_given_rows_and_down_rows(
    rows: int, size: int, neurons: int, union: int, dtype: torch.dtype, gated: bool, biased: bool, activation: str, device: str
) -> None:
    if device == "cpu" and dtype == BF16:
        pytest.skip("Triton's interpreter multiplies the bits of bf16 matrices as integers")
    memory = Memory(device, dtype)
    weights = given_weights(memory, size, neurons, gated=gated, up_bias=biased, down_bias=biased, kept=union)
    weights = replace(weights, activation=activation)
    x_BD, product_BF, union_A = memory.normal(rows, size), memory.normal(rows, neurons), memory.choice(neurons, union)
    keep_BF = torch.zeros(rows, neurons, dtype=torch.bool)
    keep_BF[:, union_A] = torch.rand(rows, union, generator=memory.generator) < 0.6
    keep_BF[0, union_A] = True
    row_mask_F = (keep_BF * torch.tensor([1 << row for row in range(rows)])[:, None]).sum(0)
    row_mask_F = torch.where(row_mask_F >= 2**31, row_mask_F - 2**32, row_mask_F).int()  # the 32nd row has the sign
    unread = next((f for f in range(neurons) if f not in union_A.tolist()), 0)
    listed = torch.cat([union_A, torch.full((neurons - union,), unread)]).int()
    exact = converted(weights, torch.float64)
    truths = select_gate_definition(product_BF.double(), 0.0, activation, 0.0)[0]
    truth_BD = mlp_given_definition(x_BD.double(), exact, truths, keep_BF)
    plain_BD = mlp_given_definition(x_BD, weights, select_gate_definition(product_BF, 0.0, activation, 0.0)[0], keep_BF)

    poisoned = replace(poisoned_neurons(weights, union_A), gate_FD=weights.gate_FD, gate_bias_F=weights.gate_bias_F)
    if not gated:
        poisoned = replace(poisoned, up_FD=torch.full_like(weights.up_FD, torch.nan))
    given = placed(poisoned, memory)
    listed_F, count = memory.given(listed), memory.given(torch.tensor([union], dtype=INT))
    act_FB, start_BD = memory.room(neurons, padded_rows(rows), dtype=dtype), memory.normal(rows, size, dtype=FP32)
    known_F = torch.zeros(neurons, dtype=torch.bool).index_fill(0, union_A, True)
    up_given_rows(
        memory.given(x_BD), memory.given(torch.where(known_F, product_BF, torch.nan)), given, memory.given(row_mask_F), listed_F, count,
        act_FB, shape=UpShape(columns=64, programs=2),
    )  # fmt: skip
    memory.check()
    out_BD = memory.room(rows, size, holds=start_BD)
    down_rows(act_FB, given, listed_F, count, out_BD)
    memory.check()
    check_rule(out_BD.double().cpu() - start_BD.double(), plain_BD, truth_BD, dtype)
    shares = shares_of(size, DownShape(), torch.device(device))
    sums = memory.room(shares, rows, size)
    down_rows(act_FB, given, listed_F, count, sums, partial=True)
    memory.check()
    check_rule(sums.double().sum(0), plain_BD, truth_BD, dtype)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_bytes_are_those_of_the_tensors(gated: bool, biased: bool) -> None:
    """With every neuron kept: what is read and written in full."""
    memory = Memory("cpu", FP16)
    weights = given_weights(memory, 24, 40, gated=gated, up_bias=biased, down_bias=biased, kept=40)
    rows: list[Tensor | None] = [weights.down_FD, weights.down_bias_D, *((weights.up_FD, weights.up_bias_F) if gated else ())]
    matrices = sum(part.nbytes for part in rows if part is not None)
    index_F, product_BF = torch.empty(40, dtype=INT), torch.empty(3, 40, dtype=FP16)
    assert gate_rows_bytes(weights, 3, 40) == matrices + product_BF.nbytes + index_F.nbytes
    first = [weights.gate_FD, weights.gate_bias_F] if gated else [weights.up_FD, weights.up_bias_F]
    assert mlp_by_gate_bytes(weights, 40) == matrices + sum(part.nbytes for part in first if part is not None) + index_F.nbytes
