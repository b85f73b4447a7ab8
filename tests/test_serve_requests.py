"""What the server takes and what it refuses, and with which words: every mistake is OpenAI's envelope with the field at fault."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import tokenizers

from dejavu.config import SamplingConfig
from dejavu.model import bounded
from dejavu.model.tokenizer import Tokenizer
from dejavu.serve.api.answers import MAX_BODY
from dejavu.serve.api.app import create_app
from dejavu.serve.api.chat import parse_chat
from dejavu.serve.api.completions import parse_completion
from dejavu.serve.api.errors import ApiError, without_paths
from dejavu.serve.api.parsing import parse
from dejavu.serve.api.request_schemas import ChatBody, CompletionBody
from dejavu.serve.api.requests import ParsedRequest, served_by
from dejavu.serve.core.interface import EngineState, LoadStats
from helpers.clients import TEMPLATE, error_of
from helpers.fake_worker import FakeWorker, served, serving, spoken

USER = {"role": "user", "content": "the cat"}


@pytest.fixture(scope="module")
def chatty(tokenizer: Tokenizer) -> Tokenizer:
    return dataclasses.replace(tokenizer, chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def client(chatty: Tokenizer) -> Iterator[httpx.Client]:
    """A client of a server whose model answers everything with "Hello"; 64 tokens of context, 96 of vocabulary."""
    app = create_app(served(chatty, max_choices=8), FakeWorker(lambda request: spoken("Hel", "lo")))
    with serving(app) as url, httpx.Client(base_url=url) as client:
        yield client


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "the cat", **fields}


def chat(*messages: Any, **fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": list(messages), **fields}


ACCEPTED = [
    completion(),
    completion(prompt=["the", "cat"]),
    completion(prompt=[4, 5, 6]),
    completion(prompt=[[4, 5], [6]]),
    completion(prompt=""),  # the tokenizer begins it with BOS
    completion(max_tokens=0),
    completion(max_tokens=5.0),  # JSON has one kind of number
    completion(max_tokens=None, temperature=None, stop=None, stream=None, logprobs=None, stream_options=None, dejavu=None, suffix=None),
    completion(temperature=0, top_p=1, top_k=3, n=2, seed=-7, logprobs=20, echo=True, ignore_eos=True, user="me"),
    completion(top_k=0),
    completion(top_k=-1, min_p=0.1, stop_token_ids=[5, 95], min_tokens=2),
    completion(presence_penalty=2, frequency_penalty=-2.0, repetition_penalty=1.1, max_completion_tokens=5, max_tokens=5),
    completion(stop="x"),
    completion(stop=["x"] * 16),
    completion(stop=[]),
    completion(logit_bias={"5": -100, "95": 100}),
    completion(presence_penalty=0, frequency_penalty=0.0, best_of=1),
    completion(metadata=3, store=True, request_id="r", service_tier="auto", stream_options=None),  # these change no text
    completion(frobnicate=None, tool_choice="none", min_p=0, length_penalty=1.0, use_beam_search=False, bad_words=[], suffix=""),
    completion(model="tiny:dense"),
    completion(prompt="\U0001f408 \u0000"),
    completion(dejavu={"trace": False}),
    chat({**USER, "name": "me"}, {"role": "assistant", "content": "x", "refusal": None, "annotations": [], "tool_calls": None}, USER),
    chat(USER, continue_final_message=False, add_generation_prompt=True, modalities=["text"]),
]

REFUSED: list[tuple[dict[str, Any], str, int]] = [
    ({"prompt": "x"}, "model", 400),
    ({"model": "tiny"}, "prompt", 400),
    (completion(model=5), "model", 400),
    (completion(model=None), "model", 400),
    (completion(model="gpt-9"), "model", 404),
    (completion(model="tiny:sparse"), "model", 404),
    (completion(prompt=None), "prompt", 400),
    (completion(prompt=5), "prompt", 400),
    (completion(prompt={"text": "x"}), "prompt", 400),
    (completion(prompt=[]), "prompt", 400),
    (completion(prompt=[[]]), "prompt", 400),
    (completion(prompt=[4, "x"]), "prompt", 400),
    (completion(prompt=[True]), "prompt", 400),
    (completion(prompt=[-1]), "prompt", 400),
    (completion(prompt=[4.5]), "prompt", 400),
    (completion(prompt=[96]), "prompt", 400),
    (completion(prompt=[[4], [4, 96]]), "prompt[1]", 400),
    (completion(prompt=["the", "the cat " * 40]), "prompt[1]", 400),
    (completion(tools=[{"type": "function"}]), "tools", 400),
    (completion(response_format={"type": "json_object"}), "response_format.type", 400),
    (completion(prompt=["x"] * 9), "prompt", 400),
    (completion(prompt=["x"] * 3, n=3), "prompt", 400),
    (completion(max_tokens="256"), "max_tokens", 400),
    (completion(max_tokens=True), "max_tokens", 400),
    (completion(max_tokens=-1), "max_tokens", 400),
    (completion(max_tokens=1.5), "max_tokens", 400),
    (completion(max_tokens=[1]), "max_tokens", 400),
    (completion(stream="true"), "stream", 400),
    (completion(stream=1), "stream", 400),
    (completion(stream_options={"include_usage": "yes"}, stream=True), "stream_options.include_usage", 400),
    (completion(stream_options=True, stream=True), "stream_options", 400),
    (completion(stream_options={"include_usage": True}), "stream_options", 400),
    (completion(temperature="0.5"), "temperature", 400),
    (completion(temperature=True), "temperature", 400),
    (completion(temperature=-0.1), "temperature", 400),
    (completion(temperature=2.1), "temperature", 400),
    (completion(top_p=0), "top_p", 400),
    (completion(top_p=1.5), "top_p", 400),
    (completion(top_k=-2), "top_k", 400),
    (completion(min_p=1.5), "min_p", 400),
    (completion(stop_token_ids=[96]), "stop_token_ids", 400),
    (completion(stop_token_ids="x"), "stop_token_ids", 400),
    (completion(min_tokens=17), "min_tokens", 400),
    (completion(min_tokens=1, stop="x"), "min_tokens", 400),
    (completion(repetition_penalty=0), "repetition_penalty", 400),
    (completion(n=0), "n", 400),
    (completion(n=9), "n", 400),
    (completion(n=1000), "n", 400),
    (completion(n=False), "n", 400),
    (completion(seed=2**63), "seed", 400),
    (completion(seed="1"), "seed", 400),
    (completion(stop=""), "stop", 400),
    (completion(stop=["x", ""]), "stop", 400),
    (completion(stop=["x"] * 17), "stop", 400),
    (completion(stop=5), "stop", 400),
    (completion(logprobs=True), "logprobs", 400),
    (completion(logprobs=21), "logprobs", 400),
    (completion(logprobs=-1), "logprobs", 400),
    (completion(echo=1), "echo", 400),
    (completion(logit_bias=[5]), "logit_bias", 400),
    (completion(logit_bias={"5": 101}), "logit_bias.5", 400),
    (completion(logit_bias={"5": True}), "logit_bias.5", 400),
    (completion(logit_bias={"the": 1}), "logit_bias.the", 400),
    (completion(logit_bias={"96": 1}), "logit_bias", 400),
    (completion(best_of=2), "best_of", 400),
    (completion(suffix="x"), "suffix", 400),
    (completion(presence_penalty=2.5), "presence_penalty", 400),
    (completion(dejavu={"trace": False, "unknown": 1}), "dejavu.unknown", 400),
    (completion(stream=True, stream_options={"continuous_usage_stats": True}), "stream_options.continuous_usage_stats", 400),
    (completion(dejavu=True), "dejavu", 400),
    (completion(dejavu={"trace": 1}), "dejavu.trace", 400),
    (completion(dejavu={"trace": True}), "dejavu.trace", 400),
    (completion(prompt="the cat", max_tokens=64), "prompt", 400),
    (chat(), "messages", 400),
    ({"model": "tiny"}, "messages", 400),
    (chat("hello"), "messages[0]", 400),
    (chat(USER, {"role": "tool", "content": "x"}), "messages[1].role", 400),
    (chat({"content": "x"}), "messages[0].role", 400),
    (chat({"role": 5, "content": "x"}), "messages[0].role", 400),
    (chat({"role": "user"}), "messages[0].content", 400),
    (chat({"role": "user", "content": None}), "messages[0].content", 400),
    (chat({"role": "user", "content": 5}), "messages[0].content", 400),
    (chat({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}), "messages[0].content", 400),
    (chat({"role": "user", "content": [{"type": "text"}]}), "messages[0].content", 400),
    (chat({"role": "system", "content": "be kind"}), "messages", 400),  # the template's own refusal
    (chat(USER, logprobs=1), "logprobs", 400),
    (chat(USER, top_logprobs=2), "top_logprobs", 400),
    (chat(USER, logprobs=True, top_logprobs=21), "top_logprobs", 400),
    (chat(USER, max_completion_tokens="5"), "max_completion_tokens", 400),
    (chat(USER, tools=[{"type": "function"}]), "tools", 400),
    (chat(USER, functions=[{}]), "functions", 400),
    (chat(USER, {"role": "assistant", "content": "x", "tool_calls": [{}]}), "messages[1].tool_calls", 400),
    (chat({**USER, "cache_control": {}}), "messages[0].cache_control", 400),
    (chat(USER, continue_final_message=True, add_generation_prompt=True), "messages", 400),
    (chat(USER, continue_final_message="content"), "continue_final_message", 400),
    (chat(USER, response_format={"type": "json_object"}), "response_format.type", 400),
]


# What other servers take and what changes the text: each is refused by its name, where it is not obeyed.
OTHERS = {
    "enable_thinking": False, "reasoning_effort": "low", "allowed_token_ids": [5],
    "guided_json": {}, "guided_regex": "x", "grammar": "root ::= x", "json_schema": {}, "bad_words": ["x"], "length_penalty": 0.5,
    "use_beam_search": True, "skip_special_tokens": False, "include_stop_str_in_output": True, "logits_processors": ["x"],
    "truncate_prompt_tokens": 4, "typical_p": 0.5, "mirostat": 2, "n_predict": 3, "frobnicate": {"unknown": [1]},
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_a_field_that_might_change_the_text_is_refused_by_name(client: httpx.Client, name: str) -> None:
    for body in (completion(), chat(USER)):
        error = error_of(client.post(path_of(body), json=body | {name: OTHERS[name]}))
        assert error["param"] == name and name in error["message"] and "leave it out" in error["message"]


def path_of(body: dict[str, Any], param: str = "") -> str:
    return "/v1/chat/completions" if "messages" in body or param == "messages" else "/v1/completions"


@pytest.mark.parametrize("body", ACCEPTED, ids=lambda body: json.dumps(body)[:60])
def test_accepted(client: httpx.Client, body: dict[str, Any]) -> None:
    response = client.post(path_of(body), json=body)
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    assert (choice["text"] if "text" in choice else choice["message"]["content"]).endswith("Hello")


@pytest.mark.parametrize(("body", "param", "status"), REFUSED, ids=lambda part: json.dumps(part)[:60])
def test_refused(client: httpx.Client, body: dict[str, Any], param: str, status: int) -> None:
    response = client.post(path_of(body, param), json=body)
    error = error_of(response)
    assert (response.status_code, error["param"], error["type"]) == (status, param, "invalid_request_error"), error


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "must be a JSON object, not []"),
        (b"null", "must be a JSON object, not null"),
        (b'"model"', "must be a JSON object"),
        (b'{"model": "tiny", "prompt": "x",}', "not JSON"),
        (b'{"model": "tiny", "prompt": "x", "temperature": NaN}', "NaN"),
        (b'{"model": "tiny", "prompt": "x", "temperature": -Infinity}', "-Infinity"),
        (b'{"model": "tiny", "prompt": "x", "unknown": Infinity}', "Infinity"),
        (b'{"model": "tiny", "prompt": "x", "temperature": 1e999}', "1e999"),
        (b'{"model": "tiny", "prompt": "x", "seed": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"model": "tiny", "prompt": "\xff"}', "not UTF-8"),
        (b'{"model": "tiny", "prompt": "\\ud800"}', "half of a surrogate pair"),
        ('{"model": "tiny"}'.encode("utf-16"), "not UTF-8"),
        (b'{"model": ' + b"[" * 200_000, "nested too deeply"),
        (b'\xef\xbb\xbf{"model": "tiny"}', "not JSON"),
    ],
)
def test_a_body_that_is_no_json_is_said_to_be_none(client: httpx.Client, raw: bytes, says: str) -> None:
    for path in ("/v1/completions", "/v1/chat/completions"):
        response = client.post(path, content=raw, headers={"Content-Type": "application/json"})
        error = error_of(response)
        assert response.status_code == 400 and error["param"] is None and says in error["message"], error
        assert len(error["message"]) < 300


def test_only_json_is_read(client: httpx.Client) -> None:
    """A page of another origin can send text or a form without being asked; it cannot send JSON."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "", "application/jsonp"):
        response = client.post("/v1/completions", content=json.dumps(completion()), headers={"Content-Type": kind})
        assert response.status_code == 415 and "application/json" in error_of(response)["message"]
    response = client.post("/v1/completions", content=json.dumps(completion()), headers={"Content-Type": "Application/JSON; charset=utf-8"})
    assert response.status_code == 200


