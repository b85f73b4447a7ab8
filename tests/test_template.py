"""Chat templates: what a model reads of messages, and that the command line uses it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

import dejavu
from conftest import Tiny
from dejavu.cli.main import run
from dejavu.model.bundle import export
from dejavu.model.template import chat_ids, rendered
from dejavu.model.tokenizer import Tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no ' + m['role']) }}{% endif %}"
    "{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
HELLO = [{"role": "user", "content": "the cat"}]


@pytest.fixture
def chatty(tokenizer: Tokenizer) -> Tokenizer:
    return dataclasses.replace(tokenizer, chat_template=TEMPLATE)


def test_messages_are_rendered_and_bos_comes_once(chatty: Tokenizer) -> None:
    assert rendered(chatty, HELLO) == "</s>user: the cat\nassistant:"
    ids = chat_ids(chatty, HELLO)
    assert ids[0] == 2 and ids.count(2) == 1 and chatty.decode(ids) == "user: the cat\nassistant:"


def test_what_cannot_be_rendered_is_said(chatty: Tokenizer, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="cannot be rendered: no system"):
        rendered(chatty, [{"role": "system", "content": "be kind"}])
    with pytest.raises(ValueError, match="no messages"):
        rendered(chatty, [])
    with pytest.raises(ValueError, match="no chat template"):
        rendered(tokenizer, HELLO)
    with pytest.raises(ValueError, match="cannot be rendered"):
        rendered(dataclasses.replace(chatty, chat_template="{{ messages.append(1) }}"), HELLO)
    with pytest.raises(ValueError, match="cannot be rendered"):
        rendered(dataclasses.replace(chatty, chat_template="{% for"), HELLO)


def test_the_command_line_answers_a_message(
    tiny: Tiny, chatty: Tokenizer, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def printed(folder: str, *options: str) -> dict:
        requested = [
            "generate",
            str(tmp_path / folder),
            "--backend",
            "torch",
            "--prompt",
            "the cat",
            "-n",
            "6",
            "--ignore-eos",
            "--json",
            *options,
        ]
        assert run(requested) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    model = tiny("llama")
    export(model, chatty, tmp_path / "chat")
    export(model, tokenizer, tmp_path / "plain")
    answer, raw, plain = printed("chat"), printed("chat", "--raw"), printed("plain")
    assert (answer["chat"], raw["chat"], plain["chat"]) == (True, False, False)
    assert raw["text"] == plain["text"] != answer["text"] and answer["prompt_tokens"] == len(chat_ids(chatty, HELLO))
    assert run(["generate", str(tmp_path / "chat"), "--backend", "torch", "--prompt", "the cat", "-n", "2"]) == 0
    assert "message (chat template) of" in capsys.readouterr().out
    lm = dejavu.load(tmp_path / "chat", backend="torch")
    assert lm.generate(HELLO, max_new_tokens=6, ignore_eos=True) == answer["text"]
