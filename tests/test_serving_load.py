"""Loads, loops and rows of a serving benchmark: what arrives when, latencies from intended arrival, percentiles of known timings."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from dejavu.bench.rows import append_rows, completed, read_rows
from dejavu.loadtest.client import Reply
from dejavu.loadtest.rows import Limits, ServeRow, notes_on, serve_row
from dejavu.loadtest.run import Outcome, Segment, run_load
from dejavu.loadtest.workload import Load, Mix, Prompts, planned_requests
from helpers.loads import PROMPTS, TEXT, load, replied
from helpers.rows import KEYS

T = TypeVar("T")


class VirtualLoop(asyncio.SelectorEventLoop):
    """Time stands still while anything is ready to run, then jumps to the next timer: sleeps are exact and take no time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:  # pyrefly: ignore[missing-attribute]
            self.now = max(self.now, self._scheduled[0]._when)  # pyrefly: ignore[missing-attribute]
        super()._run_once()  # pyrefly: ignore[missing-attribute]


def virtually(work: Callable[[VirtualLoop], Coroutine[Any, Any, T]]) -> T:
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(work(loop))
    finally:
        loop.close()


def open_load(**changes: Any) -> Load:
    return load(**({"rate": 10.0, "concurrency": None} | changes))


class TestLoads:
    @pytest.mark.parametrize(
        ("text", "lengths", "shares"),
        [("128", (128,), (1.0,)), ("32,128", (32, 128), (0.5, 0.5)), ("32:0.5,128:0.3,512:0.2", (32, 128, 512), (0.5, 0.3, 0.2))],
    )
    def test_a_mix_is_parsed(self, text: str, lengths: tuple[int, ...], shares: tuple[float, ...]) -> None:
        assert Mix.parse(text, "--x") == Mix(lengths=lengths, shares=shares)
        assert Mix.parse(str(Mix.parse(text, "--x")), "--x") == Mix(lengths=lengths, shares=shares)

    @pytest.mark.parametrize("text", ["", "a", "0", "-1", "32:0.5", "32:0.5,64", "32:1.5,64:-0.5", "1:2:3", "32:x,64:1", "32:0.6,64:0.6"])
    def test_a_bad_mix_names_the_option(self, text: str) -> None:
        with pytest.raises(ValueError, match="--prompt-tokens"):
            Mix.parse(text, "--prompt-tokens")

    def test_lengths_are_drawn_by_their_shares(self) -> None:
        mix = Mix.parse("32:0.5,128:0.3,512:0.2", "--x")
        drawn = planned_requests(open_load(output_tokens=mix, requests=5000), PROMPTS, 0)
        lengths = [request.output_tokens for request in drawn]
        assert [round(lengths.count(length) / 5000, 1) for length in mix.lengths] == [0.5, 0.3, 0.2]

    def test_arrivals_are_poisson(self) -> None:
        """Mean and standard deviation of exponential gaps are both 1 / rate, and a quarter of them is shorter than -ln(3/4) of that."""
        due = [request.due_s for request in planned_requests(open_load(rate=20.0, requests=4000), PROMPTS, 0)]
        gaps = np.diff([0.0, *(each for each in due if each is not None)])
        assert len(gaps) == 4000 and gaps.mean() == pytest.approx(0.05, rel=0.05) and gaps.std() == pytest.approx(0.05, rel=0.1)
        assert np.quantile(gaps, 0.25) == pytest.approx(-math.log(0.75) / 20, rel=0.1)

    def test_a_seed_repeats_a_round_and_rounds_differ(self) -> None:
        def plan(index: int, **changes: Any) -> list[Any]:
            return list(planned_requests(open_load(requests=9, rounds=2, **changes), PROMPTS, index))

        assert plan(0) == plan(0) and len(plan(0)) == 5 and len(plan(1)) == 4
        assert plan(0) != plan(0, seed=1) and {request.prompt for request in plan(0)}.isdisjoint(request.prompt for request in plan(1))

    def test_seconds_end_the_arrivals(self) -> None:
        due = [
            request.due_s or 0.0 for request in planned_requests(open_load(rate=100.0, requests=None, seconds=6.0, rounds=3), PROMPTS, 0)
        ]
        assert 140 < len(due) < 260 and 1.8 < due[-1] < 2.0
        endless = planned_requests(load(requests=None, seconds=1.0), PROMPTS, 0)
        assert len(list(itertools.islice(endless, 500))) == 500

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"rate": 0.0}, "rate"), ({"rate": math.nan}, "rate"), ({"rate": 2.0, "concurrency": 3}, "one of the two"),
            ({"concurrency": 0}, "concurrency"), ({"concurrency": None}, "one of the two"),
            ({"seconds": 3.0}, "one of the two"), ({"requests": 0}, "requests"),
            ({"requests": None, "seconds": -1.0}, "seconds"), ({"rounds": 0}, "rounds"), ({"seed": -1}, "seed"),
        ],
    )  # fmt: skip
    def test_impossible_loads_are_refused(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            load(**changes)

    def test_prompts_are_stretches_of_the_text_that_start_with_a_word(self) -> None:
        prompts, generator = Prompts(text=TEXT, characters_per_token=5.0, extra_tokens=3.0), np.random.default_rng(0)
        cut = [prompts.cut(23, generator) for _ in range(50)]
        assert {len(prompt) for prompt in cut} == {100} and all(prompt in TEXT and prompt.startswith("word") for prompt in cut)
        assert len(set(cut)) > 45
        with pytest.raises(ValueError, match="longer --text"):
            Prompts(text="short").check(30)


class TestLoops:
    def test_an_open_loop_does_not_wait_for_answers(self) -> None:
        """Each answer takes 10 s, ten requests arrive in one second: all are in flight at once, and each waits for itself alone."""

        async def work(loop: VirtualLoop) -> list[Segment]:
            async def slow(model: str, prompt: str, max_tokens: int) -> Reply:
                sent = loop.time()
                await asyncio.sleep(10)
                return replied(sent, loop.time())

            return await run_load(open_load(requests=10), {"m": PROMPTS}, slow, clock=loop.time)

        [segment] = virtually(work)
        assert segment.busiest == 10 and [outcome.end_to_end_s for outcome in segment.outcomes] == pytest.approx([10.0] * 10)
        last = max(request.due_s or 0.0 for request in planned_requests(open_load(requests=10), PROMPTS, 0))
        assert segment.seconds == pytest.approx(last + 10)

    def test_a_stalled_client_does_not_hide_the_wait(self) -> None:
        """The process stands still for 5 s at its third answer: what was due meanwhile is sent late and waited since it was due."""

        async def work(loop: VirtualLoop) -> list[Segment]:
            async def quick(model: str, prompt: str, max_tokens: int) -> Reply:
                return replied(loop.time(), loop.time())

            def stall(what: str, done: int, total: int) -> None:
                loop.now += 5.0 if done == 3 else 0.0

            return await run_load(open_load(rate=4.0, requests=16), {"m": PROMPTS}, quick, clock=loop.time, progress=stall)

        [segment] = virtually(work)
        due = [request.due_s or 0.0 for request in planned_requests(open_load(rate=4.0, requests=16), PROMPTS, 0)]
        behind = [max(0.0, due[2] + 5.0 - each) if index > 2 else 0.0 for index, each in enumerate(due)]
        assert [outcome.end_to_end_s for outcome in segment.outcomes] == pytest.approx(behind)
        assert [outcome.late_s for outcome in segment.outcomes] == pytest.approx(behind) and sum(each > 1 for each in behind) > 5

    def test_a_stalled_server_is_waited_for_by_all_that_arrive_meanwhile(self) -> None:
        """One answer at a time, 0.5 s each, 10 requests a second: request n ends near n / 2 s, though each is served in 0.5 s."""

        async def work(loop: VirtualLoop) -> list[Segment]:
            one = asyncio.Lock()

            async def serial(model: str, prompt: str, max_tokens: int) -> Reply:
                sent = loop.time()
                async with one:
                    await asyncio.sleep(0.5)
                return replied(sent, loop.time())

            return await run_load(open_load(requests=20), {"m": PROMPTS}, serial, clock=loop.time)

        [segment] = virtually(work)
        row = serve_row([segment], open_load(requests=20), Limits(ttft_ms=1000.0), {}, endpoint="completions", here=True)
        assert row.e2e_p99_ms is not None and row.e2e_p99_ms > 7000 and row.goodput_share is not None and row.goodput_share < 0.2
        assert row.requests_s == pytest.approx(2.0, rel=0.05)

    def test_a_closed_loop_has_no_more_requests_than_clients(self) -> None:
        async def work(loop: VirtualLoop) -> list[Segment]:
            numbers = itertools.count(1)

            async def slow(model: str, prompt: str, max_tokens: int) -> Reply:
                sent = loop.time()
                await asyncio.sleep(next(numbers))
                return replied(sent, loop.time())

            return await run_load(load(concurrency=3, requests=7), {"m": PROMPTS}, slow, clock=loop.time)

        [segment] = virtually(work)
        assert segment.busiest == 3 and len(segment.outcomes) == 7 and all(outcome.late_s == 0 for outcome in segment.outcomes)
        assert sorted(outcome.end_to_end_s for outcome in segment.outcomes) == [1, 2, 3, 4, 5, 6, 7]
        assert segment.seconds == 12  # 1, 4, 7 after one another

    def test_seconds_end_a_closed_loop(self) -> None:
        async def work(loop: VirtualLoop) -> list[Segment]:
            async def slow(model: str, prompt: str, max_tokens: int) -> Reply:
                sent = loop.time()
                await asyncio.sleep(1)
                return replied(sent, loop.time())

            return await run_load(load(concurrency=2, requests=None, seconds=5.0, rounds=2), {"m": PROMPTS}, slow, clock=loop.time)

        segments = virtually(work)
        assert [segment.seconds for segment in segments] == [3, 3] and [len(segment.outcomes) for segment in segments] == [6, 6]

    def test_models_take_turns_with_the_same_requests(self) -> None:
        async def work(loop: VirtualLoop) -> tuple[list[Segment], list[tuple[str, str]], list[int]]:
            requested: list[tuple[str, str]] = []
            after: list[int] = []

            async def note(model: str, prompt: str, max_tokens: int) -> Reply:
                requested.append((model, prompt))
                await asyncio.sleep(0.01)
                return replied(loop.time(), loop.time())

            async def ended() -> None:
                after.append(len(requested))

            models = {"a": PROMPTS, "b": PROMPTS}
            return await run_load(open_load(requests=7, rounds=3), models, note, clock=loop.time, after_round=ended), requested, after

        segments, requested, after = virtually(work)
        assert [segment.model for segment in segments] == ["a", "b", "b", "a", "a", "b"] and after == [6, 10, 14]
        own = {model: [prompt for name, prompt in requested if name == model] for model in ("a", "b")}
        assert own["a"] == own["b"] and len(set(own["a"])) == 7

    @pytest.mark.parametrize(
        ("retries", "done", "rejected", "took"), [(0, False, 1, 1.0), (1, False, 2, 5.0), (2, True, 3, 7.0), (5, True, 3, 7.0)]
    )
    def test_a_429_is_tried_again_when_it_says_and_only_if_asked(self, retries: int, done: bool, rejected: int, took: float) -> None:
        """Each reply takes 1 s; two 429s, the first with Retry-After 3, the second without, which is 1 s."""

        async def work(loop: VirtualLoop) -> list[Segment]:
            waits = iter([3.0, None])

            async def busy(model: str, prompt: str, max_tokens: int) -> Reply:
                sent = loop.time()
                await asyncio.sleep(1)
                wait = next(waits, math.inf)
                error = {} if wait == math.inf else {"status": 429, "error": "http 429", "retry_after_s": wait, "texts": []}
                return replied(sent, loop.time(), **error)

            return await run_load(load(concurrency=1, requests=1), {"m": PROMPTS}, busy, clock=loop.time, retries=retries)

        [[outcome]] = [segment.outcomes for segment in virtually(work)]
        assert (outcome.done, outcome.rejected, outcome.end_to_end_s, outcome.late_s) == (
            done,
            min(rejected, 3 if done else rejected) - done,
            took,
            0.0,
        )


def outcome(ttft: float, gaps: list[float], *, intended: float = 100.0, end: float = 0.0, **changes: Any) -> Outcome:
    """Times in seconds: the first text `ttft` after the intended arrival, then gaps, then `end` to the last event."""
    texts = list(itertools.accumulate([intended + ttft, *gaps]))
    reply = Reply(
        sent=intended,
        ended=texts[-1] + end,
        texts=texts,
        status=200,
        prompt_tokens=10,
        completion_tokens=len(texts),
        finish_reason="length",
    )
    for name, value in changes.items():
        setattr(reply, name, value)
    return Outcome(intended=intended, late_s=0.001, requested_tokens=len(texts), rejected=0, reply=reply)


def failure(kind: str = "http 500", rejected: int = 0) -> Outcome:
    reply = Reply(sent=100.0, ended=100.001, error=kind, message="it broke")
    return Outcome(intended=100.0, late_s=0.0, requested_tokens=4, rejected=rejected, reply=reply)


def row_of(outcomes: list[Outcome], limits: Limits | None = None, **changes: Any) -> ServeRow:
    segment = Segment(model="tiny", seconds=10.0, busiest=3, outcomes=outcomes)
    return serve_row([segment], load(**changes), limits or Limits(), {"server": "dejavu 9"}, endpoint="completions", here=True)


class TestRows:
    def test_percentiles_of_known_timings(self) -> None:
        """TTFT 10, 20, ..., 1010 ms: the p-th percentile is 10 + 10 p, exactly."""
        found = row_of([outcome(0.01 * number, [0.002, 0.004], end=0.001) for number in range(1, 102)])
        assert [found.ttft_p50_ms, found.ttft_p90_ms, found.ttft_p95_ms, found.ttft_p99_ms] == pytest.approx([510, 910, 960, 1000])
        assert [found.e2e_p50_ms, found.e2e_p99_ms] == pytest.approx([517, 1007])
        assert [found.p20_us, found.p50_us, found.p80_us] == pytest.approx([217e3, 517e3, 817e3])
        assert [found.itl_p50_ms, found.itl_p90_ms] == pytest.approx([3, 4])  # half of the gaps are 2, half 4
        assert found.tpot_p50_ms == pytest.approx(3.5) == found.tpot_p99_ms  # (2 + 4 + 1) / 2 tokens
        assert (found.requests, found.completed, found.failed) == (101, 101, 0)
        assert found.output_tokens == 303 and found.tok_s == pytest.approx(30.3) and found.total_tok_s == pytest.approx(131.3)
        assert found.requests_s == pytest.approx(10.1) and found.context == 10 and found.late_p99_ms == pytest.approx(1.0)

    def test_tokens_count_though_pieces_hold_several(self) -> None:
        found = row_of([outcome(0.1, [0.06], completion_tokens=7)])
        assert found.tpot_p50_ms == pytest.approx(10) and found.itl_p50_ms == pytest.approx(60) and found.output_tokens == 7

    def test_failures_are_counted_apart(self) -> None:
        """A failure that took a millisecond flatters nothing: no percentile, no throughput, no goodput has it."""
        done = [outcome(0.2, [0.01] * 3) for _ in range(3)]
        alone, mixed = row_of(done, Limits(ttft_ms=300)), row_of([*done, failure(), failure("http 429", 2)], Limits(ttft_ms=300))
        same = (
            "ttft_p50_ms",
            "ttft_p99_ms",
            "itl_p50_ms",
            "tpot_p50_ms",
            "e2e_p50_ms",
            "tok_s",
            "requests_s",
            "goodput_s",
            "p20_us",
            "completed",
        )
        assert [getattr(mixed, key) for key in same] == [getattr(alone, key) for key in same]
        assert (mixed.requests, mixed.failed, mixed.rejected, mixed.errors) == (5, 2, 2, {"http 500": 1, "http 429": 1})
        assert (alone.goodput_share, mixed.goodput_share) == (1.0, 0.6)

    def test_goodput_is_of_answers_within_all_limits(self) -> None:
        outcomes = [outcome(0.1, [0.01] * 4), outcome(0.1, [0.03] * 4), outcome(0.3, [0.01] * 4), outcome(0.1, [])]
        for limits, good in [
            (Limits(ttft_ms=200), 3), (Limits(itl_ms=20), 3), (Limits(ttft_ms=200, itl_ms=20), 2),
            (Limits(ttft_ms=1), 0), (Limits(ttft_ms=1e3), 4),
        ]:  # fmt: skip
            found = row_of(outcomes, limits)
            assert (found.goodput_s, found.goodput_share) == (pytest.approx(good / 10), good / 4)
            assert (found.ttft_limit_ms, found.itl_limit_ms) == (limits.ttft_ms, limits.itl_ms)
        assert row_of(outcomes).goodput_s is None and row_of(outcomes).goodput_share is None

    def test_densities_weigh_decoded_tokens(self) -> None:
        told = {"mode": "sparse", "mlp_density": 0.1, "head_density": 0.5}
        found = row_of(
            [
                outcome(0.1, [0.01] * 10, densities=told),
                outcome(0.1, [0.01] * 30, densities=told | {"mlp_density": 0.2}),
                outcome(0.1, [0.01]),
            ]
        )
        assert found.mlp_density == pytest.approx(0.175) and found.head_density == pytest.approx(0.5) and found.union_density is None
        assert found.mode == "sparse" and found.sparse and found.model == "tiny"

    def test_a_server_that_tells_nothing(self) -> None:
        found = row_of([outcome(0.1, [], prompt_tokens=None)])
        assert (found.mode, found.backend, found.dtype, found.threads, found.layers) == ("dejavu 9", "dejavu 9", "unknown", None, None)
        assert found.peer and not found.sparse
        assert found.itl_p50_ms is None and found.tpot_p50_ms is None and found.mlp_density is None and found.context == 0

    def test_nothing_was_answered(self) -> None:
        found = row_of([failure(), failure()], Limits(ttft_ms=5))
        assert (found.completed, found.failed, found.tok_s, found.ttft_p50_ms, found.goodput_share) == (0, 2, 0.0, None, 0.0)
        with pytest.raises(ValueError, match="no request arrived"):
            row_of([])

    @pytest.mark.parametrize(
        ("model", "name", "mode"), [("a/b:dense", "a/b", "dense"), ("/".join(["", "srv", "models", "opt"]), "opt", "vllm")]
    )
    def test_names_of_models(self, model: str, name: str, mode: str) -> None:
        segment = Segment(model=model, seconds=1.0, busiest=1, outcomes=[failure()])
        found = serve_row([segment], load(), Limits(), {"server": "vllm"}, endpoint="completions", here=False)
        assert (found.model, found.mode, found.device, found.peer) == (name, mode, "unknown", True)
        assert completed([found])[0].device_kind is None  # another machine's

    def test_a_row_has_all_keys_of_results_and_is_read_back(self, tmp_path: Path) -> None:
        found = row_of([outcome(0.1, [0.01])])
        written = append_rows(tmp_path / "serving.jsonl", [found])
        assert set(KEYS) < set(json.loads((tmp_path / "serving.jsonl").read_text())) and written[0].device is not None
        assert read_rows(tmp_path / "serving.jsonl", ServeRow) == written
        assert (found.op, found.batch, found.synthetic, found.rate, found.concurrency) == ("serve", 3, False, None, 2)

    def test_notes_tell_what_a_number_does_not(self) -> None:
        outcomes = [outcome(0.01, [0.06], completion_tokens=7, cached_tokens=4), failure()]
        outcomes[0] = Outcome(intended=100.0, late_s=0.2, requested_tokens=9, rejected=0, reply=outcomes[0].reply)
        found = row_of(outcomes, rate=5.0, concurrency=None)
        notes = "\n".join(notes_on(found, [Segment(model="tiny", outcomes=outcomes)]))
        for part in (
            "1 of 2 requests failed: http 500: it broke",
            "too few for a 99th",
            "7 tokens came in 2 pieces",
            "shorter",
            "4 of 10 prompt",
            "late",
        ):
            assert part in notes
        many = [outcome(0.1, [0.01]) for _ in range(100)]
        assert notes_on(row_of(many), [Segment(model="tiny", outcomes=many)]) == []
