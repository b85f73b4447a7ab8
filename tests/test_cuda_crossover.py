"""Several rows on the GPU: what is measured to be slower sparse runs dense, and is then what a dense layer is."""

import pytest
import torch

pytest.importorskip("triton")

from conftest import Tiny
from dejavu.engine.cuda import crossover
from dejavu.engine.cuda.batch_step import BatchStep
from dejavu.engine.cuda.engine import CudaEngine
from dejavu.engine.options import EngineOptions
from dejavu.engine.torch_engine import TorchEngine
from dejavu.model.selectors import AllHeads, AllNeurons, LayerAdapter
from helpers.cuda import DEVICES, on, prefilled, slow
from helpers.engines import ids_of, random_layers


def batch_step(engine: CudaEngine) -> BatchStep:
    step = engine._bucket(2).step(5)
    assert isinstance(step, BatchStep)
    return step


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("layers", "heads"), [((), True), ((0,), False), ((0, 1), True)])
def test_what_runs_dense(tiny: Tiny, device: str, layers: tuple[int, ...], heads: bool) -> None:
    """As an engine whose layers have no such predictors: the same logits and counts."""
    model = tiny("llama", activation="relu", num_layers=2)
    sparse = random_layers(model, mlp=1, heads=1)
    left = [
        LayerAdapter(neurons=AllNeurons() if index in layers else layer.neurons, heads=AllHeads() if heads else layer.heads)
        for index, layer in enumerate(sparse)
    ]  # fmt: skip
    reference = TorchEngine(model, left, EngineOptions(num_slots=2))
    engine = CudaEngine(on(model, device), sparse, EngineOptions(num_slots=2), crossover=False)
    batch_step(engine).run_dense(frozenset(layers), heads=heads)
    for slot in range(2):
        for each in (reference, engine):
            each.prefill(slot, ids_of(slot, 5 + slot))
    for index in range(3):
        tokens = ids_of(40 + index, 2)
        want, found = reference.step(tokens, [0, 1]), engine.step(tokens, [0, 1])
        assert found.counts == want.counts
        torch.testing.assert_close(found.logits_BV.cpu(), want.logits_BV, rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("slower", [slow(False), True])
def test_heads_are_timed_both_ways(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, slower: bool) -> None:
    model = on(tiny("opt"), "cpu")
    engine = prefilled(CudaEngine(model, random_layers(model, mlp=1, heads=1), EngineOptions(num_slots=2)))
    engine.step([5, 6], [0, 1])
    step, times = batch_step(engine), iter((2.0, 1.0) if slower else (1.0, 2.0))

    def timed(work):
        work()
        return next(times)

    monkeypatch.setattr(crossover, "milliseconds", timed)
    assert crossover.slower_heads(step) is slower and list(times) == []


def test_without_predictors_there_is_nothing_to_time(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = on(tiny("opt"), "cpu")
    engine = CudaEngine(model, random_layers(model, mlp=None, heads=1), EngineOptions(num_slots=2))
    monkeypatch.setattr(crossover, "milliseconds", lambda _: pytest.fail("timed"))
    assert crossover.slower_layers(batch_step(engine)) == frozenset()
    dense = batch_step(CudaEngine(model, None, EngineOptions(num_slots=2)))
    assert crossover.slower_layers(dense) == frozenset() and not crossover.slower_heads(dense)


@pytest.mark.gpu
def test_a_step_chooses_before_it_is_captured(tiny: Tiny) -> None:
    """Whatever is chosen, steps, decode and a longer text go on with it."""
    model = on(tiny("opt"), "cuda")
    engine = prefilled(CudaEngine(model, random_layers(tiny("opt"), mlp=1, heads=1), EngineOptions(num_slots=2)))
    engine.step([5, 6], [0, 1])
    measured = engine._bucket(2).crossover
    assert measured is not None
    chosen = measured.layers, measured.heads[batch_step(engine).tokens]
    found = engine.decode([7, 8], [0, 1], 4)
    assert found.token_NB.shape == (4, 2) and (measured.layers, measured.heads[batch_step(engine).tokens]) == chosen
    step = engine.step([5, 6], [0, 1])
    for heads in (step.counts.heads, found.counts.heads):
        assert (heads == model.config.num_heads).all() or not chosen[1]


def test_a_choice_made_again_keeps_the_memory_that_a_graph_reads(tiny: Tiny) -> None:
    """A step has two graphs, one of steps and one of decode; the second capture applies the same choice of dense layers."""
    model = on(tiny("opt"), "cpu")
    engine = prefilled(CudaEngine(model, random_layers(model, mlp=1, heads=1), EngineOptions(num_slots=2)))
    engine.step([5, 6], [0, 1])
    step = batch_step(engine)
    step.run_dense(frozenset({0}))
    counts, unions = step._first_counts, step._first_unions
    step.run_dense(frozenset({0}))
    assert step._first_counts is counts and step._first_unions is unions