def test_a_body_has_a_largest_size(client: httpx.Client) -> None:
    body = json.dumps(completion(metadata="")).encode()
    full = body.replace(b'"metadata": ""', b'"metadata": "' + b"x" * (MAX_BODY - len(body)) + b'"')
    kind = {"Content-Type": "application/json"}
    assert len(full) == MAX_BODY and client.post("/v1/completions", content=full, headers=kind).status_code == 200
    longer = full.replace(b"xx", b"xxx", 1)
    for content in (longer, iter([longer[:1000], longer[1000:]])):  # with a length, and in chunks without one
        response = client.post("/v1/completions", content=content, headers=kind)
        assert response.status_code == 413 and error_of(response)["code"] == "body_too_large"


def test_a_message_shows_a_long_value_shortened(client: httpx.Client) -> None:
    message = error_of(client.post("/v1/completions", json=completion(stop=["x"] * 5000)))["message"]
    assert len(message) < 300 and "…" in message
    message = error_of(client.post("/v1/completions", json=completion(model="m" * 5000)))["message"]
    assert len(message) < 300


def completed(tokenizer: Tokenizer, **fields: Any) -> ParsedRequest:
    return parse_completion(parse(json.dumps(completion(**fields)).encode(), CompletionBody), served(tokenizer))


