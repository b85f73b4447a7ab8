"""Above the crossover the native engine reads all neurons in order: the same selections, the same sums, bit for bit."""

from __future__ import annotations

import pytest
import torch

from conftest import Tiny
from dejavu.engine.torch_engine import TorchEngine
from dejavu.model.selectors import LayerAdapter
from dejavu.model.transformer import Transformer
from helpers.engines import decode, ids_of, random_layers
from helpers.native import ISAS, engine_of, needs_library

MANY, MOST = -2.0, -4.0  # thresholds that about four neurons in five pass, and nearly all


def case(tiny: Tiny, family: str, threshold: float = MANY) -> tuple[Transformer, tuple[LayerAdapter, ...]]:
    model = tiny(family, intermediate_size=131)
    return model, random_layers(model, mlp=1, heads=None, threshold=threshold)


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("family", ["opt", "llama"])
def test_many_selected_neurons_equal_torch(tiny: Tiny, family: str, isa: str) -> None:
    model, layers = case(tiny, family)
    ids = ids_of(5)
    expected, torch_steps = decode(TorchEngine(model, layers), ids)
    logits, steps = decode(engine_of(model, layers, instruction_set=isa), ids)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    density = torch.stack([step.counts.neurons[0] for step in steps]).double().mean() / 131
    assert 0.65 < float(density) < 0.95, "above the crossover, and not all"
    assert all(torch.equal(step.counts.neurons, other.counts.neurons) for step, other in zip(steps, torch_steps, strict=True))


@needs_library
@pytest.mark.parametrize("dtype", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("family", ["opt", "llama"])
@pytest.mark.parametrize("threshold", [MANY, MOST])
def test_the_order_of_reading_changes_no_bit(tiny: Tiny, family: str, dtype: str, threshold: float) -> None:
    """One row by one thread and three by two: whether a chunk or a tile of it is above the crossover is not the same."""
    model, layers = case(tiny, family, threshold)
    together = engine_of(model, layers, num_slots=3, dtype=dtype)
    tokens = ids_of(31, 3)
    step = together.step(tokens, [0, 1, 2])
    for row, token_id in enumerate(tokens):
        alone = engine_of(model, layers, threads=1, dtype=dtype).step([token_id], [0])
        assert torch.equal(step.logits_BV[row], alone.logits_BV[0]) and torch.equal(step.counts.neurons[row], alone.counts.neurons[0])


@needs_library
def test_a_profile_counts_what_fired_and_no_more(tiny: Tiny) -> None:
    model, layers = case(tiny, "opt")
    engine = engine_of(model, layers)
    engine.prefill(0, ids_of(3, 4))
    result, profile = engine.profiled_step([7], [0])
    assert profile.counts.neurons.tolist() == result.counts.neurons[0].tolist()
    assert all(0 < fired < selected for fired, selected in zip(profile.fired_L.tolist(), profile.counts.neurons.tolist(), strict=True))
