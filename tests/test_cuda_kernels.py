"""Every kernel for one token but those of attention, against its definition: on the CPU under Triton's interpreter, on a GPU with -m gpu.

The rule and the poisoned memory are those of helpers/kernel_memory.py. Rows of what is not selected are NaN, and so is the memory around
everything that is read. Norms and biases are such that every neuron fires.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from dejavu.kernels.cuda.common import GridShape, Side, multiprocessors, norm_definition
from dejavu.kernels.cuda.mlp import mlp_token, mlp_token_definition, programs_of
from dejavu.kernels.cuda.project import (
    GroupScores,
    project_token,
    project_token_definition,
    selected_groups_definition,
)
from dejavu.kernels.cuda.read import read_buffer
from dejavu.kernels.cuda.select import order_list, select_definition, select_token
from dejavu.kernels.sparse_mlp import MlpWeights
from helpers.cuda import DEVICES
from helpers.kernel_memory import CANARY, Memory, check_rule, midway, poisoned_neurons, poisoned_rows
from helpers.kernels import BF16, FP16, FP32, check_list, check_side, converted, neuron_scores, norm_of, placed, side_of, with_room


@dataclass(frozen=True, kw_only=True)
class MlpCase:
    """count: neurons in the list, None without one. side: rows computed with it, 0 without. rows: neurons at a time."""

    size: int
    neurons: int
    count: int | None
    dtype: torch.dtype
    gated: bool = False
    up_bias: bool = True
    down_bias: bool = True
    rms: bool = False
    affine: bool = True
    activation: str = "relu"
    partial: bool = False
    side: int = 0
    rows: int = 16
    programs: int = 3


MLP_CASES = [
    MlpCase(size=16, neurons=7, count=0, dtype=FP32),
    MlpCase(size=17, neurons=64, count=1, dtype=FP16, gated=True, up_bias=False, rms=True),
    MlpCase(size=96, neurons=127, count=126, dtype=BF16, down_bias=False),
    MlpCase(size=129, neurons=150, count=150, dtype=FP32, gated=True, rms=True, side=5),
    MlpCase(size=250, neurons=150, count=61, dtype=FP16, side=9, rows=4, programs=2),
    MlpCase(size=129, neurons=64, count=63, dtype=BF16, gated=True, affine=False, partial=True),
    MlpCase(size=250, neurons=127, count=None, dtype=BF16, gated=True, down_bias=False, side=3),
    MlpCase(size=17, neurons=150, count=None, dtype=FP32, up_bias=False, partial=True),
    MlpCase(size=96, neurons=7, count=1, dtype=FP16, up_bias=False, down_bias=False, partial=True, rows=1, programs=5),
    MlpCase(size=16, neurons=127, count=127, dtype=FP16, affine=False, rows=8),
    MlpCase(size=250, neurons=64, count=0, dtype=BF16, gated=True, partial=True, side=6),
    MlpCase(size=129, neurons=7, count=6, dtype=FP16, activation="relu2", rms=True, affine=False),
    MlpCase(size=96, neurons=64, count=20, dtype=FP32, activation="fatrelu", gated=True, rms=True),
    MlpCase(size=31, neurons=64, count=20, dtype=FP32, activation="silu", gated=True, affine=False),
    MlpCase(size=16, neurons=64, count=33, dtype=BF16, activation="gelu"),
    MlpCase(size=17, neurons=64, count=33, dtype=FP32, activation="gelu"),
    MlpCase(size=129, neurons=64, count=5, dtype=FP32, activation="gelu_tanh"),
]


def mlp_weights(case: MlpCase, memory: Memory) -> MlpWeights:
    """Products with positive x, or biases, are positive."""
    shape, spread = (case.neurons, case.size), 1 / case.size
    return MlpWeights(
        up_FD=memory.positive(*shape, scale=spread),
        down_FD=memory.normal(*shape, scale=max(case.count or case.neurons, 1) ** -0.5),
        gate_FD=memory.positive(*shape, scale=spread) if case.gated else None,
        up_bias_F=memory.positive(case.neurons, scale=0.3) + 1 if case.up_bias else None,
        gate_bias_F=memory.positive(case.neurons, scale=0.3) + 1 if case.gated and case.up_bias else None,
        down_bias_D=memory.normal(case.size, scale=0.1) if case.down_bias else None,
        activation=case.activation,
        activation_threshold=0.5,
    )


def check_that_all_fire(x_D: Tensor, weights: MlpWeights) -> None:
    activated, bias = (weights.up_FD, weights.up_bias_F) if weights.gate_FD is None else (weights.gate_FD, weights.gate_bias_F)
    pre_F = activated.double() @ x_D + (0 if bias is None else bias.double())
    assert (pre_F > (0.5 if weights.activation == "fatrelu" else 0)).all()


def check_mlp_token(case: MlpCase, device: str) -> None:
    memory = Memory(device, case.dtype)
    weights, norm = mlp_weights(case, memory), norm_of(memory, case.size, rms=case.rms, affine=case.affine)
    y_D, delta_D = (memory.normal(case.size, dtype=FP32) for _ in range(2))
    if case.rms:
        y_D, delta_D = y_D.abs(), delta_D.abs()
    idx_A = torch.arange(case.neurons) if case.count is None else memory.choice(case.neurons, case.count)
    exact_norm, exact = converted(norm, torch.float64), converted(weights, torch.float64)
    truth_D = mlp_token_definition(y_D.double(), delta_D.double(), exact_norm, exact, idx_A)
    plain_D = mlp_token_definition(y_D, delta_D, norm, weights, idx_A)
    x_D = norm_definition(y_D.double() + delta_D.double(), exact_norm)
    check_that_all_fire(x_D, weights)

    shape = GridShape(rows=case.rows, warps=4, programs=case.programs)
    programs = programs_of(shape, torch.device(device))
    start_D = memory.normal(case.size, dtype=FP32)
    out = memory.room(programs, case.size) if case.partial else memory.room(case.size, holds=start_D)
    y_out_D = memory.room(case.size)
    side = side_of(memory, case.side, case.size)
    given_side = Side(matrix=memory.given(side.matrix), scale=memory.given(side.scale), out=memory.room(case.side))
    listed = torch.tensor([f for f in range(case.neurons) if f not in set(idx_A.tolist())][:1] * (case.neurons - len(idx_A)))
    listed = torch.cat([idx_A, listed]).int()  # behind the list: a neuron whose rows are NaN
    mlp_token(
        memory.given(y_D), memory.given(delta_D), y_out_D, out, placed(norm, memory), placed(poisoned_neurons(weights, idx_A), memory),
        None if case.count is None else memory.given(listed),
        None if case.count is None else memory.given(torch.tensor([case.count], dtype=torch.int32)),
        side=given_side if case.side else None, shape=shape, partial=case.partial,
    )  # fmt: skip
    memory.check()
    found_D = out.double().sum(0) if case.partial else out.double().cpu() - start_D.double()
    check_rule(found_D, plain_D, truth_D, case.dtype)
    assert torch.equal(y_out_D.cpu(), y_D + delta_D)
    if case.side:
        check_side(side, norm_definition((y_D + delta_D).to(case.dtype), norm), x_D, case.dtype, given_side)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", MLP_CASES, ids=str)
def test_mlp_token(case: MlpCase, device: str) -> None:
    check_mlp_token(case, device)


@settings(max_examples=3)
@given(data=st.data())
def test_mlp_token_of_any_size(data: st.DataObject) -> None:
    """On the CPU alone: a GPU would compile a kernel for each."""
    neurons = data.draw(st.integers(1, 40))
    case = MlpCase(
        size=data.draw(st.integers(16, 140)),
        neurons=neurons,
        count=data.draw(st.integers(0, neurons)),
        dtype=data.draw(st.sampled_from([FP32, FP16, BF16])),
        gated=data.draw(st.booleans()),
        partial=data.draw(st.booleans()),
        rows=data.draw(st.sampled_from([1, 4, 16])),
        programs=data.draw(st.integers(1, 5)),
    )
    check_mlp_token(case, "cpu")


@pytest.mark.parametrize("device", DEVICES)
def test_mlp_token_in_the_shape_it_chooses_itself(device: str) -> None:
    memory = Memory(device, FP16)
    case = MlpCase(size=96, neurons=40, count=None, dtype=FP16)
    weights, norm = mlp_weights(case, memory), norm_of(memory, 96, rms=False, affine=True)
    y_D, delta_D = (memory.normal(96, dtype=FP32) for _ in range(2))
    out_D = memory.room(96, holds=0.0)
    mlp_token(memory.given(y_D), memory.given(delta_D), memory.room(96), out_D, placed(norm, memory), placed(weights, memory))
    memory.check()
    exact = [converted(value, torch.float64) for value in (norm, weights)]
    truth_D = mlp_token_definition(y_D.double(), delta_D.double(), exact[0], exact[1], torch.arange(40))
    check_rule(out_D, mlp_token_definition(y_D, delta_D, norm, weights, torch.arange(40)), truth_D, FP16)


@dataclass(frozen=True, kw_only=True)
class ProjectCase:
    """groups of `per` heads of `head_dim`; count: groups whose score exceeds the threshold, None without a predictor."""

    size: int
    groups: int
    per: int
    head_dim: int
    count: int | None
    dtype: torch.dtype
    biased: bool = True
    rms: bool = False
    affine: bool = True
    side: int = 0
    prepares: bool = True
    rows: int = 8
    programs: int = 2


PROJECT_CASES = [
    ProjectCase(size=16, groups=5, per=1, head_dim=8, count=0, dtype=FP32, side=3),
    ProjectCase(size=17, groups=5, per=2, head_dim=8, count=1, dtype=FP16, biased=False, rms=True),
    ProjectCase(size=96, groups=3, per=1, head_dim=6, count=2, dtype=BF16, affine=False),
    ProjectCase(size=129, groups=5, per=3, head_dim=4, count=4, dtype=FP32, rms=True, side=11, prepares=False),
    ProjectCase(size=250, groups=2, per=2, head_dim=16, count=2, dtype=FP16, rows=16, side=4),
    ProjectCase(size=31, groups=2, per=4, head_dim=4, count=1, dtype=FP16, rows=16),
    ProjectCase(size=250, groups=5, per=2, head_dim=8, count=None, dtype=BF16, rms=True, affine=False, programs=3),
    ProjectCase(size=129, groups=1, per=1, head_dim=7, count=None, dtype=FP32, biased=False, rows=4),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", PROJECT_CASES, ids=str)
def test_project_token(case: ProjectCase, device: str) -> None:
    memory, rank = Memory(device, case.dtype), 5
    per_group = case.per * case.head_dim
    queries = case.groups * per_group
    rows = queries + 2 * case.groups * case.head_dim
    matrix, bias = memory.normal(rows, case.size, scale=case.size**-0.5), memory.normal(rows) if case.biased else None
    norm = norm_of(memory, case.size, rms=case.rms, affine=case.affine)
    y_D, delta_D = (memory.normal(case.size, dtype=FP32) for _ in range(2))
    exact_norm = converted(norm, torch.float64)
    truth = project_token_definition(y_D.double(), delta_D.double(), exact_norm, matrix.double(), None if bias is None else bias.double())
    plain = project_token_definition(y_D, delta_D, norm, matrix, bias)

    scores = GroupScores(
        matrix=memory.int8(case.groups, rank), scale=memory.positive(case.groups).float() / 127,
        bias=memory.normal(case.groups, dtype=FP32), threshold=torch.zeros(1), h=memory.normal(rank, dtype=FP32),
        groups=torch.empty(0), count=torch.empty(0),
    )  # fmt: skip
    score_G = (scores.matrix.float() @ scores.h) * scores.scale + scores.bias
    scores = replace(scores, threshold=torch.tensor([midway(score_G, case.count or 0)]))
    groups_A = torch.arange(case.groups) if case.count is None else selected_groups_definition(scores)
    assert case.count is None or len(groups_A) == max(1, case.count)
    given_scores = replace(
        placed(scores, memory), groups=memory.room(case.groups, dtype=torch.int32), count=memory.room(1, dtype=torch.int32)
    )
    selected = torch.cat([torch.arange(queries).view(case.groups, -1)[groups_A].flatten(), torch.arange(queries, rows)])

    side = side_of(memory, case.side, case.size)
    given_side = Side(matrix=memory.given(side.matrix), scale=memory.given(side.scale), out=memory.room(case.side))
    out, y_out_D, cleared_D = memory.room(rows), memory.room(case.size), memory.room(case.size)
    counter = memory.room(1, dtype=torch.int32)
    project_token(
        memory.given(y_D), memory.given(delta_D), placed(norm, memory), memory.given(poisoned_rows(matrix, selected)),
        None if bias is None else memory.given(poisoned_rows(bias, selected)), out, queries=queries, num_groups=case.groups,
        scores=None if case.count is None else given_scores, side=given_side if case.side else None,
        y_out_D=y_out_D if case.prepares else None, cleared_D=cleared_D if case.prepares else None,
        counter=counter if case.prepares else None, shape=GridShape(rows=case.rows, warps=4, programs=case.programs),
    )  # fmt: skip
    memory.check()
    check_rule(out.cpu()[selected], plain[selected], truth[selected], case.dtype)
    left_out = torch.ones(rows, dtype=torch.bool).index_fill(0, selected, False)
    assert out.cpu()[left_out].isnan().all(), "a row was written that was not selected"
    if case.count is not None:
        assert given_scores.count.item() == len(groups_A)
        assert given_scores.groups.tolist() == groups_A.tolist() + [CANARY] * (case.groups - len(groups_A))
    if case.prepares:
        assert torch.equal(y_out_D.cpu(), y_D + delta_D) and cleared_D.tolist() == [0.0] * case.size and counter.item() == 0
    else:
        assert y_out_D.isnan().all() and cleared_D.isnan().all() and counter.item() == CANARY
    if case.side:
        plain_x_D = norm_definition((y_D + delta_D).to(case.dtype), norm)
        check_side(side, plain_x_D, norm_definition(y_D.double() + delta_D.double(), exact_norm), case.dtype, given_side)


@pytest.mark.parametrize("device", DEVICES)
def test_project_token_for_side_rows_alone(device: str) -> None:
    memory = Memory(device)
    side, norm = side_of(memory, 7, 96), norm_of(memory, 96, rms=False, affine=True)
    y_D, delta_D = (memory.normal(96) for _ in range(2))
    given_side = Side(matrix=memory.given(side.matrix), scale=memory.given(side.scale), out=memory.room(7))
    out = memory.room(4)
    none = memory.given(memory.normal(1, 96))[:0]
    project_token(memory.given(y_D), memory.given(delta_D), placed(norm, memory), none, None, out, side=given_side)
    memory.check()
    assert out.isnan().all()
    x_D = norm_definition(y_D.double() + delta_D.double(), converted(norm, torch.float64))
    check_side(side, norm_definition(y_D + delta_D, norm), x_D, FP32, given_side)


SELECTIONS = [
    (neurons, rank, count, int8)
    for neurons, rank, int8 in ((7, 5, True), (64, 16, False), (127, 17, True), (300, 3, False))
    for count in (0, 1, neurons - 1, neurons)
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("neurons", "rank", "count", "int8"), SELECTIONS)
def test_select_token_and_order_list(neurons: int, rank: int, count: int, int8: bool, device: str) -> None:
    memory = Memory(device, seed=count)
    scores = neuron_scores(memory, neurons, rank, count, int8=int8)
    expected = select_definition(scores).tolist()
    assert len(expected) == count
    found = with_room(scores, memory)
    select_token(found)
    check_list(found, expected)
    marks_F, out_F = memory.room(neurons, dtype=torch.int32, holds=0.0), memory.room(neurons, dtype=torch.int32)
    order_list(found.neurons, found.count, marks_F, out_F)
    memory.check()
    assert out_F.tolist() == expected + [CANARY] * (neurons - count)
    assert not marks_F.any(), "marks must be zero for the next list"


@pytest.mark.parametrize("device", DEVICES)
def test_a_neuron_whose_score_is_nan_is_selected(device: str) -> None:
    memory = Memory(device)
    scores = neuron_scores(memory, 127, 17, 10, int8=False)
    scores.bias[[3, 90]] = torch.nan
    expected = select_definition(scores).tolist()
    assert {3, 90} <= set(expected) and len(expected) < 20
    found = with_room(scores, memory)
    select_token(found)
    check_list(found, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_order_list_of_more_than_a_block(device: str) -> None:
    memory = Memory(device)
    chosen = memory.choice(2500, 1300)
    listed = torch.cat([chosen, torch.full((1200,), 2499)]).int()
    count = memory.given(torch.tensor([1300], dtype=torch.int32))
    out_F = memory.room(2500, dtype=torch.int32)
    order_list(memory.given(listed), count, memory.room(2500, dtype=torch.int32, holds=0.0), out_F)
    memory.check()
    assert out_F[:1300].tolist() == sorted(chosen.tolist()) and set(out_F[1300:].tolist()) == {CANARY}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("words", [1, 4095, 4096, 40000])
def test_read_buffer(words: int, device: str) -> None:
    """The sums are of every word once."""
    memory = Memory(device)
    values = torch.randint(-(2**15), 2**15, (words,), generator=memory.generator).int()
    sums = memory.room(8 * multiprocessors(torch.device(device)), dtype=torch.int32)
    assert read_buffer(memory.given(values), sums) is sums
    memory.check()
    assert int(sums.long().sum()) == int(values.long().sum())