def chatted(tokenizer: Tokenizer, *messages: Any, **fields: Any) -> ParsedRequest:
    return parse_chat(parse(json.dumps(chat(*messages, **fields)).encode(), ChatBody), served(tokenizer))


def test_defaults_are_those_of_openai(chatty: Tokenizer) -> None:
    (request,) = completed(chatty).sequences
    assert request.max_new_tokens == 16 and request.sampling == SamplingConfig(temperature=1.0) and request.top_logprobs is None
    assert not (request.stop or request.ignore_eos or request.logit_bias or request.prompt_logprobs or request.dense or request.trace)
    (request,) = chatted(chatty, USER).sequences
    assert request.max_new_tokens == 64 - len(request.prompt_ids)


def test_what_a_request_does_not_say_of_drawing_is_the_models_own(chatty: Tokenizer) -> None:
    own, of_base = SamplingConfig(temperature=0.6, top_k=50, top_p=0.9), SamplingConfig(temperature=0.8)
    facts = served(chatty, sampling=own, dense_sampling=of_base)

    def sampling(**fields: Any) -> SamplingConfig:
        return parse_completion(parse(json.dumps(completion(**fields)).encode(), CompletionBody), facts).sequences[0].sampling

    assert sampling() == own and sampling(model="tiny:dense", seed=3) == SamplingConfig(temperature=0.8, seed=3)
    assert sampling(temperature=1, top_p=None) == SamplingConfig(temperature=1.0, top_k=50, top_p=0.9)
    assert sampling(top_k=0, top_p=0.5) == SamplingConfig(temperature=0.6, top_p=0.5)
    assert sampling(temperature=0).temperature == 0
    engine = EngineState(mode="dense", made=True, **{field.name: 1 for field in dataclasses.fields(LoadStats)})
    state = dataclasses.replace(FakeWorker(lambda request: spoken("x")).state(), engines=(engine,))
    told = served_by(chatty, state, queue=1, threads=1, sampling=own, dense_sampling=SamplingConfig())
    assert told.sampling == own and told.dense_sampling == SamplingConfig(temperature=1.0), "a greedy model leaves OpenAI's default"


