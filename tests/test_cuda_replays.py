"""The cuda engine over many steps whose selections change: what a graph replays is what its kernels give, and is accurate.

Against the torch engine, against the same kernels without a graph, and against fp64 with the selections that were made. On the CPU
(under Triton's interpreter, without a graph) with few steps of tiny models; on a GPU with -m gpu.
"""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from conftest import Tiny
from dejavu.bench.models.density import rethresholded
from dejavu.bench.models.planted import plant, planted_model
from dejavu.bench.models.random import random_ids, shape_of
from dejavu.config import ModelConfig
from dejavu.engine.cuda.engine import CudaEngine
from dejavu.engine.options import EngineOptions
from dejavu.engine.torch_engine import TorchEngine
from dejavu.model.selectors import LayerAdapter, PredictedHeads, PredictedNeurons
from dejavu.model.transformer import Transformer
from helpers.cuda import Recorded, cuda_engine_of, on
from helpers.engines import ids_of, random_layers, reselect
from helpers.kernel_memory import check_rule

THRESHOLDS = (1e9, 0.0, -1e9, 0.3)  # nothing (of heads: the best group), some, everything, fewer


def with_threshold(layers: Sequence[LayerAdapter], threshold: float) -> tuple[LayerAdapter, ...]:
    found = []
    for layer in layers:
        parts = (each for each in layer.selectors if isinstance(each, PredictedNeurons | PredictedHeads))
        found.append(LayerAdapter.of(each.at_threshold(threshold) for each in parts))
    return tuple(found)


def set_threshold(engine: CudaEngine, threshold: float) -> None:
    """In the memory that the engine's graphs read."""
    for own in engine._model.predictors:
        for scores in (own.neurons, own.group_scores):
            if scores is not None:
                scores.threshold.fill_(threshold)


