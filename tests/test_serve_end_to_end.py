"""From HTTP to the engine and back: the real server, the real worker, and engines that follow a script or compute a model."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import torch

import dejavu
from conftest import Brute, Tiny
from dejavu.language_model import LanguageModel
from dejavu.loading import load
from dejavu.model.bundle import export
from dejavu.model.tokenizer import Tokenizer
from dejavu.serve.api.app import create_app
from dejavu.serve.api.requests import served_by
from dejavu.serve.api.vocabulary import Vocabulary
from dejavu.serve.config import ServeConfig
from dejavu.serve.core.worker import ServedModel, Worker
from helpers.adapters import make_adapter
from helpers.clients import Caller
from helpers.fake_worker import eventually, serving
from helpers.stub_engine import StubModel
from helpers.texts import PROMPT


class Site:
    """A server with a worker of its own. name: of its model."""

    def __init__(self, url: str, client: httpx.Client, worker: Worker, name: str) -> None:
        self.url, self.client, self.worker, self.name = url, client, worker, name

    def post(self, **fields: Any) -> httpx.Response:
        path = "/v1/chat/completions" if "messages" in fields else "/v1/completions"
        return self.client.post(path, json={"model": self.name} | fields)

    def choices(self, **fields: Any) -> list[dict[str, Any]]:
        """The choices of an answer, which is the same as a stream."""
        answer = self.post(**fields)
        assert answer.status_code == 200, answer.text
        found = answer.json()["choices"]
        lines = self.post(**fields, stream=True).text.split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        parts = [part for line in lines[:-2] for part in json.loads(line.removeprefix("data: "))["choices"]]
        for choice in found:
            mine = [part for part in parts if part["index"] == choice["index"]]
            said = "".join(part["text"] if "text" in part else part["delta"].get("content", "") for part in mine)
            assert said == (choice["text"] if "text" in choice else choice["message"]["content"])
            assert [part["finish_reason"] for part in mine] == [None] * (len(mine) - 1) + [choice["finish_reason"]]
        return found


@contextmanager
def site_of(lm: ServedModel, *, tokenizer: Tokenizer | None = None, **config: Any) -> Iterator[Site]:
    worker = Worker(lm, ServeConfig(**config))
    worker.start()
    try:
        served = served_by(tokenizer or lm.tokenizer, worker.state(), queue=config.get("queue", 64), threads=1)
        with serving(create_app(served, worker)) as url, httpx.Client(base_url=url, timeout=60) as client:
            yield Site(url, client, worker, served.name)
    finally:
        worker.close()


def test_a_model_may_be_served_by_another_name() -> None:
    with site_of(StubModel("abc")) as site:
        named = served_by(site.worker._lm.tokenizer, site.worker.state(), queue=64, threads=1, name="smollm2-sparse")
        assert named.models == ("smollm2-sparse", "smollm2-sparse:dense") and named.is_dense("smollm2-sparse:dense")
        assert site.client.get("/v1/models").json()["data"][0]["id"] == "stub"


# A script


@pytest.mark.parametrize(
    ("answer", "max_tokens", "stop", "text", "reason", "tokens"),
    [
        ("DEFGHIJ", 20, "DEFGHIJ", "", "stop", 7),
        ("DEFGX", 20, "DEFGHIJ", "DEFGX", "stop", 6),
        ("DEFGHIJ", 4, "DEFGHIJ", "DEFG", "length", 4),
        ("aaab", 20, "aab", "a", "stop", 4),
        ("one two", 20, ["two", "e t"], "on", "stop", 5),
        ("one two", 20, ["e t", "ne t"], "on", "stop", 5),
        ("one two", 20, [], "one two", "stop", 8),
        ("one two", 0, "one", "", "length", 0),
        ("a€b", 20, "€", "a", "stop", 4),
    ],
)
def test_stop_strings(answer: str, max_tokens: int, stop: Any, text: str, reason: str, tokens: int) -> None:
    """Nothing that is sent is taken back, and the first to complete wins. The prompt is not searched."""
    with site_of(StubModel(answer)) as site:
        requested = {"prompt": "DEFGHIJ aab two", "max_tokens": max_tokens, "stop": stop, "temperature": 0}
        (choice,) = site.choices(**requested)
        assert (choice["text"], choice["finish_reason"]) == (text, reason)
        assert site.post(**requested).json()["usage"]["completion_tokens"] == tokens
        (echoed,) = site.choices(**requested, echo=True, logprobs=0)
        assert echoed["text"] == "DEFGHIJ aab two" + text and len(echoed["logprobs"]["tokens"]) == 15 + tokens


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_a_slot_is_free_one_step_after_its_reader_left(stream: bool, n: int) -> None:
    model = StubModel("x" * 200)
    with site_of(model, slots=4) as site:
        engine = model.engines[-1]
        before = engine.free_kv_pages
        engine.hold()
        caller = Caller(site.url)
        caller.ask(model="stub", prompt="abc", max_tokens=200, stream=stream, n=n)
        engine.allow(5)
        eventually(lambda: engine.steps == 5 and engine.waiting.is_set())
        if stream:
            caller.hear(b'"text":"x')  # one or more of them
        caller.leave()
        metric = 'dejavu_requests_total{endpoint="completions",outcome="cancelled"} 1.0'
        eventually(lambda: metric in site.client.get("/metrics").text)
        engine.allow(1)  # the step that was waiting when the reader left
        eventually(lambda: engine.live_sequences == 0)
        assert engine.steps == 6 and engine.free_kv_pages == before and site.worker.state().running == 0


def test_one_that_waits_for_a_slot_leaves_the_queue() -> None:
    model = StubModel("x" * 50)
    with site_of(model, slots=1) as site:
        engine = model.engines[-1]
        engine.hold()
        first, second = Caller(site.url), Caller(site.url)
        first.ask(model="stub", prompt="abc", max_tokens=50)
        eventually(lambda: site.worker.state().running == 1)
        second.ask(model="stub", prompt="abc", max_tokens=50)
        eventually(lambda: site.worker.state().queued == 1)
        second.leave()
        eventually(lambda: site.worker.state().queued == 0)
        engine.release()
        first.hear(b'"finish_reason":"length"')
        first.leave()
        assert engine.calls.count(("prefill", (0,), 3)) == 1


def test_a_full_queue_and_a_failure_are_told_and_pass() -> None:
    model = StubModel("ab")
    with site_of(model, slots=1, queue=1) as site:
        engine = model.engines[-1]
        engine.hold()
        callers = [Caller(site.url) for _ in range(2)]
        for count, caller in enumerate(callers, 1):
            caller.ask(model="stub", prompt="abc", max_tokens=3)
            eventually(lambda count=count: site.worker.state().running + site.worker.state().queued == count)
        busy = site.post(prompt="abc")
        assert busy.status_code == 429 and int(busy.headers["retry-after"]) >= 1
        assert site.post(prompt="abc", n=3).status_code == 400, "more than could ever wait"
        engine.release()
        for caller in callers:
            caller.hear(b'"text":"ab"')
            caller.leave()

        def broken(what: str, slots: Sequence[int]) -> None:
            if what == "step":
                raise RuntimeError("no memory for /srv/x")

        engine.before = broken
        failed = site.post(prompt="abc")
        assert failed.status_code == 500 and failed.json()["error"]["code"] == "engine_failed" and "/srv" not in failed.text
        engine.before = lambda what, slots: None
        assert site.post(prompt="abc").json()["choices"][0]["text"] == "ab"


def test_a_trace_shows_what_fired() -> None:
    with site_of(StubModel("ab")) as site:
        lines = site.post(prompt="abc", stream=True, dejavu={"trace": True}).text.split("\n\n")
        extras = [json.loads(line.removeprefix("data: "))["dejavu"] for line in lines[:-2]]
        assert extras[0]["shape"] == {"layers": 2, "bins": 64, "heads": 4, "neurons": 128}
        first, second, third = [token for extra in extras for token in extra["trace"]]
        assert first["neurons"] is None and second["mlp_density"] == third["mlp_density"] == (0.25 + 1) / 2
        assert len(second["neurons"]) == len(third["neurons"]) and second["neurons"] != third["neurons"]
        assert extras[-1]["mode"] == "sparse" and extras[-1]["head_density"] == 0.75


# A model


@pytest.fixture(scope="module")
def lm(tiny: Tiny, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """A tiny model of 64 positions with an adapter, on the torch backend."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    model = tiny("opt")
    export(model, tokenizer, path)
    plain = load(path)
    export(model, tokenizer, path, adapter=make_adapter(plain.config, plain.base_hash))
    return load(path, backend="torch")