def test_what_is_asked_reaches_the_requests(chatty: Tokenizer) -> None:
    fields = {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "seed": 7, "stop": "x", "logit_bias": {"5": -2}, "ignore_eos": True}
    requested = completed(chatty, **fields, model="tiny:dense", max_tokens=3, logprobs=2, echo=True, stream=True, dejavu={"trace": True})
    (request,) = requested.sequences
    assert (
        request.sampling == SamplingConfig(temperature=0.5, top_k=3, top_p=0.9, seed=7)
        and request.stop == ("x",)
        and request.max_new_tokens == 3
    )
    assert (
        request.logit_bias == {5: -2.0}
        and request.ignore_eos
        and request.dense
        and request.trace
        and request.prompt_logprobs
        and request.top_logprobs == 2
    )
    (request,) = chatted(chatty, USER, max_completion_tokens=0, max_tokens=7, logprobs=True, top_logprobs=5).sequences
    assert (request.max_new_tokens, request.top_logprobs) == (0, 5)
    assert (
        chatted(chatty, USER, logprobs=True).sequences[0].top_logprobs == 0
        and chatted(chatty, USER, logprobs=False).sequences[0].top_logprobs is None
    )
    assert completed(chatty, logprobs=0).sequences[0].top_logprobs == 0


def test_choices_of_a_prompt_differ_and_prompts_do_not_matter_to_each_other(chatty: Tokenizer) -> None:
    """Choice j of a prompt draws what it draws alone: its index is within its prompt."""
    requested = completed(chatty, prompt=["the", "cat"], n=2, seed=1)
    assert [(request.prompt_ids, request.index) for request in requested.sequences] == [
        (tuple(chatty.encode(text)), index) for text in ("the", "cat") for index in (0, 1)
    ]


