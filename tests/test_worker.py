"""The worker on a scripted engine: events, sharing, limits, cancelling, failures; on a real model: a batch gives what one alone gives."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dejavu
from dejavu.config import SamplingConfig
from dejavu.engine.generation import generate_tokens
from dejavu.engine.interface import Decoded, LayerSelection, StepResult
from dejavu.engine.sampling import NOT_NUMBERS
from dejavu.language_model import LanguageModel
from dejavu.serve.config import ServeConfig
from dejavu.serve.jobs import BINS, EngineFailed, Event, Job, QueueFull, Summary, TokenInfo, TooLong
from dejavu.serve.lane import Lane
from dejavu.serve.stream import Stream
from dejavu.serve.trace import token_trace
from dejavu.serve.worker import Worker
from stub_engine import CERTAIN, EOS, LAYERS, NEURONS, VOCAB, StubEngine, StubModel

GREEDY = SamplingConfig()


@contextmanager
def serving(model: StubModel | LanguageModel, **config: Any) -> Generator[Worker]:
    """A worker that runs, and is closed at the end whatever happens."""
    worker = Worker(model, ServeConfig(**config))
    worker.start()
    try:
        yield worker
    finally:
        for engine in model.engines if isinstance(model, StubModel) else ():
            engine.release()
        worker.close()


def job(prompt: str | Sequence[int] = "Once", new: int = 40, **options: Any) -> Job:
    ids = prompt.encode() if isinstance(prompt, str) else prompt
    settings: dict[str, Any] = {"sampling": GREEDY, **options}
    return Job(prompt_ids=tuple(ids), max_new_tokens=new, **settings)


def text_of(events: Sequence[Event]) -> str:
    return "".join(event.text for event in events)


def tokens_of(events: Sequence[Event]) -> list[TokenInfo]:
    return [info for event in events for info in event.tokens]


def run(worker: Worker, *jobs: Job) -> list[list[Event]]:
    """The events of jobs that are submitted together."""
    return [list(stream.events()) for stream in worker.submit_all(jobs)]


def summary_of(events: Sequence[Event]) -> Summary:
    assert [event.finish_reason is not None for event in events] == [False] * (len(events) - 1) + [True], "one end, the last event"
    assert events[-1].summary is not None
    return events[-1].summary


def until(condition: Callable[[], object], *, seconds: float = 20) -> None:
    """Wait for what another thread does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to be in time"
        time.sleep(0.001)


def is_idle(model: StubModel) -> bool:
    return all(engine.live_sequences == 0 and engine.free_kv_pages == engine.info.num_pages for engine in model.engines)


# Events


def test_a_job_is_answered_token_by_token() -> None:
    with serving(StubModel(" upon a")) as worker:
        (events,) = run(worker, job())
        assert [event.text for event in events] == [*" upon a", ""]
        assert [[info.token_id for info in event.tokens] for event in events] == [[byte] for byte in b" upon a"] + [[EOS]]
        assert (events[-1].finish_reason, events[-1].prompt_tokens) == ("stop", ())
        first, *later = tokens_of(events)
        assert (first.mlp_density, first.head_density, first.trace) == (None, None, None), "it comes from the prefill"
        assert {(info.mlp_density, info.head_density) for info in later} == {((0.25 + 1) / 2, (0.5 + 1) / 2)}
        logits_V = torch.arange(VOCAB).double() / -VOCAB
        logits_V[ord("u")] = CERTAIN
        assert later[0].logprob == pytest.approx(float(logits_V.log_softmax(0)[ord("u")]), abs=1e-5)
        summary = summary_of(events)
        assert (summary.prompt_tokens, summary.completion_tokens, summary.cached_tokens) == (4, 8, 0)
        assert (summary.mlp_density, summary.head_density) == (0.625, 0.75)
        assert summary.time_to_first_token_s > 0 and summary.decode_s > 0
        state = worker.state()
        assert (state.alive, state.last_error, state.queued, state.running, state.failed, state.finished) == (True, None, 0, 0, 0, 1)
        assert (state.prompt_tokens, state.tokens, state.steps) == (4, 8, 7) and state.pages_free == state.pages_total
        assert state.tok_s is not None and state.tok_s > 0


LETTERS = st.text(alphabet="abé", min_size=1, max_size=4)