@pytest.fixture(scope="module")
def site(lm: LanguageModel, tokenizer: Tokenizer) -> Iterator[Site]:
    """slots: 3, fewer than some requests have choices."""
    chatty = dataclasses.replace(tokenizer, chat_template="{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}")
    with site_of(lm, tokenizer=chatty, slots=3) as site:
        yield site


@pytest.mark.parametrize("max_tokens", [0, 1, 4])
@pytest.mark.parametrize("as_ids", [False, True])
def test_echoed_logprobs_are_those_of_the_model(site: Site, lm: LanguageModel, brute: Brute, max_tokens: int, as_ids: bool) -> None:
    """Of the prompt, by a forward pass over it; of what follows too, dense."""
    ids = lm.tokenizer.encode(PROMPT)
    prompt = ids[1:] if as_ids else PROMPT
    requested = {"model": f"{site.name}:dense", "prompt": prompt, "echo": True, "logprobs": 2, "max_tokens": max_tokens}
    (choice,) = site.choices(**requested, temperature=0, ignore_eos=True)
    found = choice["logprobs"]
    ids = ids[1:] if as_ids else ids
    vocabulary = Vocabulary(lm.tokenizer)
    by_text = {vocabulary.text(token_id): token_id for token_id in range(lm.tokenizer.vocab_size)}
    whole = [by_text[token] for token in found["tokens"]]
    assert whole[: len(ids)] == ids and len(by_text) == lm.tokenizer.vocab_size
    assert len(whole) == len(ids) + max_tokens == len(found["token_logprobs"]) == len(found["top_logprobs"]) == len(found["text_offset"])
    expected_TV = brute(lm.model, whole)
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    for place, token_id in enumerate(whole[1:]):
        assert found["token_logprobs"][place + 1] == pytest.approx(float(expected_TV[place, token_id]), abs=1e-4)
        best = sorted(found["top_logprobs"][place + 1].values(), reverse=True)[:2]
        assert best == pytest.approx(expected_TV[place].topk(2).values.tolist(), abs=1e-4)
    assert choice["finish_reason"] == "length"
    # What lm-evaluation-harness makes of it: the score of a continuation, whose one new token it drops.
    context = len(ids) // 2
    if max_tokens == 1:
        score = sum(found["token_logprobs"][context:-1])
        assert score == pytest.approx(sum(float(expected_TV[place - 1, ids[place]]) for place in range(context, len(ids))), abs=1e-3)


