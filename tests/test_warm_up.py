"""Before the first client: every size of a step has run, on real text, and nothing of it is left."""

from __future__ import annotations

import pytest

from dejavu.serve.core.warm_up import LONG, PROMPT, warm_up
from helpers.stub_engine import DrawingEngine, StubEngine, StubModel, byte_tokenizer
from helpers.worker_requests import failing, outcomes, request, run, serving, text_of


class CapturingEngine(DrawingEngine):
    """One that has something to prepare."""

    def graph(self, rows: int) -> None:
        return None


def sizes(engine: StubEngine, what: str = "step") -> list[int]:
    return [rows for kind, _, rows in engine.calls if kind == what]


@pytest.mark.parametrize(("slots", "expected"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_every_size_runs_on_short_and_on_long_text(slots: int, expected: list[int]) -> None:
    engine = CapturingEngine(num_slots=slots, cache_tokens=8192, max_positions=2048)
    warm_up(engine, byte_tokenizer(), longest=engine.info.max_positions)
    twice = [size for size in expected for _ in range(2)]  # a step, and one that is drawn from
    assert sizes(engine) == twice * 2
    assert [tokens for kind, _, tokens in engine.calls if kind == "prefill"] == [PROMPT] * slots + [LONG] + [PROMPT] * (slots - 1)
    assert len(engine.drawn) == 2 * len(expected), "the engine's own draw ran too"
    assert engine.free_pages == engine.info.num_pages and engine.live_sequences == 0


def test_where_dense_calls_come_too_both_are_prepared() -> None:
    engine = CapturingEngine(num_slots=2, cache_tokens=1024)
    warm_up(engine, byte_tokenizer(), longest=64, both=True)
    assert sizes(engine) == [size for size in (1, 2) for _ in range(4)] and len(engine.drawn) == 4


def test_a_long_text_is_longer_than_what_the_cuda_engine_calls_short() -> None:
    pytest.importorskip("triton")
    from dejavu.kernels.cuda.attention import SHORT

    assert SHORT < LONG < SHORT + PROMPT + 1, "no longer than it must be: a prompt that does not fit is left out"


def test_rows_have_texts_of_their_own() -> None:
    """The union of rows that say the same would be that of one."""
    seen: list[list[int]] = []
    engine = CapturingEngine(num_slots=8, cache_tokens=1024)
    engine.before = lambda what, slots: seen.extend(list(engine.sequences[slot]) for slot in slots) if what == "free" else None
    warm_up(engine, byte_tokenizer(), longest=engine.info.max_positions)
    assert len({tuple(ids[:PROMPT]) for ids in seen}) == 8


@pytest.mark.parametrize(
    ("cache_tokens", "max_positions", "rows"), [(64, 256, 2), (16, 256, 1), (4096, 20, 4), (4096, 8, 4), (4096, 6, 0), (8192, 1040, 4)]
)
def test_what_does_not_fit_is_left_out(cache_tokens: int, max_positions: int, rows: int) -> None:
    engine = CapturingEngine(num_slots=4, cache_tokens=cache_tokens, max_positions=max_positions)
    warm_up(engine, byte_tokenizer(), longest=engine.info.max_positions)
    assert max(sizes(engine), default=0) == rows
    assert engine.free_pages == engine.info.num_pages


def test_an_engine_without_graphs_has_nothing_to_prepare() -> None:
    engine = DrawingEngine(num_slots=4)
    warm_up(engine, byte_tokenizer(), longest=engine.info.max_positions)
    assert not engine.calls


def test_a_failure_leaves_nothing_behind_and_is_told() -> None:
    def refuse(what: str, slots: object) -> None:
        if what == "step":
            raise RuntimeError("no kernel image")

    engine = CapturingEngine(num_slots=2)
    engine.before = refuse
    with pytest.raises(RuntimeError, match="no kernel image"):
        warm_up(engine, byte_tokenizer(), longest=engine.info.max_positions)
    assert engine.free_pages == engine.info.num_pages and engine.live_sequences == 0


def test_a_worker_warms_its_engines_before_it_takes_requests() -> None:
    """Also the one that is made anew after a failure."""
    model = StubModel(engine=CapturingEngine, max_positions=2048)
    with serving(model, slots=4) as worker:
        dense, sparse = model.engines
        assert sizes(dense) == sizes(sparse) == [1, 1, 2, 2, 4, 4] * 2
        sparse.before = failing(RuntimeError("sticky"), "prefill")
        assert [outcomes([worker.submit(request())])[0][:6] for _ in range(2)] == ["failed"] * 2
        sparse.before = lambda what, slots: None
        assert [text_of(events) for events in run(worker, request(), request(trace=True))] == [" and so on"] * 2
        _, _, again = model.engines
        assert sizes(again)[:12] == [1, 1, 2, 2, 4, 4] * 2
        assert worker.state().pages_free == worker.state().pages_total
        assert worker.state().tokens == 2 * (len(" and so on") + 1), "what warms up counts nowhere"
