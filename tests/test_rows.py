"""The step that every decode loop takes: who draws, how many tokens at once, and what becomes of rows whose logits are not numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dejavu.attached import GenerateCall, decode
from dejavu.config import Penalties, SamplingConfig
from dejavu.engine.interface import StepResult
from dejavu.engine.sampling import Distribution, Sampler
from dejavu.generation.pieces import Token
from dejavu.generation.rows import CHUNK, Row, advance, draw, draws, tokens_at_once
from helpers.stub_engine import EOS, HEADS, LAYERS, NEURONS, DrawingEngine, StubEngine

PROMPT = b"Once"


def begun(engine: StubEngine, rows: int = 1, **options: Any) -> list[Row]:
    """Rows with a prompt each, that have their first token."""
    made = [Row(slot=slot, sampler=Sampler(SamplingConfig(seed=slot), index=slot), **options) for slot in range(rows)]
    for row in made:
        assert row.last == -1
        assert draw(row, engine.prefill(row.slot, list(PROMPT))).token_id == row.last
    return made


def ids(tokens: Sequence[Token | ValueError]) -> list[int]:
    return [token.token_id for token in tokens if isinstance(token, Token)]


def test_how_many_tokens_are_asked_for() -> None:
    """Each call asks for as many as there are and one more, up to the most; never for more than are left."""
    decoded, requested = 0, []
    while decoded < 30:
        requested.append(tokens_at_once(decoded, 30 - decoded))
        decoded += requested[-1]
    assert requested == [1, 2, 4, CHUNK, CHUNK, 7] and decoded == 30
    assert tokens_at_once(9, 100, most=1) == 1 and tokens_at_once(9, 100, most=4) == 4
    assert tokens_at_once(9, 0) == tokens_at_once(9, -3) == 1, "an engine that is full says so itself"


def test_an_engine_draws_unless_it_records() -> None:
    assert draws(DrawingEngine()) and not draws(DrawingEngine(record=True)) and not draws(StubEngine()) and not draws(None)


HOST = [{"top": 0}, {"top": 2}, {"bias": {65: -1.0}}, {"trace": True}, {"forbidden": {EOS}}, {"penalties": Penalties(presence=0.1)}]


@pytest.mark.parametrize("options", HOST)
def test_rows_that_want_more_than_tokens_are_drawn_on_the_host(options: dict[str, Any]) -> None:
    engine = DrawingEngine("abcdefgh")
    plain, more = begun(engine)[0], Row(slot=1, sampler=Sampler(SamplingConfig()), **options)
    draw(more, engine.prefill(1, list(PROMPT)))
    (step,) = advance(engine, [plain, more], 4)
    assert ids(step.tokens_B) == [ord("b")] * 2 and engine.requested == [], "one of them is enough"
    assert [row.last for row in (plain, more)] == [ord("b")] * 2
    steps = advance(engine, [plain], 3)
    assert [ids(step.tokens_B) for step in steps] == [[ord(c)] for c in "cde"] and engine.requested == [(3, 1)] and plain.last == ord("e")
    assert [(row.slot, row.last) for row in (plain, more)] == [(0, ord("e")), (1, ord("b"))]


def test_penalties_count_what_was_drawn_and_what_the_prompt_has() -> None:
    """Each token's logit after the bias: divided by the repetition penalty where it is positive, else multiplied; then less the others."""
    logits_V = torch.tensor([4.0, 3.9, -1.0, 3.0, -torch.inf])
    row = Row(
        slot=0, sampler=Sampler(SamplingConfig()), bias={1: 0.2}, prompt=frozenset({3}), forbidden=frozenset({0}),
        penalties=Penalties(presence=0.5, frequency=0.25, repetition=2.0),
    )  # fmt: skip
    assert row.added(Distribution(logits_V)) == {0: -math.inf, 1: 0.2, 3: -1.5}
    row.forbidden = frozenset()
    assert [draw(row, logits_V).token_id for _ in range(4)] == [1, 0, 3, 1]
    assert row.drawn == {1: 2, 0: 1, 3: 1}
    found = row.added(Distribution(logits_V))
    assert found[1] == pytest.approx((3.9 + 0.2) / 2 - 0.5 - 0.5 - 3.9) and found[0] == pytest.approx(4.0 / 2 - 0.75 - 4.0)
    row.drawn[2] += 1
    assert row.added(Distribution(logits_V))[2] == pytest.approx(-2.0 - 0.75 + 1.0)
    row.drawn[4] += 1
    assert 4 not in row.added(Distribution(logits_V)), "what is impossible stays so"


