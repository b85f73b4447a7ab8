"""A quantised matrix: packing loses nothing, its values are those of the plain definitions, rows are rows of the whole, models share."""

from __future__ import annotations

import copy
import dataclasses

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from conftest import Tiny
from dejavu.kernels import quantized
from dejavu.kernels.quantize import quantize_groups, rounded
from dejavu.kernels.quantized import QuantizedMatrix, linear, packed_nibbles, rounded_to, stacked, unpacked_nibbles, wide
from dejavu.model.masked import MaskedSelection
from helpers.matrices import random_matrix

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
    assert turned.dequantize().is_contiguous()


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
