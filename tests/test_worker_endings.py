"""The worker on a scripted engine: who leaves and what fails, and that nobody else notices."""

from __future__ import annotations

import dataclasses
import logging
import random
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dejavu.engine.interface import StepResult
from dejavu.engine.sampling import NOT_NUMBERS
from dejavu.serve.config import ServeConfig
from dejavu.serve.core.engine_loop import EngineLoop
from dejavu.serve.core.interface import EngineFailed
from dejavu.serve.core.worker import Worker
from helpers.stub_engine import VOCAB, DrawingEngine, StubEngine, StubModel
from helpers.worker_requests import failing, is_idle, outcomes, request, serving, text_of, until

# Cancelling


@pytest.mark.parametrize("seen", [0, 1, 5])
def test_a_cancelled_stream_frees_its_slot_within_a_step(seen: int) -> None:
    model = StubModel("a" * 200)
    with serving(model) as worker:
        engine = model.engines[1]
        stream = worker.submit(request(new=200))
        events = stream.events()
        for _ in range(seen):
            next(events)
        engine.hold()
        until(engine.waiting.is_set)
        steps = engine.steps
        stream.cancel()
        stream.cancel()
        engine.release()
        until(lambda: is_idle(model))
        assert engine.steps <= steps + 1
        assert list(events) == [], "nothing comes behind a cancellation"
        until(lambda: worker.state().running == 0)
        assert (worker.state().cancelled, worker.state().failed, worker.state().finished) == (1, 0, 0)


def test_a_cancelled_prompt_is_not_read_to_its_end() -> None:
    model = StubModel("abc", max_positions=2048)
    with serving(model, prefill_chunk=1) as worker:
        engine = model.engines[1]
        stream = worker.submit(request([5] * 2000, new=3))
        until(lambda: engine.prefills > 3)
        stream.cancel()
        until(lambda: is_idle(model))
        assert engine.prefills < 2000


def test_a_waiting_request_is_cancelled_without_a_step() -> None:
    model = StubModel("abc" * 9)
    with serving(model, slots=1) as worker:
        engine = model.engines[1]
        engine.hold()
        first, second = worker.submit_all([request(new=4), request("Twice", new=4)])
        until(engine.waiting.is_set)
        second.cancel()
        assert worker.state().queued == 0
        engine.release()
        assert text_of(list(first.events())) == "abca" and list(second.events()) == []
        assert engine.prefills == 1


@pytest.mark.parametrize("at", ["prefill", "step"])
def test_who_leaves_during_a_turn_is_left_out_of_the_rest_of_it(at: str) -> None:
    """The first row's call ends the second's stream: neither is the second's prompt read, nor a token of it decoded."""
    model = StubModel("abcdef", engine=DrawingEngine)
    with serving(model, slots=2) as worker:
        engine = model.engines[1]
        engine.hold()
        first, second = worker.submit_all([request("One", new=6), request("Two", new=6, top_logprobs=0)])

        def before(what: str, slots: Sequence[int]) -> None:
            if what == at and 0 in slots:
                second.cancel()

        engine.before = before
        engine.release()
        assert text_of(list(first.events())) == "abcdef"
        until(lambda: is_idle(model))
        others = [what for what, slots, _ in engine.calls if 1 in slots]
        assert others == {"prefill": [], "step": ["prefill"]}[at]


def reading_together(model: StubModel) -> Any:
    """The sparse engine of a model, which now reads the prompts of a turn by one call."""
    engine = model.engines[1]
    engine.info = dataclasses.replace(engine.info, prompts_together=True)
    return engine


