"""The kernels of selection by the gate, against their definitions: on the CPU under Triton's interpreter, on a GPU with -m gpu.

As test_cuda_kernels.py: rows of what is not selected are NaN, and so is the memory around everything that is read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dejavu.kernels.cuda.common import GridShape
from dejavu.kernels.cuda.gate import (
    GateNeurons,
    mlp_given_bytes,
    mlp_given_definition,
    mlp_given_token,
    mlp_given_token_definition,
    select_gate_definition,
)
from dejavu.kernels.cuda.gate_rows import GateRows, gate_rows_bytes, select_gate_rows, up_given_rows
from dejavu.kernels.cuda.mlp import programs_of
from dejavu.kernels.cuda.mlp_rows import DownShape, UpShape, down_rows, padded_rows, shares_of
from dejavu.kernels.cuda.project import project_token, project_token_definition
from dejavu.kernels.sparse_mlp import MlpWeights
from helpers.cuda import DEVICES
from helpers.kernel_memory import CANARY, Memory, check_rule, midway, poisoned_neurons
from helpers.kernels import BF16, FP16, FP32, converted, norm_of, placed

INT = torch.int32


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", ["relu", "fatrelu", "silu", "gelu_tanh"])
@pytest.mark.parametrize(("neurons", "count", "rows"), [(7, 0, 2), (7, 7, 1), (256, 1, 4), (300, 150, 8), (515, 100, 4)])
def test_the_list_of_a_gate(neurons: int, count: int, rows: int, activation: str, device: str) -> None:
    """Negative values exceed a threshold by their size, where an activation has them. A product that is NaN is selected."""
    memory, size = Memory(device, seed=neurons + count), 24
    norm, matrix, bias = norm_of(memory, size, rms=True, affine=True), memory.normal(neurons, size, scale=0.2), memory.normal(neurons)
    if activation in ("relu", "fatrelu"):
        bias = bias.abs() + 3
    y_D, delta_D = memory.normal(size), memory.normal(size)
    product_F = project_token_definition(y_D, delta_D, norm, matrix, bias)
    threshold = midway(select_gate_definition(product_F, 0.0, activation, 0.4)[0].abs(), count)
    product_F[3] = bias[3] = torch.nan
    value_F, keep_F = select_gate_definition(product_F, threshold, activation, 0.4)
    expected = keep_F.nonzero().squeeze(1).tolist()
    assert 3 in expected and count <= len(expected) <= count + 1
    gate = GateNeurons(
        activation=activation, activation_threshold=0.4, threshold=memory.given(torch.tensor([threshold])), value=memory.room(neurons),
        neurons=memory.room(neurons, dtype=INT), count=memory.room(1, dtype=INT, holds=0.0),
    )  # fmt: skip
    project_token(
        memory.given(y_D), memory.given(delta_D), placed(norm, memory), memory.given(matrix), memory.given(bias), gate.value, gate=gate,
        shape=GridShape(rows=rows, warps=4, programs=3),
    )  # fmt: skip
    memory.check()
    found = gate.neurons.tolist()
    assert gate.count.item() == len(expected) and sorted(found[: len(expected)]) == expected and set(found[len(expected) :]) <= {CANARY}
    torch.testing.assert_close(gate.value.cpu()[expected], value_F[expected], rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(gate.value.cpu()[~keep_F], product_F[~keep_F], rtol=1e-5, atol=1e-5)


@dataclass(frozen=True, kw_only=True)
class GivenCase:
    """count: neurons in the list. rows: neurons at a time."""

    size: int
    neurons: int
    count: int
    dtype: torch.dtype
    gated: bool = True
    up_bias: bool = True
    down_bias: bool = True
    rms: bool = False
    affine: bool = True
    partial: bool = False
    rows: int = 16
    programs: int = 3


GIVEN_CASES = [
    GivenCase(size=16, neurons=7, count=0, dtype=FP32),
    GivenCase(size=17, neurons=64, count=1, dtype=FP16, up_bias=False, rms=True),
    GivenCase(size=96, neurons=127, count=126, dtype=BF16, gated=False, down_bias=False),
    GivenCase(size=129, neurons=300, count=300, dtype=FP32, rms=True),
    GivenCase(size=250, neurons=300, count=61, dtype=FP16, gated=False, rows=4, programs=2),
    GivenCase(size=129, neurons=64, count=63, dtype=BF16, affine=False, partial=True),
    GivenCase(size=17, neurons=64, count=40, dtype=FP32, gated=False, partial=True),
    GivenCase(size=96, neurons=7, count=1, dtype=FP16, up_bias=False, down_bias=False, partial=True, rows=1, programs=5),
    GivenCase(size=250, neurons=64, count=0, dtype=BF16, gated=False, partial=True),
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
@pytest.mark.parametrize("case", GIVEN_CASES, ids=str)
def test_mlp_given_token(case: GivenCase, device: str) -> None:
    memory = Memory(device, case.dtype)
    weights = given_weights(
        memory, case.size, case.neurons, gated=case.gated, up_bias=case.up_bias, down_bias=case.down_bias, kept=case.count
    )
    norm, idx_A = norm_of(memory, case.size, rms=case.rms, affine=case.affine), memory.choice(case.neurons, case.count)
    y_D, delta_D, value_F = (memory.normal(count, dtype=FP32) for count in (case.size, case.size, case.neurons))
    keep_F = torch.zeros(case.neurons, dtype=torch.bool).index_fill(0, idx_A, True)
    exact = [converted(given, torch.float64) for given in (norm, weights)]
    truth_D = mlp_given_token_definition(y_D.double(), delta_D.double(), exact[0], exact[1], value_F.double(), keep_F)
    plain_D = mlp_given_token_definition(y_D, delta_D, norm, weights, value_F, keep_F)

    shape = GridShape(rows=case.rows, warps=4, programs=case.programs)
    start_D, y_out_D = memory.normal(case.size, dtype=FP32), memory.room(case.size)
    programs = programs_of(shape, torch.device(device))
    out = memory.room(programs, case.size) if case.partial else memory.room(case.size, holds=start_D)
    poisoned = replace(poisoned_neurons(weights, idx_A), gate_FD=weights.gate_FD, gate_bias_F=weights.gate_bias_F)
    if not case.gated:
        poisoned = replace(poisoned, up_FD=torch.full_like(weights.up_FD, torch.nan), up_bias_F=None)
    unlisted = (~keep_F).nonzero().squeeze(1)[:1].repeat(case.neurons - case.count)  # behind the list: what is NaN
    mlp_given_token(
        memory.given(y_D), memory.given(delta_D), y_out_D, out, placed(norm, memory), placed(poisoned, memory),
        memory.given(torch.where(keep_F, value_F, torch.nan)), memory.given(torch.cat([idx_A, unlisted]).int()),
        memory.given(torch.tensor([case.count], dtype=INT)), shape=shape, partial=case.partial,
    )  # fmt: skip
    memory.check()
    assert torch.equal(y_out_D.cpu(), y_D + delta_D)
    check_rule(out.double().sum(0) if case.partial else out.double().cpu() - start_D.double(), plain_D, truth_D, case.dtype)


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
    value_F, index_F, product_BF = torch.empty(40), torch.empty(40, dtype=INT), torch.empty(3, 40, dtype=FP16)
    assert mlp_given_bytes(weights, 40) == matrices + value_F.nbytes + index_F.nbytes
    assert gate_rows_bytes(weights, 3, 40) == matrices + product_BF.nbytes + index_F.nbytes