def test_logprobs_are_before_temperature_and_bias(site: Site, tokenizer: Tokenizer) -> None:
    plain = site.choices(prompt=PROMPT, max_tokens=1, logprobs=3, temperature=0)[0]["logprobs"]
    token_id = 50
    text = Vocabulary(tokenizer).text(token_id)
    biased = site.choices(prompt=PROMPT, max_tokens=1, logprobs=3, temperature=0.01, logit_bias={str(token_id): 100})[0]["logprobs"]
    assert biased["tokens"] == [text] != plain["tokens"]
    top = {key: value for key, value in biased["top_logprobs"][0].items() if key != text}
    assert top.items() <= plain["top_logprobs"][0].items() and biased["token_logprobs"][0] < min(plain["top_logprobs"][0].values())


@pytest.mark.parametrize("dense", [False, True])
def test_a_greedy_text_is_that_of_generate(site: Site, lm: LanguageModel, dense: bool) -> None:
    name = f"{site.name}:dense" if dense else site.name
    told = lm.generate(PROMPT, max_new_tokens=12, ignore_eos=True, dense=dense)
    (choice,) = site.choices(model=name, prompt=PROMPT, max_tokens=12, temperature=0, ignore_eos=True)
    assert choice["text"] == told
    extra = site.post(model=name, prompt=PROMPT, max_tokens=12, temperature=0, ignore_eos=True).json()["dejavu"]
    assert extra["mode"] == ("dense" if dense else "sparse") and extra["tok_s"] > 0
    assert extra["mlp_density"] == pytest.approx(told.mlp_density) and extra["head_density"] == pytest.approx(told.head_density)


def test_a_seed_gives_the_same_text_whatever_else_runs(site: Site) -> None:
    """Alone, again, among others, as the first of three choices; and torch's own generator is not touched."""
    requested = {"prompt": PROMPT, "max_tokens": 10, "temperature": 1.5, "seed": 7, "ignore_eos": True}
    state = torch.get_rng_state()
    alone = site.choices(**requested)[0]["text"]
    three = [choice["text"] for choice in site.choices(**requested, n=3)]
    assert three[0] == alone and len(set(three)) == 3
    others = [threading.Thread(target=lambda: site.post(prompt="the", max_tokens=20, ignore_eos=True)) for _ in range(4)]
    for other in others:
        other.start()
    assert [site.choices(**requested)[0]["text"] for _ in range(3)] == [alone] * 3
    for other in others:
        other.join()
    assert torch.equal(torch.get_rng_state(), state)
    assert site.choices(**requested | {"prompt": ["the hat", PROMPT]})[1]["text"] == alone, "prompts do not matter to each other"
    unseeded = {site.post(**requested | {"seed": None}).json()["choices"][0]["text"] for _ in range(4)}
    assert len(unseeded) > 1