def test_prompts_of_a_turn_are_read_together() -> None:
    """One that is refused is told so alone; one that left meanwhile is not decoded."""
    model = StubModel("abcdef", engine=DrawingEngine)
    with serving(model, slots=3) as worker:
        engine = reading_together(model)
        batches: list[list[int]] = []

        def together(slots_B: Sequence[int], token_ids_B: Sequence[Sequence[int]], one: Any = engine.prefill) -> Tensor:
            batches.append(list(slots_B))
            if len(batches) == 1:
                raise ValueError("one of them is refused")
            return torch.stack([one(slot, token_ids) for slot, token_ids in zip(slots_B, token_ids_B, strict=True)])

        engine.prefill_batch = together
        engine.before = failing(ValueError("refused"), "prefill", when=lambda slots: 0 in slots)
        assert outcomes(worker.submit_all([request("One"), request("Two")])) == ["failed: refused", "abcdef"]
        engine.before = lambda what, slots: None
        engine.hold()
        streams = worker.submit_all([request("One"), request("Two"), request("Three", new=1)])
        streams[1].cancel()
        engine.release()
        assert outcomes([streams[0], streams[2]]) == ["abcdef", "a"]
        assert [len(batch) for batch in batches] == [2, 2] or [len(batch) for batch in batches] == [2, 3]
        until(lambda: is_idle(model))


def test_an_error_of_prompts_read_together_ends_all_of_them() -> None:
    model = StubModel("abcdef", engine=DrawingEngine)
    with serving(model, slots=2) as worker:
        engine = reading_together(model)
        engine.before = failing(RuntimeError("at /srv/secret.py"), "prefill", when=lambda slots: 0 in slots)
        failed = "failed: the engine failed (RuntimeError)"
        assert outcomes(worker.submit_all([request("One"), request("Two")])) == [failed, failed]
        engine.before = lambda what, slots: None
        assert outcomes([worker.submit(request())]) == ["abcdef"] and is_idle(model)


def test_who_leaves_in_the_step_of_its_last_token_has_left() -> None:
    model = StubModel("abcdef")
    with serving(model) as worker:
        engine = model.engines[1]
        engine.hold()
        stream = worker.submit(request(new=2))
        until(engine.waiting.is_set)
        engine.before = lambda what, slots: stream.cancel()
        engine.release()
        until(lambda: is_idle(model) and worker.state().running == 0)
        assert (worker.state().finished, worker.state().cancelled, worker.state().failed) == (0, 1, 0)


def test_cancelling_what_has_ended_changes_nothing() -> None:
    with serving(StubModel("abc")) as worker:
        stream = worker.submit(request())
        until(lambda: worker.state().finished == 1)
        stream.cancel()
        assert text_of(list(stream.events())) == "abc"
        assert worker.state().cancelled == 0


def test_survivors_do_not_notice_who_leaves() -> None:
    answers = {n: bytes(97 + (n * 7 + place) % 26 for place in range(30)) for n in range(70)}
    model = StubModel(lambda prompt: answers.get(prompt[-1], b""), page_size=4)
    chance = random.Random(4)
    with serving(model, slots=6, queue=100, cache_tokens=400, prefill_chunk=16) as worker:
        requests = [request([200] * chance.randrange(30) + [n], new=30) for n in range(70)]
        streams = worker.submit_all(requests)
        leaving = chance.sample(range(70), 50)
        for n in leaving:
            reader = streams[n].events()
            for _ in range(chance.randrange(4) if n < 6 else 0):
                next(reader)
            streams[n].cancel()
        for n in set(range(70)) - set(leaving):
            assert text_of(list(streams[n].events())) == answers[n].decode()
        until(lambda: worker.state().running == 0)
        assert is_idle(model) and worker.state().queued == 0
        assert worker.state().finished + worker.state().cancelled == 70


# Failures


def test_a_refused_step_ends_only_the_row_at_fault() -> None:
    model = StubModel("abcdef")
    with serving(model, slots=3) as worker:
        model.engines[1].before = failing(ValueError("logits are not finite"), "step", when=lambda slots: 1 in slots)
        found = outcomes(worker.submit_all([request("One"), request("Two"), request("Three")]))
        assert found == ["abcdef", "failed: logits are not finite", "abcdef"]
        assert len(model.engines) == 2 and worker.state().failed == 1 and worker.state().last_error == "ValueError: logits are not finite"
        model.engines[1].before = lambda what, slots: None
        assert outcomes(worker.submit_all([request()] * 3)) == ["abcdef"] * 3
        assert is_idle(model)


