"""Places beyond 2^31 values from the start of a matrix or a pool: an index is widened before it is multiplied.

Such memory costs nothing on the CPU: pages that nobody touches do not exist. As much lies before it, where an offset that wraps around
lands: in zeros, not outside. Not here: matrices of a predictor, norms and sums, of which none can be that large.
"""

import mmap

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from dejavu.kernels.cuda import attention
from dejavu.kernels.cuda.attention import Partials, Places, attend, attention_definition, output_token
from dejavu.kernels.cuda.common import GridShape, NormWeights, launch, tile
from dejavu.kernels.cuda.embed import embed_rows
from dejavu.kernels.cuda.gate import GateNeurons, mlp_by_gate, mlp_by_gate_definition, mlp_given_definition
from dejavu.kernels.cuda.gate_rows import up_given_rows
from dejavu.kernels.cuda.inputs import ActivatedInputs, KeptInputs, SumShape, sum_inputs, sum_inputs_definition, sum_scratch
from dejavu.kernels.cuda.linear_rows import (
    activated_rows,
    activated_rows_definition,
    linear_rows,
    linear_rows_definition,
    linear_slices,
)
from dejavu.kernels.cuda.mlp import mlp_token, mlp_token_definition
from dejavu.kernels.cuda.mlp_rows import down_rows, mlp_rows, mlp_rows_definition, padded_rows
from dejavu.kernels.cuda.project import GroupScores, project_token, project_token_definition
from dejavu.kernels.cuda.read import read_buffer
from dejavu.kernels.sparse_mlp import MlpWeights
from helpers.cuda import DEVICES
from helpers.kernel_memory import check_rule
from helpers.kernels import FP16, FP32

MAP_NORESERVE = 0x4000  # of Linux; mmap has the name from Python 3.13 on
NORM = NormWeights(weight=None, bias=None, eps=1e-5, rms=True)


