"""The generation loop: limits, counts and speeds, on scripted and on real engines."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from conftest import Tiny, random_predictor
from dejavu.config import SamplingConfig
from dejavu.engine.interface import StepResult
from dejavu.engine.options import EngineOptions
from dejavu.engine.torch_engine import TorchEngine
from dejavu.generation.generation import GeneratedText, Generation, generate_tokens
from dejavu.model.counts import Counts
from dejavu.model.predictor import Predictor
from dejavu.model.selectors import LayerAdapter
from dejavu.model.tokenizer import Tokenizer
from helpers.adapters import predicted
from helpers.scripted import LETTERS, VOCAB, DecodingEngine, ScriptedEngine, WordTokenizer, run


def test_eos_and_stop_ids() -> None:
    words = ["a", "b", "c"]

    def generate(**options: object) -> GeneratedText:
        engine = ScriptedEngine([0, 1, 3, 2, 1])
        return generate_tokens(engine, WordTokenizer(words), [0], max_new_tokens=5, **options).result()  # pyrefly: ignore[bad-argument-type]

    plain = generate()
    assert (plain, plain.finish_reason, plain.token_ids, plain.new_tokens) == ("ab", "stop", (0, 1, 3), 3)
    ignoring = generate(ignore_eos=True)
    assert (ignoring, ignoring.finish_reason, ignoring.token_ids) == ("abcb", "length", (0, 1, 3, 2, 1))
    assert generate(stop_ids=[1]) == "a"
    assert generate(stop_ids=[2], ignore_eos=True) == "ab"
    assert generate(stop=["bc"]) == "ab", "held back text is sent at the end"


def test_counts_and_densities_are_those_of_the_steps() -> None:
    pieces, result = run(["a", "b", "c", "d"])
    assert (result.prompt_tokens, result.new_tokens, result.token_ids) == (1, 4, (0, 1, 2, 3))
    tokens = [token for piece in pieces for token in piece.tokens]
    counted = [token.counts for token in tokens]
    heads = torch.tensor([4, 2])
    assert counted == [None, *(Counts(neurons=torch.tensor([count, 8]), heads=heads) for count in (2, 3, 4))]
    assert result.mlp_density == pytest.approx(((2 + 3 + 4) / 3 / 8 + 1) / 2)
    assert result.head_density == pytest.approx(0.75)
    assert result.logprobs == pytest.approx([float((torch.tensor([9.0] + [0.0] * (VOCAB - 1))).log_softmax(0)[0])] * 4, abs=1e-5)
    assert result.trace is None


def test_one_token_takes_no_step() -> None:
    engine = ScriptedEngine([0, 0])
    result = generate_tokens(engine, WordTokenizer(["a"]), [0], max_new_tokens=1).result()
    assert (result, engine.steps, result.tok_s, result.mlp_density) == ("a", 0, None, None)
    assert result.prefill_tok_s is not None and engine.frees == [0]


def test_no_token_requested_runs_nothing() -> None:
    engine = ScriptedEngine([0])
    generation = generate_tokens(engine, WordTokenizer(["a"]), [0] * 64, max_new_tokens=0)
    assert [(piece.text, piece.finish_reason) for piece in generation] == [("", "length")]
    result = generation.result()
    assert (result, result.new_tokens, result.prompt_tokens, result.prefill_tok_s) == ("", 0, 64, None)


def test_speeds_count_steps_and_leave_out_the_prompt_and_the_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only the engine and the reader move: 10 s of prefill, 2 s a step, 100 s a piece in the reader's hands."""
    now = [0.0]
    monkeypatch.setattr("dejavu.generation.generation.time.perf_counter", lambda: now[0])

    class SlowEngine(ScriptedEngine):
        def prefill(self, slot: int, token_ids: Sequence[int]) -> Tensor:
            now[0] += 10
            return super().prefill(slot, token_ids)

        def step(self, token_ids_B: Sequence[int], slots_B: Sequence[int], **options: Any) -> StepResult:
            now[0] += 2
            return super().step(token_ids_B, slots_B, **options)

    generation = generate_tokens(SlowEngine([0, 0, 0, 0, 0]), WordTokenizer(["a"]), [0] * 30, max_new_tokens=5)
    for _ in generation:
        now[0] += 100
    assert (generation.result().tok_s, generation.result().prefill_tok_s) == (0.5, 3.0)