class HalfDoneEngine(StubEngine):
    """Refuses a step of several rows when it has done it: not what engines may do."""

    def step(self, token_ids_B: Sequence[int], slots_B: Sequence[int], **options: Any) -> StepResult:
        result = super().step(token_ids_B, slots_B, **options)
        if len(slots_B) > 1:
            raise ValueError("too late")
        return result


def test_a_step_that_was_done_is_not_done_again() -> None:
    model = StubModel("abcdef", engine=HalfDoneEngine)
    with serving(model) as worker:
        assert outcomes(worker.submit_all([request("One"), request("Two")])) == ["failed: too late"] * 2
        assert outcomes([worker.submit(request())]) == ["abcdef"] and is_idle(model)


def test_logits_that_are_no_numbers_end_only_their_row() -> None:
    model = StubModel("abcdef", engine=DamagedEngine)
    with serving(model) as worker:
        found = outcomes(worker.submit_all([request("One"), request([VOCAB - 2, 66]), request("Three")]))
        assert found == ["abcdef", f"failed: {NOT_NUMBERS}", "abcdef"]
        assert is_idle(model)


class DamagedEngine(StubEngine):
    """From the second token on, NaN for a sequence that begins with token 255."""

    def _logits(self, slot: int) -> torch.Tensor:
        damaged = self.sequences[slot][0] == VOCAB - 2 and len(self.sequences[slot]) > 3
        return super()._logits(slot) * (float("nan") if damaged else 1.0)


def test_a_refused_prompt_ends_alone() -> None:
    model = StubModel("abc")
    with serving(model, prefill_chunk=40) as worker:
        model.engines[1].before = failing(ValueError("refused"), "prefill", when=lambda slots: 0 in slots)
        assert outcomes(worker.submit_all([request("One"), request("Two")])) == ["failed: refused", "abc"]
        assert is_idle(model) and len(model.engines) == 2


@pytest.mark.parametrize("what", ["prefill", "step", "publish"])
def test_an_error_without_a_reason_ends_the_rows_of_its_call_and_names_no_details(what: str) -> None:
    model = StubModel("abcdef")
    with serving(model, slots=2) as worker:
        model.engines[1].before = failing(RuntimeError("at /srv/secret.py"), what, when=lambda slots: 0 in slots)
        first, second, third = outcomes(worker.submit_all([request("One"), request("Two"), request("Three", new=1)]))
        assert first == "failed: the engine failed (RuntimeError)"
        assert second == (first if what == "step" else "abcdef"), "a step is of both"
        assert worker.state().last_error == "RuntimeError: at /srv/secret.py" and worker.state().alive
        assert third in ("a", first)
        model.engines[-1].before = lambda what, slots: None
        assert outcomes([worker.submit(request())]) == ["abcdef"]
        assert is_idle(model)


def test_an_engine_that_fails_again_and_again_is_made_anew() -> None:
    model = StubModel("abcdef")
    with serving(model, slots=1) as worker:
        broken = model.engines[1]
        broken.before = failing(RuntimeError("sticky"), "prefill")
        found = outcomes(worker.submit_all([request()] * 4))
        assert found == ["failed: the engine failed (RuntimeError)"] * 2 + ["abcdef"] * 2
        assert len(model.engines) == 3 and broken.prefills == 2


def test_an_engine_whose_steps_fail_again_and_again_is_made_anew_though_it_reads_prompts() -> None:
    model = StubModel("abcdef")
    with serving(model, slots=1) as worker:
        model.engines[1].before = failing(RuntimeError("sticky"), "step")
        found = [outcomes([worker.submit(request())])[0] for _ in range(4)]
        assert found == ["failed: the engine failed (RuntimeError)"] * 2 + ["abcdef"] * 2 and len(model.engines) == 3