@given(answer=st.text(alphabet="abé€", max_size=12), stop=st.lists(LETTERS, max_size=3), new=st.integers(0, 14), ignore_eos=st.booleans())
def test_the_events_are_the_pieces_of_a_generation(answer: str, stop: list[str], new: int, ignore_eos: bool) -> None:
    """Stop strings, unfinished characters, EOS, limits: all as `generate` has them."""
    model = StubModel(answer.encode())
    with serving(model) as worker:
        (events,) = run(worker, job(new=new, stop=tuple(stop), ignore_eos=ignore_eos))
    alone = model.engine(num_slots=1, cache_tokens=64)
    pieces = generate_tokens(
        alone, model.tokenizer, list(b"Once"), max_new_tokens=new, stop=stop, ignore_eos=ignore_eos
    )  # fmt: skip
    expected = [(piece.text, piece.token_ids, piece.finish_reason) for piece in pieces]
    assert [(event.text, tuple(info.token_id for info in event.tokens), event.finish_reason) for event in events] == expected


def test_a_stop_string_over_several_tokens_is_never_sent() -> None:
    with serving(StubModel(b"xxDEFGHIJ and on")) as worker:
        (events,) = run(worker, job(stop=("DEFGHIJ",)))
        assert (text_of(events), events[-1].finish_reason, summary_of(events).completion_tokens) == ("xx", "stop", 9)


def test_no_token_wanted_takes_no_step_and_no_slot() -> None:
    model = StubModel()
    with serving(model, slots=1) as worker:
        (events,) = run(worker, job(new=0))
        assert [(event.text, event.tokens, event.finish_reason) for event in events] == [("", (), "length")]
        assert summary_of(events).completion_tokens == 0
        assert [engine.calls for engine in model.engines] == [[], []]


def test_log_probabilities_are_those_before_bias_and_temperature() -> None:
    with serving(StubModel("abc")) as worker:
        bias = {ord("z"): 100.0}
        (events,) = run(worker, job(new=2, top_logprobs=3, logit_bias=bias, sampling=SamplingConfig(temperature=3.0, seed=1)))
        logits_V = torch.arange(VOCAB).double() / -VOCAB
        logits_V[ord("a")] = CERTAIN
        logprob_V = logits_V.log_softmax(0)
        info = tokens_of(events)[0]
        assert text_of(events) == "zz"
        assert info.logprob == pytest.approx(float(logprob_V[ord("z")]), abs=1e-5)
        assert [token_id for token_id, _ in info.top] == [ord("a"), 0, 1]
        assert [value for _, value in info.top] == pytest.approx([float(logprob_V[i]) for i in (ord("a"), 0, 1)], abs=1e-5)
        (plain,) = run(worker, job(new=2))
        assert tokens_of(plain)[0].top == ()


@pytest.mark.parametrize("new", [0, 1, 3])
def test_prompt_log_probabilities_come_once_in_the_first_event(new: int) -> None:
    """Of every token of the prompt but the first, whatever the chunks, and whatever of it is cached."""
    with serving(StubModel("abc"), prefill_chunk=7) as worker:
        prompt = [*range(40, 75)]
        run(worker, job(prompt))
        (events,) = run(worker, job(prompt, new=new, prompt_logprobs=True, top_logprobs=2))
        assert [info.token_id for info in events[0].prompt_tokens] == prompt
        assert (events[0].prompt_tokens[0].logprob, events[0].prompt_tokens[0].top) == (None, ())
        logits_V = torch.arange(VOCAB).double() / -VOCAB
        logits_V[ord("a")] = CERTAIN
        expected = logits_V.log_softmax(0)[prompt[1:]].tolist()
        assert [info.logprob for info in events[0].prompt_tokens[1:]] == pytest.approx(expected, abs=1e-5)
        assert all([token_id for token_id, _ in info.top] == [ord("a"), 0] for info in events[0].prompt_tokens[1:])
        assert all(event.prompt_tokens == () for event in events[1:])
        assert (summary_of(events).completion_tokens, summary_of(events).cached_tokens) == (new, 0)
        (later,) = run(worker, job(prompt, new=1))
        assert summary_of(later).cached_tokens == 32, "what an echo computed may be shared"


def test_events_reach_an_asyncio_loop() -> None:
    with serving(StubModel("abcdefgh")) as worker:

        async def read(stream: Stream) -> str:
            return "".join([event.text async for event in stream])

        async def read_all() -> list[str]:
            return await asyncio.gather(*(read(worker.submit(job(new=count))) for count in (3, 5, 8)))

        assert asyncio.run(read_all()) == ["abc", "abcde", "abcdefgh"]


def test_a_loop_that_is_gone_harms_nobody() -> None:
    model = StubModel("abcdefgh")
    with serving(model) as worker:
        model.engines[1].hold()
        stream = worker.submit(job())

        async def leave() -> None:
            async def read() -> None:
                async for _ in stream:
                    pass

            task = asyncio.create_task(read())
            await asyncio.to_thread(model.engines[1].waiting.wait)
            await asyncio.sleep(0)
            task.cancel()

        asyncio.run(leave())
        model.engines[1].release()
        until(lambda: is_idle(model))
        assert text_of(run(worker, job(new=3))[0]) == "abc"


