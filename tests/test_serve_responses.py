"""From events to answers: log-probabilities and echo, usage, finish reasons and indices, and that chunks joined are the whole."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from dejavu.engine.interface import LayerSelection
from dejavu.generation.pieces import Token
from dejavu.model.tokenizer import Tokenizer, build_tokenizer
from dejavu.serve.api import response_schemas as schemas
from dejavu.serve.api.chat import CHAT
from dejavu.serve.api.completions import COMPLETIONS
from dejavu.serve.api.endpoint import TextEndpoint
from dejavu.serve.api.requests import ParsedRequest, Served
from dejavu.serve.api.responses import to_bytes
from dejavu.serve.api.vocabulary import Vocabulary
from dejavu.serve.core.interface import Event
from helpers.fake_worker import served, spoken, summary
from helpers.stub_engine import byte_tokenizer

USER = {"role": "user", "content": "the cat"}


@pytest.fixture(scope="module")
def facts(tokenizer: Tokenizer) -> Served:
    return served(dataclasses.replace(tokenizer, chat_template="{{ messages[0].content }}"))


EndpointRequest = tuple[TextEndpoint, ParsedRequest]


def completion(facts: Served, **fields: Any) -> EndpointRequest:
    return request_of(COMPLETIONS, facts, {"prompt": "the cat"} | fields)


def chat(facts: Served, **fields: Any) -> EndpointRequest:
    return request_of(CHAT, facts, {"messages": [USER]} | fields)


def request_of(endpoint: TextEndpoint, facts: Served, fields: dict[str, Any]) -> EndpointRequest:
    return endpoint, endpoint.parse(endpoint.body.model_validate({"model": "tiny"} | fields), facts)


def whole(requested: EndpointRequest, facts: Served, *streams: Sequence[Event]) -> dict[str, Any]:
    """The answer as a client reads it, in one object."""
    endpoint, request = requested
    answer = endpoint.answer(request, facts)
    for index, stream in enumerate(streams):
        for event in stream:
            answer.take(index, event)
    return json.loads(to_bytes(answer.whole()))


def chunks(requested: EndpointRequest, facts: Served, *streams: Sequence[Event]) -> list[dict[str, Any]]:
    """The same as a stream, the choices' events in turns."""
    endpoint, request = requested
    answer = endpoint.answer(request, facts)
    found = list(answer.first_chunks())
    for place in range(max(map(len, streams))):
        for index, stream in enumerate(streams):
            if place < len(stream):
                found += answer.chunks(index, stream[place])
    return [json.loads(to_bytes(chunk)) for chunk in (*found, *answer.closing())]


def joined(found: list[dict[str, Any]], index: int) -> str:
    """The text of one choice of a stream."""
    said = [choice for chunk in found for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["text"] if "text" in choice else choice["delta"].get("content", "") for choice in said)


def token(token_id: int, logprob: float | None = -1.0, *top: tuple[int, float], **more: Any) -> Token:
    return Token(token_id=token_id, logprob=logprob, top=top, **more)


