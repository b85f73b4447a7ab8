"""A quantised matrix: packing loses nothing, its values are those of the plain definitions, rows are rows of the whole, models share."""

from __future__ import annotations

import copy
import dataclasses
import gc
import mmap
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from conftest import Tiny
from dejavu.kernels import quantized
from dejavu.kernels.memory import give_back_freed, give_back_pages, mapped_file, take_pages
from dejavu.kernels.quantize import quantize_groups, rounded
from dejavu.kernels.quantized import (
    BLOCKS,
    SCALES_AT,
    QuantizedMatrix,
    Stacked,
    all_rounded_to,
    gguf_block,
    joined,
    linear,
    linear_by_input,
    packed_nibbles,
    rounded_by_output,
    rounded_to,
    stacked,
    unpacked_nibbles,
    wide,
)
from dejavu.model.masked import MaskedSelection
from helpers.matrices import random_blocks, random_matrix, scale_type

GRIDS = ("int8", "int4", "bf16")
GGUF_GRIDS = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "bf16")
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


@given(rows=st.integers(1, 9), columns=st.integers(1, 131), seed=st.integers(0, 99))
def test_packing_loses_nothing(rows: int, columns: int, seed: int) -> None:
    q, _ = quantize_groups(random_matrix(rows, columns, seed))
    packed = packed_nibbles(q)
    assert packed.shape == (rows, -(-columns // 2)) and packed.dtype == torch.uint8
    assert torch.equal(unpacked_nibbles(packed, columns), q)


@given(rows=st.integers(1, 9), columns=st.integers(1, 131), seed=st.integers(0, 99), grid=st.sampled_from(GRIDS), data=st.data())
def test_values_are_those_of_the_definition(rows: int, columns: int, seed: int, grid: str, data: st.DataObject) -> None:
    matrix = random_matrix(rows, columns, seed)
    held, expected = QuantizedMatrix.of(matrix, grid), rounded(matrix, grid)
    assert held.shape == (rows, columns) and held.numel() == matrix.numel()
    assert torch.equal(held.dequantize(), expected)
    again = rounded_to(held.dequantize(), grid)
    assert isinstance(again, QuantizedMatrix) and all(map(torch.equal, again.tensors, held.tensors)), "quantising again changes nothing"
    start = data.draw(st.integers(0, rows - 1))
    some, chosen = slice(start, data.draw(st.integers(start + 1, rows))), torch.tensor([rows - 1, 0])
    assert torch.equal(held.dequantize(some), expected[some]) and torch.equal(held.rows(some).dequantize(), expected[some])
    assert torch.equal(held.dequantize(chosen), expected[chosen])
    assert torch.equal(wide(stacked([held, held.rows(some)])), torch.cat([expected, expected[some]]))


@pytest.mark.parametrize("grid", BLOCKS)
def test_rounding_to_blocks_is_that_of_the_package_and_changes_nothing_twice(grid: str) -> None:
    matrix = random_matrix(12, 96, 4)
    held, kind = QuantizedMatrix.of(matrix, grid), gguf.GGMLQuantizationType[grid.upper()]
    assert np.array_equal(held.values.numpy(), gguf.quants.quantize(matrix.numpy(), kind)) and rounded_to(held, grid) is held
    by_output = rounded_by_output(matrix.T, grid)  # [inputs, outputs]: blocks lie along the inputs
    assert isinstance(by_output, QuantizedMatrix) and by_output.transposed and torch.equal(by_output.values, held.values)
    again = rounded_to(held.dequantize(), grid)
    assert torch.equal(wide(again), held.dequantize()), "quantising again changes no value"
    with pytest.raises(ValueError, match=f"rows of 33 values are not cut into the blocks of 32 that {grid} has; choose int8 or int4"):
        QuantizedMatrix.of(random_matrix(2, 33, 0), grid)


@pytest.mark.parametrize("grid", GGUF_GRIDS)
def test_a_gguf_grid_is_read_as_its_package_reads_it(grid: str) -> None:
    kind = gguf.GGMLQuantizationType[grid.upper()]
    raw = gguf.quants.quantize(np.random.default_rng(0).normal(size=(12, 96)).astype(np.float32), kind)
    expected = torch.from_numpy(gguf.quants.dequantize(raw, kind))
    values = torch.from_numpy(raw)
    held = QuantizedMatrix(grid, values.view(torch.bfloat16) if grid == "bf16" else values, None, 96)
    assert torch.equal(held.dequantize(), expected) and torch.equal(held.dequantize(slice(3, 7)), expected[3:7])
    turned = dataclasses.replace(held, transposed=True)
    assert turned.shape == (96, 12) and torch.equal(turned.dequantize(torch.tensor([5, 90])), expected.T[[5, 90]])


@pytest.mark.parametrize("grid", ["q4_0", "q4_1", "q8_0", "q4_k", "q5_k", "q6_k"])
def test_any_bits_of_a_block_are_read_as_the_package_reads_them(grid: str) -> None:
    held = random_blocks(grid, 3, 1024)
    expected = gguf.quants.dequantize(held.values.numpy(), gguf.GGMLQuantizationType[grid.upper()])
    assert np.array_equal(held.dequantize().numpy(), expected)


@pytest.mark.parametrize(
    "grid", ["int8", "int4", "fp16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q4_k", "q6_k", "iq4_nl", "w4_fp16", "w8_bf16"]
)
def test_single_values_and_damage_are_found_without_dequantising_all(grid: str) -> None:
    """Rows in another order, the transpose, values at places: all those of the whole matrix; one bad scale or value makes it not finite."""
    columns, order = 512, torch.tensor([6, 0, 5, 1, 4])
    matrix = random_matrix(7, columns, 3)
    held = QuantizedMatrix.of(matrix, grid) if grid in ("int8", "int4", "fp16", "bf16") else random_blocks(grid, 7, columns)
    expected = held.dequantize()
    turned = dataclasses.replace(held, order=order)
    assert turned.shape == (5, columns) and torch.equal(turned.dequantize(), expected[order])
    assert torch.equal(turned.rows(slice(1, 3)).dequantize(), expected[order[1:3]])
    assert torch.equal(turned.in_order().dequantize(), expected[order])
    row_N, column_N = torch.tensor([0, 4, 2, 2]), torch.tensor([0, columns - 1, 33, 300])
    assert torch.equal(turned.at(row_N, column_N), expected[order][row_N, column_N])
    assert torch.equal(turned.swapped().at(column_N, row_N), expected[order][row_N, column_N])
    assert torch.equal(turned.swapped().dequantize(), expected[order].T)
    assert held.is_finite()
    broken = [tensor.clone() for tensor in held.tensors]
    _break_last_value(grid, broken)
    damaged = dataclasses.replace(held, values=broken[0], scales=broken[1] if len(broken) > 1 else None)
    assert not damaged.dequantize().isfinite().all() and not damaged.is_finite()


def _break_last_value(grid: str, tensors: list[torch.Tensor]) -> None:
    """Make the last value of the last row, or the scale that it is a multiple of, infinite."""
    if grid in ("int8", "int4", "fp16", "bf16"):
        tensors[-1].view(-1)[-1] = torch.inf
        return
    at = tensors[0].shape[1] - gguf_block(grid)[1] + SCALES_AT.get(grid, (0, 2))[0]
    tensors[0][-1, at : at + 2] = torch.tensor([torch.inf], dtype=scale_type(grid)).view(torch.uint8)


@pytest.mark.parametrize("mixed", [False, True])
def test_matrices_one_below_the_other_are_read_as_one(mixed: bool) -> None:
    parts = [
        random_blocks("q4_k", 6, 256),
        random_blocks("q6_k" if mixed else "q4_k", 4, 256),
        QuantizedMatrix.of(random_matrix(4, 256, 1), "fp16"),
    ]
    joint = joined(parts)
    assert isinstance(joint, Stacked) and joint.shape == (14, 256) and joint.numel() == 14 * 256
    expected, x, bias = torch.cat([part.dequantize() for part in parts]), random_matrix(3, 256, 2), random_matrix(1, 14, 3)[0]
    assert torch.equal(wide(joint), expected) and joint.rows(slice(6, 10)).shape == (4, 256)
    torch.testing.assert_close(linear(x, joint, bias), F.linear(x, expected, bias))
    rounded_again = all_rounded_to(joint, "bf16")
    assert isinstance(rounded_again, Stacked) and torch.equal(wide(rounded_again), expected.bfloat16().float())
    assert all_rounded_to(joint, "stored") is joint and all_rounded_to(rounded_again, "bf16") is rounded_again


@pytest.mark.parametrize("grid", ["fp16", "q4_k"])
def test_a_product_by_input_reads_what_is_stored_by_output(grid: str) -> None:
    stored = QuantizedMatrix.of(random_matrix(48, 256, 5), grid) if grid == "fp16" else random_blocks(grid, 48, 256)
    x, bias = random_matrix(3, 256, 6), random_matrix(1, 48, 7)[0]
    for held in (stored.swapped(), stored.swapped().dequantize()):
        expected = x.double() @ stored.dequantize().double().T + bias
        torch.testing.assert_close(linear_by_input(x, held, bias).double(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.skipif(sys.platform != "linux", reason="counts pages by /proc")
def test_pages_of_a_mapped_file_go_and_come_again(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(range(256)) * (1 << 15))  # 8 MiB
    data = mapped_file(tmp_path / "file")
    expected = bytes(range(256)) * 16
    total = int(data.long().sum())
    before = _resident()
    other = torch.ones(4 << 20, dtype=torch.uint8)
    give_back_pages(other)
    assert int(other.sum()) == 4 << 20, "memory that no file is behind stays"
    give_back_pages(data[4096:-4096])
    after = _resident()
    assert before - after > 3 << 20, "of 8 MiB read, and 4 of another tensor that came since"
    take_pages(data)
    take_pages(other)
    assert _resident() - after > 6 << 20, "they are there before anybody reads them"
    assert int(data.long().sum()) == total and bytes(data[8192 : 8192 + 4096].tolist()) == expected


def _resident() -> int:
    """Bytes of this process's pages in memory."""
    gc.collect()
    give_back_freed()
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.parametrize("grid", GRIDS)
def test_a_product_takes_a_block_of_rows_at_a_time(grid: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "BLOCK", 320)
    held, x, bias = QuantizedMatrix.of(random_matrix(37, 32, 1), grid), random_matrix(3, 32, 2), random_matrix(1, 37, 3)[0]
    largest, whole = [], QuantizedMatrix.dequantize
    monkeypatch.setattr(QuantizedMatrix, "dequantize", lambda self, rows=None: largest.append(len(found := whole(self, rows))) or found)
    torch.testing.assert_close(linear(x, held, bias), F.linear(x, whole(held), bias))
    assert largest == [8, 8, 8, 8, 5]


@pytest.mark.parametrize("family", ["opt", "llama"])
@pytest.mark.parametrize("dtype", GRIDS)
def test_a_rounded_model_computes_with_rounded_values_and_leaves_the_other_alone(tiny: Tiny, family: str, dtype: str) -> None:
    model, plain = tiny(family), tiny(family)
    made = model.rounded(dtype, cache_dtype="int8")
    assert all(map(torch.equal, model.parameters(), plain.parameters())) and model.blocks[0].cache_dtype is None
    assert made.blocks[0].norm1.weight is model.blocks[0].norm1.weight and made.num_parameters == model.num_parameters
    if model.position is not None:
        assert made.position is not None and made.position.weight is model.position.weight
    with torch.no_grad():
        for name, values in plain.named_weights():
            if values.dim() == 2 and not name.startswith("position"):
                values.copy_(rounded(values, dtype))
    for block in plain.blocks:
        block.cache_dtype = "int8"
    for (name, found), (_, expected) in zip(made.named_weights(), plain.named_weights(), strict=True):
        assert torch.equal(found, expected), name
    assert torch.equal(made(IDS), plain(IDS)) and torch.equal(made.widened()(IDS), plain(IDS))
    assert torch.equal(copy.deepcopy(made)(IDS), plain(IDS)) and made.rounded(dtype).embed.matrix is made.embed.matrix


def test_a_quantised_weight_is_no_parameter(tiny: Tiny) -> None:
    made = tiny("llama").rounded("int8")
    with pytest.raises(AttributeError, match=r"this weight is int8: take `matrix`"):
        _ = made.blocks[0].up.weight
    made.blocks[0].up.weight = torch.nn.Parameter(tiny("llama").blocks[0].up.weight, requires_grad=False)
    assert made.blocks[0].up.matrix is made.blocks[0].up.weight, "what a user puts there is what runs"


def test_names_and_hashes_know_q_k_and_v_which_are_views_of_one(tiny: Tiny) -> None:
    model = tiny("opt")
    block, names = model.blocks[1], [name for name, _ in model.named_weights()]
    assert "layers.1.qkv.weight" not in names and names.index("layers.1.k.bias") == names.index("layers.1.q.weight") + 3
    before = model(IDS)
    with torch.no_grad():
        block.v.weight.mul_(2)
    assert torch.equal(block.qkv.weight[-len(block.v.weight) :], block.v.weight) and not torch.equal(model(IDS), before)


def test_selections_see_a_quantised_model_as_any_other(tiny: Tiny) -> None:
    from helpers.engines import random_layers

    made = tiny("llama").rounded("int8")
    layers = random_layers(made, mlp=1, heads=0)
    assert torch.equal(made(IDS, MaskedSelection(layers)), made.widened()(IDS, MaskedSelection(layers)))
