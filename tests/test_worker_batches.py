"""The worker on a real model: what comes in a batch is what comes alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

import dejavu
from dejavu.config import SamplingConfig
from dejavu.language_model import LanguageModel
from dejavu.serve.api.trace import BINS, step_trace
from dejavu.serve.core.interface import Event, SequenceRequest
from helpers.screens import screen_of, with_screen
from helpers.worker_requests import request, run, serving, summary_of, text_of, tokens_of


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return dejavu.load("opt-mini", backend="native", dtype="fp32")


def sampled(lm: LanguageModel, prompt: str, new: int = 12, *, seed: int | None = 7, **options: Any) -> SequenceRequest:
    return request(lm.tokenizer.encode(prompt), new, sampling=SamplingConfig(temperature=1.0, seed=seed), **options)


def facts(events: Sequence[Event]) -> list[tuple[Any, ...]]:
    return [(info.token_id, info.logprob, info.top, info.mlp_density, info.head_density) for info in tokens_of(events)]


PROMPT = "The old lighthouse keeper had a secret, and every night he went down to the sea to"
HOSTILE = "zq!! 9# Qx"


def test_a_neighbour_that_adds_to_logits_changes_no_text() -> None:
    """It has the full head; who has the screened one goes on with that."""
    lm = dejavu.load("opt-mini", backend="native", dtype="fp32")
    assert lm.adapter is not None
    lm.adapter = with_screen(lm.adapter, screen_of(lm.model, threshold=0.3))
    plain, biased = sampled(lm, PROMPT, 24), sampled(lm, PROMPT, 24, logit_bias={5: 1e-6})

    def ids(events: Sequence[Event]) -> list[int]:
        return [info.token_id for info in tokens_of(events)]

    with serving(lm, slots=2) as worker:
        alone = [ids(run(worker, one)[0]) for one in (plain, biased)]
        assert alone[0] != alone[1], "what is left out is drawn now and then"
        assert list(map(ids, run(worker, plain, biased))) == alone


@pytest.mark.parametrize("dense", [False, True])
def test_a_batch_gives_what_a_generation_gives(lm: LanguageModel, dense: bool) -> None:
    """Sampled with a seed, next to a neighbour without one and a hostile one, joined late, with a shared prefix: bit for bit."""
    alone = lm.generate(PROMPT, max_new_tokens=12, temperature=1.0, top_p=1.0, seed=7, dense=dense)
    state = torch.get_rng_state()
    with serving(lm, slots=4, prefill_chunk=5) as worker:
        neighbours = worker.submit_all(
            [sampled(lm, HOSTILE, 400, seed=None, ignore_eos=True, dense=dense), sampled(lm, PROMPT, 400, seed=3, dense=dense)]
        )
        for neighbour in neighbours:
            next(neighbour.events())  # both have read their prompts
        for attempt in range(2):
            (events,) = run(worker, sampled(lm, PROMPT, top_logprobs=attempt or None, dense=dense))
            logprobs = alone.logprobs if attempt else [None] * 12
            assert [(token_id, logprob) for token_id, logprob, *_ in facts(events)] == list(zip(alone.token_ids, logprobs, strict=True))
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
        (events,) = run(worker, request(ids, 1, prompt_logprobs=True, top_logprobs=2))
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
        shape = lm.generate(PROMPT, max_new_tokens=1).engine
        for info in tokens_of(traced)[1:]:
            assert info.selections is not None and info.mlp_density is not None
            shares = [sum(layer) / 255 / BINS for layer in step_trace(shape, info.selections).neurons]
            assert sum(shares) / len(shares) == pytest.approx(info.mlp_density, abs=0.002)
