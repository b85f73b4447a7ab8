"""Every kernel for several rows, against its definition: on the CPU under Triton's interpreter, on a GPU with -m gpu.

As test_cuda_kernels.py. `combine_rows` is in test_cuda_attention.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dejavu.kernels.cuda.attention import Partials, Places, attend
from dejavu.kernels.cuda.common import BlockOutput, Side, joined_definition, norm_definition
from dejavu.kernels.cuda.embed import embed_rows
from dejavu.kernels.cuda.gate import GateNeurons, mlp_by_gate
from dejavu.kernels.cuda.inputs import KeptInputs, NormedInputs, sum_inputs, sum_scratch
from dejavu.kernels.cuda.logits import finish_logits, finish_logits_definition
from dejavu.kernels.cuda.mlp import mlp_token
from dejavu.kernels.cuda.mlp_rows import DownShape, UpShape, mlp_rows, mlp_rows_definition, padded_rows, shares_of
from dejavu.kernels.cuda.project import GroupScores, project_token, selected_groups_definition, side_definition
from dejavu.kernels.cuda.rows import group_rows, norm_rows
from dejavu.kernels.cuda.select_rows import UnionScores, project_rows, select_rows, select_rows_definition
from dejavu.kernels.sparse_mlp import MlpWeights
from helpers.cuda import DEVICES
from helpers.kernel_memory import CANARY, Memory, check_rule, midway, poisoned_neurons, poisoned_rows
from helpers.kernels import BF16, FP16, FP32, converted, norm_of, placed, side_of

INT = torch.int32


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("rows", "size", "dtype", "delta_dtype", "rms", "affine", "clears"),
    [
        (1, 17, FP32, FP32, False, True, True),
        (2, 16, FP16, FP16, True, True, False),
        (3, 250, BF16, FP32, False, False, True),
        (5, 129, FP16, FP32, True, False, True),
        (5, 96, BF16, BF16, False, True, False),
    ],
)
def test_norm_rows(
    rows: int, size: int, dtype: torch.dtype, delta_dtype: torch.dtype, rms: bool, affine: bool, clears: bool, device: str
) -> None:
    memory = Memory(device, dtype)
    norm = norm_of(memory, size, rms=rms, affine=affine)
    start_BD, delta_BD = memory.normal(rows, size, dtype=FP32), memory.normal(rows, size, dtype=delta_dtype)
    y_BD, x_BD, cleared_BD = memory.room(rows, size, holds=start_BD), memory.room(rows, size, dtype=dtype), memory.room(rows, size)
    norm_rows(y_BD, memory.given(delta_BD), placed(norm, memory), x_BD, cleared_BD if clears else None)
    memory.check()
    assert torch.equal(y_BD.cpu(), start_BD + delta_BD)
    truth_BD = norm_definition(start_BD.double() + delta_BD.double(), converted(norm, torch.float64))
    check_rule(x_BD, norm_definition((start_BD + delta_BD).to(dtype), norm), truth_BD, dtype)
    assert not cleared_BD.any() if clears else cleared_BD.isnan().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("slices", "size"), [(1, 17), (3, 250)])
def test_norm_rows_adds_the_parts_of_a_product_in_order(slices: int, size: int, device: str) -> None:
    memory = Memory(device, FP32)
    norm, start_BD, delta_SBD = norm_of(memory, size, rms=True, affine=True), memory.normal(3, size), memory.normal(slices, 3, size)
    delta_BD = delta_SBD[0].clone()
    for part_BD in delta_SBD[1:]:
        delta_BD += part_BD
    found = []
    for delta in (delta_SBD, delta_BD):
        y_BD, x_BD = memory.room(3, size, holds=start_BD), memory.room(3, size)
        norm_rows(y_BD, memory.given(delta), placed(norm, memory), x_BD)
        memory.check()
        found.append((y_BD, x_BD))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert torch.equal(found[0][0].cpu(), start_BD + delta_BD)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("size", "dtype", "normed", "scale"), [(17, FP16, True, 1.0), (250, FP32, True, 0.7), (96, BF16, False, 1.4)])
def test_what_a_block_gave_is_normed_and_scaled_before_it_is_added(
    size: int, dtype: torch.dtype, normed: bool, scale: float, device: str
) -> None:
    """By every kernel that reads the sum."""
    memory = Memory(device, dtype)
    norm, out_norm = norm_of(memory, size, rms=True, affine=True), norm_of(memory, size, rms=True, affine=True)
    added = BlockOutput(weight=out_norm.weight if normed else None, eps=1e-5, scale=scale)
    start_D, delta_D, weight_OD = memory.normal(size, dtype=FP32), memory.normal(size, dtype=FP32), memory.normal(8, size)
    exact = BlockOutput(weight=None if added.weight is None else added.weight.double(), eps=1e-5, scale=scale)
    truth_D = joined_definition(start_D.double(), delta_D.double(), exact)
    here = BlockOutput(weight=None if added.weight is None else memory.given(added.weight), eps=1e-5, scale=scale)
    weights = placed(MlpWeights(up_FD=weight_OD, down_FD=weight_OD, activation="relu"), memory)
    least, counted = memory.given(torch.tensor([-1.0])), [memory.room(1, dtype=INT, holds=0.0) for _ in range(2)]
    kept = KeptInputs(norm=memory.given(torch.ones(size)), threshold=least, inputs=memory.room(size, dtype=INT), count=counted[0])
    gate, room = GateNeurons(threshold=least, marks=memory.room(8, dtype=INT), count=counted[1]), sum_scratch(size, 8, torch.device(device))
    scratch, weight_DO = (memory.room(room, dtype=INT), memory.room(room)), memory.given(weight_OD.T.contiguous())
    y, delta, own = memory.given(start_D), memory.given(delta_D), placed(norm, memory)

    def by_rows(y_out: Tensor) -> None:
        y_out.copy_(y)
        norm_rows(y_out[None], delta[None], own, memory.room(1, size, dtype=dtype), added=here)

    ways: list[Callable[[Tensor], None]] = [
        by_rows,
        lambda y_out: sum_inputs(
            NormedInputs(y=y, delta=delta, y_out=y_out, norm=own, added=here), kept, scratch, weight_DO, None, memory.room(8)
        ),
        lambda y_out: mlp_token(y, delta, y_out, memory.room(size, holds=start_D), own, weights, added=here),
        lambda y_out: mlp_by_gate(y, delta, y_out, memory.room(size, holds=start_D), own, weights, gate, added=here),
        lambda y_out: project_token(y, delta, own, weights.up_FD, None, memory.room(8), y_out_D=y_out, added=here),
    ]
    plain_D = joined_definition(start_D, delta_D, added)
    for way in ways:
        y_out = memory.room(size)
        way(y_out)
        memory.check()
        check_rule(y_out, plain_D, truth_D, FP32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("scale", "cap"), [(1.0, 3.0), (0.5, 0.0), (2.0, 1.5)])
def test_logits_are_scaled_and_capped(scale: float, cap: float, device: str) -> None:
    memory = Memory(device, FP32)
    start_BV = 4 * memory.normal(2, 1030)
    logits_BV = memory.room(2, 1030, holds=start_BV)
    finish_logits(logits_BV, scale=scale, cap=cap)
    memory.check()
    truth_BV = finish_logits_definition(start_BV.double(), scale=scale, cap=cap)
    check_rule(logits_BV, finish_logits_definition(start_BV, scale=scale, cap=cap), truth_BV, FP32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [FP16, FP32])
def test_a_scaled_embedding_is_rounded_as_the_models_own(dtype: torch.dtype, device: str) -> None:
    memory = Memory(device, dtype)
    table_VD, scale = memory.normal(11, 70), float(torch.tensor(11.3, dtype=dtype))
    y_BD, token_B = memory.room(2, 70), torch.tensor([3, 10], dtype=INT)
    embed_rows(memory.given(token_B), memory.given(token_B), memory.given(table_VD), None, 0, y_BD, memory.room(2, 70), scale=scale)
    memory.check()
    assert torch.equal(y_BD.cpu(), (table_VD[token_B] * torch.tensor(11.3, dtype=dtype)).float())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("rows", "size", "count", "dtype"), [(1, 16, 5, FP32), (2, 17, 1, FP16), (3, 250, 9, BF16), (5, 129, 7, FP32), (17, 96, 3, FP16)]
)
@pytest.mark.parametrize("int8", [True, False])
def test_project_rows(rows: int, size: int, count: int, dtype: torch.dtype, int8: bool, device: str) -> None:
    memory = Memory(device, dtype)
    side = side_of(memory, count, size)
    if not int8:
        side = replace(side, matrix=memory.normal(count, size, dtype=FP32))
    x_BD, out = memory.normal(rows, size), memory.room(rows, count)
    project_rows(Side(matrix=memory.given(side.matrix), scale=memory.given(side.scale), out=out), memory.given(x_BD))
    memory.check()
    truth_BR = torch.stack([side.scale.double() * (side.matrix.double() @ x_D.double()) for x_D in x_BD])
    check_rule(out, torch.stack([side_definition(x_D, side) for x_D in x_BD]), truth_BR, FP32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rows", "groups", "rank", "int8"), [(1, 3, 5, True), (2, 17, 16, False), (5, 5, 3, True), (3, 1, 17, False)])
def test_group_rows(rows: int, groups: int, rank: int, int8: bool, device: str) -> None:
    """Each row its own groups, a row that none of its scores lets through its best one; counts in a column of a matrix."""
    memory = Memory(device, seed=rows)
    matrix = memory.int8(groups, rank) if int8 else memory.normal(groups, rank)
    scale, bias, h_BP = memory.positive(groups) / (127 if int8 else 1), memory.normal(groups), memory.normal(rows, rank)
    score_BG = (h_BP @ matrix.float().T) * scale + bias
    threshold = torch.tensor([float(score_BG[0].amax()) + 1e-3])
    counts, listed = memory.room(rows, 3, dtype=INT), memory.room(rows, groups, dtype=INT)
    group_rows(
        GroupScores(
            matrix=memory.given(matrix), scale=memory.given(scale), bias=memory.given(bias), threshold=memory.given(threshold),
            h=memory.given(h_BP), groups=listed, count=counts[:, 1:2],
        )
    )  # fmt: skip
    memory.check()
    assert counts[:, [0, 2]].eq(CANARY).all()
    for row in range(rows):
        one = GroupScores(matrix=matrix, scale=scale, bias=bias, threshold=threshold, h=h_BP[row], groups=listed, count=counts)
        expected = selected_groups_definition(one).tolist()
        assert counts[row, 1].item() == len(expected) and listed[row].tolist() == expected + [CANARY] * (groups - len(expected))
    assert counts[0, 1].item() == 1, "the first row selects its best alone"


def attend_first_tokens(memory: Memory, rows: int, select: UnionScores) -> None:
    """Attention of rows without a past, each in a page of its own, with the selection beside it: each row's head gives its own value."""
    numbers, qkv_BW = torch.arange(rows, dtype=INT), memory.normal(rows, 24, dtype=FP32)
    k_pool, v_pool = (memory.room(rows, 1, 4, 8, holds=torch.zeros(rows, 1, 4, 8)) for _ in range(2))
    places = Places(slot_B=memory.given(numbers), position_B=memory.given(0 * numbers), table=memory.given(numbers.long()[:, None]))
    partials = Partials(mixed=memory.room(rows, 1, 1, 8), stats=memory.room(rows, 1, 1, 2))
    attend(memory.given(qkv_BW), k_pool, v_pool, places, partials, heads=1, select=select)
    found_BK = (partials.mixed / partials.stats[..., 1:])[:, 0, 0]
    torch.testing.assert_close(found_BK.cpu(), qkv_BW[:, 16:])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("rows", "neurons", "rank", "int8", "count", "padded"),
    [
        (1, 7, 5, True, 0, 0),
        (2, 64, 16, False, 1, 0),
        (3, 127, 17, True, 126, 1),
        (5, 300, 3, True, 60, 2),
        (32, 64, 5, False, 9, 0),
        (2, 300, 5, True, 300, 1),
        (1, 64, 5, True, 64, 1),
    ],
)
@pytest.mark.parametrize("beside", [False, True])
def test_select_rows(rows: int, neurons: int, rank: int, int8: bool, count: int, padded: int, beside: bool, device: str) -> None:
    """count: neurons that the first row selects. The last `padded` rows only fill the bucket: what they would select is not counted.
    beside: as further programs of attention."""
    memory = Memory(device, seed=rows)
    matrix = memory.int8(neurons, rank) if int8 else memory.normal(neurons, rank)
    scale, bias, h_BP = memory.positive(neurons) / (127 if int8 else 1), memory.normal(neurons), memory.normal(rows, rank)
    threshold = torch.tensor([midway((h_BP[0] @ matrix.float().T) * scale + bias, count)])
    slots = torch.arange(rows, dtype=INT)
    slots[rows - padded :] = 99
    counts, row_mask_F = memory.room(rows, 3, dtype=INT, holds=0.0), memory.room(neurons, dtype=INT)
    union_F, union = memory.room(neurons, dtype=INT), memory.room(1, dtype=INT, holds=0.0)
    plain = UnionScores(
        matrix=matrix, scale=scale, bias=bias, threshold=threshold, h=h_BP, slot_B=slots, padding=99, row_mask_F=row_mask_F, union=union_F,
        count=union, row_count=counts[:, 1:2],
    )  # fmt: skip
    given = replace(
        plain, matrix=memory.given(matrix), scale=memory.given(scale), bias=memory.given(bias), threshold=memory.given(threshold),
        h=memory.given(h_BP), slot_B=memory.given(slots),
    )  # fmt: skip
    if beside:
        attend_first_tokens(memory, rows, given)
    else:
        select_rows(given)
    memory.check()
    keep_BF = select_rows_definition(plain) & (slots != 99)[:, None]
    assert padded == rows or int(keep_BF[0].sum()) == count
    found_BF = (row_mask_F.cpu()[None] >> torch.arange(rows)[:, None]) & 1 == 1
    assert torch.equal(found_BF, keep_BF)
    assert counts.tolist() == [[0, int(kept.sum()), 0] for kept in keep_BF]
    expected = keep_BF.any(0).nonzero().squeeze(1).tolist()
    assert union.item() == len(expected) and sorted(union_F[: len(expected)].tolist()) == expected
    assert set(union_F[len(expected) :].tolist()) <= {CANARY}


