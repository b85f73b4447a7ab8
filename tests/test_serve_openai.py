"""OpenAI's own client against the server: what it sends is understood, and what comes back is what it expects."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from dejavu.generation.pieces import Token
from dejavu.model.tokenizer import Tokenizer
from dejavu.serve.api.app import create_app
from dejavu.serve.core.interface import EngineFailed, Event
from helpers.clients import TEMPLATE
from helpers.fake_worker import FakeWorker, served, serving, spoken

KEY = "open-sesame"
USER: Any = {"role": "user", "content": "the cat"}


@pytest.fixture(scope="module")
def worker() -> FakeWorker:
    return FakeWorker(lambda request: [])


@pytest.fixture(scope="module")
def url(tokenizer: Tokenizer, worker: FakeWorker) -> Iterator[str]:
    facts = served(dataclasses.replace(tokenizer, chat_template=TEMPLATE))
    with serving(create_app(facts, worker, api_key=KEY)) as url:
        yield f"{url}/v1"


@pytest.fixture
def client(url: str, worker: FakeWorker) -> Iterator[openai.OpenAI]:
    worker.script, worker.waiting = (lambda request: spoken("-", f".{request.index}")), None
    worker.requests.clear()
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
        yield client


def test_openai_client_completions(client: openai.OpenAI, worker: FakeWorker) -> None:
    requested: Any = {"model": "tiny", "prompt": ["the", "cat"], "n": 2, "max_tokens": 5, "logprobs": 1, "stop": ["x"], "seed": 3}
    whole = client.completions.create(**requested)
    assert [(choice.index, choice.text, choice.finish_reason) for choice in whole.choices] == [
        (index, f"-.{index % 2}", "stop") for index in range(4)
    ]
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens == ["-", "."] and logprobs.token_logprobs == [-0.5, -1.5]
    assert whole.usage is not None and whole.usage.total_tokens == 6 + 8 and worker.requests[0].sampling.seed == 3
    assert whole.model_extra is not None and whole.model_extra["dejavu"]["mlp_density"] == 0.25

    texts: dict[int, str] = {}
    for chunk in client.completions.create(**requested, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
    assert texts == {choice.index: choice.text for choice in whole.choices} and chunk.usage == whole.usage


def test_openai_client_chat(client: openai.OpenAI, worker: FakeWorker) -> None:
    requested: Any = {"model": "tiny:dense", "messages": [USER], "max_completion_tokens": 5, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**requested)
    (choice,) = whole.choices
    assert choice.message.content == "-.0" and choice.message.role == "assistant" and choice.finish_reason == "stop"
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert [(token.token, token.bytes) for token in choice.logprobs.content] == [("-", [45]), (".", [46])]
    assert worker.requests[0].dense and worker.requests[0].max_new_tokens == 5

    deltas = [chunk.choices[0] for chunk in client.chat.completions.create(**requested, stream=True)]
    assert deltas[0].delta.role == "assistant" and "".join(choice.delta.content or "" for choice in deltas) == "-.0"
    assert [choice.finish_reason for choice in deltas] == [None] * (len(deltas) - 1) + ["stop"]


def test_openai_client_the_streaming_helper(client: openai.OpenAI) -> None:
    """It builds the whole answer from the chunks by its own rules."""
    chats: Any = client.chat.completions
    helper = getattr(chats, "stream", None) or client.beta.chat.completions.stream  # where older clients have it
    with helper(model="tiny", messages=[USER]) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.content == "-.0"


def test_openai_client_own_fields_pass(client: openai.OpenAI, worker: FakeWorker) -> None:
    extra = {"top_k": 3, "ignore_eos": True, "dejavu": {"trace": True}}
    chunks = list(client.completions.create(model="tiny", prompt="the cat", stream=True, extra_body=extra))
    assert worker.requests[0].sampling.top_k == 3 and worker.requests[0].ignore_eos and worker.requests[0].trace
    assert chunks[0].model_extra is not None and chunks[0].model_extra["dejavu"]["shape"]["layers"] == 2


def test_openai_client_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "tiny:dense"]
    assert client.models.retrieve("tiny:dense").owned_by == "dejavu"
    with pytest.raises(openai.NotFoundError, match="not served"):
        client.models.retrieve("owner/name")


def test_openai_client_errors_are_the_clients_own(client: openai.OpenAI, worker: FakeWorker, url: str) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="tiny", prompt="x", temperature=-1)
    assert bad.value.param == "temperature" and bad.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="tiny", prompt="x", max_tokens=1000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-9", messages=[USER])
    assert unknown.value.code == "model_not_found"
    with openai.OpenAI(base_url=url, api_key="wrong", max_retries=0) as stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    worker.waiting = 3
    with pytest.raises(openai.RateLimitError) as busy:
        client.completions.create(model="tiny", prompt="x")
    assert busy.value.response.headers["retry-after"] == "7"
    worker.waiting, worker.script = None, lambda request: [Event(text="-", tokens=(Token(token_id=10),)), EngineFailed("broken")]
    with pytest.raises(openai.InternalServerError):
        client.completions.create(model="tiny", prompt="x")
    stream = client.completions.create(model="tiny", prompt="x", stream=True)
    assert next(stream).choices[0].text == "-"
    with pytest.raises(openai.APIError, match="the model failed"):
        next(stream)