# Engines and what they share


def test_dense_and_sparse_jobs_take_turns() -> None:
    order: list[str] = []
    model = StubModel("abcdefghijkl")
    with serving(model) as worker:
        dense, sparse = model.engines
        dense.before = lambda what, slots: order.append("dense") if what == "step" else None
        sparse.before = lambda what, slots: order.append("sparse") if what == "step" else None
        dense.hold()
        sparse.hold()
        streams = worker.submit_all([job(new=6), job(new=6, dense=True)])
        until(lambda: dense.waiting.is_set() or sparse.waiting.is_set())
        for engine in model.engines:
            engine.release()
        events = [list(stream.events()) for stream in streams]
        assert [text_of(each) for each in events] == ["abcdef", "abcdef"]
        assert order[0] != order[1] and order[:10:2] == [order[0]] * 5 and order[1:10:2] == [order[1]] * 5
        assert (summary_of(events[0]).mlp_density, summary_of(events[1]).mlp_density) == (0.625, 1.0)


def test_the_union_is_of_the_rows_of_a_step() -> None:
    """One row reads a quarter of layer 0, two whose tokens are 16 apart read half as much again."""
    model = StubModel(lambda prompt: [10] * 9 if prompt[:1] == (1,) else [26] * 9)
    with serving(model) as worker:
        (alone,) = run(worker, job([1, 1], new=9))
        assert summary_of(alone).union_density == (0.25 + 1) / 2
        for events in run(worker, job([1, 1], new=9), job([2, 2], new=9)):
            assert summary_of(events).union_density == (0.375 + 1) / 2
            assert summary_of(events).mlp_density == 0.625
        (dense,) = run(worker, job([1, 1], new=9, dense=True))
        assert summary_of(dense).union_density == 1.0


def test_without_an_adapter_every_job_is_dense() -> None:
    model = StubModel("ab", sparse=False)
    with serving(model) as worker:
        (events,) = run(worker, job(trace=True))
        assert summary_of(events).mlp_density == 1.0
        assert len(model.engines) == 1 and not worker.state().sparse


