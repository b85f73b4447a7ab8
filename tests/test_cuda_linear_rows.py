"""Products of several rows with a whole matrix: against definitions, and each row as it is alone; on the CPU under Triton's interpreter, on
a GPU with -m gpu.

As test_cuda_kernels.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from conftest import Tiny
from dejavu.engine.cuda import batch_step
from dejavu.engine.cuda.engine import CudaEngine
from dejavu.engine.options import EngineOptions
from dejavu.engine.torch_engine import TorchEngine
from dejavu.kernels.cuda import linear_rows as linear_rows_module
from dejavu.kernels.cuda.common import Side
from dejavu.kernels.cuda.linear_rows import (
    LinearShape,
    activated_rows,
    activated_rows_definition,
    linear_rows,
    linear_rows_bytes,
    linear_rows_definition,
    linear_shape,
)
from dejavu.kernels.cuda.project import side_definition
from dejavu.kernels.cuda.rows import norm_rows
from dejavu.kernels.sparse_mlp import MlpWeights
from helpers.cuda import DEVICES, on, prefilled, slow
from helpers.engines import ids_of
from helpers.kernel_memory import Memory, check_rule
from helpers.kernels import BF16, FP16, FP32, converted, placed, side_of
from helpers.thresholds import gate_layers, input_layers

SHAPES = [LinearShape(outputs=32, inputs=32, warps=4, stages=2), LinearShape(outputs=16, inputs=64, warps=4, stages=3, slices=3)]


def in_order(matrix: Tensor, memory: Memory, *, by_input: bool) -> Tensor:
    """The matrix [O, I] on the device; by_input: as a view of one with a row per input, whose rows are longer than its outputs."""
    if not by_input:
        return memory.given(matrix)
    wide = torch.full((matrix.shape[1], matrix.shape[0] + 5), torch.nan, dtype=matrix.dtype)
    wide[:, : matrix.shape[0]] = matrix.T
    return memory.given(wide)[:, : matrix.shape[0]].T


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=["whole", "sliced"])
@pytest.mark.parametrize("by_input", [False, True])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "dtype", "biased"),
    [(1, 16, 5, FP32, True), (3, 250, 67, FP16, False), (9, 129, 96, BF16, True), (17, 96, 33, FP16, True)],
)
def test_linear_rows(
    rows: int, inputs: int, outputs: int, dtype: torch.dtype, biased: bool, by_input: bool, shape: LinearShape, device: str
) -> None:
    if device == "cpu" and dtype == BF16:
        pytest.skip("Triton's interpreter multiplies the bits of bf16 matrices as integers")
    memory = Memory(device, dtype, seed=rows)
    x_BI, weight_OI = memory.normal(rows, inputs), memory.normal(outputs, inputs, scale=inputs**-0.5)
    bias_O = memory.normal(outputs) if biased else None
    given, bias = in_order(weight_OI, memory, by_input=by_input), None if bias_O is None else memory.given(bias_O)
    plain = linear_rows_definition(x_BI, weight_OI, bias_O)
    truth = linear_rows_definition(x_BI.double(), weight_OI.double(), None if bias_O is None else bias_O.double())
    parts_SBO = memory.room(shape.slices, rows, outputs)
    linear_rows(memory.given(x_BI), given, bias, parts_SBO, shape=shape)
    memory.check()
    check_rule(parts_SBO.double().sum(0), plain, truth, dtype)
    out_BO, side = memory.room(rows, outputs, dtype=dtype), side_of(memory, 3, inputs)
    given_side = Side(matrix=memory.given(side.matrix), scale=memory.given(side.scale), out=memory.room(rows, 3))
    linear_rows(memory.given(x_BI), given, bias, out_BO, side=given_side)
    memory.check()
    check_rule(out_BO, plain, truth, dtype)
    truth_BR = torch.stack([side.scale.double() * (side.matrix.double() @ x_I.double()) for x_I in x_BI])
    check_rule(given_side.out, torch.stack([side_definition(x_I, side) for x_I in x_BI]), truth_BR, FP32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("by_input", [False, True])
@pytest.mark.parametrize(
    ("activation", "gated", "biased", "dtype"),
    [("silu", True, False, FP16), ("relu", False, True, FP32), ("fatrelu", True, True, FP32), ("relu2", False, False, BF16)],
)
def test_activated_rows(activation: str, gated: bool, biased: bool, dtype: torch.dtype, by_input: bool, device: str) -> None:
    if device == "cpu" and dtype == BF16:
        pytest.skip("Triton's interpreter multiplies the bits of bf16 matrices as integers")
    memory = Memory(device, dtype)
    shape = (70, 48)
    weights = MlpWeights(
        up_FD=memory.normal(*shape, scale=0.2), down_FD=memory.normal(*shape), gate_FD=memory.normal(*shape, scale=0.2) if gated else None,
        up_bias_F=memory.normal(70) if biased else None, gate_bias_F=memory.normal(70) if gated and biased else None,
        activation=activation, activation_threshold=0.3,
    )  # fmt: skip
    x_BD, out_BF = memory.normal(5, 48), memory.room(5, 70, dtype=dtype)
    given = placed(weights, memory)
    if by_input:
        gate_FD = None if weights.gate_FD is None else in_order(weights.gate_FD, memory, by_input=True)
        given = MlpWeights(
            up_FD=in_order(weights.up_FD, memory, by_input=True), down_FD=given.down_FD, gate_FD=gate_FD, up_bias_F=given.up_bias_F,
            gate_bias_F=given.gate_bias_F, activation=activation, activation_threshold=0.3,
        )  # fmt: skip
    activated_rows(memory.given(x_BD), given, out_BF)
    memory.check()
    truth = activated_rows_definition(x_BD.double(), converted(weights, torch.float64))
    check_rule(out_BF, activated_rows_definition(x_BD, weights), truth, dtype)


def test_shapes_fit_every_device() -> None:
    """Tiles of x and of the matrices, for each stage, in 99 KiB; slices cover all inputs."""
    for inputs, outputs in [(4096, 12288), (16384, 4096), (28672, 7168), (40, 9)]:
        for rows in (1, 32):
            for matrices, element in [(1, 2), (2, 2), (2, 4)]:
                shape = linear_shape(inputs, outputs, rows, matrices, element, torch.device("cpu"))
                stage = (max(16, rows) + matrices * shape.outputs) * shape.inputs * element
                assert shape.stages >= 1 and shape.stages * stage <= 99 << 10


def test_bytes_are_those_of_the_tensors() -> None:
    x, weight, bias, out = torch.zeros(2, 8, dtype=FP16), torch.zeros(5, 8, dtype=FP16), torch.zeros(5, dtype=FP16), torch.zeros(2, 5)
    assert linear_rows_bytes(x, weight, bias, out) == sum(part.nbytes for part in (x, weight, bias, out))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", ["gate", "input"])
def test_a_dense_step_of_a_sparse_engine_has_the_same_bits_alone(tiny: Tiny, method: str, device: str) -> None:
    """And a deterministic dense step of one row can be recorded: nothing is selected."""
    model = on(tiny("llama"), device)
    layers = {"gate": gate_layers, "input": input_layers}[method](model, 0.4)
    engine = CudaEngine(model, layers, EngineOptions(num_slots=2, record=True), deterministic=True)
    engine.prefill(0, ids_of(1, 5))
    alone = engine.step([3], [0], sparse=False)
    assert alone.selections is not None and all(layer.neurons_A is None for layer in alone.selections[0])
    engine.free(0)
    engine.prefill(0, ids_of(1, 5))
    engine.prefill(1, ids_of(2, 9))
    assert torch.equal(engine.step([3, 4], [0, 1], sparse=False).logits_BV[0], alone.logits_BV[0])


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_whose_products_are_left_in_slices(tiny: Tiny, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """O and down in three parts, which the next norm adds up, as a wide model has them: the torch engine's logits."""

    def sliced(inputs: int, outputs: int, count: int, matrices: int, element: int, device: torch.device) -> LinearShape:
        return LinearShape(outputs=16, inputs=16, warps=4, stages=2, slices=3)

    def seen(y_BD: Tensor, delta: Tensor, *rest: Any, **named: Any) -> None:
        if delta.dim() == 3:
            added.append(delta)
        norm_rows(y_BD, delta, *rest, **named)

    added: list[Tensor] = []
    monkeypatch.setattr(linear_rows_module, "linear_shape", sliced)
    monkeypatch.setattr(batch_step, "norm_rows", seen)
    model = tiny("llama")
    cuda, plain = CudaEngine(on(model, device), None, EngineOptions(num_slots=3)), TorchEngine(model, None, EngineOptions(num_slots=3))
    for engine in (cuda, plain):
        prefilled(engine)
    for tokens in ([3, 4, 5], [6, 7, 8]):
        found, expected = cuda.step(tokens, [0, 1, 2]).logits_BV, plain.step(tokens, [0, 1, 2]).logits_BV
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)
    assert {len(parts) for parts in added} == {3}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [slow(FP32), FP16])
def test_a_dense_row_has_the_same_bits_alone_and_with_others(tiny: Tiny, dtype: torch.dtype, device: str) -> None:
    """With 2 to 9 rows of other lengths beside it, and across the length at which steps change; deterministic."""
    model = on(tiny("llama", max_positions=2048 if device == "cuda" else 64), device, dtype)
    engine = CudaEngine(
        model, None, EngineOptions(num_slots=10, page_size=16, cache_tokens=4096 if device == "cuda" else 400), deterministic=True
    )
    first = ids_of(1, 9)
    engine.prefill(0, first)
    alone = [engine.step([token], [0]).logits_BV[0].clone() for token in (3, 4)]
    for rows in (2, 9) if device == "cpu" else (2, 3, 5, 9):
        for slot in range(rows):
            engine.free(slot)
            engine.prefill(slot, first if slot == 1 else ids_of(slot + 2, 5 + slot if device == "cpu" or slot else 700))
        for token, expected_V in zip((3, 4), alone, strict=True):
            found_BV = engine.step([token + (slot != 1) for slot in range(rows)], list(range(rows))).logits_BV
            assert torch.equal(found_BV[1], expected_V)
