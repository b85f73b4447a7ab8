"""The kernels of selection by inputs, against their definitions: on the CPU under Triton's interpreter, on a GPU with -m gpu.

As test_cuda_kernels.py: rows of inputs that are left out are NaN, and so is the memory around everything that is read.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dejavu.kernels.cuda.attention import Partials
from dejavu.kernels.cuda.common import BlockOutput, joined_definition, norm_definition
from dejavu.kernels.cuda.inputs import (
    ActivatedInputs,
    HeadInputs,
    KeptInputs,
    NormedInputs,
    SumShape,
    activated_definition,
    kept_definition,
    mask_rows,
    mask_rows_bytes,
    sum_inputs,
    sum_inputs_bytes,
    sum_inputs_definition,
    sum_scratch,
    sum_slices,
)
from helpers.cuda import DEVICES
from helpers.kernel_memory import CANARY, Memory, check_rule, midway, poisoned_rows
from helpers.kernels import BF16, FP16, FP32, converted, norm_of, placed

INT = torch.int32


@dataclass(frozen=True, kw_only=True)
class SumCase:
    """inputs kept of a matrix of so many. source: what x is made of; splits, gated, rms, affine, out_norm: of those that have it."""

    source: str
    inputs: int
    outputs: int
    count: int
    dtype: torch.dtype
    biased: bool = True
    partial: bool = False
    rows: int = 4
    columns: int = 32
    programs: int = 3
    splits: int = 2
    head_dim: int = 1
    activation: str = "silu"
    gated: bool = True
    rms: bool = True
    affine: bool = True
    out_norm: bool = False
    cleared: int = 0


CASES = [
    SumCase(source="normed", inputs=16, outputs=17, count=0, dtype=FP32),
    SumCase(source="normed", inputs=17, outputs=16, count=17, dtype=FP16, rms=False, partial=True),
    SumCase(source="normed", inputs=250, outputs=300, count=100, dtype=BF16, affine=False, cleared=77, programs=41),
    SumCase(source="normed", inputs=129, outputs=70, count=1, dtype=FP32, rms=False, affine=False, biased=False, programs=9, cleared=3000),
    SumCase(source="normed", inputs=300, outputs=40, count=150, dtype=FP16, out_norm=True, rows=16, columns=16),
    SumCase(source="heads", inputs=16, outputs=24, count=0, dtype=FP32, head_dim=16, splits=1),
    SumCase(source="heads", inputs=18, outputs=130, count=18, dtype=FP16, head_dim=6, splits=4, partial=True, programs=30),
    SumCase(source="heads", inputs=100, outputs=33, count=50, dtype=BF16, head_dim=20, splits=8, programs=7, cleared=40),
    SumCase(source="heads", inputs=256, outputs=250, count=17, dtype=FP32, head_dim=128, biased=False, rows=8, columns=64),
    SumCase(source="activated", inputs=7, outputs=16, count=0, dtype=FP32),
    SumCase(source="activated", inputs=256, outputs=18, count=255, dtype=FP16, gated=False, activation="gelu", biased=False, programs=20),
    SumCase(source="activated", inputs=300, outputs=129, count=100, dtype=BF16, activation="relu", partial=True, programs=11),
    SumCase(source="activated", inputs=515, outputs=64, count=200, dtype=FP32, activation="gelu_tanh", cleared=1030),
    SumCase(source="activated", inputs=64, outputs=250, count=20, dtype=FP16, gated=False, activation="fatrelu"),
]


def source_of(case: SumCase, memory: Memory) -> tuple[NormedInputs | HeadInputs | ActivatedInputs, Tensor, Tensor]:
    """What x is made of, x in plain torch in the dtype of the weights, and in fp64."""
    if case.source == "normed":
        norm = norm_of(memory, case.inputs, rms=case.rms, affine=case.affine)
        y_D, delta_D = (memory.normal(case.inputs, dtype=FP32) for _ in range(2))
        added = BlockOutput(weight=memory.normal(case.inputs), eps=1e-3, scale=0.7) if case.out_norm else BlockOutput(scale=1.2)
        exact = replace(added, weight=None if added.weight is None else added.weight.double())
        plain = norm_definition(joined_definition(y_D, delta_D, added).to(case.dtype), norm)
        truth = norm_definition(joined_definition(y_D.double(), delta_D.double(), exact), converted(norm, torch.float64))
        given = NormedInputs(
            y=memory.given(y_D), delta=memory.given(delta_D), y_out=memory.room(case.inputs), norm=placed(norm, memory),
            added=replace(added, weight=None if added.weight is None else memory.given(added.weight)),
        )  # fmt: skip
        return given, plain, truth
    if case.source == "heads":
        heads = case.inputs // case.head_dim
        mixed, top = memory.normal(1, heads, case.splits, case.head_dim, dtype=FP32), memory.normal(1, heads, case.splits, dtype=FP32)
        total = memory.normal(1, heads, case.splits, dtype=FP32).abs() + 1
        weight = (top.double() - top.double().amax(-1, keepdim=True)).exp()
        truth = ((mixed.double() * weight[..., None]).sum(2) / (total.double() * weight).sum(2)[..., None]).flatten()
        return HeadInputs(partials=Partials(mixed=memory.given(mixed), stats=memory.given(torch.stack([top, total], -1)))), truth, truth
    sums_O = memory.normal(case.inputs * (2 if case.gated else 1), dtype=FP32)
    if case.activation in ("relu", "fatrelu"):
        sums_O = sums_O.abs() + 0.3
    truth = activated_definition(sums_O.double(), case.activation, 0.2, gated=case.gated)
    given = ActivatedInputs(sums=memory.given(sums_O), activation=case.activation, activation_threshold=0.2, gated=case.gated)
    return given, activated_definition(sums_O, case.activation, 0.2, gated=case.gated), truth


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sum_inputs(case: SumCase, device: str) -> None:
    """Rows of the matrix that are left out are NaN. What is kept is what the definition keeps of an x that is as exact as plain torch's:
    the threshold lies between two values that rounding does not swap."""
    memory, place = Memory(device, case.dtype, seed=case.inputs), torch.device(device)
    x, plain_I, truth_I = source_of(case, memory)
    norm_I = memory.positive(case.inputs).float() + 0.1
    threshold = midway(truth_I.to(case.dtype).float().abs() * norm_I, case.count)
    keep_I = kept_definition(truth_I.to(case.dtype), norm_I, threshold)
    idx_A = keep_I.nonzero().squeeze(1)
    assert abs(len(idx_A) - case.count) <= 1
    weight_IO = memory.normal(case.inputs, case.outputs, scale=max(case.count, 1) ** -0.5)
    bias_O = memory.normal(case.outputs) if case.biased else None
    shape = SumShape(rows=case.rows, columns=case.columns, warps=4, programs=case.programs)
    slices, listed = (found(case.inputs, case.outputs, place, shape) for found in (sum_slices, sum_scratch))
    kept = KeptInputs(
        norm=memory.given(norm_I), threshold=memory.given(torch.tensor([threshold])), inputs=memory.room(case.inputs, dtype=INT),
        count=memory.room(1, dtype=INT, holds=0.0),
    )  # fmt: skip
    start_O, cleared = memory.normal(case.outputs, dtype=FP32), memory.room(case.cleared)
    out = memory.room(slices, case.outputs) if case.partial else memory.room(case.outputs, holds=start_O)
    sum_inputs(
        x, kept, (memory.room(listed, dtype=INT), memory.room(listed)), memory.given(poisoned_rows(weight_IO, idx_A)),
        None if bias_O is None else memory.given(bias_O), out, cleared=cleared if case.cleared else None, shape=shape, partial=case.partial,
    )  # fmt: skip
    memory.check()
    found = kept.inputs.tolist()
    assert kept.count.item() == len(idx_A) and sorted(found[: len(idx_A)]) == idx_A.tolist() and set(found[len(idx_A) :]) <= {CANARY}
    assert not cleared.any()
    if isinstance(x, NormedInputs) and not case.out_norm:
        torch.testing.assert_close(x.y_out, x.y + x.delta * x.added.scale, rtol=1e-6, atol=1e-6)
    truth_O = sum_inputs_definition(truth_I, keep_I, weight_IO.double(), None if bias_O is None else bias_O.double())
    plain_O = sum_inputs_definition(plain_I.to(case.dtype), keep_I, weight_IO, bias_O)
    check_rule(out.double().sum(0) if case.partial else out.double().cpu() - start_O.double(), plain_O, truth_O, case.dtype)


@pytest.mark.parametrize("device", DEVICES)
def test_a_value_that_is_no_number_is_kept(device: str) -> None:
    memory = Memory(device)
    sums_F = memory.normal(20)
    sums_F[7] = torch.nan
    kept = KeptInputs(
        norm=memory.given(torch.ones(20)), threshold=memory.given(torch.tensor([1e9])), inputs=memory.room(20, dtype=INT),
        count=memory.room(1, dtype=INT, holds=0.0),
    )  # fmt: skip
    listed = sum_scratch(20, 16, torch.device(device))
    out = memory.room(16, holds=0.0)
    x = ActivatedInputs(sums=memory.given(sums_F), activation="relu", activation_threshold=0.0, gated=False)
    sum_inputs(x, kept, (memory.room(listed, dtype=INT), memory.room(listed)), memory.given(memory.normal(20, 16)), None, out)
    memory.check()
    assert kept.count.item() == 1 and kept.inputs[0].item() == 7 and out.isnan().all()


@pytest.mark.parametrize("device", DEVICES)
def test_a_sum_of_several_slices(device: str) -> None:
    """Each the sum of its own part of the inputs, in order."""
    shape = SumShape(rows=4, columns=16, warps=4, programs=5)
    slices = sum_slices(100, 16, torch.device(device), shape)
    assert slices >= 5
    memory = Memory(device)
    weight_IO, x_I = memory.normal(100, 16), memory.normal(100).abs()
    kept = KeptInputs(
        norm=memory.given(torch.ones(100)), threshold=memory.given(torch.tensor([0.2])), inputs=memory.room(100, dtype=INT),
        count=memory.room(1, dtype=INT, holds=0.0),
    )  # fmt: skip
    listed, out_SO = sum_scratch(100, 16, torch.device(device), shape), memory.room(slices, 16)
    x = ActivatedInputs(sums=memory.given(x_I), activation="relu", activation_threshold=0.0, gated=False)
    scratch = memory.room(listed, dtype=INT), memory.room(listed)
    sum_inputs(x, kept, scratch, memory.given(weight_IO), None, out_SO, shape=shape, partial=True)
    memory.check()
    x_I = torch.where(x_I > 0.2, x_I, 0)
    for at, (lo, hi) in enumerate(itertools.pairwise(100 * at // slices for at in range(slices + 1))):
        torch.testing.assert_close(out_SO[at].cpu(), x_I[lo:hi] @ weight_IO[lo:hi], rtol=1e-5, atol=1e-5)


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
    read = weight_IO.nbytes + x_I.nbytes + norm_I.nbytes + list_I.nbytes + out_O.nbytes
    assert sum_inputs_bytes(weight_IO, None, 40) == read and sum_inputs_bytes(weight_IO, bias_O, 40) == read + bias_O.nbytes
    assert mask_rows_bytes(torch.empty(3, 40, dtype=FP16)) == 6 * x_I.nbytes + norm_I.nbytes
