"""Dense and sparse rows on one engine: a dense call is what a dense engine gives, whatever the engine selects by, and disturbs nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from conftest import Tiny
from dejavu.engine.interface import Engine, LayerSelection, StepResult
from dejavu.engine.options import EngineOptions
from dejavu.engine.torch_engine import TorchEngine
from dejavu.model.selectors import LayerAdapter
from dejavu.model.transformer import Transformer
from helpers.cuda import slow
from helpers.engines import ids_of, random_layers
from helpers.native import engine_of, needs_library
from helpers.screens import screen_of
from helpers.thresholds import gate_layers, input_layers

Layers = tuple[LayerAdapter, ...]
METHODS: dict[str, Callable[[Transformer], Layers]] = {
    "predicted": lambda model: random_layers(model, mlp=1, heads=1),
    "gate": lambda model: gate_layers(model, 0.4),
    "input": lambda model: input_layers(model, 0.4),
}


def torch_engine(model: Transformer, layers: Layers | None, **options: Any) -> Engine:
    return TorchEngine(model, layers, EngineOptions(num_slots=3, page_size=4, **options))


def native_engine(model: Transformer, layers: Layers | None, **options: Any) -> Engine:
    return engine_of(model, layers, num_slots=3, page_size=4, **options)


def cuda_engine(model: Transformer, layers: Layers | None, **options: Any) -> Engine:
    from dejavu.engine.cuda.engine import CudaEngine  # needs triton

    return CudaEngine(model, layers, EngineOptions(num_slots=3, page_size=4, **options), crossover=False)


ENGINES = {"torch": torch_engine, "native": native_engine, "cuda": cuda_engine}
KINDS = ["torch", pytest.param("native", marks=needs_library)]


def lists(layer: LayerSelection) -> list[list[int] | None]:
    parts = (layer.neurons_A, layer.heads_A, *(layer.inputs_P or ()))
    return [None if part is None else part.tolist() for part in parts]


def check_whole(step: StepResult, model: Transformer) -> None:
    """A dense layer counts all of its own."""
    config, sizes = model.config, step.counts.kept_inputs
    assert (step.counts.neurons == config.intermediate_size).all() and (step.counts.heads == config.num_heads).all()
    assert step.union_L is not None and (step.union_L == config.intermediate_size).all() and step.fallback_layers == 0
    assert sizes is None or (sizes == sizes.amax((0, 1))).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", [1, 2])
def test_dense_calls_among_sparse_ones(tiny: Tiny, kind: str, method: str, rows: int) -> None:
    """In slots of their own, in turns: each gives what it gives on an engine that is always dense, or always sparse."""
    model = tiny("llama")
    layers, make = METHODS[method](model), ENGINES[kind]
    both, dense, sparse = make(model, layers), make(model, None), make(model, layers)
    for slot in range(3):
        for engine in (both, dense, sparse):
            engine.prefill(slot, ids_of(slot, 5 + slot))
    slots = [0, 1][:rows]
    for index in range(4):
        tokens = ids_of(40 + index, rows)
        found, expected = both.step(tokens, slots, sparse=False), dense.step(tokens, slots)
        check_whole(found, model)
        if kind == "native" and method == "input":  # the same values in another order in memory, and so in their sums
            torch.testing.assert_close(found.logits_BV, expected.logits_BV, rtol=0, atol=1e-5)
        else:
            assert torch.equal(found.logits_BV, expected.logits_BV)
        found, expected = both.step([9 + index], [2]), sparse.step([9 + index], [2])
        assert torch.equal(found.logits_BV, expected.logits_BV) and found.counts == expected.counts
        assert float(found.counts.neurons.double().mean()) < model.config.intermediate_size or method == "input"


@needs_library
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8", "int4"])
def test_a_dense_call_of_every_dtype_is_that_of_a_dense_engine(tiny: Tiny, dtype: str) -> None:
    """Bit for bit, with and without a screened head."""
    model = tiny("opt")
    for screen in (None, screen_of(model, threshold=0.01)):
        both = native_engine(model, METHODS["predicted"](model), dtype=dtype, screen=screen)
        dense = native_engine(model, None, dtype=dtype)
        for engine in (both, dense):
            engine.prefill(0, ids_of(3, 5))
        for token_id in ids_of(4, 6):
            assert torch.equal(both.step([token_id], [0], sparse=False).logits_BV, dense.step([token_id], [0]).logits_BV)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_a_call_may_record(tiny: Tiny, kind: str, method: str) -> None:
    """Or leave it, whatever the engine was made for; what ran dense selected nothing."""
    model = tiny("llama")
    layers = METHODS[method](model)
    made, requested = ENGINES[kind](model, layers, record=True), ENGINES[kind](model, layers)
    for engine in (made, requested):
        engine.prefill(0, ids_of(3, 5))
    expected, found = made.step([7], [0]), requested.step([7], [0], record=True)
    assert expected.selections is not None and found.selections is not None
    assert [lists(layer) for layer in found.selections[0]] == [lists(layer) for layer in expected.selections[0]]
    assert made.step([8], [0], record=False).selections is None and requested.step([8], [0]).selections is None
    dense = made.step([9], [0], sparse=False)
    assert dense.selections is not None
    assert all(layer.neurons_A is None and layer.heads_A is None and layer.inputs_P is None for layer in dense.selections[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_serves_both(tiny: Tiny, kind: str) -> None:
    """Prefill is the same for both, so what one has published the other may begin with."""
    model, prompt = tiny("opt"), ids_of(5, 11)
    both, dense = (ENGINES[kind](model, layers) for layers in (METHODS["predicted"](model), None))
    both.prefill(0, prompt)
    both.publish(0, prompt)
    both.step([3], [0])
    assert both.reuse(1, prompt) == 8
    both.prefill(1, prompt[8:])
    dense.prefill(1, prompt)
    found, expected = both.step([4], [1], sparse=False), dense.step([4], [1])
    torch.testing.assert_close(found.logits_BV, expected.logits_BV, rtol=0, atol=0 if kind == "native" else 1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", [slow(1), 2])
def test_dense_calls_on_the_gpu(tiny: Tiny, method: str, rows: int) -> None:
    """Steps and tokens that it decodes by itself, and sparse ones after them; of a step that records, too."""
    pytest.importorskip("triton")
    model = tiny("llama", num_layers=1)
    layers = METHODS[method](model)
    both, dense, sparse = cuda_engine(model, layers), torch_engine(model, None), torch_engine(model, layers)
    for slot in range(2):
        for engine in (both, dense, sparse):
            engine.prefill(slot, ids_of(slot, 5 + slot))
    slots, tokens = [0, 1][:rows], ids_of(8, rows)
    found, expected = both.step(tokens, slots, sparse=False, record=True), dense.step(tokens, slots)
    check_whole(found, model)
    torch.testing.assert_close(found.logits_BV, expected.logits_BV, rtol=0, atol=2e-5)
    assert found.selections is not None and all(row[0].neurons_A is None and row[0].inputs_P is None for row in found.selections)
    drawn = both.decode(tokens, slots, 1, sparse=False)  # pyrefly: ignore[missing-attribute]
    expected = dense.step(tokens, slots)
    assert drawn.token_NB[0].tolist() == expected.logits_BV.argmax(-1).tolist()
    assert (drawn.counts.neurons == model.config.intermediate_size).all()
    for slot in slots:
        for engine in (both, sparse):
            engine.free(slot)
            engine.prefill(slot, ids_of(slot, 5 + slot))
    found, expected = both.step(tokens, slots), sparse.step(tokens, slots)
    torch.testing.assert_close(found.logits_BV, expected.logits_BV, rtol=0, atol=2e-5)
    assert found.counts == expected.counts
