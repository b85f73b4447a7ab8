"""Every kernel for one token, against its definition: on the CPU under Triton's interpreter, on a GPU with -m gpu.

The rule and the poisoned memory are those of kernel_memory.py. Rows of what is not selected are NaN, and so is the memory around
everything that is read. Norms and biases are such that every neuron fires.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from dejavu.kernels.attention import masked_output_heads, plain_attention
from dejavu.kernels.cuda.attention import Partials, Places, attend, output_token
from dejavu.kernels.cuda.common import NormWeights, Side, multiprocessors, norm_definition
from dejavu.kernels.cuda.mlp import MlpShape, mlp_token, mlp_token_definition, programs_of
from dejavu.kernels.cuda.project import (
    GroupScores,
    ProjectShape,
    project_token,
    project_token_definition,
    selected_groups_definition,
    side_definition,
)
from dejavu.kernels.cuda.read import read_buffer
from dejavu.kernels.cuda.rows import combine_rows
from dejavu.kernels.cuda.select import NeuronScores, order_token, select_definition, select_token
from dejavu.kernels.sparse_mlp import MlpWeights
from dejavu.model.layers import rotate
from kernel_memory import CANARY, Memory, check_rule, midway, poisoned_neurons, poisoned_rows

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


def converted(value: Any, dtype: torch.dtype) -> Any:
    """A dataclass of weights with its floating-point tensors in another dtype."""
    found = {field.name: getattr(value, field.name) for field in fields(value)}
    return replace(value, **{k: v.to(dtype) for k, v in found.items() if isinstance(v, Tensor) and v.is_floating_point()})


def placed(value: Any, memory: Memory) -> Any:
    """A dataclass of weights, given to a kernel."""
    found = {field.name: getattr(value, field.name) for field in fields(value)}
    return replace(value, **{k: memory.given(v) for k, v in found.items() if isinstance(v, Tensor)})


def norm_of(memory: Memory, size: int, *, rms: bool, affine: bool) -> NormWeights:
    """A LayerNorm's bias of 3 makes what it gives positive."""
    weight_D = memory.normal(size, scale=0.1) + 0.5 if affine else None
    bias_D = memory.normal(size, scale=0.1) + 3 if affine and not rms else None
    return NormWeights(weight=weight_D, bias=bias_D, eps=1e-5, rms=rms)


def side_of(memory: Memory, rows: int, size: int) -> Side:
    return Side(matrix=memory.int8(rows, size), scale=memory.positive(rows).float() / 127 + 0.01, out=torch.empty(0))


def check_side(side: Side, plain_x_D: Tensor, x_D: Tensor, dtype: torch.dtype, memory_side: Side) -> None:
    truth_R = side.scale.double() * (side.matrix.double() @ x_D)
    check_rule(memory_side.out, side_definition(plain_x_D, side), truth_R, dtype)


@dataclass(frozen=True, kw_only=True)
class MlpCase:
    """count: neurons in the list, None without one. side: rows beside it, 0 without. rows: neurons at a time."""

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
    MlpCase(size=129, neurons=300, count=300, dtype=FP32, gated=True, rms=True, side=5),
    MlpCase(size=250, neurons=300, count=61, dtype=FP16, side=9, rows=4, programs=2),
    MlpCase(size=129, neurons=64, count=63, dtype=BF16, gated=True, affine=False, partial=True),
    MlpCase(size=250, neurons=127, count=None, dtype=BF16, gated=True, down_bias=False, side=3),
    MlpCase(size=17, neurons=300, count=None, dtype=FP32, up_bias=False, partial=True),
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
    firing, bias = (weights.up_FD, weights.up_bias_F) if weights.gate_FD is None else (weights.gate_FD, weights.gate_bias_F)
    pre_F = firing.double() @ x_D + (0 if bias is None else bias.double())
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

    shape = MlpShape(rows=case.rows, warps=4, programs=case.programs)
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