def test_a_model_with_an_adapter_has_two_names(tokenizer: Tokenizer) -> None:
    plain = served(tokenizer, sparse=False)
    assert plain.models == ("tiny",) and plain.is_dense("tiny")
    sparse = served(tokenizer)
    assert sparse.models == ("tiny", "tiny:dense") and [sparse.is_dense(name) for name in sparse.models] == [False, True]


def test_bos_comes_once(chatty: Tokenizer, tokenizer: Tokenizer) -> None:
    """Raw text: the tokenizer's own, once; a chat: what the template spells; token ids: as they are."""
    bosless = dataclasses.replace(tokenizer, adds_bos=False)

    def count(requested: ParsedRequest) -> int:
        return requested.sequences[0].prompt_ids.count(2)

    assert count(completed(tokenizer)) == 1 and count(completed(tokenizer, prompt="</s>the cat")) == 1 and count(completed(bosless)) == 0
    assert count(chatted(chatty, USER)) == 1
    assert count(chatted(dataclasses.replace(chatty, chat_template=TEMPLATE.replace("{{ bos_token }}", "")), USER)) == 0
    assert completed(tokenizer, prompt=[4, 5]).sequences[0].prompt_ids == (4, 5)
    with pytest.raises(ApiError, match="has no tokens"):
        completed(bosless, prompt="")


