"""The worker on a scripted engine: events, engines and what they share, limits."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dejavu.config import SamplingConfig
from dejavu.engine.interface import LayerSelection
from dejavu.generation.generation import generate_tokens
from dejavu.serve.api.trace import BINS, step_trace
from dejavu.serve.config import ServeConfig
from dejavu.serve.core.interface import EngineFailed, QueueFull, SequenceRequest, TooLong
from dejavu.serve.core.stream import Stream
from dejavu.serve.core.worker import Worker
from helpers.stub_engine import CERTAIN, EOS, LAYERS, NEURONS, VOCAB, DrawingEngine, StubEngine, StubModel
from helpers.worker_requests import is_idle, request, run, serving, summary_of, text_of, tokens_of, until

# Events


def test_a_request_is_answered_token_by_token() -> None:
    with serving(StubModel(" upon a")) as worker:
        (events,) = run(worker, request())
        assert [event.text for event in events] == [*" upon a", ""]
        assert [[info.token_id for info in event.tokens] for event in events] == [[byte] for byte in b" upon a"] + [[EOS]]
        assert (events[-1].finish_reason, events[-1].prompt_tokens) == ("stop", ())
        first, *later = tokens_of(events)
        assert (first.mlp_density, first.head_density, first.selections) == (None, None, None), "it comes from the prefill"
        assert {(info.mlp_density, info.head_density) for info in later} == {((0.25 + 1) / 2, (0.5 + 1) / 2)}
        assert {info.logprob for info in tokens_of(events)} == {None}, "none was asked for"
        summary = summary_of(events)
        assert (summary.prompt_tokens, summary.completion_tokens, summary.cached_tokens) == (4, 8, 0)
        assert (summary.mlp_density, summary.head_density) == (0.625, 0.75)
        assert summary.time_to_first_token_s > 0 and summary.decode_s > 0
        state = worker.state()
        assert (state.alive, state.last_error, state.queued, state.running, state.failed, state.finished) == (True, None, 0, 0, 0, 1)
        assert (state.prompt_tokens, state.tokens, state.steps) == (4, 8, 7) and state.pages_free == state.pages_total
        assert state.tok_s is not None and state.tok_s > 0


@pytest.mark.parametrize("engine", [StubEngine, DrawingEngine])
def test_tokens_that_end_a_text_are_the_requests_own_too_and_none_ends_it_early(engine: type[StubEngine]) -> None:
    model = StubModel("abcabc", engine=engine)
    with serving(model) as worker:
        (events,) = run(worker, request(stop_ids=(ord("c"),)))
        assert (text_of(events), events[-1].finish_reason, summary_of(events).completion_tokens) == ("ab", "stop", 3)
        (events,) = run(worker, request(new=9, stop_ids=(ord("c"),), min_tokens=4))
        found = [info.token_id for info in tokens_of(events)]
        assert len(found) >= 5 and not {ord("c"), EOS} & set(found[:4]), "so many tokens come before one that may end it"


LETTERS = st.text(alphabet="abé", min_size=1, max_size=4)


@given(answer=st.text(alphabet="abé€", max_size=12), stop=st.lists(LETTERS, max_size=3), new=st.integers(0, 14), ignore_eos=st.booleans())
def test_the_events_are_the_pieces_of_a_generation(answer: str, stop: list[str], new: int, ignore_eos: bool) -> None:
    """Stop strings, unfinished characters, EOS, limits: all as `generate` has them."""
    model = StubModel(answer.encode())
    with serving(model) as worker:
        (events,) = run(worker, request(new=new, stop=tuple(stop), ignore_eos=ignore_eos))
    alone = model.engine(num_slots=1, cache_tokens=64)
    pieces = generate_tokens(
        alone, model.tokenizer, list(b"Once"), max_new_tokens=new, stop=stop, ignore_eos=ignore_eos
    )  # fmt: skip
    expected = [(piece.text, piece.token_ids, piece.finish_reason) for piece in pieces]
    assert [(event.text, tuple(info.token_id for info in event.tokens), event.finish_reason) for event in events] == expected


def test_a_stop_string_over_several_tokens_is_never_sent() -> None:
    with serving(StubModel(b"xxDEFGHIJ and on")) as worker:
        (events,) = run(worker, request(stop=("DEFGHIJ",)))
        assert (text_of(events), events[-1].finish_reason, summary_of(events).completion_tokens) == ("xx", "stop", 9)


def test_no_token_requested_takes_no_step_and_no_slot() -> None:
    model = StubModel()
    with serving(model, slots=1) as worker:
        (events,) = run(worker, request(new=0))
        assert [(event.text, event.tokens, event.finish_reason) for event in events] == [("", (), "length")]
        assert summary_of(events).completion_tokens == 0
        assert [engine.calls for engine in model.engines] == [[], []]


def test_log_probabilities_are_those_before_bias_and_temperature() -> None:
    with serving(StubModel("abc")) as worker:
        bias = {ord("z"): 100.0}
        (events,) = run(worker, request(new=2, top_logprobs=3, logit_bias=bias, sampling=SamplingConfig(temperature=3.0, seed=1)))
        logits_V = torch.arange(VOCAB).double() / -VOCAB
        logits_V[ord("a")] = CERTAIN
        logprob_V = logits_V.log_softmax(0)
        info = tokens_of(events)[0]
        assert text_of(events) == "zz"
        assert info.logprob == pytest.approx(float(logprob_V[ord("z")]), abs=1e-5)
        assert [token_id for token_id, _ in info.top] == [ord("a"), 0, 1]
        assert [value for _, value in info.top] == pytest.approx([float(logprob_V[i]) for i in (ord("a"), 0, 1)], abs=1e-5)
        (plain,) = run(worker, request(new=2))
        assert tokens_of(plain)[0].top == ()


@pytest.mark.parametrize("new", [0, 1, 3])
def test_prompt_log_probabilities_come_once_in_the_first_event(new: int) -> None:
    """Of every token of the prompt but the first, whatever the chunks, and whatever of it is cached."""
    with serving(StubModel("abc"), prefill_chunk=7) as worker:
        prompt = [*range(40, 75)]
        run(worker, request(prompt))
        (events,) = run(worker, request(prompt, new=new, prompt_logprobs=True, top_logprobs=2))
        assert [info.token_id for info in events[0].prompt_tokens] == prompt
        assert (events[0].prompt_tokens[0].logprob, events[0].prompt_tokens[0].top) == (None, ())
        logits_V = torch.arange(VOCAB).double() / -VOCAB
        logits_V[ord("a")] = CERTAIN
        expected = logits_V.log_softmax(0)[prompt[1:]].tolist()
        assert [info.logprob for info in events[0].prompt_tokens[1:]] == pytest.approx(expected, abs=1e-5)
        assert all([token_id for token_id, _ in info.top] == [ord("a"), 0] for info in events[0].prompt_tokens[1:])
        assert all(event.prompt_tokens == () for event in events[1:])
        assert (summary_of(events).completion_tokens, summary_of(events).cached_tokens) == (new, 0)
        (later,) = run(worker, request(prompt, new=1))
        assert summary_of(later).cached_tokens == 32, "what an echo computed may be shared"


def test_events_reach_an_asyncio_loop() -> None:
    with serving(StubModel("abcdefgh")) as worker:

        async def read(stream: Stream) -> str:
            return "".join([event.text async for event in stream])

        async def read_all() -> list[str]:
            return await asyncio.gather(*(read(worker.submit(request(new=count))) for count in (3, 5, 8)))

        assert asyncio.run(read_all()) == ["abc", "abcde", "abcdefgh"]


def test_a_loop_that_is_gone_harms_nobody() -> None:
    model = StubModel("abcdefgh")
    with serving(model) as worker:
        model.engines[1].hold()
        stream = worker.submit(request())

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
        assert text_of(run(worker, request(new=3))[0]) == "abc"


# Engines and what they share


def test_dense_and_sparse_requests_take_turns() -> None:
    order: list[str] = []
    model = StubModel("abcdefghijkl")
    with serving(model) as worker:
        dense, sparse = model.engines
        dense.before = lambda what, slots: order.append("dense") if what == "step" else None
        sparse.before = lambda what, slots: order.append("sparse") if what == "step" else None
        dense.hold()
        sparse.hold()
        streams = worker.submit_all([request(new=6), request(new=6, dense=True)])
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
        (alone,) = run(worker, request([1, 1], new=9))
        assert summary_of(alone).union_density == (0.25 + 1) / 2
        for events in run(worker, request([1, 1], new=9), request([2, 2], new=9)):
            assert summary_of(events).union_density == (0.375 + 1) / 2
            assert summary_of(events).mlp_density == 0.625
        (dense,) = run(worker, request([1, 1], new=9, dense=True))
        assert summary_of(dense).union_density == 1.0


@pytest.mark.parametrize("engine", [StubEngine, DrawingEngine])
def test_where_an_adapter_changes_no_weights_both_share_an_engine(engine: type[StubEngine]) -> None:
    """Its slots, its pages and the prefixes in them; each row is as it is on an engine of its own."""
    model, prompt = StubModel("abcdef", engine=engine, one_engine=True), "sixteen letters, and a few more"
    with serving(model, slots=2) as worker:
        sparse, dense = run(worker, request(prompt), request(prompt, dense=True))
        assert text_of(sparse) == text_of(dense) == "abcdef" and len(model.engines) == 1
        assert (summary_of(sparse).mlp_density, summary_of(dense).mlp_density) == (0.625, 1.0)
        assert (summary_of(sparse).union_density, summary_of(dense).union_density) == (0.625, 1.0)
        assert (summary_of(sparse).cached_tokens, summary_of(dense).cached_tokens) == (0, 16)
        state = worker.state()
        assert [engine.mode for engine in state.engines] == ["sparse"] and state.slots == 2 and state.sparse
        (traced,) = run(worker, request(prompt, dense=True, trace=True))
        trace = step_trace(model.engines[0].info, tokens_of(traced)[1].selections)
        assert trace.neurons == (b"\xff" * BINS,) * LAYERS and len(model.engines) == 1


def test_without_an_adapter_every_request_is_dense() -> None:
    model = StubModel("ab", sparse=False)
    with serving(model) as worker:
        (events,) = run(worker, request(trace=True))
        assert summary_of(events).mlp_density == 1.0
        assert len(model.engines) == 1 and not worker.state().sparse


def test_what_steps_select_is_kept_where_a_trace_is_asked_for() -> None:
    """On the engine that runs the others, too, and in no other step."""
    model = StubModel("abc")
    with serving(model) as worker:
        for plain in run(worker, request(), request(dense=True)):
            assert all(token.selections is None for token in tokens_of(plain))
        (events,) = run(worker, request(trace=True))
        assert len(model.engines) == 2 and not any(engine.records for engine in model.engines)
        first, second, *_ = tokens_of(events)
        assert first.mlp_density is None and first.selections is None and second.selections is not None
        trace = step_trace(model.engines[1].info, second.selections)
        neurons = {(index + ord("a")) % NEURONS for index in range(NEURONS // 4)}
        shares = [sum(2 * bin_ + at in neurons for at in range(2)) / 2 for bin_ in range(BINS)]
        assert trace.neurons[0] == bytes(round(255 * share) for share in shares)
        assert trace.heads == (bytes([1, 0, 1, 0]), bytes([1, 1, 1, 1]))
        assert trace.neurons[1] == b"\xff" * BINS and len(trace.neurons) == LAYERS
        (dense,) = run(worker, request(dense=True, trace=True))
        trace = step_trace(model.engines[0].info, tokens_of(dense)[1].selections)
        assert trace.neurons == (b"\xff" * BINS,) * LAYERS and trace.heads == (b"\x01" * 4,) * LAYERS


@pytest.mark.parametrize("neurons", [1, 63, 64, 100, 3072])
def test_bins_hold_the_share_of_their_neurons(neurons: int) -> None:
    info = dataclasses.replace(StubEngine().info, num_layers=1, num_neurons=neurons)
    chosen = torch.arange(0, neurons, 3)
    (binned,) = step_trace(info, [LayerSelection(neurons_A=chosen, heads_A=None)]).neurons
    members = [[n for n in range(neurons) if n * BINS // neurons == bin_] for bin_ in range(BINS)]
    expected = [255 * sum(n % 3 == 0 for n in of) / len(of) if of else 0 for of in members]
    assert all(abs(value - share) <= 0.5 for value, share in zip(binned, expected, strict=True)) and len(binned) == BINS


def test_choices_read_their_prompt_once() -> None:
    model = StubModel("abc")
    with serving(model) as worker:
        prompt = [7] * 50
        found = run(worker, *(request(prompt, index=index) for index in range(3)))
        assert [summary_of(events).cached_tokens for events in found] == [0, 48, 48]
        assert model.count("prefill") == {50: 1, 2: 2}
        assert worker.state().cached_tokens == 96 and worker.state().prompt_tokens == 54
        assert [text_of(events) for events in found] == ["abc"] * 3
        assert summary_of(run(worker, request(prompt, dense=True))[0]).cached_tokens == 0, "nothing is shared between modes"


def test_what_was_cached_is_counted_once() -> None:
    with serving(StubModel("abc"), prefill_chunk=10) as worker:
        prompt = [7] * 20
        run(worker, request(prompt))
        run(worker, request([*prompt, *range(50)]))
        assert worker.state().cached_tokens == 16


def test_prefix_reuse_can_be_left_out() -> None:
    model = StubModel("abc")
    with serving(model, prefix_reuse=False) as worker:
        prompt = [7] * 50
        found = run(worker, request(prompt), request(prompt))
        assert [summary_of(events).cached_tokens for events in found] == [0, 0] and model.count("prefill") == {50: 2}


def test_prompts_are_read_in_chunks_with_rows_that_decode() -> None:
    model = StubModel("a" * 50, max_positions=512, page_size=16)
    with serving(model, slots=2, prefill_chunk=20, cache_tokens=1024) as worker:
        engine = model.engines[1]
        engine.hold()
        row = worker.submit(request(new=40))
        until(engine.waiting.is_set)
        long = worker.submit(request([*range(100)] * 2, new=1))
        engine.release()
        assert text_of(list(row.events())) == "a" * 40
        list(long.events())
        between = [what for what, _, _ in engine.calls[1:]][:20]
        assert between == ["step"] + ["prefill", "step"] * 9 + ["prefill"]
        assert model.count("prefill") == {4: 1, 20: 10}


def test_an_engine_draws_for_rows_that_want_nothing_else() -> None:
    model = StubModel("abc", engine=DrawingEngine)
    with serving(model) as worker:
        sampling = SamplingConfig(seed=3)
        plain, scored = run(worker, request(new=3, sampling=sampling, index=2), request("Twice", new=3, top_logprobs=1))
        assert text_of(plain) == text_of(scored) == "abc"
        assert [info.mlp_density for info in tokens_of(plain)] == [None, 0.625, 0.625]
        assert summary_of(plain).union_density == (0.25 + 1) / 2 and worker.state().fallback_layers == 2, "of its own two steps"
        assert [info.logprob is None for info in (*tokens_of(plain), *tokens_of(scored))] == [True] * 3 + [False] * 3
        engine = model.engines[1]
        assert isinstance(engine, DrawingEngine) and engine.drawn == [((3, 2),)] * 2, "one row, and not the one that wants more"
        engine.damaged = ord("a")
        for stream, text in zip(worker.submit_all([request(), request("Twice", top_logprobs=0)]), (None, "abc"), strict=True):
            if text is None:
                with pytest.raises(EngineFailed, match="not numbers"):
                    list(stream.events())
            else:
                assert text_of(list(stream.events())) == text


@pytest.mark.parametrize(
    ("new", "stop", "text"), [(10, (), "abcdefghij"), (3, (), "abc"), (40, ("h",), "abcdefg"), (40, (), "abcdefghijklm")]
)
def test_a_text_alone_is_drawn_a_few_tokens_at_a_time(new: int, stop: tuple[str, ...], text: str) -> None:
    """What lies behind its end is dropped, counts as steps alone, and no token is asked for beyond what it may have."""
    model = StubModel("abcdefghijklm", engine=DrawingEngine)
    with serving(model) as worker:
        (events,) = run(worker, request(new=new, stop=stop))
        assert text_of(events) == text
        engine, state = model.engines[1], worker.state()
        assert isinstance(engine, DrawingEngine)
        calls, tokens = {10: ([1, 2, 4, 2], 10), 3: ([1, 1], 3)}.get(new, ([1, 2, 4], 8) if stop else ([1, 2, 4, 4, 4], 14))
        assert engine.requested == [(count, 1) for count in calls]
        assert state.tokens == tokens == summary_of(events).completion_tokens
        assert state.steps == state.fallback_layers == sum(calls) and state.running == 0 and state.pages_free == state.pages_total
        assert state.last_error is None and len(model.engines) == 2


@pytest.mark.parametrize("other_work", ["a neighbour", "one that waits", "a prompt", "the other engine"])
def test_where_others_run_or_wait_a_step_is_one_token(other_work: str) -> None:
    model = StubModel("ab" * 40, engine=DrawingEngine)
    slots = 1 if other_work == "one that waits" else 2
    with serving(model, slots=slots, prefill_chunk=4) as worker:
        engine = model.engines[1]
        assert isinstance(engine, DrawingEngine)
        engine.hold()
        first = worker.submit(request(new=40))
        engine.allow(3)
        until(lambda: len(engine.requested) == 3 and engine.waiting.is_set())  # in its third call, of four
        model.engines[0].hold()
        prompt = [*range(200)] if other_work == "a prompt" else [66]
        other = worker.submit(request(prompt, new=1 if other_work == "a prompt" else 20, dense=other_work == "the other engine"))
        engine.allow(4)
        until(lambda: (len(engine.requested) >= 4 and engine.waiting.is_set()) or model.engines[0].waiting.is_set())
        for each in model.engines:
            each.release()
        for stream in (first, other):
            list(stream.events())
        ones = {"a neighbour": 19, "one that waits": 32, "a prompt": 32, "the other engine": 15}[other_work]
        calls = engine.requested[3 : 3 + ones]
        assert engine.requested[:3] == [(1, 1), (2, 1), (4, 1)] and {count for count, _ in calls} == {1}, engine.requested
        assert worker.state().last_error is None


def test_a_trace_of_a_dense_text_has_every_token() -> None:
    model = StubModel("abcdef", engine=DrawingEngine)
    with serving(model) as worker:
        (events,) = run(worker, request(dense=True, trace=True))
        assert [info.mlp_density for info in tokens_of(events)] == [None] + [1.0] * 6
        assert model.engines[0].steps == 6, "a token at a time"


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
                worker.submit_all([request(new=2), request([5] * prompt, new=new)])
            assert worker.state().queued == 0, "all or none"
        else:
            (events,) = run(worker, request([5] * prompt, new=new, prompt_logprobs=True))
            assert (events[-1].finish_reason, summary_of(events).completion_tokens) == ("length", new)
        assert text_of(run(worker, request("ab", new=3))[0]) == "abc"
        assert worker.state().max_model_len == limit


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (request([], new=1), "no tokens"),
        (request(new=-1), "max_new_tokens must be 0 or more, not -1"),
        (request([5, VOCAB]), f"token id {VOCAB} is outside the model's vocabulary of {VOCAB}"),
        (request([-1, 5]), "token id -1 is outside"),
        (request(logit_bias={VOCAB + 1: 1.0}), f"token id {VOCAB + 1} is outside"),
        (request(stop=("x", "")), "must not be empty"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_at_once(bad: SequenceRequest, message: str) -> None:
    model = StubModel()
    with serving(model) as worker:
        with pytest.raises(ValueError, match=message):
            worker.submit_all([request(), bad])
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
        running, *waiting = worker.submit_all([request(new=4)] * 3)
        for count in (1, 2):
            with pytest.raises(QueueFull) as caught:
                worker.submit_all([request(new=4)] * count)
            assert caught.value.retry_after_s >= 1
        until(model.engines[1].waiting.is_set)
        assert (worker.state().queued, worker.state().running) == (2, 1)
        waiting[0].cancel()
        with pytest.raises(QueueFull):
            worker.submit_all([request(new=4)] * 2)
        late = worker.submit(request(new=4))
        assert worker.submit(request(new=0)) is not None, "what needs no slot needs no place"
        model.engines[1].release()
        assert [text_of(list(stream.events())) for stream in (running, *waiting, late)] == ["abca", "", "abca", "abca"]


def test_all_or_none_is_over_all_engines() -> None:
    model = StubModel("abc" * 9)
    with serving(model, slots=1, queue=0) as worker:
        model.engines[0].hold()
        dense = worker.submit(request(new=4, dense=True))
        until(model.engines[0].waiting.is_set)
        with pytest.raises(QueueFull):
            worker.submit_all([request(new=4), request(new=4, dense=True)])
        model.engines[0].release()
        assert text_of(list(dense.events())) == "abca" and model.engines[1].prefills == 0