def far_memory(device: str, *shape: int, dtype: torch.dtype = FP16) -> Tensor:
    """Zeros of that shape, of more than 2^31 values, with as many before them."""
    count = torch.Size(shape).numel()
    assert count > 2**31
    if device != "cpu":
        return torch.zeros(2 * count, dtype=dtype, device=device)[count:].view(shape)
    try:
        pages = mmap.mmap(-1, 2 * count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    except OSError as error:
        pytest.skip(f"this machine does not lend so many addresses: {error}")
    return torch.frombuffer(pages, dtype=dtype)[count:].view(shape)


def normal(*shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = FP32) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


@triton.jit
def _tile(matrix, out, row, D: tl.constexpr):
    at = row + tl.arange(0, 1)
    value = tile(matrix, at, at >= 0, D, 0, 16)  # pyrefly: ignore[bad-argument-type]
    tl.store(out + tl.arange(0, 16)[None, :], value)


@pytest.mark.parametrize("device", DEVICES)
def test_a_tile_of_a_far_row(device: str) -> None:
    matrix = far_memory(device, 320, 7_864_320, dtype=torch.int8)
    assert 319 * 7_864_320 == 2_508_718_080 > 2**31
    matrix[319, :16] = torch.arange(1, 17)
    out = torch.zeros(16, dtype=torch.int8, device=device)
    _tile[(1,)](matrix, out, 319, D=7_864_320)  # pyrefly: ignore[bad-argument-type]
    assert out.tolist() == list(range(1, 17))


def far_mlp(device: str) -> tuple[MlpWeights, MlpWeights, Tensor]:
    """Weights whose last neuron is far; those of the two neurons that are not zero alone, on the CPU; where these are."""
    size, neurons = 4096, 2**31 // 4096 + 3
    matrix_FD, rows = far_memory(device, neurons, size), normal(2, size, dtype=FP16).abs() * size**-0.5
    idx_A = torch.tensor([2, neurons - 1])
    matrix_FD[idx_A] = rows.to(device)
    far = MlpWeights(up_FD=matrix_FD, down_FD=matrix_FD, gate_FD=matrix_FD)
    return far, MlpWeights(up_FD=rows, down_FD=rows, gate_FD=rows), idx_A


def wide(weights: MlpWeights) -> MlpWeights:
    rows = weights.up_FD.double()
    return MlpWeights(up_FD=rows, down_FD=rows, gate_FD=rows)


@pytest.mark.parametrize("device", DEVICES)
def test_neurons_of_one_token(device: str) -> None:
    far, near, idx_A = far_mlp(device)
    y_D, delta_D = normal(4096, seed=1), normal(4096, seed=2)
    out_D, both = torch.zeros(4096, device=device), torch.arange(2)
    mlp_token(
        y_D.to(device), delta_D.to(device), torch.empty(4096, device=device), out_D, NORM, far, idx_A.int().to(device),
        torch.tensor([2], dtype=torch.int32, device=device), shape=GridShape(rows=2, warps=8, programs=1),
    )  # fmt: skip
    truth_D = mlp_token_definition(y_D.double(), delta_D.double(), NORM, wide(near), both)
    check_rule(out_D, mlp_token_definition(y_D, delta_D, NORM, near, both), truth_D, FP16)


@pytest.mark.parametrize("device", DEVICES)
def test_neurons_of_several_rows(device: str) -> None:
    far, near, idx_A = far_mlp(device)
    x_BD, neurons = normal(2, 4096, seed=1, dtype=FP16).abs(), far.up_FD.shape[0]
    row_mask_F = torch.zeros(neurons, dtype=torch.int32, device=device)
    row_mask_F[idx_A] = torch.tensor([2, 3], dtype=torch.int32, device=device)
    keep_BF = torch.tensor([[False, True], [True, True]])
    out_BD = torch.zeros(2, 4096, device=device)
    act_FB = torch.empty(2, padded_rows(2), dtype=FP16, device=device)
    count = torch.tensor([2], dtype=torch.int32, device=device)
    mlp_rows(x_BD.to(device), far, row_mask_F, idx_A.int().to(device), count, act_FB, out_BD)
    check_rule(out_BD, mlp_rows_definition(x_BD, near, keep_BF), mlp_rows_definition(x_BD.double(), wide(near), keep_BF), FP16)


@pytest.mark.parametrize("device", DEVICES)
def test_neurons_of_several_rows_whose_gates_are_given(device: str) -> None:
    far, near, idx_A = far_mlp(device)
    x_BD, product_BA, neurons = normal(2, 4096, seed=1, dtype=FP16), normal(2, 2, seed=2, dtype=FP16).abs(), far.up_FD.shape[0]
    product_BF, row_mask_F = torch.zeros(2, neurons, dtype=FP16, device=device), torch.zeros(neurons, dtype=torch.int32, device=device)
    product_BF[:, idx_A], row_mask_F[idx_A] = product_BA.to(device), torch.tensor([2, 3], dtype=torch.int32, device=device)
    keep_BA, count = torch.tensor([[False, True], [True, True]]), torch.tensor([2], dtype=torch.int32, device=device)
    act_FB, out_BD, listed = torch.empty(2, padded_rows(2), dtype=FP16, device=device), torch.zeros(2, 4096, device=device), idx_A.int()
    up_given_rows(x_BD.to(device), product_BF, far, row_mask_F, listed.to(device), count, act_FB)
    down_rows(act_FB, far, listed.to(device), count, out_BD)
    truth_BD = mlp_given_definition(x_BD.double(), wide(near), product_BA.double(), keep_BA)
    check_rule(out_BD, mlp_given_definition(x_BD, near, product_BA, keep_BA), truth_BD, FP16)


def last_neurons(device: str) -> tuple[MlpWeights, MlpWeights, Tensor]:
    """As far_mlp where all neurons are read, which takes a GPU; few on the CPU, so that what is tested there runs."""
    if device != "cpu":
        return far_mlp(device)
    rows, idx_A = normal(2, 64, dtype=FP16).abs() / 8, torch.tensor([2, 37])
    matrix_FD = torch.zeros(38, 64, dtype=FP16)
    matrix_FD[idx_A] = rows
    return MlpWeights(up_FD=matrix_FD, down_FD=matrix_FD, gate_FD=matrix_FD), MlpWeights(up_FD=rows, down_FD=rows, gate_FD=rows), idx_A


@pytest.mark.parametrize("device", DEVICES)
def test_neurons_that_their_own_gate_selects(device: str) -> None:
    far, near, idx_A = last_neurons(device)
    neurons, size = far.up_FD.shape
    y_D, delta_D = normal(size, seed=1).abs(), normal(size, seed=2).abs()
    out_D, marks_F = torch.zeros(size, device=device), torch.zeros(neurons, dtype=torch.int32, device=device)
    gate = GateNeurons(threshold=torch.zeros(1, device=device), marks=marks_F, count=torch.zeros(1, dtype=torch.int32, device=device))
    mlp_by_gate(
        y_D.to(device), delta_D.to(device), torch.empty(size, device=device), out_D, NORM, far, gate,
        shape=GridShape(rows=2, warps=8, programs=1),
    )  # fmt: skip
    assert gate.count.item() == 2 and torch.equal(marks_F.nonzero().squeeze(1).cpu(), idx_A)
    truth_D, keep_A = mlp_by_gate_definition(y_D.double(), delta_D.double(), NORM, wide(near), 0.0)
    assert keep_A.all()
    check_rule(out_D, mlp_by_gate_definition(y_D, delta_D, NORM, near, 0.0)[0], truth_D, FP16)


@pytest.mark.parametrize("device", DEVICES)
def test_outputs_of_several_rows(device: str) -> None:
    """Of a matrix with a row per output, alone and as a gate and up."""
    far, near, idx_A = last_neurons(device)
    neurons, size = far.up_FD.shape
    x_BD = normal(2, size, seed=1, dtype=FP16).abs()
    out_BF = torch.empty(2, neurons, device=device)
    linear_rows(x_BD.to(device), far.up_FD, None, out_BF)
    check_rule(out_BF[:, idx_A], linear_rows_definition(x_BD, near.up_FD, None), x_BD.double() @ near.up_FD.double().T, FP16)
    assert out_BF.count_nonzero() == 4
    act_BF = torch.empty(2, neurons, dtype=FP16, device=device)
    activated_rows(x_BD.to(device), far, act_BF)
    check_rule(act_BF[:, idx_A], activated_rows_definition(x_BD, near), activated_rows_definition(x_BD.double(), wide(near)), FP16)
    assert act_BF.count_nonzero() == 4


@pytest.mark.parametrize("device", DEVICES)
def test_inputs_of_several_rows(device: str) -> None:
    """Of a matrix with a row per input, whose sums are left in parts."""
    far, near, idx_A = last_neurons(device)
    neurons, size = far.down_FD.shape
    act_BF, act_BA = torch.zeros(2, neurons, dtype=FP16, device=device), normal(2, 2, seed=1, dtype=FP16)
    act_BF[:, idx_A] = act_BA.to(device)
    out_SBD = torch.empty(linear_slices(far.down_FD.T), 2, size, device=device)
    linear_rows(act_BF, far.down_FD.T, None, out_SBD)
    check_rule(out_SBD.sum(0), act_BA @ near.down_FD, act_BA.double() @ near.down_FD.double(), FP16)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_inputs(device: str) -> None:
    inputs, outputs = 2**31 // 4096 + 3, 4096
    weight_IO, rows, x_A = far_memory(device, inputs, outputs), normal(2, outputs, dtype=FP16), normal(2, seed=1, dtype=FP16).abs()
    idx_A, sums_I, out_O = torch.tensor([2, inputs - 1]), torch.zeros(inputs, device=device), torch.zeros(outputs, device=device)
    weight_IO[idx_A], sums_I[idx_A], shape = rows.to(device), x_A.float().to(device), SumShape(rows=4, columns=1024, warps=4, programs=8)
    listed, room = torch.zeros(2, inputs, dtype=torch.int32, device=device), sum_scratch(inputs, outputs, torch.device(device), shape)
    kept = KeptInputs(
        norm=torch.ones(inputs, device=device), threshold=torch.zeros(1, device=device), inputs=listed[0], count=listed[1, :1]
    )
    scratch = torch.zeros(room, dtype=torch.int32, device=device), torch.zeros(room, device=device)
    x = ActivatedInputs(sums=sums_I, activation="relu", activation_threshold=0.0, gated=False)
    sum_inputs(x, kept, scratch, weight_IO, None, out_O, shape=shape)
    assert kept.count.item() == 2
    both = torch.ones(2, dtype=torch.bool)
    truth_O = sum_inputs_definition(x_A.double(), both, rows.double(), None)
    check_rule(out_O, sum_inputs_definition(x_A, both, rows, None), truth_O, FP16)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_queries_keys_and_values(device: str) -> None:
    """On the CPU only two of many head groups are computed; a GPU computes every row."""
    size, groups = (65536, 8208) if device == "cpu" else (4096, 131136)
    queries, rows = 4 * groups, 4 * groups + 4
    matrix, selected = far_memory(device, rows, size), torch.tensor([*range(20, 24), *range(queries - 4, rows)])
    values = normal(len(selected), size, dtype=FP16) * size**-0.5
    matrix[selected] = values.to(device)
    y_D, delta_D, out = normal(size, seed=1), normal(size, seed=2), torch.zeros(rows, device=device)
    scores = None
    if device == "cpu":
        matrix_GP = torch.zeros(groups, 1)
        matrix_GP[[5, groups - 1]] = 1
        scores = GroupScores(
            matrix=matrix_GP, scale=torch.ones(groups), bias=torch.zeros(groups), threshold=torch.tensor([0.5]), h=torch.ones(1),
            groups=torch.zeros(groups, dtype=torch.int32), count=torch.zeros(1, dtype=torch.int32),
        )  # fmt: skip
    project_token(
        y_D.to(device), delta_D.to(device), NORM, matrix, None, out, queries=queries, num_groups=groups, scores=scores,
        shape=GridShape(rows=4, warps=4, programs=2),
    )  # fmt: skip
    truth = project_token_definition(y_D.double(), delta_D.double(), NORM, values.double(), None)
    check_rule(out.cpu()[selected], project_token_definition(y_D, delta_D, NORM, values, None), truth, FP16)
    assert out.count_nonzero() == len(selected)


@pytest.mark.parametrize("device", DEVICES)
def test_pages_of_the_cache(device: str) -> None:
    """A new key and value go to a far page and are attended to from there."""
    groups, page, head_dim = 2, 16, 64
    pages = 2**31 // (groups * page * head_dim) + 3
    pools = [far_memory(device, pages, groups, page, head_dim) for _ in range(2)]
    near = [normal(2, groups, page, head_dim, seed=seed, dtype=FP16) for seed in (1, 2)]
    for pool, values in zip(pools, near, strict=True):
        pool[[3, pages - 1]] = values.to(device)
    qkv_BW = normal(1, 3 * groups * head_dim, seed=3, dtype=FP16)
    partials = Partials(mixed=torch.empty(1, groups, 2, head_dim, device=device), stats=torch.empty(1, groups, 2, 2, device=device))
    places = Places(
        slot_B=torch.zeros(1, dtype=torch.int32, device=device), position_B=torch.full((1,), 20, dtype=torch.int32, device=device),
        table=torch.tensor([[3, pages - 1]], device=device),
    )  # fmt: skip
    attend(qkv_BW.to(device), pools[0], pools[1], places, partials, heads=groups)
    q_HK, k_GK, v_GK = qkv_BW.view(3, groups, head_dim)
    for pool, values, new_GK in zip(pools, near, (k_GK, v_GK), strict=True):
        assert torch.equal(pool[pages - 1, :, 4].cpu(), new_GK)
        values[1, :, 4] = new_GK

    weight_QD, out_D = normal(groups * head_dim, 33, seed=4, dtype=FP16), torch.zeros(33, device=device)
    output_token(partials, weight_QD.to(device), None, out_D, num_groups=groups)
    found = []
    for kind in (FP16, torch.float64):
        keys, values = near[0].to(kind), near[1].to(kind)
        found.append(attention_definition(q_HK.to(kind), keys, values, torch.arange(2), 21, weight_QD.to(kind), None, None))
    check_rule(out_D, found[0], found[1], FP16)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_the_output_of_heads(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU only the first columns of the only selected head, which is the last one."""
    size, heads, head_dim, columns = 131072, 260, 64, 128
    weight_QD, values = far_memory(device, heads * head_dim, size), normal(head_dim, size, dtype=FP16)
    weight_QD[-head_dim:] = values.to(device)
    mixed, stats = torch.zeros(1, heads, 1, head_dim, device=device), torch.zeros(1, heads, 1, 2, device=device)
    m_K = normal(head_dim, seed=1)
    mixed[0, -1, 0], stats[0, -1, 0, 1] = m_K.to(device), 1.0
    listed = torch.full((heads,), heads - 1, dtype=torch.int32, device=device)
    out_D = torch.zeros(size, device=device)
    if device == "cpu":
        monkeypatch.setattr(attention, "launch", lambda kernel, grid, *given, **named: launch(kernel, (1, 1), *given, **named))
    output_token(
        Partials(mixed=mixed, stats=stats), weight_QD, None, out_D, num_groups=heads, groups_G=listed,
        count=torch.tensor([1], dtype=torch.int32, device=device), columns=columns,
    )  # fmt: skip
    computed = slice(columns if device == "cpu" else size)
    check_rule(out_D[computed], (m_K.to(FP16) @ values)[computed], (m_K.double() @ values.double())[computed], FP16)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_embeddings(device: str) -> None:
    rows, size = 2**31 // 4096 + 3, 4096
    table_VD, values = far_memory(device, rows, size), normal(2, size, dtype=FP16)
    table_VD[[rows - 1, rows - 2]] = values.to(device)
    y_BD, cleared_BD = torch.empty(1, size, device=device), torch.empty(1, size, device=device)
    token_B, position_B = (torch.tensor([index], dtype=torch.int32, device=device) for index in (rows - 1, rows - 4))
    embed_rows(token_B, position_B, table_VD, table_VD, 2, y_BD, cleared_BD)
    assert torch.equal(y_BD[0].cpu(), values[0].float() + values[1].float())


@pytest.mark.gpu
@pytest.mark.parametrize("words", [2**31 - 1000, 2**31 + 5000])
def test_read_of_a_far_buffer(words: int) -> None:
    """The last word is read, and a step of the loop beyond it ends the loop."""
    buffer = torch.zeros(words, dtype=torch.int32, device="cuda")
    buffer[::10_000_000] = 3
    buffer[-1] = 5
    assert int(read_buffer(buffer).long().sum()) == 3 * -(-words // 10_000_000) + 5