@dataclass(frozen=True, kw_only=True)
class RowsCase:
    """union: neurons that some row selects."""

    rows: int
    size: int
    neurons: int
    union: int
    dtype: torch.dtype
    gated: bool = False
    biased: bool = True
    partial: bool = False
    activation: str = "relu"
    programs: int = 3
    early: bool = False


ROWS_CASES = [
    RowsCase(rows=1, size=16, neurons=7, union=0, dtype=FP32),
    RowsCase(rows=2, size=17, neurons=64, union=1, dtype=FP16, gated=True, biased=False),
    RowsCase(rows=3, size=96, neurons=127, union=126, dtype=FP16, partial=True),
    RowsCase(rows=3, size=129, neurons=127, union=126, dtype=BF16, partial=True),
    RowsCase(rows=5, size=129, neurons=300, union=300, dtype=FP32, gated=True),
    RowsCase(rows=5, size=250, neurons=64, union=31, dtype=FP16, partial=True, early=True),
    RowsCase(rows=17, size=300, neurons=127, union=60, dtype=FP16, gated=True, early=True),
    RowsCase(rows=16, size=300, neurons=127, union=60, dtype=BF16, gated=True),
    RowsCase(rows=32, size=17, neurons=64, union=64, dtype=FP32, biased=False),
    RowsCase(rows=2, size=250, neurons=7, union=0, dtype=BF16, partial=True),
    RowsCase(rows=3, size=129, neurons=64, union=33, dtype=FP32, gated=True, activation="silu", early=True),
    RowsCase(rows=2, size=96, neurons=64, union=17, dtype=FP16, activation="relu2", programs=1),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", ROWS_CASES, ids=str)
def test_mlp_rows(case: RowsCase, device: str) -> None:
    if device == "cpu" and case.dtype == BF16:
        pytest.skip("Triton's interpreter multiplies the bits of bf16 matrices as integers")
    memory, shape, spread = Memory(device, case.dtype), (case.neurons, case.size), 1 / case.size
    biased = case.biased
    weights = MlpWeights(
        up_FD=memory.positive(*shape, scale=spread),
        down_FD=memory.normal(*shape, scale=max(case.union, 1) ** -0.5),
        gate_FD=memory.positive(*shape, scale=spread) if case.gated else None,
        up_bias_F=memory.positive(case.neurons, scale=0.3) if biased else None,
        gate_bias_F=memory.positive(case.neurons, scale=0.3) if case.gated and biased else None,
        down_bias_D=memory.normal(case.size, scale=0.1) if biased else None,
        activation=case.activation,
    )
    x_BD = memory.positive(case.rows, case.size)
    union_A = memory.choice(case.neurons, case.union)
    keep_BF = torch.zeros(case.rows, case.neurons, dtype=torch.bool)
    keep_BF[:, union_A] = torch.rand(case.rows, case.union, generator=memory.generator) < 0.6
    keep_BF[0, union_A] = True
    bits_B = torch.tensor([1 << row for row in range(case.rows)])
    row_mask_F = (keep_BF * bits_B[:, None]).sum(0)
    row_mask_F = torch.where(row_mask_F >= 2**31, row_mask_F - 2**32, row_mask_F).int()  # the 32nd row has the sign
    unread = next((f for f in range(case.neurons) if f not in union_A.tolist()), 0)
    listed = torch.cat([union_A, torch.full((case.neurons - case.union,), unread)]).int()

    down_shape = DownShape(programs=case.programs)
    columns = max(16, 1 << (case.size - 1).bit_length())
    down_shape = replace(down_shape, columns=min(64, columns))
    shares = shares_of(case.size, down_shape, torch.device(device))
    start_BD = memory.normal(case.rows, case.size, dtype=FP32)
    out = memory.room(shares, case.rows, case.size) if case.partial else memory.room(case.rows, case.size, holds=start_BD)
    act_FB = memory.room(case.neurons, padded_rows(case.rows), dtype=case.dtype)
    mlp_rows(
        memory.given(x_BD), placed(poisoned_neurons(weights, union_A), memory), memory.given(row_mask_F), memory.given(listed),
        memory.given(torch.tensor([case.union], dtype=INT)), act_FB, out, up_shape=UpShape(columns=64, programs=2),
        down_shape=down_shape, partial=case.partial, early=case.early,
    )  # fmt: skip
    memory.check()
    truth_BD = mlp_rows_definition(x_BD.double(), converted(weights, torch.float64), keep_BF)
    found_BD: Tensor = out.double().sum(0) if case.partial else out.double().cpu() - start_BD.double()
    plain_BD = mlp_rows_definition(x_BD, weights, keep_BF)
    if not case.partial:  # what is added to fp32 sums that are there already is rounded as they are: plain torch's too
        plain_BD = (start_BD + plain_BD.float()).double() - start_BD.double()
    check_rule(found_BD, plain_BD, truth_BD, case.dtype, None if case.partial else start_BD)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("rows", "size", "dtype", "offset"), [(1, 16, FP32, None), (2, 17, FP16, 2), (3, 1030, BF16, 0), (5, 250, FP16, None)]
)
def test_embed_rows(rows: int, size: int, dtype: torch.dtype, offset: int | None, device: str) -> None:
    """offset: of the table of positions, None without one. Exact: a sum of two rows in fp32."""
    memory = Memory(device, dtype)
    table_VD, position_table = memory.normal(11, size), memory.normal(9 + (offset or 0), size)
    token_B, position_B = torch.arange(10, 10 - rows, -1), torch.arange(8, 8 - rows, -1)  # the last rows of both too
    y_BD, cleared_BD = memory.room(rows, size), memory.room(rows, size)
    embed_rows(
        memory.given(token_B.int()), memory.given(position_B.int()), memory.given(poisoned_rows(table_VD, token_B)),
        None if offset is None else memory.given(poisoned_rows(position_table, position_B + offset)), offset or 0, y_BD, cleared_BD,
    )  # fmt: skip
    memory.check()
    expected_BD = table_VD[token_B].float()
    if offset is not None:
        expected_BD = expected_BD + position_table[position_B + offset].float()
    assert torch.equal(y_BD.cpu(), expected_BD) and not cleared_BD.any()