def test_prompts_that_fail_do_not_cost_those_that_are_written() -> None:
    model = StubModel("a" * 100)
    with serving(model, slots=3) as worker:
        engine = model.engines[1]
        engine.hold()
        writes = worker.submit(request(new=60))
        until(engine.waiting.is_set)
        engine.before = failing(RuntimeError("CUDA out of memory"), "prefill")
        for _ in range(3):
            fails = worker.submit(request("Two"))
            engine.allow(3)
            assert outcomes([fails]) == ["failed: the engine failed (RuntimeError)"]
        engine.release()
        assert outcomes([writes]) == ["a" * 60] and len(model.engines) == 2
        assert outcomes([worker.submit(request("Three")) for _ in range(1)]) == ["failed: the engine failed (RuntimeError)"]


def test_an_engine_that_cannot_draw_is_made_anew_though_it_steps() -> None:
    class Blind(DrawingEngine):
        def decode(self, *arguments: Any, **options: Any) -> Any:
            raise RuntimeError("no kernel image")

    model = StubModel("abc", engine=Blind)
    with serving(model) as worker:
        found = [outcomes([worker.submit(request(top_logprobs=scored))])[0] for scored in (None, 0, None, 0)]
        assert found == ["failed: the engine failed (RuntimeError)", "abc"] * 2 and len(model.engines) == 3


@pytest.mark.parametrize("chained", [False, True])
def test_the_memory_of_an_engine_is_free_when_the_next_is_made(chained: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, logger="dejavu")  # a record that is kept has the traceback, and that the engine
    model, there = StubModel("abc"), []
    make = model.engine
    with serving(model, slots=1) as worker:

        def before(what: str, slots: Sequence[int]) -> None:
            if what == "prefill":
                try:
                    raise KeyError("what led to it")
                except KeyError as error:
                    if chained:
                        raise RuntimeError("sticky") from error
                raise RuntimeError("sticky")

        model.engines[1].before = before
        old = weakref.ref(model.engines.pop(1))

        def engine(**settings: Any) -> StubEngine:
            there.append(old() is not None)
            return make(**settings)

        model.engine = engine
        streams = worker.submit_all([request()] * 4)
        assert outcomes(streams) == ["failed: the engine failed (RuntimeError)"] * 2 + ["abc"] * 2
        assert there == [False]


def test_each_request_fails_once_also_where_its_slot_cannot_be_freed() -> None:
    model = StubModel("abcdef")
    with serving(model, slots=4) as worker:

        def before(what: str, slots: Sequence[int]) -> None:
            if what in ("step", "free"):
                raise RuntimeError("lost")

        model.engines[1].before = before
        assert (
            outcomes(worker.submit_all([request("One"), request("Two"), request("Three")]))
            == ["failed: the engine failed (RuntimeError)"] * 3
        )
        until(lambda: worker.state().running == 0)
        assert worker.state().failed == 3 and worker.state().last_error == "RuntimeError: lost"


def test_who_hears_of_a_failure_finds_the_slot_free() -> None:
    model, told = StubModel("abcdef"), []
    with serving(model, slots=1) as worker:
        engine = model.engines[1]
        engine.hold()
        stream = worker.submit(request())
        until(engine.waiting.is_set)

        def before(what: str, slots: Sequence[int]) -> None:
            if what == "step":
                raise RuntimeError("lost")
            told.append((what, worker.state().failed))

        engine.before = before
        engine.release()
        assert outcomes([stream]) == ["failed: the engine failed (RuntimeError)"]
        assert told == [("free", 0)]
        stream.cancel()
        assert (worker.state().failed, worker.state().cancelled) == (1, 0)


@pytest.mark.parametrize("bad", [1, 2, 5])
def test_logits_that_are_no_numbers_in_the_middle_of_a_turn_of_several_tokens(bad: int) -> None:
    model = StubModel("abcdefgh", engine=DrawingEngine)
    with serving(model) as worker:
        engine = model.engines[1]
        assert isinstance(engine, DrawingEngine)
        engine.damaged = ord("abcdefgh"[bad - 1])
        stream = worker.submit(request())
        events, reader = [], stream.events()
        with pytest.raises(EngineFailed, match="not numbers"):
            events.extend(iter(lambda: next(reader), None))
        assert text_of(events) == "abcdefgh"[:bad]
        assert worker.state().failed == 1 and worker.state().tokens == bad and is_idle(model) and len(model.engines) == 2