def test_echo_with_logprobs_has_an_entry_for_every_token(facts: Served, tokenizer: Tokenizer) -> None:
    """P tokens of the prompt and G new ones: four lists of P + G, null for the first."""
    ids = tokenizer.encode("the cat")
    prompt = (token(ids[0], None), *(token(token_id, -float(place), (7, -0.25)) for place, token_id in enumerate(ids[1:], 1)))
    new = tokenizer.encode_plain(" sat")[0]
    new_text = tokenizer.decode([new])
    event = Event(
        text=new_text, tokens=(token(new, -0.5, (new, -0.5)),), prompt_tokens=prompt, finish_reason="length", summary=summary(len(ids), 1)
    )
    found = whole(completion(facts, echo=True, logprobs=1, max_tokens=1), facts, [event])
    (choice,) = found["choices"]
    logprobs, count = choice["logprobs"], len(ids) + 1
    assert [len(logprobs[key]) for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset")] == [count] * 4
    assert choice["text"] == "the cat" + new_text and choice["finish_reason"] == "length"
    assert logprobs["token_logprobs"] == [None, *(-float(place) for place in range(1, len(ids))), -0.5]
    assert logprobs["top_logprobs"][0] is None and logprobs["top_logprobs"][-1] == {new_text: -0.5}
    seven = facts.vocabulary.text(7)
    assert logprobs["top_logprobs"][1] == {seven: -0.25, logprobs["tokens"][1]: -1.0}  # the likeliest, and the token itself
    assert logprobs["tokens"][0] == "</s>" and "".join(logprobs["tokens"][1:]) == choice["text"]
    for offset, text in zip(logprobs["text_offset"][1:], logprobs["tokens"][1:], strict=True):
        assert choice["text"][offset:].startswith(text)
    assert found["usage"]["prompt_tokens"] == len(ids) and found["usage"]["total_tokens"] == len(ids) + 1
    assert joined(chunks(completion(facts, echo=True, logprobs=1, max_tokens=1, stream=True), facts, [event]), 0) == choice["text"]


def test_nothing_new_is_asked(facts: Served, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the cat")
    end = Event(prompt_tokens=tuple(token(token_id, None) for token_id in ids), finish_reason="length", summary=summary(len(ids), 0))
    echoed = whole(completion(facts, max_tokens=0, echo=True, logprobs=0), facts, [end])
    assert echoed["choices"][0]["text"] == "the cat" and echoed["choices"][0]["finish_reason"] == "length"
    assert len(echoed["choices"][0]["logprobs"]["tokens"]) == len(ids)
    assert {key: echoed["usage"][key] for key in ("prompt_tokens", "completion_tokens", "total_tokens")} == {
        "prompt_tokens": len(ids), "completion_tokens": 0, "total_tokens": len(ids)
    }  # fmt: skip
    bare = Event(finish_reason="length", summary=summary(len(ids), 0))
    assert whole(completion(facts, max_tokens=0), facts, [bare])["choices"][0] == {
        "index": 0, "text": "", "logprobs": None, "finish_reason": "length"
    }  # fmt: skip
    assert whole(completion(facts, max_tokens=0, echo=True), facts, [bare])["choices"][0]["text"] == "the cat"
    found = chunks(completion(facts, max_tokens=0, echo=True, stream=True), facts, [bare])
    assert joined(found, 0) == "the cat" and found[-1]["choices"][0]["finish_reason"] == "length"


def test_echo_of_token_ids_is_their_text(facts: Served, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_plain("the cat")
    found = whole(completion(facts, prompt=[ids, ids[:1]], echo=True, n=2), facts, *[spoken("!", prompt=len(ids))] * 4)
    assert [choice["text"] for choice in found["choices"]] == ["the cat!"] * 2 + [tokenizer.decode(ids[:1]) + "!"] * 2


def test_without_echo_offsets_are_into_the_new_text(facts: Served) -> None:
    found = whole(completion(facts, logprobs=0), facts, spoken("-", ".", "0"))
    assert found["choices"][0]["logprobs"]["text_offset"] == [0, 1, 2]
    assert found["choices"][0]["logprobs"]["top_logprobs"] == [{"-": -0.5}, {".": -1.5}, {"0": -2.5}]


def test_minus_infinity_is_a_number(facts: Served) -> None:
    event = Event(text="x", tokens=(token(10, -math.inf, (11, -0.0), (12, -math.inf)),), finish_reason="stop", summary=summary(3, 1))
    assert whole(completion(facts, logprobs=2), facts, [event])["choices"][0]["logprobs"]["token_logprobs"] == [-9999.0]
    (entry,) = whole(chat(facts, logprobs=True, top_logprobs=2), facts, [event])["choices"][0]["logprobs"]["content"]
    assert entry["logprob"] == -9999.0 and [top["logprob"] for top in entry["top_logprobs"]] == [0.0, -9999.0]


def test_the_bytes_of_log_probabilities_are_those_of_the_text(facts: Served) -> None:
    """A special token has a name and adds nothing to a text."""
    event = Event(text="-", tokens=(token(10, -0.5), token(2, -0.5)), finish_reason="stop", summary=summary(3, 2))
    (choice,) = whole(chat(facts, logprobs=True), facts, [event])["choices"]
    assert [entry["token"] for entry in choice["logprobs"]["content"]] == ["-", "</s>"]
    assert bytes(byte for entry in choice["logprobs"]["content"] for byte in entry["bytes"]).decode() == choice["message"]["content"]


def test_an_echoed_prompt_that_ends_within_a_character_is_finished_by_its_answer() -> None:
    facts, prompt = dataclasses.replace(served(byte_tokenizer()), vocab_size=257), [97, *"€".encode()[:2]]
    assert whole(completion(facts, prompt=prompt, echo=True), facts, spoken("€"))["choices"][0]["text"] == "a€"
    end = Event(finish_reason="length", summary=summary(3, 0))
    assert whole(completion(facts, prompt=prompt, echo=True, max_tokens=0), facts, [end])["choices"][0]["text"] == "a\ufffd"


def test_a_chat_tells_logprobs_in_its_own_form(facts: Served) -> None:
    event = Event(text="-", tokens=(token(10, -0.5, (10, -0.5), (11, -1.0)),), finish_reason="stop", summary=summary(3, 1))
    (choice,) = whole(chat(facts, logprobs=True, top_logprobs=2), facts, [event])["choices"]
    assert choice["message"] == {"role": "assistant", "content": "-"} and choice["finish_reason"] == "stop"
    assert choice["logprobs"]["content"] == [
        {
            "token": "-", "logprob": -0.5, "bytes": [45],
            "top_logprobs": [{"token": "-", "logprob": -0.5, "bytes": [45]}, {"token": ".", "logprob": -1.0, "bytes": [46]}],
        }
    ]  # fmt: skip
    found = chunks(chat(facts, logprobs=True, top_logprobs=2, stream=True), facts, [event])
    told = [entry for chunk in found for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert told == choice["logprobs"]["content"]
    assert whole(chat(facts), facts, [event])["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("kind", [completion, chat])
def test_a_stream_has_its_parts_in_order(facts: Served, kind: Any) -> None:
    """Roles first; one finish_reason for each choice, in its last chunk; usage only where it was asked for, last."""
    streams = [spoken("Hel", "lo", prompt=5), spoken("", "Bye", "", finish="length", prompt=5)]
    requested = kind(facts, n=2, stream=True)
    found = chunks(requested, facts, *streams)
    if kind is chat:
        assert [chunk["choices"][0]["delta"] for chunk in found[:2]] == [{"role": "assistant", "content": ""}] * 2
        assert {chunk["object"] for chunk in found} == {"chat.completion.chunk"}
    assert [joined(found, index) for index in (0, 1)] == ["Hello", "Bye"]
    for index, reason in ((0, "stop"), (1, "length")):
        reasons = [choice["finish_reason"] for chunk in found for choice in chunk["choices"] if choice["index"] == index]
        assert reasons[-1] == reason and set(reasons[:-1]) == {None}
    assert all(len(chunk["choices"]) == 1 and "usage" not in chunk for chunk in found)
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in found}) == 1
    assert ["dejavu" in chunk for chunk in found] == [False] * (len(found) - 1) + [True]

    counted = chunks(kind(facts, n=2, stream=True, stream_options={"include_usage": True}), facts, *streams)
    assert all(chunk["usage"] is None for chunk in counted[:-1]) and counted[-1]["choices"] == []
    assert counted[-1]["usage"] == whole(kind(facts, n=2), facts, *streams)["usage"]
    assert counted[-1]["usage"]["prompt_tokens"] == 5, "a prompt with two choices counts once"
    assert ["dejavu" in chunk for chunk in counted] == [False] * (len(counted) - 1) + [True]
    for options in ({}, {"include_usage": False}, {"include_usage": None}):
        assert all("usage" not in chunk for chunk in chunks(kind(facts, n=2, stream=True, stream_options=options), facts, *streams))


@given(
    cuts=st.lists(st.lists(st.sampled_from(["", "a", "bc", "d e"]), min_size=1, max_size=5), min_size=2, max_size=2),
    echo=st.booleans(),
    logprobs=st.sampled_from([None, 0, 2]),
)
def test_chunks_joined_are_the_whole(facts: Served, cuts: list[list[str]], echo: bool, logprobs: int | None) -> None:
    streams = [spoken(*texts) for texts in cuts]
    requested = completion(facts, prompt=["the", "cat"], echo=echo, logprobs=logprobs)
    once = whole(requested, facts, *streams)["choices"]
    found = chunks(requested, facts, *streams)
    for index, choice in enumerate(once):
        assert joined(found, index) == choice["text"] == ("the", "cat")[index] * echo + "".join(cuts[index])
        parts = [part["logprobs"] for chunk in found for part in chunk["choices"] if part["index"] == index]
        if logprobs is None:
            assert choice["logprobs"] is None and set(map(str, parts)) == {"None"}
        else:
            assert choice["logprobs"] == {key: [entry for part in parts for entry in part[key]] for key in choice["logprobs"]}


def test_what_says_nothing_is_not_sent(facts: Served) -> None:
    """A token within a character or a stop string gives no text yet."""
    streams = spoken("", "", "x", "")
    assert [chunk["choices"][0]["text"] for chunk in chunks(completion(facts, stream=True), facts, streams)] == ["x", ""]
    assert len(chunks(completion(facts, stream=True, logprobs=0), facts, streams)) == 4


def test_densities_are_means_over_decode_steps(facts: Served) -> None:
    one = spoken("a", "b", mlp_density=0.1, head_density=0.4, union_density=None, decode_s=0.5)
    three = spoken("a", "b", "c", "d", mlp_density=0.3, head_density=1.0, union_density=0.5, decode_s=1.5)
    none = spoken("a", mlp_density=None, head_density=None, union_density=None, decode_s=0.0)
    found = whole(completion(facts, n=3), facts, one, three, none)["dejavu"]
    assert found == {
        "mode": "sparse", "mlp_density": pytest.approx(0.25), "head_density": pytest.approx(0.85), "union_density": 0.5, "tok_s": 2.0
    }  # fmt: skip
    alone = whole(completion(facts, model="tiny:dense"), facts, none)["dejavu"]
    assert alone == {"mode": "dense", "mlp_density": None, "head_density": None, "union_density": None, "tok_s": None}


def test_usage_counts_prompts_once_and_says_what_was_cached(facts: Served) -> None:
    streams = [
        spoken("a", prompt=4, cached_tokens=2),
        spoken("a", "b", prompt=4, cached_tokens=4),
        spoken("a", prompt=6),
        spoken("a", prompt=6),
    ]
    usage = whole(completion(facts, prompt=["the", "cat"], n=2), facts, *streams)["usage"]
    assert usage == {
        "prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15, "prompt_tokens_details": {"cached_tokens": 2}
    }  # fmt: skip


@pytest.mark.parametrize("kind", [completion, chat])
def test_a_trace_comes_with_the_chunks(facts: Served, kind: Any) -> None:
    fired = (
        LayerSelection(neurons_A=torch.tensor([0, 63]), heads_A=torch.tensor([0, 3])),
        LayerSelection(neurons_A=None, heads_A=None),
    )
    events = [
        Event(text="a", tokens=(token(10),)),
        Event(text="", tokens=(token(11, mlp_density=0.25, head_density=0.75, selections=fired),)),
        Event(text="b", tokens=(token(12, mlp_density=0.5, head_density=1.0),), finish_reason="stop", summary=summary(3, 3)),
    ]
    found = chunks(kind(facts, stream=True, dejavu={"trace": True}), facts, events)
    assert found[0]["dejavu"]["shape"] == {"layers": 2, "bins": 64, "heads": 4, "neurons": 64}
    assert all("shape" not in chunk["dejavu"] for chunk in found[1:])
    first, second, third = [entry for chunk in found for entry in chunk["dejavu"]["trace"]]
    assert first == {"mlp_density": None, "head_density": None, "neurons": None, "heads": None}
    assert (second["mlp_density"], second["head_density"], third["mlp_density"]) == (0.25, 0.75, 0.5)
    assert base64.b64decode(second["neurons"]) == b"\xff" + bytes(62) + b"\xff" * 65, "of 64 neurons each has a bin of its own"
    assert base64.b64decode(second["heads"]) == b"\x01\x00\x00\x01" + b"\x01" * 4
    assert base64.b64decode(third["neurons"]) == b"\xff" * 128 and base64.b64decode(third["heads"]) == b"\x01" * 8, "all of it ran"
    assert found[-1]["dejavu"]["mode"] == "sparse" and found[-1]["dejavu"]["mlp_density"] == 0.25


def test_what_is_sent_is_what_the_classes_say(facts: Served) -> None:
    """The OpenAPI document is made of these classes: they take back, strictly, what was sent."""
    stream = spoken("*", "+")
    schemas.Completion.model_validate(whole(completion(facts, logprobs=1, echo=True), facts, stream))
    schemas.ChatCompletion.model_validate(whole(chat(facts, logprobs=True), facts, stream))
    for found in chunks(completion(facts, stream=True, dejavu={"trace": True}), facts, stream):
        schemas.Completion.model_validate(found)
    for found in chunks(chat(facts, stream=True, stream_options={"include_usage": True}), facts, stream):
        schemas.ChatChunk.model_validate(found)


def metaspace_tokenizer() -> Tokenizer:
    """The kind that came with SentencePiece: spaces as a letter, bytes for what it does not know, no space before a text."""
    words = ["<unk>", "<s>", "▁", "▁the", "▁cat", "s", "<0xE2>", "<0x82>", "<0xAC>", "é"]
    backend = Backend(models.BPE(vocab={word: place for place, word in enumerate(words)}, merges=[], byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()  # pyrefly: ignore[bad-assignment]
    chain = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(chain)  # pyrefly: ignore[bad-assignment]
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    return build_tokenizer(backend, special_tokens={"bos_token": "<s>"})


def test_tokens_of_a_byte_level_vocabulary() -> None:
    vocabulary = Vocabulary(byte_tokenizer())
    assert [vocabulary.raw(byte) for byte in range(256)] == [bytes([byte]) for byte in range(256)]
    assert vocabulary.text(ord("a")) == "a" and vocabulary.text(ord(" ")) == " " and vocabulary.text(0xE2) == "bytes:\\xe2"
    assert vocabulary.text(256) == "</s>" and vocabulary.text(999) == "<999>"
    assert vocabulary.written(256) == b"" and vocabulary.written(0xE2) == b"\xe2"
    assert len({vocabulary.text(token_id) for token_id in range(257)}) == 257
    offsets = vocabulary.offsets(first=True)
    assert [offsets.begin(byte) for byte in (256, *"a€b".encode())] == [0, 0, 1, 1, 1, 2]


def test_tokens_of_a_vocabulary_with_bytes_and_spaces() -> None:
    tokenizer = metaspace_tokenizer()
    vocabulary = Vocabulary(tokenizer)
    assert [vocabulary.text(token_id) for token_id in (1, 3, 5, 9)] == ["<s>", " the", "s", "é"]
    assert [vocabulary.text(token_id) for token_id in (6, 7, 8)] == ["bytes:\\xe2", "bytes:\\x82", "bytes:\\xac"]
    ids = [1, 3, 4, 5, 6, 7, 8, 9]
    assert tokenizer.decode(ids) == "the cats€é"
    first, later = vocabulary.offsets(first=True), vocabulary.offsets(first=False)
    assert [first.begin(token_id) for token_id in ids] == [0, 0, 3, 7, 8, 8, 8, 9]  # a text begins without its space
    assert [later.begin(token_id) for token_id in (3, 4, 5)] == [0, 4, 8]