def test_messages_are_text_however_they_are_written(chatty: Tokenizer) -> None:
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}]
    assert chatted(chatty, {"role": "user", "content": parts}).sequences == chatted(chatty, USER).sequences
    said = chatted(chatty, USER, {"role": "assistant", "content": None}, {"role": "assistant"}, USER)
    assert chatty.decode(said.sequences[0].prompt_ids) == "user: the cat\nassistant: \nassistant: \nuser: the cat\nassistant:"


def test_variables_of_the_template_come_from_the_request_else_from_the_server(chatty: Tokenizer) -> None:
    template = "{{ enable_thinking }}{{ tone }}{{ messages[0].content }}"
    facts = served(dataclasses.replace(chatty, chat_template=template), chat_template_kwargs={"tone": "dry", "enable_thinking": True})

    def text(**fields: Any) -> str:
        (request,) = parse_chat(parse(json.dumps(chat(USER, **fields)).encode(), ChatBody), facts).sequences
        return chatty.decode(request.prompt_ids)

    assert text() == "Truedrythe cat" and text(chat_template_kwargs={"enable_thinking": False}) == "Falsedrythe cat"
    with pytest.raises(ApiError, match="messages cannot be among chat_template_kwargs"):
        text(chat_template_kwargs={"messages": []})


def test_a_prompt_may_end_behind_or_within_its_last_message(chatty: Tokenizer) -> None:
    def text(**fields: Any) -> str:
        return chatty.decode(chatted(chatty, USER, {"role": "assistant", "content": "sat"}, **fields).sequences[0].prompt_ids)

    assert text().endswith("assistant: sat\nassistant:") and text(add_generation_prompt=False).endswith("assistant: sat\n")
    assert text(continue_final_message=True).endswith("assistant: sat")


def test_turns_that_a_user_writes_are_a_text_unless_the_server_says_otherwise(chatty: Tokenizer) -> None:
    body = parse(json.dumps(chat({"role": "user", "content": "hi</s>"}, {"role": "assistant", "content": "</s>"})).encode(), ChatBody)
    counts = []
    for sanitized in (True, False):
        (request,) = parse_chat(body, served(chatty, sanitize_control_tokens=sanitized)).sequences
        counts.append(request.prompt_ids.count(2))
    (request,) = parse_chat(parse(json.dumps(chat(USER)).encode(), ChatBody), served(chatty)).sequences
    own = request.prompt_ids.count(2)
    assert counts == [own + 1, own + 2], "the assistant's is its own"


def test_a_message_that_a_template_does_not_end_with_holds_nobody_else_up(chatty: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "SECONDS", 0)
    monkeypatch.setattr(bounded, "MORE_SECONDS", 0)
    hostile = "{% set text = messages[0].content %}{% for a in text %}{% for b in text %}{% endfor %}{% endfor %}"
    slow = dataclasses.replace(chatty, chat_template=hostile + "{{ text }}")
    app = create_app(served(slow), FakeWorker(lambda request: spoken("x")))
    with serving(app) as url, httpx.Client(base_url=url, timeout=60) as client, ThreadPoolExecutor(3) as threads:

        def asked(content: str) -> httpx.Response:
            return client.post("/v1/chat/completions", json=chat({"role": "user", "content": content}, max_tokens=2))

        held = [threads.submit(asked, "x" * 50_000) for _ in range(2)]
        assert asked("hi").status_code == 200 and not all(each.done() for each in held)
        for each in held:
            error = error_of(each.result())
            assert each.result().status_code == 400 and "cannot be rendered: the chat template took more than" in error["message"]


def test_a_developer_speaks_as_the_system(chatty: Tokenizer) -> None:
    with pytest.raises(ApiError, match="no system"):
        chatted(chatty, {"role": "developer", "content": "be kind"}, USER)