def test_the_recording_engine_is_made_when_a_trace_is_asked_for() -> None:
    model = StubModel("abc")
    with serving(model) as worker:
        run(worker, job(), job(dense=True, trace=True))
        assert [engine.records for engine in model.engines] == [False, False], "nothing of a dense step needs recording"
        (events,) = run(worker, job(trace=True))
        assert [engine.records for engine in model.engines] == [False, False, True]
        first, second, *_ = tokens_of(events)
        assert first.trace is None and second.trace is not None
        neurons = {(index + ord("a")) % NEURONS for index in range(NEURONS // 4)}
        shares = [sum(2 * bin_ + at in neurons for at in range(2)) / 2 for bin_ in range(BINS)]
        assert second.trace.neurons[0] == bytes(round(255 * share) for share in shares)
        assert second.trace.heads == (bytes([1, 0, 1, 0]), bytes([1, 1, 1, 1]))
        assert second.trace.neurons[1] == b"\xff" * BINS and len(second.trace.neurons) == LAYERS
        (dense,) = run(worker, job(dense=True, trace=True))
        trace = tokens_of(dense)[1].trace
        assert trace is not None and trace.neurons == (b"\xff" * BINS,) * LAYERS and trace.heads == (b"\x01" * 4,) * LAYERS


@pytest.mark.parametrize("neurons", [1, 63, 64, 100, 3072])
def test_bins_hold_the_share_of_their_neurons(neurons: int) -> None:
    info = dataclasses.replace(StubEngine().info, num_layers=1, num_neurons=neurons)
    chosen = torch.arange(0, neurons, 3)
    (binned,) = token_trace(info, [LayerSelection(neurons_A=chosen, heads_A=None)]).neurons
    members = [[n for n in range(neurons) if n * BINS // neurons == bin_] for bin_ in range(BINS)]
    expected = [255 * sum(n % 3 == 0 for n in of) / len(of) if of else 0 for of in members]
    assert all(abs(value - share) <= 0.5 for value, share in zip(binned, expected, strict=True)) and len(binned) == BINS


def test_choices_read_their_prompt_once() -> None:
    model = StubModel("abc")
    with serving(model) as worker:
        prompt = [7] * 50
        found = run(worker, *(job(prompt, index=index) for index in range(3)))
        assert [summary_of(events).cached_tokens for events in found] == [0, 48, 48]
        assert model.count("prefill") == {50: 1, 2: 2}
        assert worker.state().cached_tokens == 96 and worker.state().prompt_tokens == 54
        assert [text_of(events) for events in found] == ["abc"] * 3
        assert summary_of(run(worker, job(prompt, dense=True))[0]).cached_tokens == 0, "nothing is shared between modes"


def test_what_was_cached_is_counted_once() -> None:
    with serving(StubModel("abc"), prefill_chunk=10) as worker:
        prompt = [7] * 20
        run(worker, job(prompt))
        run(worker, job([*prompt, *range(50)]))
        assert worker.state().cached_tokens == 16


def test_prefix_reuse_can_be_left_out() -> None:
    model = StubModel("abc")
    with serving(model, prefix_reuse=False) as worker:
        prompt = [7] * 50
        found = run(worker, job(prompt), job(prompt))
        assert [summary_of(events).cached_tokens for events in found] == [0, 0] and model.count("prefill") == {50: 2}


def test_prompts_are_read_in_chunks_beside_rows_that_decode() -> None:
    model = StubModel("a" * 50, max_positions=512, page_size=16)
    with serving(model, slots=2, prefill_chunk=20, cache_tokens=1024) as worker:
        engine = model.engines[1]
        engine.hold()
        row = worker.submit(job(new=40))
        until(engine.waiting.is_set)
        long = worker.submit(job([*range(100)] * 2, new=1))
        engine.release()
        assert text_of(list(row.events())) == "a" * 40
        list(long.events())
        between = [what for what, _, _ in engine.calls[1:]][:20]
        assert between == ["step"] + ["prefill", "step"] * 9 + ["prefill"]
        assert model.count("prefill") == {4: 1, 20: 10}


class DrawingEngine(StubEngine):
    """Draws by itself, what `step` would give; -1 after the token in `damaged`."""

    drawn: list[tuple[int, ...]]
    damaged: int | None = None

    def decode(
        self,
        token_ids_B: Sequence[int],
        slots_B: Sequence[int],
        count: int,
        sampling: Sequence[SamplingConfig] | None = None,
        choices: Sequence[int] | None = None,
    ) -> Decoded:
        assert count == 1 and sampling is not None and choices is not None
        self.drawn = [*getattr(self, "drawn", []), tuple(zip((config.seed for config in sampling), choices, strict=True))]  # pyrefly: ignore
        step = self.step(token_ids_B, slots_B)
        tokens = [
            -1 if token_id == self.damaged else int(best) for token_id, best in zip(token_ids_B, step.logits_BV.argmax(-1), strict=True)
        ]
        logprob = step.logits_BV.log_softmax(-1).amax(-1)[None]
        return Decoded(
            token_NB=torch.tensor(tokens)[None], logprob_NB=logprob, neurons_NBL=step.neurons_BL[None], heads_NBL=step.heads_BL[None]
        )


def test_an_engine_draws_for_rows_that_want_nothing_else() -> None:
    model = StubModel("abc", engine=DrawingEngine)
    with serving(model) as worker:
        sampling = SamplingConfig(seed=3)
        plain, scored = run(worker, job(new=3, sampling=sampling, index=2), job("Twice", new=3, top_logprobs=1))
        assert text_of(plain) == text_of(scored) == "abc"
        assert [info.mlp_density for info in tokens_of(plain)] == [None, 0.625, 0.625]
        assert [info.logprob for info in tokens_of(plain)] == pytest.approx([info.logprob for info in tokens_of(scored)], abs=1e-5)
        engine = model.engines[1]
        assert isinstance(engine, DrawingEngine) and engine.drawn == [((3, 2),)] * 2, "one row, and not the one that wants more"
        engine.damaged = ord("a")
        for stream, text in zip(worker.submit_all([job(), job("Twice", top_logprobs=0)]), (None, "abc"), strict=True):
            if text is None:
                with pytest.raises(EngineFailed, match="not numbers"):
                    list(stream.events())
            else:
                assert text_of(list(stream.events())) == text


# Limits


@pytest.mark.parametrize("prompt", [1, 23, 24, 31, 32, 33])
@pytest.mark.parametrize("new", [0, 1, 16])
@pytest.mark.parametrize(
    ("config", "limit"), [({"cache_tokens": 24}, 24), ({"cache_tokens": 20}, 20), ({}, 32), ({"max_model_len": 20}, 20)]
)
def test_what_can_never_fit_is_refused_at_once_and_nothing_hangs(prompt: int, new: int, config: dict[str, int], limit: int) -> None:
    with serving(StubModel("abc" * 20, max_positions=32, page_size=8), slots=2, **config) as worker:
        if prompt + new > limit:
            with pytest.raises(TooLong, match=f"prompt has {prompt} tokens and {new} more were requested.*limit is {limit}"):
                worker.submit_all([job(new=2), job([5] * prompt, new=new)])
            assert worker.state().queued == 0, "all or none"
        else:
            (events,) = run(worker, job([5] * prompt, new=new, prompt_logprobs=True))
            assert (events[-1].finish_reason, summary_of(events).completion_tokens) == ("length", new)
        assert text_of(run(worker, job("ab", new=3))[0]) == "abc"
        assert worker.state().max_model_len == limit


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (job([], new=1), "no tokens"),
        (job(new=-1), "max_new_tokens must be 0 or more, not -1"),
        (job([5, VOCAB]), f"token id {VOCAB} is outside the model's vocabulary of {VOCAB}"),
        (job([-1, 5]), "token id -1 is outside"),
        (job(logit_bias={VOCAB + 1: 1.0}), f"token id {VOCAB + 1} is outside"),
        (job(stop=("x", "")), "must not be empty"),
    ],
)
def test_a_job_that_makes_no_sense_is_refused_at_once(bad: Job, message: str) -> None:
    model = StubModel()
    with serving(model) as worker:
        with pytest.raises(ValueError, match=message):
            worker.submit_all([job(), bad])
        assert worker.state().queued == 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"slots": 0}, "slots must be at least 1, not 0"),
        ({"prefill_chunk": 0}, "prefill_chunk must be at least 1"),
        ({"queue": -1}, "queue must be 0 or more, not -1"),
        ({"cache_tokens": 1}, "cache_tokens must be at least 2"),
        ({"max_model_len": 257}, "max_model_len 257 exceeds the model's context of 256"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(config: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Worker(StubModel(), ServeConfig(**config))  # pyrefly: ignore[bad-argument-type]


def test_the_cache_has_room_for_every_slot_unless_told_otherwise() -> None:
    def pages(context: int, **config: Any) -> int:
        model = StubModel(max_positions=context)
        Worker(model, ServeConfig(**config))
        return model.engines[0].info.num_pages

    assert pages(256, slots=3) == 3 * 16
    assert pages(256, slots=3, max_model_len=100) == 19
    assert pages(5000, slots=2) == 2 * 128
    assert pages(256, cache_tokens=100) == 7


def test_a_full_queue_refuses_all_or_none() -> None:
    model = StubModel("abc" * 9)
    with serving(model, slots=1, queue=2) as worker:
        model.engines[1].hold()
        running, *waiting = worker.submit_all([job(new=4)] * 3)
        for count in (1, 2):
            with pytest.raises(QueueFull) as caught:
                worker.submit_all([job(new=4)] * count)
            assert caught.value.retry_after_s >= 1
        until(model.engines[1].waiting.is_set)
        assert (worker.state().queued, worker.state().running) == (2, 1)
        waiting[0].cancel()
        with pytest.raises(QueueFull):
            worker.submit_all([job(new=4)] * 2)
        late = worker.submit(job(new=4))
        assert worker.submit(job(new=0)) is not None, "what needs no slot needs no place"
        model.engines[1].release()
        assert [text_of(list(stream.events())) for stream in (running, *waiting, late)] == ["abca", "", "abca", "abca"]


def test_all_or_none_is_over_all_engines() -> None:
    model = StubModel("abc" * 9)
    with serving(model, slots=1, queue=0) as worker:
        model.engines[0].hold()
        dense = worker.submit(job(new=4, dense=True))
        until(model.engines[0].waiting.is_set)
        with pytest.raises(QueueFull):
            worker.submit_all([job(new=4), job(new=4, dense=True)])
        model.engines[0].release()
        assert text_of(list(dense.events())) == "abca" and model.engines[1].prefills == 0


# Cancelling (C14)


@pytest.mark.parametrize("seen", [0, 1, 5])
def test_a_cancelled_stream_frees_its_slot_within_a_step(seen: int) -> None:
    model = StubModel("a" * 200)
    with serving(model) as worker:
        engine = model.engines[1]
        stream = worker.submit(job(new=200))
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
        stream = worker.submit(job([5] * 2000, new=3))
        until(lambda: engine.prefills > 3)
        stream.cancel()
        until(lambda: is_idle(model))
        assert engine.prefills < 2000


def test_a_waiting_job_is_cancelled_without_a_step() -> None:
    model = StubModel("abc" * 9)
    with serving(model, slots=1) as worker:
        engine = model.engines[1]
        engine.hold()
        first, second = worker.submit_all([job(new=4), job("Twice", new=4)])
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
        first, second = worker.submit_all([job("One", new=6), job("Two", new=6, top_logprobs=0)])

        def before(what: str, slots: Sequence[int]) -> None:
            if what == at and 0 in slots:
                second.cancel()

        engine.before = before
        engine.release()
        assert text_of(list(first.events())) == "abcdef"
        until(lambda: is_idle(model))
        others = [what for what, slots, _ in engine.calls if 1 in slots]
        assert others == {"prefill": [], "step": ["prefill"]}[at]


def test_who_leaves_in_the_step_of_its_last_token_has_left() -> None:
    model = StubModel("abcdef")
    with serving(model) as worker:
        engine = model.engines[1]
        engine.hold()
        stream = worker.submit(job(new=2))
        until(engine.waiting.is_set)
        engine.before = lambda what, slots: stream.cancel()
        engine.release()
        until(lambda: is_idle(model) and worker.state().running == 0)
        assert (worker.state().finished, worker.state().cancelled, worker.state().failed) == (0, 1, 0)


def test_cancelling_what_has_ended_changes_nothing() -> None:
    with serving(StubModel("abc")) as worker:
        stream = worker.submit(job())
        until(lambda: worker.state().finished == 1)
        stream.cancel()
        assert text_of(list(stream.events())) == "abc"
        assert worker.state().cancelled == 0


def test_survivors_do_not_notice_who_leaves() -> None:
    answers = {n: bytes(97 + (n * 7 + place) % 26 for place in range(30)) for n in range(70)}
    model = StubModel(lambda prompt: answers.get(prompt[-1], b""), page_size=4)
    chance = random.Random(4)
    with serving(model, slots=6, queue=100, cache_tokens=400, prefill_chunk=16) as worker:
        jobs = [job([200] * chance.randrange(30) + [n], new=30) for n in range(70)]
        streams = worker.submit_all(jobs)
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


def failing(
    error: Exception, what: str, *, when: Callable[[Sequence[int]], bool] = lambda slots: True
) -> Callable[[str, Sequence[int]], None]:
    def before(called: str, slots: Sequence[int]) -> None:
        if called == what and when(slots):
            raise error

    return before


def outcomes(streams: Sequence[Stream]) -> list[str]:
    """The text of each stream, or what it raised."""
    found = []
    for stream in streams:
        try:
            found.append(text_of(list(stream.events())))
        except EngineFailed as error:
            found.append(f"failed: {error}")
    return found


def test_a_refused_step_ends_only_the_row_at_fault() -> None:
    model = StubModel("abcdef")
    with serving(model, slots=3) as worker:
        model.engines[1].before = failing(ValueError("logits are not finite"), "step", when=lambda slots: 1 in slots)
        found = outcomes(worker.submit_all([job("One"), job("Two"), job("Three")]))
        assert found == ["abcdef", "failed: logits are not finite", "abcdef"]
        assert len(model.engines) == 2 and worker.state().failed == 1 and worker.state().last_error == "ValueError: logits are not finite"
        model.engines[1].before = lambda what, slots: None
        assert outcomes(worker.submit_all([job()] * 3)) == ["abcdef"] * 3
        assert is_idle(model)


class HalfDoneEngine(StubEngine):
    """Refuses a step of several rows when it has done it: not what engines may do."""

    def step(self, token_ids_B: Sequence[int], slots_B: Sequence[int]) -> StepResult:
        result = super().step(token_ids_B, slots_B)
        if len(slots_B) > 1:
            raise ValueError("too late")
        return result


def test_a_step_that_was_done_is_not_done_again() -> None:
    model = StubModel("abcdef", engine=HalfDoneEngine)
    with serving(model) as worker:
        assert outcomes(worker.submit_all([job("One"), job("Two")])) == ["failed: too late"] * 2
        assert outcomes([worker.submit(job())]) == ["abcdef"] and is_idle(model)


def test_logits_that_are_no_numbers_end_only_their_row() -> None:
    model = StubModel("abcdef", engine=DamagedEngine)
    with serving(model) as worker:
        found = outcomes(worker.submit_all([job("One"), job([VOCAB - 2, 66]), job("Three")]))
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
        assert outcomes(worker.submit_all([job("One"), job("Two")])) == ["failed: refused", "abc"]
        assert is_idle(model) and len(model.engines) == 2


@pytest.mark.parametrize("what", ["prefill", "step", "publish"])
def test_an_error_without_a_reason_ends_the_rows_of_its_call_and_names_no_details(what: str) -> None:
    model = StubModel("abcdef")
    with serving(model, slots=2) as worker:
        model.engines[1].before = failing(RuntimeError("at /srv/secret.py"), what, when=lambda slots: 0 in slots)
        first, second, third = outcomes(worker.submit_all([job("One"), job("Two"), job("Three", new=1)]))
        assert first == "failed: the engine failed (RuntimeError)"
        assert second == (first if what == "step" else "abcdef"), "a step is of both"
        assert worker.state().last_error == "RuntimeError: at /srv/secret.py" and worker.state().alive
        assert third in ("a", first)
        model.engines[-1].before = lambda what, slots: None
        assert outcomes([worker.submit(job())]) == ["abcdef"]
        assert is_idle(model)


def test_an_engine_that_fails_again_and_again_is_made_anew() -> None:
    model = StubModel("abcdef")
    with serving(model, slots=1) as worker:
        broken = model.engines[1]
        broken.before = failing(RuntimeError("sticky"), "prefill")
        found = outcomes(worker.submit_all([job()] * 4))
        assert found == ["failed: the engine failed (RuntimeError)"] * 2 + ["abcdef"] * 2
        assert len(model.engines) == 3 and broken.prefills == 2


def test_a_failure_now_and_then_does_not_cost_the_engine() -> None:
    model = StubModel("abcdef")
    with serving(model, slots=1) as worker:
        engine, turn = model.engines[1], iter(range(100))
        engine.before = failing(RuntimeError("now and then"), "prefill", when=lambda slots: next(turn) % 2 == 0)
        assert outcomes(worker.submit_all([job()] * 6)) == ["failed: the engine failed (RuntimeError)", "abcdef"] * 3
        assert len(model.engines) == 2


@pytest.mark.parametrize("what", ["free", "reuse"])
def test_an_engine_that_cannot_keep_its_books_is_made_anew(what: str) -> None:
    """Those that run in it fail; those that wait go on in the next."""
    model = StubModel("abcdef")
    with serving(model, slots=2) as worker:
        model.engines[1].before = failing(RuntimeError("lost"), what)
        prompt = [5] * 20
        found = outcomes(
            worker.submit_all([job(prompt, new=1), job([6, *prompt], new=5), job([7, *prompt], new=5), job([8, *prompt], new=5)])
        )
        ended = "failed: the engine failed (RuntimeError)"
        assert found == (["a", ended, "abcde", "abcde"] if what == "free" else [ended, "abcde", "abcde", "abcde"])
        assert len(model.engines) == 3 and is_idle_but(model, 1)
        assert worker.state().alive and worker.state().pages_free == worker.state().pages_total


def is_idle_but(model: StubModel, abandoned: int) -> bool:
    return all(engine.live_sequences == 0 for index, engine in enumerate(model.engines) if index != abandoned)


def test_an_engine_that_cannot_be_made_fails_its_jobs_and_is_tried_again() -> None:
    model = StubModel("abc")
    with serving(model, slots=1) as worker:
        model.engines[1].before = failing(RuntimeError("lost"), "free")
        model.fail = 1
        assert outcomes(worker.submit_all([job(new=1), job(), job()])) == ["a"] + ["failed: the engine failed (RuntimeError)"] * 2
        assert not worker.state().alive and worker.state().last_error == "RuntimeError: the engine cannot be made"
        assert outcomes([worker.submit(job(dense=True))]) == ["abc"], "the other engine is there"
        assert outcomes([worker.submit(job())]) == ["abc"]
        assert worker.state().alive


def test_a_mistake_of_ours_does_not_end_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    model = StubModel("abc")

    def broken(lane: Lane, *arguments: object) -> None:
        monkeypatch.undo()
        raise ZeroDivisionError

    with serving(model) as worker:
        monkeypatch.setattr(Lane, "_deliver", broken)
        assert outcomes(worker.submit_all([job("One"), job("Two")])) == ["failed: the engine failed (ZeroDivisionError)"] * 2
        assert outcomes([worker.submit(job())]) == ["abc"] and len(model.engines) == 3


def test_closing_ends_everything() -> None:
    model = StubModel("abc" * 20)
    worker = Worker(model, ServeConfig(slots=1))
    with pytest.raises(EngineFailed, match="shutting down"):
        with serving(model, slots=1) as worker:
            running, waiting = worker.submit_all([job()] * 2)
            model.engines[-1].hold()
            until(model.engines[-1].waiting.is_set)
        assert outcomes([waiting]) == ["failed: the server is shutting down"]
        assert not worker.state().alive
        worker.close()
        with pytest.raises(EngineFailed, match="shutting down"):
            worker.submit(job())
        list(running.events())


def test_jobs_wait_for_the_start() -> None:
    worker = Worker(StubModel("abc"), ServeConfig())
    stream = worker.submit(job())
    assert (worker.state().queued, worker.state().alive) == (1, False)
    worker.start()
    assert outcomes([stream]) == ["abc"]
    worker.close()


# A real model: what comes in a batch is what comes alone


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return dejavu.load("opt-mini", backend="native", dtype="fp32")


def sampled(lm: LanguageModel, prompt: str, new: int = 12, *, seed: int | None = 7, **options: Any) -> Job:
    return job(lm.tokenizer.encode(prompt), new, sampling=SamplingConfig(temperature=1.0, seed=seed), **options)


def facts(events: Sequence[Event]) -> list[tuple[Any, ...]]:
    return [(info.token_id, info.logprob, info.top, info.mlp_density, info.head_density) for info in tokens_of(events)]


PROMPT = "The old lighthouse keeper had a secret, and every night he went down to the sea to"
HOSTILE = "zq!! 9# Qx"


@pytest.mark.parametrize("dense", [False, True])
def test_a_batch_gives_what_a_generation_gives(lm: LanguageModel, dense: bool) -> None:
    """Sampled with a seed, beside a neighbour without one and a hostile one, joined late, with a shared prefix: bit for bit (C02, C15)."""
    alone = lm.generate(PROMPT, max_new_tokens=12, temperature=1.0, seed=7, dense=dense)
    state = torch.get_rng_state()
    with serving(lm, slots=4, prefill_chunk=5) as worker:
        neighbours = worker.submit_all(
            [sampled(lm, HOSTILE, 40, seed=None, ignore_eos=True, dense=dense), sampled(lm, PROMPT, 40, seed=3, dense=dense)]
        )
        reader = neighbours[0].events()
        for _ in range(3):
            next(reader)
        for attempt in range(2):
            (events,) = run(worker, sampled(lm, PROMPT, top_logprobs=attempt or None, dense=dense))
            assert [(token_id, logprob) for token_id, logprob, *_ in facts(events)] == list(
                zip(alone.token_ids, alone.logprobs, strict=True)
            )
            assert text_of(events) == alone and events[-1].finish_reason == alone.finish_reason
            assert summary_of(events).cached_tokens == 16, "the neighbour has read the beginning of the prompt"
            assert summary_of(events).mlp_density == pytest.approx(alone.mlp_density)
            assert summary_of(events).head_density == pytest.approx(alone.head_density)
        assert worker.state().running >= 1, "there was a neighbour all the time"
        for stream in neighbours:
            stream.cancel()
    assert torch.equal(torch.get_rng_state(), state), "nobody's random numbers were touched"


def test_choices_differ_and_the_first_is_the_lone_one(lm: LanguageModel) -> None:
    with serving(lm, slots=3) as worker:
        choices = [text_of(events) for events in run(worker, *(sampled(lm, PROMPT, index=index) for index in range(3)))]
        (lone,) = run(worker, sampled(lm, PROMPT))
        assert choices[0] == text_of(lone) and len(set(choices)) == 3
        unseeded = [text_of(events) for events in run(worker, *(sampled(lm, PROMPT, seed=None) for _ in range(3)))]
        assert len({*unseeded, *choices}) == 6


def test_prompt_log_probabilities_are_those_of_the_model(lm: LanguageModel) -> None:
    ids = lm.tokenizer.encode(PROMPT)
    expected_TV = lm.logits(ids, dense=True).double().log_softmax(-1)
    with serving(lm, prefill_chunk=6) as worker:
        (events,) = run(worker, job(ids, 1, prompt_logprobs=True, top_logprobs=2))
        assert [info.token_id for info in events[0].prompt_tokens] == ids
        for place, info in enumerate(events[0].prompt_tokens[1:]):
            assert info.logprob == pytest.approx(float(expected_TV[place, ids[place + 1]]), abs=1e-4)
            values, best = expected_TV[place].topk(2)
            assert [token_id for token_id, _ in info.top] == best.tolist()
            assert [value for _, value in info.top] == pytest.approx(values.tolist(), abs=1e-4)
        assert tokens_of(events)[0].logprob == pytest.approx(float(expected_TV[-1].max()), abs=1e-4)


def test_a_trace_is_of_the_same_tokens(lm: LanguageModel) -> None:
    with serving(lm) as worker:
        (plain,), (traced,) = run(worker, sampled(lm, PROMPT)), run(worker, sampled(lm, PROMPT, trace=True))
        assert facts(plain) == facts(traced)
        for info in tokens_of(traced)[1:]:
            assert info.trace is not None and info.mlp_density is not None
            shares = [sum(layer) / 255 / BINS for layer in info.trace.neurons]
            assert sum(shares) / len(shares) == pytest.approx(info.mlp_density, abs=0.002)
