"""Logits after every token of a prompt: the model's own, and the last of them a plain prefill's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conftest import Brute, Tiny
from dejavu.engine import prefill
from dejavu.engine.interface import Engine
from dejavu.engine.torch_engine import TorchEngine
from dejavu.model.transformer import Transformer
from helpers.engines import MODELS, ids_of, random_layers
from helpers.native import engine_of, needs_library, rounded

COUNT = 45  # more than a block of the native engine


def check(engine: Engine, plain: Engine, model: Transformer, brute: Brute, *, atol: float) -> None:
    """In one piece, and behind tokens that the slot holds; against the model, and the last against `prefill` on another engine."""
    ids = ids_of(4, COUNT)
    expected = brute(model, ids)
    for first in (0, 7):
        if first:
            engine.prefill(0, ids[:first])
        found = engine.prefill_logits(0, ids[first:])
        assert found.shape == (COUNT - first, model.config.vocab_size) and found.dtype == torch.float32
        assert engine.length(0) == COUNT
        torch.testing.assert_close(found.log_softmax(-1).cpu(), expected[first:], rtol=0, atol=atol)
        torch.testing.assert_close(found[-1], plain.prefill(0, ids).to(found.device), rtol=0, atol=atol)
        for each in (engine, plain):
            each.free(0)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("chunk", [512, 8])
def test_torch(tiny: Tiny, brute: Brute, name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "PREFILL_CHUNK", chunk)
    family, overrides = MODELS[name]
    model = tiny(family, **overrides)
    layers = random_layers(model, mlp=1, heads=1)
    check(TorchEngine(model, layers), TorchEngine(model, layers), model, brute, atol=1e-4)


@needs_library
@pytest.mark.parametrize("name", MODELS)
def test_native(tiny: Tiny, brute: Brute, name: str) -> None:
    family, overrides = MODELS[name]
    model = tiny(family, **overrides)
    layers = random_layers(model, mlp=1, heads=1)
    check(engine_of(model, layers), engine_of(model, layers), model, brute, atol=1e-4)


@needs_library
@pytest.mark.parametrize("options", [{}, {"dtype": "int8"}], ids=str)
def test_the_last_is_that_of_a_native_prefill_bit_for_bit(tiny: Tiny, options: dict[str, Any]) -> None:
    model, ids = rounded(tiny("llama")), ids_of(4, COUNT)
    whole = engine_of(model, **options).prefill_logits(0, ids)
    plain = engine_of(model, **options)
    for end, token_id in enumerate(ids):
        assert torch.equal(whole[end], plain.prefill(0, [token_id]))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_cuda(tiny: Tiny, brute: Brute, device: str) -> None:
    pytest.importorskip("triton")
    from dejavu.engine.cuda.engine import CudaEngine

    model = tiny("opt").to(device)
    check(CudaEngine(model), CudaEngine(model), tiny("opt"), brute, atol=1e-4)


@pytest.mark.parametrize("kind", ["torch", pytest.param("native", marks=needs_library)])
@pytest.mark.parametrize(
    ("ids", "message"), [([], "no tokens to prefill"), ([5, 96], "token id 96 is outside"), ([1] * 65, "65 tokens exceed")]
)
def test_what_prefill_refuses_is_refused(tiny: Tiny, kind: str, ids: list[int], message: str) -> None:
    engine = TorchEngine(tiny("opt")) if kind == "torch" else engine_of(tiny("opt"))
    pages = engine.free_pages
    for work in (engine.prefill, engine.prefill_logits):
        with pytest.raises(ValueError, match=message):
            work(0, ids)
    assert engine.length(0) == 0 and engine.free_pages == pages


@needs_library
def test_logits_that_are_no_numbers_leave_the_slot_as_it_was(tiny: Tiny) -> None:
    model = tiny("opt")
    model.blocks[1].down.weight.fill_(torch.inf)
    engine = engine_of(model)
    with pytest.raises(ValueError, match="not finite"):
        engine.prefill_logits(0, [1, 2, 3])
    assert engine.length(0) == 0