def test_a_model_without_a_template_says_what_to_do(tokenizer: Tokenizer) -> None:
    with pytest.raises(ApiError, match="--chat-template FILE, or use /v1/completions") as caught:
        chatted(tokenizer, USER)
    assert caught.value.status == 400 and caught.value.code == "no_chat_template"


@pytest.mark.parametrize(
    "template", ["{{ 1 / 0 }}", "{{ messages + 1 }}", "{% for", "{{ messages[7].content.x }}", "{{ raise_exception('no') }}"]
)
def test_whatever_a_template_raises_is_the_requests_error(chatty: Tokenizer, template: str) -> None:
    with pytest.raises(ApiError, match=r"chat template cannot be rendered( \(line 1\))?: .") as caught:
        chatted(dataclasses.replace(chatty, chat_template=template), USER)
    assert caught.value.status == 400


def every_schema(part: Any) -> Iterator[dict[str, Any]]:
    if isinstance(part, dict):
        yield part
        for value in part.values():
            yield from every_schema(value)
    elif isinstance(part, list):
        for value in part:
            yield from every_schema(value)


@pytest.mark.parametrize("kind", [CompletionBody, ChatBody])
def test_the_schema_has_the_bounds_that_are_checked(kind: type[CompletionBody] | type[ChatBody]) -> None:
    """In the words of JSON Schema: pydantic leaves bounds behind a function in its own."""
    schema = kind.model_json_schema()
    assert not any({"ge", "le", "gt", "lt"} & set(part) for part in every_schema(schema))
    found = {name: field.get("anyOf", [field])[0] for name, field in schema["properties"].items()}
    assert (found["n"]["minimum"], found["n"]["maximum"]) == (1, 64) and found["seed"]["minimum"] == -(2**63)
    assert found["max_tokens"] == {"minimum": 0, "type": "integer"} and found["top_p"]["exclusiveMinimum"] == 0
    assert found["logit_bias"]["additionalProperties"] is False and found["stop"]["minLength"] == 1


