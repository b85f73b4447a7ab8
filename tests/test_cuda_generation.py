"""Text from the cuda engine's own decode loop against text from its single steps: under Triton's interpreter, on a GPU with -m gpu."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from conftest import Tiny
from dejavu.config import SamplingConfig
from dejavu.engine.cuda.engine import CudaEngine
from dejavu.engine.interface import DecodesTokens, EngineInfo, StepResult
from dejavu.engine.options import EngineOptions
from dejavu.generation.generation import GeneratedText, generate_tokens
from dejavu.generation.pieces import Piece
from dejavu.language_model import LanguageModel
from dejavu.loading import load
from dejavu.model.bundle import export
from dejavu.model.selectors import LayerAdapter
from dejavu.model.tokenizer import Tokenizer
from dejavu.model.transformer import Transformer
from helpers.cuda import DEVICES, on
from helpers.engines import ids_of, random_layers


class Stepped:
    """The engine without its decode loop."""

    def __init__(self, engine: CudaEngine) -> None:
        self._engine = engine

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    @property
    def free_pages(self) -> int:
        return self._engine.free_pages

    def length(self, slot: int) -> int:
        return self._engine.length(slot)

    def prefill(self, slot: int, token_ids: Sequence[int]) -> Tensor:
        return self._engine.prefill(slot, token_ids)

    def step(self, token_ids_B: Sequence[int], slots_B: Sequence[int], **options: Any) -> StepResult:
        return self._engine.step(token_ids_B, slots_B, **options)

    def free(self, slot: int) -> None:
        self._engine.free(slot)

    def prefill_batch(self, slots_B: Sequence[int], token_ids_B: Sequence[Sequence[int]]) -> Tensor:
        return self._engine.prefill_batch(slots_B, token_ids_B)

    def prefill_logits(self, slot: int, token_ids: Sequence[int]) -> Tensor:
        return self._engine.prefill_logits(slot, token_ids)

    def reuse(self, slot: int, token_ids: Sequence[int]) -> int:
        return self._engine.reuse(slot, token_ids)

    def publish(self, slot: int, token_ids: Sequence[int]) -> None:
        self._engine.publish(slot, token_ids)


class Words:
    """Token i is the word " i"; there is no EOS."""

    eos_token_ids = ()

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(f" {token_id}" for token_id in ids)

    def token_bytes(self, token_id: int) -> bytes:
        return self.decode([token_id]).encode()


def written(engine: CudaEngine | Stepped, prompt: list[int], **options: Any) -> tuple[list[Piece], GeneratedText]:
    """The pieces and the text; the slot is empty afterwards, and its pages are back."""
    pages = engine.free_pages
    generation = generate_tokens(engine, Words(), prompt, **options)
    pieces = list(generation)
    assert engine.length(options.get("slot", 0)) == 0 and engine.free_pages == pages
    return pieces, generation.result()


def check_same(engine: CudaEngine, prompt: list[int], **options: Any) -> GeneratedText:
    """Decoded and stepped, greedily: the same pieces, tokens, counts and densities; log-probabilities to 1e-5."""
    assert isinstance(engine, DecodesTokens) and not isinstance(Stepped(engine), DecodesTokens)
    (pieces, text), (expected_pieces, expected) = (written(each, prompt, **options) for each in (engine, Stepped(engine)))
    assert [(piece.text, piece.token_ids, piece.finish_reason) for piece in pieces] == [
        (piece.text, piece.token_ids, piece.finish_reason) for piece in expected_pieces
    ]
    for piece, other in zip(pieces, expected_pieces, strict=True):
        assert [token.counts for token in piece.tokens] == [token.counts for token in other.tokens]
    assert text.logprobs == pytest.approx(expected.logprobs, abs=1e-5)
    for name in ("token_ids", "new_tokens", "finish_reason", "mlp_density", "head_density"):
        assert getattr(text, name) == getattr(expected, name), name
    return text


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_greedy_text_is_that_of_single_steps(tiny: Tiny, device: str) -> None:
    """One engine writes one text after the other, each ending in another way in the middle of a chunk. A group has two query heads."""
    model = on(tiny("llama", max_positions=12, num_layers=1), device)
    engine = CudaEngine(model, random_layers(model, mlp=1, heads=1), EngineOptions(page_size=4))
    prompt = ids_of(6, 4)
    whole = check_same(engine, prompt, max_new_tokens=7)
    assert len(set(whole.token_ids)) > 5 and whole.finish_reason == "length"
    assert whole.mlp_density is not None and 0 < whole.mlp_density < 1 and whole.head_density is not None and whole.head_density >= 0.5
    stop = "".join(f" {token_id}" for token_id in whole.token_ids[4:6])
    stopped = check_same(engine, prompt, max_new_tokens=8, stop=[stop])
    assert (stopped, stopped.finish_reason) == (str(whole)[: str(whole).index(stop)], "stop")
    by_id = check_same(engine, prompt, max_new_tokens=8, stop_ids=[whole.token_ids[2]])
    assert by_id.token_ids == whole.token_ids[:3] and by_id.finish_reason == "stop"
    full = check_same(engine, ids_of(7, 6), max_new_tokens=100)
    assert (full.new_tokens, full.finish_reason) == (6, "length")


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_a_full_cache_ends_both_at_the_same_token(tiny: Tiny, device: str) -> None:
    """Another sequence holds 3 of 6 pages: of the text's 12 tokens 5 are the prompt."""
    engine = CudaEngine(on(tiny("opt", num_layers=1), device), None, EngineOptions(num_slots=2, page_size=4, cache_tokens=24))
    engine.prefill(1, ids_of(9, 9))
    found = []
    for each in (engine, Stepped(engine)):
        pieces = []
        with pytest.raises(ValueError, match="cache is full"):
            for piece in generate_tokens(each, Words(), ids_of(5, 5), max_new_tokens=19):
                pieces.append(piece.text)
        found.append(pieces)
        assert engine.length(0) == 0 and engine.free_pages == 3
    assert found[0] == found[1] and len(found[0]) == 8


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_a_seed_repeats_a_drawn_text(tiny: Tiny, device: str) -> None:
    """On an engine that has written before and on a new one, in any slot; choices of one request differ, as do other seeds."""
    model = on(tiny("opt", num_layers=1), device)
    engine = CudaEngine(model, None, EngineOptions(num_slots=2))
    sampling = SamplingConfig(temperature=1.5, top_p=0.95, seed=3)
    options = {"max_new_tokens": 5, "sampling": sampling}
    _, first = written(engine, ids_of(8, 4), **options)
    _, again = written(engine, ids_of(8, 4), **options, slot=1)
    _, other = written(CudaEngine(model), ids_of(8, 4), **options)
    assert first.token_ids == again.token_ids == other.token_ids and first.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    _, choice = written(engine, ids_of(8, 4), **options, index=1)
    _, reseeded = written(engine, ids_of(8, 4), **{**options, "sampling": SamplingConfig(temperature=1.5, seed=4)})
    fresh = [written(engine, ids_of(8, 4), max_new_tokens=4, sampling=SamplingConfig(temperature=9.0))[1].token_ids for _ in range(2)]
    assert len({first.token_ids, choice.token_ids, reseeded.token_ids}) == 3 and fresh[0] != fresh[1]


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_logits_that_are_not_numbers_end_a_text_as_a_step_does(tiny: Tiny, device: str) -> None:
    """From the sixth step on, in the middle of a chunk."""
    model = on(tiny("opt", num_layers=1), device)
    assert model.position is not None
    with torch.no_grad():
        model.position.weight[4 + 5 + model.config.position_offset] = torch.nan
    engine = CudaEngine(model)
    found = []
    for each in (engine, Stepped(engine)):
        pieces = []
        with pytest.raises(ValueError, match="the model's logits are not numbers") as error:
            for piece in generate_tokens(each, Words(), ids_of(8, 4), max_new_tokens=12):
                pieces.append(piece.text)
        found.append((pieces, str(error.value)))
    assert found[0] == found[1] and len(found[0][0]) == 6
    assert written(engine, ids_of(8, 4), max_new_tokens=4)[1].new_tokens == 4, "NaN in a page that is free again reaches nobody"