def test_a_failure_now_and_then_does_not_cost_the_engine() -> None:
    model = StubModel("abcdef")
    with serving(model, slots=1) as worker:
        engine, calls = model.engines[1], iter(range(100))
        engine.before = failing(RuntimeError("now and then"), "prefill", when=lambda slots: next(calls) % 2 == 0)
        assert outcomes(worker.submit_all([request()] * 6)) == ["failed: the engine failed (RuntimeError)", "abcdef"] * 3
        assert len(model.engines) == 2


@pytest.mark.parametrize("what", ["free", "reuse"])
def test_an_engine_that_cannot_keep_its_books_is_made_anew(what: str) -> None:
    """Those that run in it fail; those that wait go on in the next."""
    model = StubModel("abcdef")
    with serving(model, slots=2) as worker:
        model.engines[1].before = failing(RuntimeError("lost"), what)
        prompt = [5] * 20
        found = outcomes(
            worker.submit_all(
                [request(prompt, new=1), request([6, *prompt], new=5), request([7, *prompt], new=5), request([8, *prompt], new=5)]
            )
        )
        ended = "failed: the engine failed (RuntimeError)"
        assert found == (["a", ended, "abcde", "abcde"] if what == "free" else [ended, "abcde", "abcde", "abcde"])
        assert len(model.engines) == 3 and is_idle_but(model, 1)
        assert worker.state().alive and worker.state().pages_free == worker.state().pages_total


def is_idle_but(model: StubModel, abandoned: int) -> bool:
    return all(engine.live_sequences == 0 for index, engine in enumerate(model.engines) if index != abandoned)


def test_an_engine_that_cannot_be_made_fails_its_requests_and_is_tried_again() -> None:
    model = StubModel("abc")
    with serving(model, slots=1) as worker:
        model.engines[1].before = failing(RuntimeError("lost"), "free")
        model.fail = 1
        assert (
            outcomes(worker.submit_all([request(new=1), request(), request()])) == ["a"] + ["failed: the engine failed (RuntimeError)"] * 2
        )
        assert not worker.state().alive and worker.state().last_error == "RuntimeError: the engine cannot be made"
        assert outcomes([worker.submit(request(dense=True))]) == ["abc"], "the other engine is there"
        assert outcomes([worker.submit(request())]) == ["abc"]
        assert worker.state().alive


def test_a_mistake_of_ours_does_not_end_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    model = StubModel("abc")

    def broken(loop: EngineLoop, *arguments: object) -> None:
        monkeypatch.undo()
        raise ZeroDivisionError

    with serving(model) as worker:
        monkeypatch.setattr(EngineLoop, "_deliver", broken)
        assert outcomes(worker.submit_all([request("One"), request("Two")])) == ["failed: the engine failed (ZeroDivisionError)"] * 2
        assert outcomes([worker.submit(request())]) == ["abc"] and len(model.engines) == 3


def test_closing_ends_everything() -> None:
    model = StubModel("abc" * 20)
    worker = Worker(model, ServeConfig(slots=1))
    with pytest.raises(EngineFailed, match="shutting down"):
        with serving(model, slots=1) as worker:
            running, waiting = worker.submit_all([request()] * 2)
            model.engines[-1].hold()
            until(model.engines[-1].waiting.is_set)
        assert outcomes([waiting]) == ["failed: the server is shutting down"]
        assert not worker.state().alive
        worker.close()
        with pytest.raises(EngineFailed, match="shutting down"):
            worker.submit(request())
        list(running.events())


def test_requests_wait_for_the_start() -> None:
    worker = Worker(StubModel("abc"), ServeConfig())
    stream = worker.submit(request())
    assert (worker.state().queued, worker.state().alive) == (1, False)
    worker.start()
    assert outcomes([stream]) == ["abc"]
    worker.close()
    assert worker.state().last_error is None, "an end is no failure"