def test_no_path_leaves_the_server() -> None:
    for path in ("/var/lib/models/x.gguf", "C:\\models\\x.gguf", "~/models/x"):
        assert without_paths(f"cannot read {path}: it is gone") == "cannot read [path]: it is gone"
    for text in ("1/2 of it", "https://example.org/x/y", "and/or", "owner/name"):
        assert without_paths(text) == text


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenised(chatty: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four million characters took three seconds, and memory."""

    def refuse(tokenizer: Tokenizer, text: str) -> list[int]:
        raise AssertionError(f"{len(text)} characters were tokenised")

    assert chatty.longest_token is not None
    facts = served(chatty, max_characters=64 * chatty.longest_token)
    monkeypatch.setattr(Tokenizer, "encode_plain", refuse)
    for endpoint, body, param in (
        ("completions", completion(prompt="a" * 4_000_000), "prompt"),
        ("completions", completion(prompt=["the", "a" * 4_000_000]), "prompt[1]"),
        ("chat", chat({"role": "user", "content": "a" * 4_000_000}), "messages"),
    ):
        with pytest.raises((ApiError, AssertionError)) as caught:
            if endpoint == "chat":
                parse_chat(parse(json.dumps(body).encode(), ChatBody), facts)
            else:
                parse_completion(parse(json.dumps(body).encode(), CompletionBody), facts)
        if param == "prompt[1]":  # the first one fits, and is
            assert "3 characters" in str(caught.value)
        else:
            assert isinstance(caught.value, ApiError) and (caught.value.param, caught.value.code) == (param, "context_length_exceeded")


@pytest.mark.parametrize("kind", [CompletionBody, ChatBody])
def test_null_in_place_of_what_must_be_given_is_missing(kind: Any) -> None:
    for field in ("model", "prompt" if kind is CompletionBody else "messages"):
        body = {"model": "tiny", "prompt": "x", "messages": [{"role": "user", "content": "x"}]} | {field: None}
        with pytest.raises(ApiError, match=f"^{field} is missing; a request needs it$"):
            parse(json.dumps(body).encode(), kind)


def test_no_message_names_a_class_of_ours() -> None:
    with pytest.raises(ApiError, match="^dejavu: should be an object, not true$"):
        parse(json.dumps(completion(dejavu=True)).encode(), CompletionBody)


def test_messages_that_leave_no_room_are_said_to(chatty: Tokenizer) -> None:
    body = chat({"role": "user", "content": "the cat"})
    length = len(parse_chat(parse(json.dumps(body).encode(), ChatBody), served(chatty)).sequences[0].prompt_ids)
    for limit in (length, length - 1):
        with pytest.raises(ApiError, match=f"^the messages have {length} tokens and leave no room for an answer") as caught:
            parse_chat(parse(json.dumps(body).encode(), ChatBody), served(chatty, limit=limit))
        assert caught.value.code == "context_length_exceeded"
    assert parse_chat(parse(json.dumps(body).encode(), ChatBody), served(chatty, limit=length + 1)).sequences[0].max_new_tokens == 1


def test_a_chat_is_as_long_as_its_template_makes_it(chatty: Tokenizer) -> None:
    """Templates of models that think leave out what earlier answers thought."""
    short = dataclasses.replace(chatty, chat_template="{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}")
    assert short.longest_token is not None
    body = chat({"role": "assistant", "content": "a" * 100_000 + "</think>the"}, {"role": "user", "content": "cat"})
    requested = parse_chat(parse(json.dumps(body).encode(), ChatBody), served(short, max_characters=64 * short.longest_token))
    assert len(requested.sequences[0].prompt_ids) < 64


def test_what_a_token_stands_for_at_most_is_known_where_the_vocabulary_tells_it(chatty: Tokenizer) -> None:
    longest = max(map(len, chatty.backend.get_vocab()))
    assert chatty.longest_token == longest
    backend = tokenizers.Tokenizer.from_str(chatty.backend.to_str())
    backend.add_special_tokens([tokenizers.AddedToken("<mask>", rstrip=True)])
    assert dataclasses.replace(chatty, backend=backend).longest_token is None


def test_a_trace_of_a_dense_text_has_the_dense_engines_slots(chatty: Tokenizer) -> None:
    facts = served(chatty, max_choices=8, max_traced=2)
    for model, n, refused in (("tiny", 3, True), ("tiny", 2, False), ("tiny:dense", 8, False), ("tiny:dense", 9, True)):
        body = parse(json.dumps(completion(model=model, n=n, stream=True, dejavu={"trace": True})).encode(), CompletionBody)
        with pytest.raises(ApiError, match="may ask for") if refused else contextlib.nullcontext():
            assert len(parse_completion(body, facts).sequences) == n


def test_a_refusal_has_the_value_and_what_to_do(client: httpx.Client) -> None:
    said = {
        "logit_bias names token 96, and the model's vocabulary is of 96 tokens; give ids from 0 to 95": completion(logit_bias={"96": 1}),
        "the prompt has token 200, and the model's vocabulary is of 96 tokens; give ids from 0 to 95": completion(prompt=[200]),
        "best_of 3 is not supported here; leave it out": completion(best_of=3),
        'messages[0].role must be one of system, developer, user, assistant, not "king"': chat({"role": "king", "content": "x"}),
        "min_tokens 9 exceeds the 4 tokens that the text may have; lower it, or raise max_tokens": completion(min_tokens=9, max_tokens=4),
        "top_logprobs 2 needs logprobs: set that to true, or leave this out": chat(USER, top_logprobs=2),
    }
    for message, body in said.items():
        assert error_of(client.post(path_of(body), json=body))["message"] == message
    assert error_of(client.get("/v1/completions"))["message"] == "'/v1/completions' does not take GET; send POST"
    assert error_of(client.get("/v2"))["message"] == "there is nothing at '/v2'; /openapi.json lists every path"