@pytest.mark.slow
@pytest.mark.parametrize(("device", "steps"), [("cpu", 12), pytest.param("cuda", 50, marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    ("rows", "options"), [(1, {}), (1, {"deterministic": True}), (1, {"ahead": "branch"}), (3, {}), (3, {"deterministic": True})], ids=str
)
def test_counts_that_change_from_step_to_step(tiny: Tiny, device: str, steps: int, rows: int, options: dict[str, Any]) -> None:
    """Nothing, some and everything selected in turn, over the same memory: the torch engine's logits and counts each time."""
    model = tiny("llama", activation="relu", intermediate_size=70)
    layers = random_layers(model, mlp=1, heads=1)
    torch_engine = TorchEngine(model, layers, EngineOptions(num_slots=rows))
    cuda_engine = cuda_engine_of(on(model, device), layers, num_slots=rows, crossover=False, **options)
    if device == "cpu":
        steps = steps if (rows, options) == (1, {}) else len(THRESHOLDS)  # an interpreted step takes its time
    for engine in (torch_engine, cuda_engine):
        for slot in range(rows):
            engine.prefill(slot, ids_of(slot, 3 + slot))
    neurons = set()
    for index in range(steps):
        threshold = THRESHOLDS[index % len(THRESHOLDS)]
        reselect(torch_engine, with_threshold(layers, threshold))
        set_threshold(cuda_engine, threshold)
        tokens, slots = ids_of(50 + index, rows), list(range(rows))
        want, found = torch_engine.step(tokens, slots), cuda_engine.step(tokens, slots)
        assert found.counts == want.counts
        torch.testing.assert_close(found.logits_BV.cpu(), want.logits_BV, rtol=0, atol=2e-5)
        neurons |= set(want.counts.neurons.flatten().tolist())
    assert {0, 70} < neurons, "the test must select nothing, some and everything"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("device", "steps"), [("cpu", 4), pytest.param("cuda", 10_000, marks=pytest.mark.gpu)])
def test_a_graph_gives_what_its_kernels_give(tiny: Tiny, device: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens greedily from a graph and from the kernels that it is made of, whatever is selected; logits bit for bit."""
    model = on(tiny("opt", vocab_size=50), device)
    layers = random_layers(tiny("opt", vocab_size=50), mlp=1, heads=1)
    graph, eager = (CudaEngine(model, layers, deterministic=True) for _ in range(2))
    without_graph = 0

    def start(_key: Any, _graphs: Any, work: Callable[[], None]) -> None:
        nonlocal without_graph
        without_graph += 1
        work()

    monkeypatch.setattr(eager._bucket(1), "_start", start)
    tokens, generator = [3, 3], torch.Generator().manual_seed(0)
    lengths, counts = [], set()
    for index in range(steps):
        if index % 50 == 0:
            for engine in (graph, eager):
                engine.free(0)
                engine.prefill(0, [2, index % 50, index // 50 % 50])
        threshold = THRESHOLDS[int(torch.randint(len(THRESHOLDS), (1,), generator=generator))]
        steps_of = []
        for engine, token in zip((graph, eager), tokens, strict=True):
            set_threshold(engine, threshold)
            steps_of.append(engine.step([token], [0]))
        tokens = [int(step.logits_BV.argmax()) for step in steps_of]
        assert tokens[0] == tokens[1] and torch.equal(steps_of[0].logits_BV, steps_of[1].logits_BV), f"step {index}"
        assert torch.equal(steps_of[0].counts.neurons, steps_of[1].counts.neurons)
        counts |= set(steps_of[0].counts.neurons.flatten().tolist())
        lengths.append(graph.length(0))
    assert len(counts) > 2 and len(set(lengths)) == min(steps, 50)
    assert without_graph == steps and (device == "cpu" or graph.graph(1) is not None)


@torch.inference_mode()
def check_engine(engine: CudaEngine, ids_BT: Sequence[Sequence[int]], wide: Transformer) -> None:
    """Decode rows of ids from their first token on, and hold every logit to the rule: fp64, and the plain forward pass in the
    engine's dtype, select what the engine selected. wide: the same model in fp64."""
    slots, model = list(range(len(ids_BT))), engine.model
    device = model.embed.weight.device
    steps = [engine.step(tokens, slots) for tokens in zip(*ids_BT, strict=True)]
    counts = torch.stack([step.counts.neurons for step in steps])
    assert 0 < counts.sum() < counts.numel() * engine.config.intermediate_size, "the test must select some"
    for row, ids in enumerate(ids_BT):
        recorded = []
        for step in steps:
            assert step.selections is not None
            recorded.append(step.selections[row])
        selection = Recorded(recorded, engine.config, device)
        plain, truth = (made(torch.tensor([ids], device=device), selection)[0] for made in (model, wide))
        check_rule(torch.stack([step.logits_BV[row] for step in steps]), plain.cpu(), truth.double().cpu(), model.embed.weight.dtype)


SIZES = {"vocab_size": 50, "hidden_size": 48, "intermediate_size": 100, "num_heads": 4, "num_kv_heads": 4, "head_dim": 12}
SHAPES = ("opt-1.3b", "opt-2.7b", "opt-6.7b", "opt-13b", "opt-30b", "opt-66b", "llama-2-7b-relu")


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", ["opt-1.3b", "llama-2-7b-relu"])
def test_a_tiny_planted_model_against_fp64(kind: str, rows: int) -> None:
    config = ModelConfig.from_dict(shape_of(kind).to_dict() | SIZES | {"num_layers": 3, "max_positions": 32})
    made = plant(config, name=kind, device="cpu", dtype="fp16", density=0.2, rank=8, num_layers=2)
    layers = rethresholded(made.model, made.layers, random_ids(config, 32, seed=1), mlp_density=0.3, head_density=0.5)
    engine = CudaEngine(made.model, layers, EngineOptions(record=True, num_slots=rows), crossover=False)
    ids_BT = [random_ids(config, 3, seed=2 + row) for row in range(rows)]
    check_engine(engine, ids_BT, copy.deepcopy(made.model).double())


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", SHAPES)
def test_every_size_against_fp64(name: str, rows: int) -> None:
    """Two layers of that shape in fp16."""
    made = planted_model(name, device="cuda", dtype="fp16", density=0.1, num_layers=2)
    layers = rethresholded(made.model, made.layers, random_ids(made.config, 256, seed=1), mlp_density=0.15, head_density=0.5)
    engine = CudaEngine(made.model, layers, EngineOptions(record=True, num_slots=rows, cache_tokens=256), crossover=False)
    ids_BT = [random_ids(made.config, 20, seed=2 + row) for row in range(rows)]
    check_engine(engine, ids_BT, copy.deepcopy(made.model).double())


@pytest.mark.slow
def test_the_check_sees_a_wrong_engine(tiny: Tiny) -> None:
    """A neuron's row of down, other than the one that the forward passes read."""
    model = tiny("opt").half()
    layers, wide = random_layers(model, mlp=1, heads=None), copy.deepcopy(model).double()
    engine = CudaEngine(copy.deepcopy(model), layers, EngineOptions(record=True))
    down_FD = engine._model.weights[1].mlp.down_FD
    engine._model.weights[1] = dataclasses.replace(
        engine._model.weights[1], mlp=dataclasses.replace(engine._model.weights[1].mlp, down_FD=down_FD.roll(1, 0).contiguous())
    )
    with pytest.raises(AssertionError, match="limit"):
        check_engine(engine, [ids_of(3, 3)], wide)