@pytest.mark.parametrize("device", DEVICES)
def test_an_engine_that_records_is_stepped(tiny: Tiny, device: str) -> None:
    model = on(tiny("opt", num_layers=1), device)
    engine = CudaEngine(model, random_layers(model, mlp=1, heads=1), EngineOptions(record=True))
    _, text = written(engine, ids_of(8, 4), max_new_tokens=2)
    assert text.trace is not None and text.trace[1] is not None and engine._bucket(1).decode_rows is None


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_a_model_writes_one_text_after_the_other_on_one_engine(
    tiny: Tiny, tokenizer: Tokenizer, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the torch backend does; also after the weights have been on the CPU, and come back to other memory."""
    export(tiny("opt", num_layers=1), tokenizer, tmp_path)
    plain, options = load(tmp_path, backend="torch"), {"max_new_tokens": 5, "ignore_eos": True}
    expected = {prompt: plain.generate(prompt, **options) for prompt in ("the cat", "a dog")}  # pyrefly: ignore[no-matching-overload]
    lm = LanguageModel(load(tmp_path, backend="torch").checkpoint, EngineOptions(backend="cuda"))
    lm.model.to(device)
    engines = []

    def make(model: Transformer, layers: Sequence[LayerAdapter] | None, options: EngineOptions) -> CudaEngine:
        engines.append(CudaEngine(model, layers, options))
        return engines[-1]

    monkeypatch.setattr("dejavu.generation.engine_cache.make_engine", make)

    def same(prompt: str) -> bool:
        found = lm.generate(prompt, **options)  # pyrefly: ignore[no-matching-overload]
        return found.token_ids == expected[prompt].token_ids and found.logprobs == pytest.approx(expected[prompt].logprobs, abs=1e-4)

    for prompt in (*expected, "the cat"):
        assert same(prompt)
    assert len(engines) == 1 and engines[0]._bucket(1).decode_rows is not None, "its own loop was used"
    with lm._offline():
        pass
    assert same("the cat") and len(engines) == 2