@pytest.mark.parametrize(("prompt", "requested", "given_tokens"), [(30, 1, 1), (30, 2, 2), (30, 3, 2), (31, 5, 1), (1, 100, 31)])
def test_the_context_ends_the_text(prompt: int, requested: int, given_tokens: int) -> None:
    engine = ScriptedEngine([0] * 40, max_positions=32)
    result = generate_tokens(engine, WordTokenizer(["a"]), [0] * prompt, max_new_tokens=requested).result()
    assert (result.new_tokens, result.finish_reason) == (given_tokens, "length")


def test_bad_input_is_refused_at_once() -> None:
    engine, tokenizer = ScriptedEngine([0], max_positions=32), WordTokenizer(["a"])

    def refused(message: str, prompt: int, count: int) -> None:
        with pytest.raises(ValueError, match=message):
            generate_tokens(engine, tokenizer, [0] * prompt, max_new_tokens=count)

    refused("prompt has 33 tokens and the context holds 32", 33, 1)
    refused("prompt has 33 tokens and the context holds 32", 33, 0)
    refused("prompt has 32 tokens and fills the context of 32", 32, 1)
    refused("no tokens", 0, 1)
    refused("max_new_tokens must be 0 or more, not -1", 3, -1)
    assert engine.frees == [] and engine.lengths[0] == 0


def test_the_slot_is_freed_when_the_reader_leaves() -> None:
    engine = ScriptedEngine([0] * 9)
    generation = generate_tokens(engine, WordTokenizer(["a"]), [0], max_new_tokens=9, slot=1)
    next(generation)
    with pytest.raises(ValueError, match="slot 1 of the engine is in use"):
        generate_tokens(engine, WordTokenizer(["a"]), [0], max_new_tokens=9, slot=1)
    generation.close()
    assert engine.lengths[1] == 0 and engine.frees == [1]
    assert list(generation) == []


def test_the_slot_is_freed_after_an_error() -> None:
    class Failing(ScriptedEngine):
        def step(self, token_ids_B: Sequence[int], slots_B: Sequence[int], **options: Any) -> StepResult:
            raise ValueError("full")

    engine = Failing([0, 0])
    with pytest.raises(ValueError, match="full"):
        generate_tokens(engine, WordTokenizer(["a"]), [0], max_new_tokens=2).result()
    assert engine.frees == [0]


def test_what_a_closed_generation_had_written_can_be_asked_for() -> None:
    engine = ScriptedEngine([0, 1, 2])
    generation = generate_tokens(engine, WordTokenizer(["a", "b"]), [0, 0, 0], max_new_tokens=9)
    assert (next(generation).text, next(generation).text) == ("a", "b")
    generation.close()
    text = generation.written()
    assert (text, text.finish_reason, text.new_tokens, text.prompt_tokens) == ("ab", None, 2, 3) and engine.frees == [0]
    assert text.counts is not None and text.counts.tokens == 4 and text.engine == engine.info


def test_counts_are_means_over_the_steps(tiny: Tiny, tokenizer: Tokenizer) -> None:
    layers = (predicted(mlp=random_predictor(32, 64, torch.Generator().manual_seed(3)), heads=None), LayerAdapter())
    engine = TorchEngine(tiny("opt"), layers)
    result = generate_tokens(engine, tokenizer, [2, 5, 6], max_new_tokens=5, ignore_eos=True)
    steps = [token for piece in result for token in piece.tokens][1:]
    counts = result.result().counts
    assert counts is not None and counts.tokens == (4 + 5 + 6 + 7) / 4 and counts.inputs_LP is None
    assert counts.neurons_L == (sum(int(step.counts.neurons[0]) for step in steps if step.counts) / 4, 64) and counts.heads_L == (4, 4)
    assert 0 < counts.neurons_L[0] < 64


