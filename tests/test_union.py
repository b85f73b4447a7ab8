"""What the rows of a step select together, and in how many layers so much that all of it is read: every engine says both."""

from __future__ import annotations

import pytest
import torch

from conftest import Tiny
from dejavu.engine.interface import Engine, StepResult
from dejavu.engine.options import EngineOptions
from dejavu.engine.torch_engine import TorchEngine
from dejavu.model.predictor import Predictor
from dejavu.model.selectors import GateThreshold, LayerAdapter
from dejavu.model.transformer import Transformer
from helpers.adapters import predicted
from helpers.cuda import slow
from helpers.engines import ids_of, random_layers
from helpers.native import engine_of, needs_library

NEURONS = 131  # tiles of 64 and of 16, and a rest
MANY = -2.0  # a threshold that about four neurons in five pass


def model_of(tiny: Tiny, family: str = "opt") -> Transformer:
    return tiny(family, intermediate_size=NEURONS, num_layers=3)


def some_layers(model: Transformer, threshold: float = 0.6) -> tuple[LayerAdapter, ...]:
    """Predictors in the first and the third layer, none in the second."""
    layers = random_layers(model, mlp=1, heads=None, threshold=threshold)
    return layers[0], LayerAdapter(), layers[2]


def union_of(result: StepResult) -> list[int]:
    """Counted from the recorded selections."""
    assert result.selections is not None
    by_layer = zip(*result.selections, strict=True)
    chosen = [[row.neurons_A for row in rows] for rows in by_layer]
    return [len({n for row_A in rows if row_A is not None for n in row_A.tolist()}) if rows[0] is not None else NEURONS for rows in chosen]


def counted(engine: Engine, rows: int, seed: int = 3) -> StepResult:
    for slot in range(rows):
        engine.prefill(slot, ids_of(50 + slot, 3))
    return engine.step(ids_of(seed, rows), range(rows))


@pytest.mark.parametrize("kind", ["torch", pytest.param("native", marks=needs_library)])
@pytest.mark.parametrize("threshold", [0.6, MANY])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_the_union_is_that_of_the_rows_selections(tiny: Tiny, kind: str, threshold: float, rows: int) -> None:
    model = model_of(tiny)
    layers = some_layers(model, threshold)
    torch_engine = TorchEngine(model, layers, EngineOptions(num_slots=rows, record=True))
    engine = torch_engine if kind == "torch" else engine_of(model, layers, num_slots=rows, record=True)
    result = counted(engine, rows)
    assert result.union_L is not None and result.union_L.dtype == torch.int64
    assert result.union_L.tolist() == union_of(result) and result.union_L[1] == NEURONS
    most, every = result.counts.neurons.max(0).values, result.counts.neurons.sum(0)
    assert (most <= result.union_L).all() and (result.union_L <= every).all()
    if rows == 1:
        assert torch.equal(result.union_L, result.counts.neurons[0])
    elif threshold == 0.6:
        assert most[0] < result.union_L[0] < min(int(every[0]), NEURONS), "the rows select different neurons, and some alike"


@needs_library
@pytest.mark.parametrize("threads", [1, 3])
def test_native_counts_the_union_of_gates(tiny: Tiny, threads: int) -> None:
    model = model_of(tiny, "llama")
    layers = (LayerAdapter(neurons=GateThreshold(threshold=0.4)), LayerAdapter(), LayerAdapter(neurons=GateThreshold(threshold=0.0)))
    result = counted(engine_of(model, layers, num_slots=3, record=True, threads=threads), 3)
    assert result.union_L is not None and result.union_L.tolist() == union_of(result)
    assert 0 < result.union_L[0] < NEURONS and result.union_L[2] == NEURONS, "SiLU is never exactly zero"
    assert result.fallback_layers == 1


@needs_library
@pytest.mark.parametrize(
    ("family", "dtype", "rows", "least"),
    [
        ("llama", "fp32", 1, 6),
        ("llama", "fp32", 4, 6),
        ("llama", "int8", 1, 6),
        ("llama", "int8", 4, 8),
        ("opt", "fp32", 1, None),  # most activations are zero and spare a row of down
        ("opt", "fp32", 4, 6),
    ],
)
def test_native_counts_the_layers_that_it_reads_in_order(tiny: Tiny, family: str, dtype: str, rows: int, least: int | None) -> None:
    """From so many eighths of the neurons on, in the layers that select; never in one that is dense from the start."""
    model = tiny(family, intermediate_size=128, num_layers=3)
    for eighths in (0, 5, 6, 7, 8):
        A_RD, B_OR = torch.zeros(1, model.config.hidden_size), torch.zeros(128, 1)
        bias_O = (torch.arange(128) % 8 < eighths).float()
        constant = predicted(mlp=Predictor(A_RD=A_RD, B_OR=B_OR, bias_O=bias_O, threshold=0.5, lookahead=0))
        engine = engine_of(model, (constant, LayerAdapter(), constant), num_slots=rows, dtype=dtype)
        result = counted(engine, rows)
        assert result.fallback_layers == (0 if least is None or eighths < least else 2)
        assert result.union_L is not None and result.union_L.tolist() == [16 * eighths, 128, 16 * eighths]
        assert (result.counts.neurons == result.union_L).all()


@needs_library
def test_more_rows_than_are_computed_together_have_no_union(tiny: Tiny) -> None:
    model = model_of(tiny)
    engine = engine_of(model, some_layers(model, MANY), num_slots=35, cache_tokens=35 * 6)
    result = counted(engine, 35)
    assert result.union_L is None and result.fallback_layers == 2 and result.counts.neurons.shape == (35, 3)
    assert torch.equal(
        result.counts.neurons, counted(TorchEngine(model, some_layers(model, MANY), EngineOptions(num_slots=35)), 35).counts.neurons
    )


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("rows", [slow(1), 2])
def test_cuda_counts_what_its_kernels_read(tiny: Tiny, device: str, rows: int) -> None:
    pytest.importorskip("triton")
    from dejavu.engine.cuda.engine import CudaEngine

    model = tiny("opt", num_layers=2)
    layers = (random_layers(model, mlp=1, heads=None, threshold=0.6)[0], LayerAdapter())
    result = counted(CudaEngine(tiny("opt", num_layers=2).to(device), layers, EngineOptions(num_slots=rows), crossover=False), rows)
    expected = counted(TorchEngine(model, layers, EngineOptions(num_slots=rows)), rows)
    assert result.union_L is not None and expected.union_L is not None
    assert result.union_L.tolist() == expected.union_L.tolist() and result.fallback_layers == expected.fallback_layers == 0


def test_a_batch_that_runs_dense_on_cuda_is_a_fallback(tiny: Tiny) -> None:
    """As the measured crossover has it: the layer counts as dense, and only one that would have selected is counted."""
    pytest.importorskip("triton")
    from dejavu.engine.cuda.batch_step import BatchStep
    from dejavu.engine.cuda.engine import CudaEngine

    model = tiny("opt", num_layers=2)
    engine = CudaEngine(model, (random_layers(model, mlp=1, heads=None)[0], LayerAdapter()), EngineOptions(num_slots=2))
    step = engine._bucket(2).step(3)
    assert isinstance(step, BatchStep)
    step.run_dense(frozenset({0}))
    result = counted(engine, 2)
    assert result.union_L is not None and result.union_L.tolist() == [64, 64] and result.fallback_layers == 1