@pytest.mark.parametrize("kind", [StubEngine, DrawingEngine])
def test_a_token_tells_what_its_step_selected(kind: type[StubEngine]) -> None:
    engine = kind("abcd")
    rows = begun(engine, 2, scored=True)
    (step,) = advance(engine, rows)
    for token in step.tokens_B:
        assert isinstance(token, Token) and token.logprob is not None and token.logprob == pytest.approx(0, abs=1e-3)
        assert (token.mlp_density, token.head_density) == (0.625, 0.75)
        assert token.counts is not None and token.counts.neurons.tolist() == [NEURONS // 4, NEURONS]
        assert token.counts.heads.tolist() == [HEADS // 2, HEADS] and token.selections is None and token.top == ()
    assert step.union_L is not None and step.union_L.tolist() == [NEURONS // 4, NEURONS]
    assert step.fallback_layers == int(kind is DrawingEngine)


def test_selections_and_likeliest_tokens_come_where_they_are_requested() -> None:
    engine = StubEngine("abcd", record=True)
    (row,) = begun(engine, top=2)
    (found,) = advance(engine, [row])[0].tokens_B
    assert isinstance(found, Token) and found.selections is not None and len(found.selections) == LAYERS
    assert [token_id for token_id, _ in found.top] == [ord("b"), 0] and found.top[0][1] == found.logprob
    (row,) = begun(StubEngine("abcd"), top=None)
    assert draw(row, torch.zeros(300)).logprob is None


class Torn(StubEngine):
    """The logits of slot 1 are not numbers."""

    def step(self, token_ids_B: Sequence[int], slots_B: Sequence[int], **options: Any) -> StepResult:
        found = super().step(token_ids_B, slots_B, **options)
        found.logits_BV[list(slots_B).index(1)] = torch.nan
        return found


def test_a_row_whose_logits_are_no_numbers_has_an_error_and_the_others_a_token() -> None:
    engine = Torn("abcd")
    rows = begun(engine, 3)
    first, torn, last = advance(engine, rows)[0].tokens_B
    assert isinstance(torn, ValueError) and "not numbers" in str(torn) and ids([first, last]) == [ord("b")] * 2
    drawing = DrawingEngine("abcd")
    drawing.damaged = ord("b")
    steps = advance(drawing, begun(drawing), 2)
    (good,), (bad,) = (step.tokens_B for step in steps)
    assert ids([good]) == [ord("b")] and isinstance(bad, ValueError) and "not numbers" in str(bad)


class Put:
    def __init__(self) -> None:
        self.given: list[list[int]] = []

    def put(self, value: Tensor) -> None:
        self.given.append(value.tolist())

    def end(self) -> None: ...


def test_generate_of_transformers_draws_where_the_engine_does() -> None:
    """A few tokens at a time, by the call's settings; what lies behind a row's end is dropped, and a streamer gets padding there."""
    answers = {1: "ab", 2: "cdefghijklm"}
    sampling = SamplingConfig(temperature=1.0, seed=5)
    call = GenerateCall([[1], [2, 2]], 9, frozenset([EOS]), 0, sampling)
    found, given = [], []
    for kind in (StubEngine, DrawingEngine):
        engine, streamer = kind(lambda prompt: answers[prompt[0]].encode()), Put()
        found.append(decode(engine, call, streamer))
        given.append(streamer.given)
        if isinstance(engine, DrawingEngine):
            assert engine.requested == [(1, 2), (2, 2), (4, 1), (1, 1)]
            assert engine.drawn[0] == ((5, 0), (5, 1)) and engine.drawn[-1] == ((5, 1),), "each row has a stream of its own"
    assert found[0] == found[1] == [[*b"ab", EOS], [*b"cdefghijk"]]
    assert given[0] == given[1] == [[97, 99], [98, 100], [EOS, 101], *([0, each] for each in range(102, 108))]


def test_a_damaged_row_ends_a_call_of_generate() -> None:
    engine = DrawingEngine("abcd")
    engine.damaged = ord("b")
    with pytest.raises(ValueError, match="not numbers"):
        decode(engine, GenerateCall([[1]], 9, frozenset([EOS]), 0, SamplingConfig()))