@settings(max_examples=15)
@given(data=st.data())
def test_mlp_token_of_any_size(data: st.DataObject) -> None:
    """On the CPU alone: a GPU would compile a kernel for each."""
    neurons = data.draw(st.integers(1, 80))
    case = MlpCase(
        size=data.draw(st.integers(16, 300)),
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
    wanted = torch.cat([torch.arange(queries).view(case.groups, -1)[groups_A].flatten(), torch.arange(queries, rows)])

    side = side_of(memory, case.side, case.size)
    given_side = Side(matrix=memory.given(side.matrix), scale=memory.given(side.scale), out=memory.room(case.side))
    out, y_out_D, cleared_D = memory.room(rows), memory.room(case.size), memory.room(case.size)
    counter = memory.room(1, dtype=torch.int32)
    project_token(
        memory.given(y_D), memory.given(delta_D), placed(norm, memory), memory.given(poisoned_rows(matrix, wanted)),
        None if bias is None else memory.given(poisoned_rows(bias, wanted)), out, queries=queries, num_groups=case.groups,
        scores=None if case.count is None else given_scores, side=given_side if case.side else None,
        y_out_D=y_out_D if case.prepares else None, cleared_D=cleared_D if case.prepares else None,
        counter=counter if case.prepares else None, shape=ProjectShape(rows=case.rows, warps=4, programs=case.programs),
    )  # fmt: skip
    memory.check()
    check_rule(out.cpu()[wanted], plain[wanted], truth[wanted], case.dtype)
    left_out = torch.ones(rows, dtype=torch.bool).index_fill(0, wanted, False)
    assert out.cpu()[left_out].isnan().all(), "a row was written that was not wanted"
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


def neuron_scores(memory: Memory, neurons: int, rank: int, count: int, *, int8: bool) -> NeuronScores:
    """Scores of which so many exceed the threshold; on the CPU, without room for the list."""
    matrix = memory.int8(neurons, rank) if int8 else memory.normal(neurons, rank)
    scores = NeuronScores(
        matrix=matrix, scale=memory.positive(neurons).float() / (127 if int8 else 1), bias=memory.normal(neurons, dtype=FP32),
        threshold=torch.zeros(1), h=memory.normal(rank, dtype=FP32), neurons=torch.empty(0), count=torch.empty(0),
    )  # fmt: skip
    score_F = (matrix.float() @ scores.h) * scores.scale + scores.bias
    return replace(scores, threshold=torch.tensor([midway(score_F, count)]))


def with_room(scores: NeuronScores, memory: Memory) -> NeuronScores:
    count = memory.room(1, dtype=torch.int32, holds=0.0)
    return replace(placed(scores, memory), neurons=memory.room(scores.matrix.shape[0], dtype=torch.int32), count=count)


def check_list(scores: NeuronScores, wanted: list[int]) -> None:
    """The list in any order; what lies behind it was not written."""
    count = len(wanted)
    assert scores.count.item() == count
    assert sorted(scores.neurons[:count].tolist()) == wanted and set(scores.neurons[count:].tolist()) <= {CANARY}


SELECTIONS = [
    (neurons, rank, count, int8)
    for neurons, rank, int8 in ((7, 5, True), (64, 16, False), (127, 17, True), (300, 3, False))
    for count in (0, 1, neurons - 1, neurons)
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("neurons", "rank", "count", "int8"), SELECTIONS)
def test_select_token_and_order_token(neurons: int, rank: int, count: int, int8: bool, device: str) -> None:
    memory = Memory(device, seed=count)
    scores = neuron_scores(memory, neurons, rank, count, int8=int8)
    wanted = select_definition(scores).tolist()
    assert len(wanted) == count
    found = with_room(scores, memory)
    select_token(found)
    check_list(found, wanted)
    marks_F, out_F = memory.room(neurons, dtype=torch.int32, holds=0.0), memory.room(neurons, dtype=torch.int32)
    order_token(found, marks_F, out_F)
    memory.check()
    assert out_F.tolist() == wanted + [CANARY] * (neurons - count)
    assert not marks_F.any(), "marks must be zero for the next list"


@pytest.mark.parametrize("device", DEVICES)
def test_order_token_of_more_than_a_block(device: str) -> None:
    memory = Memory(device)
    wanted = memory.choice(2500, 1300)
    listed = torch.cat([wanted, torch.full((1200,), 2499)]).int()
    none = torch.empty(2500, 0)
    scores = NeuronScores(
        matrix=none, scale=none, bias=none, threshold=none, h=none, neurons=memory.given(listed),
        count=memory.given(torch.tensor([1300], dtype=torch.int32)),
    )  # fmt: skip
    out_F = memory.room(2500, dtype=torch.int32)
    order_token(scores, memory.room(2500, dtype=torch.int32, holds=0.0), out_F)
    memory.check()
    assert out_F[:1300].tolist() == sorted(wanted.tolist()) and set(out_F[1300:].tolist()) == {CANARY}


@dataclass(frozen=True, kw_only=True)
class AttentionCase:
    """A row for each position; counts: selected groups of each row, None without predictors. partial, select: for one row."""

    groups: int
    per: int
    head_dim: int
    page: int
    splits: int
    positions: tuple[int, ...]
    dtype: torch.dtype
    counts: tuple[int, ...] | None = None
    rope: bool = False
    partial: bool = False
    beside: int | None = None
    size: int = 33


ATTENTION_CASES = [
    AttentionCase(groups=3, per=1, head_dim=8, page=4, splits=1, positions=(0,), dtype=FP32),
    AttentionCase(groups=5, per=1, head_dim=6, page=3, splits=2, positions=(31,), dtype=FP16, counts=(0,), beside=1),
    AttentionCase(groups=2, per=2, head_dim=16, page=16, splits=1, positions=(33,), dtype=BF16, counts=(1,), rope=True, partial=True),
    AttentionCase(groups=3, per=2, head_dim=10, page=5, splits=4, positions=(129,), dtype=FP32, counts=(2,), rope=True, beside=70),
    AttentionCase(groups=4, per=1, head_dim=20, page=16, splits=2, positions=(64,), dtype=FP16, counts=(4,), partial=True, size=250),
    AttentionCase(groups=2, per=3, head_dim=8, page=7, splits=8, positions=(6,), dtype=BF16, rope=True),
    AttentionCase(groups=1, per=1, head_dim=16, page=256, splits=4, positions=(3001,), dtype=FP32, rope=True),
    AttentionCase(groups=3, per=1, head_dim=8, page=4, splits=1, positions=(7, 40), dtype=BF16, counts=(1, 3)),
    AttentionCase(groups=2, per=2, head_dim=12, page=5, splits=2, positions=(0, 66, 5), dtype=FP16, rope=True),
    AttentionCase(groups=3, per=2, head_dim=4, page=3, splits=2, positions=(1, 0, 32, 8, 3), dtype=FP32, rope=True, counts=(0, 3, 1, 2, 1)),
]


def stored(k_GK: Tensor, v_GK: Tensor, pools: tuple[Tensor, Tensor], page: int, at: int) -> None:
    for pool_PGSK, new_GK in zip(pools, (k_GK, v_GK), strict=True):
        pool_PGSK[page, :, at] = new_GK


def rotated(x_HK: Tensor, position: int, inv_freq: Tensor | None) -> Tensor:
    """In fp64 from the same frequencies; as the model does in other dtypes."""
    if inv_freq is None:
        return x_HK
    if x_HK.dtype != torch.float64:
        return rotate(x_HK[None], torch.tensor([position]), inv_freq)[0]
    angle_K = (position * inv_freq.double()).repeat(2)
    first, second = x_HK.chunk(2, dim=-1)
    return x_HK * angle_K.cos() + torch.cat([-second, first], dim=-1) * angle_K.sin()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
def test_attend_and_what_follows(case: AttentionCase, device: str) -> None:
    """attend, then output_token for one row and combine_rows for any number."""
    memory, dtype = Memory(device, case.dtype), case.dtype
    groups, per, head_dim, size, page = case.groups, case.per, case.head_dim, case.size, case.page
    rows, heads = len(case.positions), groups * per
    lengths = [-(-(position + 1) // page) for position in case.positions]
    slots = memory.choice(rows + 2, rows).int()
    pages = memory.choice(sum(lengths) + 3, sum(lengths)).split(lengths)
    width = max(lengths) + 2
    spare = next(p for p in range(sum(lengths) + 3) if p not in torch.cat(pages).tolist())
    table = torch.full((rows + 2, width), spare)
    for row, own in enumerate(pages):
        table[slots[row], : len(own)] = own
    pool_shape = (sum(lengths) + 3, groups, page, head_dim)
    clean = torch.zeros(pool_shape, dtype=dtype), torch.zeros(pool_shape, dtype=dtype)
    poisoned = torch.full(pool_shape, torch.nan, dtype=dtype), torch.full(pool_shape, torch.nan, dtype=dtype)
    inv_freq = 1 / 10000 ** (torch.arange(0, head_dim, 2) / head_dim) if case.rope else None
    selected = [memory.choice(groups, groups if case.counts is None else max(1, case.counts[row])).sort().values for row in range(rows)]
    if case.counts is not None and 0 in case.counts:  # a group is always selected by the engine; the kernels do not need one
        selected = [chosen[: case.counts[row]] for row, chosen in enumerate(selected)]
    for row, position in enumerate(case.positions):
        for t in range(position):
            k_GK, v_GK = memory.normal(groups, head_dim), memory.normal(groups, head_dim)
            stored(k_GK, v_GK, clean, int(pages[row][t // page]), t % page)
            where = (int(pages[row][t // page]), selected[row], t % page)
            poisoned[0][where], poisoned[1][where] = k_GK[selected[row]], v_GK[selected[row]]
    qkv_dtype = FP32 if rows == 1 else dtype  # as the engine's two kinds of steps give it
    qkv_BW = memory.normal(rows, (heads + 2 * groups) * head_dim, dtype=qkv_dtype)

    def definition(row: int, kind: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Mixed values [G, R, K] of all groups, and the new key and value, computed in that dtype."""
        position = case.positions[row]
        vectors = qkv_BW[row].to(kind).view(-1, head_dim)
        q_HK, k_GK = (rotated(part, position, inv_freq) for part in (vectors[:heads], vectors[heads : heads + groups]))
        pools = (clean[0].to(kind, copy=True), clean[1].to(kind, copy=True))
        stored(k_GK, vectors[heads + groups :], pools, int(pages[row][position // page]), position % page)
        return plain_attention(q_HK.view(groups, per, head_dim), *pools, pages[row], position + 1, None), k_GK, vectors[heads + groups :]

    k_pool, v_pool = (memory.room(*pool_shape, dtype=dtype, holds=pool) for pool in poisoned)
    mixed, stats = memory.room(rows, heads, case.splits, head_dim), memory.room(rows, heads, case.splits, 2)
    partials = Partials(mixed=mixed, stats=stats)
    groups_BG, counts_BL = None, None
    if case.counts is not None:  # behind each list: a group that was not selected
        lists = [chosen.tolist() for chosen in selected]
        others = [next((g for g in range(groups) if g not in chosen), 0) for chosen in lists]
        full = [chosen + [other] * (groups - len(chosen)) for chosen, other in zip(lists, others, strict=True)]
        groups_BG = memory.given(torch.tensor(full, dtype=torch.int32))
        counts_BL = memory.given(torch.tensor([[9, len(chosen), 9] for chosen in lists], dtype=torch.int32))
    count_B = None if counts_BL is None else counts_BL[:, 1]
    beside = None if case.beside is None else neuron_scores(memory, 70, 5, case.beside, int8=True)
    select = None if beside is None else with_room(beside, memory)
    cleared = memory.room(2500) if rows == 1 else None
    places = Places(
        slot_B=memory.given(slots), position_B=memory.given(torch.tensor(case.positions, dtype=torch.int32)), table=memory.given(table),
        inv_freq=None if inv_freq is None else memory.given(inv_freq),
    )  # fmt: skip
    attend(
        memory.given(qkv_BW), k_pool, v_pool, places, partials, heads=heads, groups_BG=groups_BG, count_B=count_B, select=select,
        cleared=cleared,
    )  # fmt: skip
    memory.check()
    assert cleared is None or not cleared.any()
    if select is not None and beside is not None:
        check_list(select, select_definition(beside).tolist())

    for row, position in enumerate(case.positions):  # every group's key and value is in its place ..
        _, truth_k, truth_v = definition(row, torch.float64)
        _, plain_k, plain_v = definition(row, dtype)
        where = (int(pages[row][position // page]), slice(None), position % page)
        check_rule(k_pool[where], plain_k, truth_k, dtype)
        check_rule(v_pool[where], plain_v, truth_v, dtype)
        for pool, before in zip((k_pool, v_pool), poisoned, strict=True):
            before[where] = pool[where].cpu()
    for pool, expected in zip((k_pool, v_pool), poisoned, strict=True):  # .. and nothing else of the cache has changed
        assert torch.equal(pool.cpu().nan_to_num(nan=1e4), expected.nan_to_num(nan=1e4))
    for row, chosen in enumerate(selected):
        idle = torch.ones(groups, dtype=torch.bool).index_fill(0, chosen, False)
        assert mixed[row].cpu().view(groups, -1)[idle].isnan().all(), "a head was computed that was not selected"

    out_BHK = memory.room(rows, heads, head_dim, dtype=dtype)
    combine_rows(partials, groups_BG, count_B, out_BHK)
    memory.check()
    for row, chosen in enumerate(selected):
        truth_GRK, plain_GRK = definition(row, torch.float64)[0], definition(row, dtype)[0]
        found_GRK = out_BHK[row].cpu().view(groups, per, head_dim)
        check_rule(found_GRK[chosen], plain_GRK[chosen], truth_GRK[chosen], dtype)
        idle = torch.ones(groups, dtype=torch.bool).index_fill(0, chosen, False)
        assert not found_GRK[idle].any()
    if rows > 1:
        return

    chosen = selected[0]
    weight_QD, bias_D = memory.normal(heads * head_dim, size, scale=heads**-0.5), memory.normal(size) if size == 33 else None
    rows_of_O = torch.arange(heads * head_dim).view(groups, -1)[chosen].flatten()
    start_D = memory.normal(size, dtype=FP32)
    out = memory.room(heads, size) if case.partial else memory.room(size, holds=start_D)
    output_token(
        partials, memory.given(poisoned_rows(weight_QD, rows_of_O)), None if bias_D is None else memory.given(bias_D), out,
        num_groups=groups, groups_G=None if groups_BG is None else groups_BG[0], count=count_B, columns=32, partial=case.partial,
    )  # fmt: skip
    memory.check()
    idx_A = None if case.counts is None else chosen
    mixed_ARK = [definition(0, kind)[0][chosen] for kind in (torch.float64, dtype)]
    truth_D = masked_output_heads(mixed_ARK[0], weight_QD.double(), None if bias_D is None else bias_D.double(), idx_A, groups)
    plain_D = masked_output_heads(mixed_ARK[1], weight_QD, bias_D, idx_A, groups)
    found_D = out.double().sum(0) if case.partial else out.double().cpu() - start_D.double()
    if len(chosen):  # with no head at all nobody adds the bias: the engine always selects one
        check_rule(found_D, plain_D, truth_D, dtype)


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