@pytest.mark.parametrize("limits", [{"max_model_len": 32}, {"cache_tokens": 48, "slots": 1}])
def test_limits(lm: LanguageModel, limits: dict[str, Any]) -> None:
    """By the length of a sequence or by the cache: what cannot fit is refused at once, and then a small one is answered."""
    limit = min(limits.get("max_model_len", 64), limits.get("cache_tokens", 64))
    with site_of(lm, **limits) as site:
        for prompt in (limit - 1, limit, limit + 1):
            for max_tokens, new in ((0, 0), (1, 1), (None, 16)):
                answer = site.post(prompt=[5] * prompt, max_tokens=max_tokens, echo=True, logprobs=0, temperature=0, ignore_eos=True)
                if prompt + new <= limit:
                    assert answer.status_code == 200 and len(answer.json()["choices"][0]["logprobs"]["tokens"]) == prompt + new
                else:
                    error = answer.json()["error"]
                    assert answer.status_code == 400 and error["code"] == "context_length_exceeded", error
                    assert all(str(number) in error["message"] for number in (prompt, new, limit))
                    assert site.post(prompt=[5], max_tokens=1).status_code == 200


def test_a_chat_may_fill_the_context(site: Site, lm: LanguageModel) -> None:
    message = {"role": "user", "content": PROMPT}
    answer = site.post(messages=[message], ignore_eos=True, temperature=0).json()
    assert answer["usage"]["total_tokens"] == 64 and answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["prompt_tokens"] == len(lm.tokenizer.encode(PROMPT)), "one BOS, that of the template"
    assert answer["choices"][0]["message"]["content"] == lm.generate(PROMPT, max_new_tokens=99, ignore_eos=True)


def test_a_prefix_is_shared_by_both_names(lm: LanguageModel, tokenizer: Tokenizer) -> None:
    """Later requests find the pages of the first one's prompt; the dense model finds none of its answer, and answers as a fresh server."""
    prompt = [5, 6, 7, 8] * 10
    requested = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    with site_of(lm) as site:
        texts, cached = [], []
        for model in ("tiny", "tiny", "tiny:dense", "tiny:dense"):
            answer = site.post(**requested, model=model).json()
            texts.append(answer["choices"][0]["text"])
            cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
        assert cached[0] == 0 and cached[1] == cached[2] == cached[3] > 0
        assert [engine.mode for engine in site.worker.state().engines] == ["sparse"]
        assert texts[0] == texts[1] and texts[2] == texts[3]
    with site_of(lm, prefix_reuse=False) as site:
        for _ in range(2):
            fresh = site.post(**requested, model="tiny:dense").json()
            assert fresh["usage"]["prompt_tokens_details"]["cached_tokens"] == 0 and fresh["choices"][0]["text"] == texts[2]


def test_rows_of_a_batch_do_not_matter_to_each_other(site: Site) -> None:
    """Twelve prompts at once over three slots: each is what it is alone."""
    prompts = [f"{word} {PROMPT}"[: 8 + 2 * place] for place, word in enumerate(["the", "cat", "and", "hat"] * 3)]
    requested = {"max_tokens": 6, "temperature": 0, "ignore_eos": True}
    together = [choice["text"] for choice in site.choices(prompt=prompts, **requested)]
    assert together == [site.choices(prompt=prompt, **requested)[0]["text"] for prompt in prompts]


def test_the_bundled_model() -> None:
    """opt-mini on the backend of this machine, sparse and dense, whole and streamed."""
    lm = dejavu.load("opt-mini")
    with site_of(lm, slots=2, cache_tokens=256) as site:
        for model, dense in (("opt-mini", False), ("opt-mini:dense", True)):
            (choice,) = site.choices(model=model, prompt="Once upon a time", max_tokens=6, temperature=0)
            assert choice["text"] == lm.generate("Once upon a time", max_new_tokens=6, temperature=0, dense=dense)
            density = site.post(model=model, prompt="Once upon a time", max_tokens=6, temperature=0).json()["dejavu"]["mlp_density"]
            assert density == 1 if dense else 0.02 < density < 0.3
        assert site.post(messages=[{"role": "user", "content": "Hi"}], model="opt-mini").json()["error"]["code"] == "no_chat_template"
