"""Several prompts in one call: each as it is alone, and all of them or none."""

from __future__ import annotations

import pytest
import torch

from conftest import Tiny
from dejavu.engine.interface import Engine
from dejavu.engine.options import EngineOptions
from dejavu.engine.torch_engine import TorchEngine
from dejavu.model.transformer import Transformer
from helpers.engines import ids_of, random_layers
from helpers.native import engine_of, needs_library

KINDS = ["torch", pytest.param("native", marks=needs_library)]
PROMPTS = [ids_of(1, 5), ids_of(2, 9), ids_of(3, 1)]


def engine_for(kind: str, model: Transformer, *, cache_tokens: int = 64) -> Engine:
    layers = random_layers(model, mlp=1, heads=1)
    if kind == "torch":
        return TorchEngine(model, layers, EngineOptions(num_slots=3, page_size=4, cache_tokens=cache_tokens))
    return engine_of(model, layers, num_slots=3, page_size=4, cache_tokens=cache_tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_what_they_are_alone(tiny: Tiny, kind: str) -> None:
    """Also behind tokens that a slot holds."""
    model, slots = tiny("llama"), [2, 0, 1]
    together, alone = engine_for(kind, model), engine_for(kind, model)
    together.prefill(0, [7, 8])
    alone.prefill(0, [7, 8])
    logits_BV = together.prefill_batch(slots, PROMPTS)
    for row, (slot, ids) in enumerate(zip(slots, PROMPTS, strict=True)):
        assert torch.equal(logits_BV[row], alone.prefill(slot, ids)) and together.length(slot) == alone.length(slot)
    assert torch.equal(together.step([3, 4, 5], slots).logits_BV, alone.step([3, 4, 5], slots).logits_BV)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("last", "message"),
    [
        ([], "there are no tokens to prefill"),
        ([96], "token id 96 is outside"),
        ([1] * 60, "66 tokens exceed the model's context of 64"),
        ([1] * 13, r"22 more tokens need 6 pages of 4 tokens and 5 of 7 are free"),
    ],
)
def test_all_or_none(tiny: Tiny, kind: str, last: list[int], message: str) -> None:
    engine = engine_for(kind, tiny("opt"), cache_tokens=28)
    engine.prefill(1, ids_of(9, 6))
    with pytest.raises(ValueError, match=message):
        engine.prefill_batch([0, 1], [ids_of(1, 9), last])
    assert [engine.length(slot) for slot in range(3)] == [0, 6, 0] and engine.free_pages == 5


@needs_library
def test_a_prompt_that_fails_takes_the_others_back(tiny: Tiny) -> None:
    """The second prompt has a token whose embedding is not a number: the first is as it was before, and works."""
    model = tiny("llama")
    fresh = engine_for("native", model).prefill(0, PROMPTS[0])
    with torch.no_grad():
        model.embed.weight[50] = torch.nan
    engine = engine_for("native", model)
    clean = [token for token in PROMPTS[0] if token != 50]
    with pytest.raises(ValueError, match="not finite"):
        engine.prefill_batch([0, 1], [clean, [1, 50]])
    assert [engine.length(slot) for slot in range(2)] == [0, 0]
    assert clean == PROMPTS[0] and torch.equal(engine.prefill(0, clean), fresh)