def test_a_prompt_that_begins_as_the_one_before_is_read_from_there(tiny: Tiny, tokenizer: Tokenizer) -> None:
    """Whole pages of what was prefilled, where both generations ask for it; the text stays the same."""
    engine = TorchEngine(tiny("opt"))
    ids = [2, *range(10, 50)]
    long, page = [*ids, 7, 8, 9], engine.info.page_size

    def written(prompt: list[int], *, reuse_prefix: bool = False) -> GeneratedText:
        return generate_tokens(engine, tokenizer, prompt, max_new_tokens=4, ignore_eos=True, reuse_prefix=reuse_prefix).result()

    plain, first, again = written(long), written(ids, reuse_prefix=True), written(long, reuse_prefix=True)
    assert [text.reused_tokens for text in (plain, first, again)] == [0, 0, len(ids) // page * page] and again.reused_tokens > 0
    assert again == plain and again.token_ids == plain.token_ids and again.prompt_tokens == len(long)


# Engines that decode by themselves


@given(
    words=st.lists(LETTERS, min_size=1, max_size=24),
    stops=st.lists(LETTERS.filter(bool), max_size=3),
    limit=st.integers(0, 24),
    stop_id=st.integers(0, 23),
    context=st.integers(2, 30),
)
def test_tokens_that_come_several_at_a_time_give_what_single_ones_do(
    words: list[str], stops: list[str], limit: int, stop_id: int, context: int
) -> None:
    """Whatever ends the text in the middle of a chunk: the same pieces, tokens, counts and densities."""
    found: list[object] = []
    logprobs: list[tuple[float, ...]] = []
    for made in (ScriptedEngine, DecodingEngine):
        engine = made([*range(len(words)), *[len(words)] * 40], max_positions=context)
        options = {"max_new_tokens": limit, "stop": stops, "stop_ids": [stop_id]}
        generation = generate_tokens(engine, WordTokenizer(words), [0], **options)  # pyrefly: ignore[bad-argument-type]
        pieces = [(piece.text, piece.finish_reason, [(token.token_id, token.counts) for token in piece.tokens]) for piece in generation]
        result = generation.result()
        found.append((pieces, result, result.finish_reason, result.new_tokens, result.mlp_density, result.head_density, result.counts))
        logprobs.append(result.logprobs)
        assert engine.frees == [0] and (result.tok_s is None) == (result.new_tokens < 2)
    assert found[0] == found[1] and logprobs[0] == pytest.approx(logprobs[1], abs=1e-6)


def test_chunks_grow_and_keep_to_what_is_left() -> None:
    def requested(*, max_new_tokens: int, max_positions: int = 64, free_pages: int = 100) -> list[int]:
        engine = DecodingEngine([0] * 70, max_positions=max_positions)
        engine.free_pages = free_pages
        generate_tokens(engine, WordTokenizer(["a"]), [0], max_new_tokens=max_new_tokens).result()
        assert engine.steps == sum(engine.requested), "no token too many"
        return engine.requested

    assert requested(max_new_tokens=1) == []
    assert requested(max_new_tokens=29) == [1, 2, 4, 8, 8, 5]
    assert requested(max_new_tokens=100, max_positions=12) == [1, 2, 4, 3]
    assert requested(max_new_tokens=19, free_pages=0)[:5] == [1, 2, 4, 8, 1], "what a page has left, then one, which the engine refuses"


def test_an_engine_that_records_is_stepped() -> None:
    engine = DecodingEngine([0] * 4, records=True)
    assert generate_tokens(engine, WordTokenizer(["a"]), [0], max_new_tokens=4).result() == "aaaa"
    assert (engine.requested, engine.steps) == ([], 3)


def test_tokens_before_logits_that_are_not_numbers_are_handed_out() -> None:
    ended: list[int] = []
    engine = DecodingEngine([0] * 6)
    generation = generate_tokens(engine, WordTokenizer(["a"]), [0], max_new_tokens=9, on_end=lambda: ended.append(0))
    assert [next(generation).text for _ in range(6)] == ["a"] * 6
    with pytest.raises(ValueError, match="logits are not numbers"):
        next(generation)
    assert engine.frees == [0] and ended == [], "an engine that failed is not handed on"


def test_a_text_closed_before_its_first_piece_ends_once_and_leaves_the_slot_to_others() -> None:
    ended: list[int] = []
    engine = DecodingEngine([0] * 6)
    unread, other = (
        generate_tokens(engine, WordTokenizer(["a"]), [0], max_new_tokens=3, on_end=lambda number=number: ended.append(number))
        for number in (1, 2)
    )
    next(other)
    unread.close()
    unread.close()
    assert ended == [1] and engine.frees == [] and list(unread) == []
    assert other.result() == "aaa" and ended == [1, 2]


def test_the_time_of_dropped_tokens_counts_and_they_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("dejavu.generation.generation.time.perf_counter", lambda: now[0])

    class SlowEngine(DecodingEngine):
        def step(self, token_ids_B: Sequence[int], slots_B: Sequence[int], **options: Any) -> StepResult:
            now[0] += 2
            return super().step(token_ids_B, slots_B, **options)

    engine = SlowEngine([0, 0, 0, 0, 1, *[0] * 20])
    result = generate_tokens(engine, WordTokenizer(["a"]), [0], max_new_tokens=20).result()
    assert (result, engine.requested, result.new_tokens, result.tok_s) == ("aaaa", [1, 2, 4], 5, 4 / 14)


def test_the_end_is_told_once_when_the_slot_is_free() -> None:
    for leave_early in (False, True):
        engine, ended = ScriptedEngine([0] * 4), []
        generation = generate_tokens(
            engine, WordTokenizer(["a"]), [0], max_new_tokens=3, on_end=lambda at=engine, told=ended: told.append(at.length(0))
        )
        next(generation)
        assert ended == []
        if not leave_early:
            generation.result()
        generation.close()
        assert ended == [0]


# Real engines


@pytest.fixture(scope="session")
def start(tiny: Tiny, tokenizer: Tokenizer) -> Callable[..., Generation]:
    """Start a generation of a tiny model: sparse, with random predictors, unless dense."""
    model = tiny("opt")
    generator = torch.Generator().manual_seed(1)

    def predictor(outputs: int) -> Predictor:
        return random_predictor(32, outputs, generator, threshold=0.5)

    layers = (predicted(mlp=predictor(64), heads=predictor(4)), predicted(mlp=predictor(64)))

    def build(prompt: str, *, dense: bool = False, record: bool = False, count: int = 20, **sampling: float) -> Generation:
        engine = TorchEngine(model, None if dense else layers, EngineOptions(record=record))
        return generate_tokens(
            engine,
            tokenizer,
            tokenizer.encode(prompt),
            max_new_tokens=count,
            sampling=SamplingConfig(**sampling),  # pyrefly: ignore[bad-argument-type]
            ignore_eos=True,
        )

    return build


def test_greedy_text_is_the_argmax_of_the_whole_model(tiny: Tiny, tokenizer: Tokenizer, start: Callable[..., Generation]) -> None:
    model, ids = tiny("opt"), tokenizer.encode("the cat")
    result = start("the cat", dense=True).result()
    for token_id, logprob in zip(result.token_ids, result.logprobs, strict=True):
        logprob_V = model(torch.tensor([ids]))[0, -1].log_softmax(0)
        assert token_id == int(logprob_V.argmax()) and logprob == pytest.approx(float(logprob_V[token_id]), abs=1e-5)
        ids.append(token_id)
    assert (result.mlp_density, result.head_density, result.new_tokens) == (1.0, 1.0, 20)
    assert result == tokenizer.decode(ids)[len("the cat") :]


def test_sparse_text_reports_the_density_that_was_used(start: Callable[..., Generation]) -> None:
    result = start("the cat", record=True).result()
    assert result.trace is not None and len(result.trace) == 20 and result.trace[0] is None
    neurons = heads = 0
    for layers in result.trace[1:]:
        assert layers is not None and layers[1].heads_A is None
        neurons += sum(len(layer.neurons_A) for layer in layers)  # pyrefly: ignore[bad-argument-type]
        heads += len(layers[0].heads_A) + 4  # pyrefly: ignore[bad-argument-type]
    assert result.mlp_density == pytest.approx(neurons / 19 / 128) and 0.1 < neurons / 19 / 128 < 0.6
    assert result.head_density == pytest.approx(heads / 19 / 8) and 0.5 < heads / 19 / 8 < 1
    assert result.tok_s is not None and result.tok_s > 0
    assert start("the cat").result().trace is None


def test_a_seed_reproduces_the_text(start: Callable[..., Generation]) -> None:
    before = torch.get_rng_state()
    alone = start("the cat", temperature=1.0, seed=11).result()
    mine, other = start("the cat", temperature=1.0, seed=11), start("the hat", temperature=1.0)
    for _ in range(3):
        next(other)
    pieces = []
    for piece in mine:  # next to an unseeded one that runs on between
        pieces.append(piece)
        next(other, None)
    assert mine.result() == alone and mine.result().token_ids == alone.token_ids
    assert start("the cat", temperature=1.0, seed=12).result().token_ids != alone.token_ids
    assert torch.equal(torch.get_rng_state(), before)


def test_top_k_1_is_greedy(start: Callable[..., Generation]) -> None:
    assert start("the", temperature=2.0, top_k=1, seed=1).result().token_ids == start("the").result().token_ids
