"""A conversation with a model: what was said, and what of it still fits the context.

In: a LanguageModel and messages, one at a time. Out: the text of each answer in pieces, and a Turn with its counts, speeds and densities.

A model with a chat template reads the messages as its template spells them; answers go back as text, so that the template sets the
special tokens around them. A model without one reads a text: each message begins a new line of it, which the model continues, and an
empty message has it go on where it stopped.

Where what was said leaves too little room for an answer the oldest turns are left out of what the model reads. `turns` keeps them.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dejavu.bench.bytes_read import text_read_share
from dejavu.config import SamplingConfig, require
from dejavu.files import absolute
from dejavu.generation.generation import GeneratedText
from dejavu.language_model import LanguageModel
from dejavu.model.template import Messages, chat_ids

MOST_TOKENS = 1024  # of an answer, unless told otherwise
MOST_TOKENS_OF_TEXT = 128  # likewise, where there is no template: such a model seldom ends by itself
ROOM = 4  # an answer finds at least a quarter of the context free, or the tokens it may have where these are fewer


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A message and what was answered, and how that was drawn. finish_reason of the answer: None where it was stopped."""

    question: str
    answer: GeneratedText
    dense: bool
    sampling: SamplingConfig


class Conversation:
    """What was said to a model and by it. turns: since the beginning or the last `reset`. dropped: how many of them it no longer reads.

    system: a message before all others, for a model with a chat template. max_new_tokens: of an answer; not given: MOST_TOKENS, or
    MOST_TOKENS_OF_TEXT without a template. seed: of the first answer; each later one has the next. chat_template_kwargs,
    sanitize_control_tokens, sampling (temperature, top_k, top_p): of `LanguageModel.start`. Raises ValueError for a system message or
    variables that the template does not take, and for less than one token.
    """

    def __init__(
        self, lm: LanguageModel, *, system: str | None = None, max_new_tokens: int | None = None, seed: int | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None, sanitize_control_tokens: bool = True, **sampling: Any,
    ) -> None:  # fmt: skip
        self.lm, self.system = lm, system
        self.has_template = lm.tokenizer.has_template
        self._reading: dict[str, Any] = {
            "chat_template_kwargs": chat_template_kwargs, "sanitize_control_tokens": sanitize_control_tokens,
        }  # fmt: skip
        usual = MOST_TOKENS if self.has_template else MOST_TOKENS_OF_TEXT
        self.max_new_tokens = usual if max_new_tokens is None else max_new_tokens
        require(self.max_new_tokens >= 1, f"an answer has at least 1 token, not {max_new_tokens}")
        require(
            system is None or self.has_template,
            f"a system message ({system!r}) needs a model with a chat template, and {lm.name} has none; begin the first message with it",
        )
        require(
            self.has_template or not chat_template_kwargs,
            f"chat_template_kwargs need a model with a chat template, and {lm.name} has none; leave them out",
        )
        if self.has_template:
            # A template that refuses a system message does so before any is asked.
            chat_ids(lm.tokenizer, self._messages([], "Hello"), **self._reading)
        self._seed, self.sampling = seed, sampling
        self._asked = 0
        self.turns: list[Turn] = []
        self.dropped = 0

    @property
    def messages(self) -> list[dict[str, str]]:
        """All that was said: {"role": "system", "user" or "assistant", "content"}."""
        return self._messages(self.turns)

    def reset(self) -> None:
        """Forget what was said, the system message excepted."""
        self.turns, self.dropped = [], 0

    def ask(self, question: str, *, dense: bool = False) -> Generator[str]:
        """Pieces of the answer to a message, sparse where the model has an adapter.

        At its end, and where it is closed before, the answer is the last of `turns`, unless nothing of it was written: then nothing
        is kept. Raises ValueError, at the first piece, for what the template refuses and a message that does not fit the context.
        """
        dropped, prompt = self._fitting(question)
        options = self.sampling if self._seed is None else {**self.sampling, "seed": (self._seed + self._asked) % 2**64}
        drawn = self.lm.sampling_of(dense=dense).overridden(**options)
        running = self.lm.start(
            prompt, max_new_tokens=self.max_new_tokens, dense=dense, reuse_prefix=True, **self._reading, **options
        )  # fmt: skip
        self._asked += 1
        try:
            for piece in running:
                if piece.text:
                    yield piece.text
        finally:
            answer = running.written()
            if answer or answer.finish_reason is not None:
                self.turns.append(Turn(question=question, answer=answer, dense=dense or self.lm.adapter is None, sampling=drawn))
                self.dropped = dropped
            running.close()

    def read_share(self, turn: Turn) -> float | None:
        """What a step of an answer read over what it had read dense, in bytes: see bench/bytes_read.py. None without a step."""
        adapter = None if turn.dense else self.lm.adapter
        return text_read_share(self.lm.config, turn.answer, None if adapter is None else adapter.layers)

    def save(self, path: str | Path) -> Path:
        """Write all that was said to a new file, which is returned: JSON lines of messages where it ends in .jsonl, else a text to read.

        Raises ValueError where the file exists or nothing was said; OSError where it cannot be written.
        """
        path = absolute(path)
        require(len(self.turns) > 0, f"nothing was said yet, so {path} was not written; ask something first")
        if path.suffix == ".jsonl":
            content = "".join(json.dumps(message, ensure_ascii=False) + "\n" for message in self.messages)
        elif self.has_template:
            content = "\n\n".join(f"{message['role']}: {message['content']}" for message in self.messages) + "\n"
        else:
            content = self._text(self.turns) + "\n"
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(content)
        except FileExistsError as error:
            raise ValueError(f"{path} exists and is not overwritten; name a new file") from error
        return path

    def _messages(self, turns: Sequence[Turn], question: str | None = None) -> list[dict[str, str]]:
        said = [] if self.system is None else [("system", self.system)]
        for turn in turns:
            said += [("user", turn.question), ("assistant", str(turn.answer))]
        said += [] if question is None else [("user", question)]
        return [{"role": role, "content": content} for role, content in said]

    def _text(self, turns: Sequence[Turn], question: str = "") -> str:
        text = ""
        for message, answer in [*((turn.question, str(turn.answer)) for turn in turns), (question, "")]:
            text += ("\n" if text and message else "") + message + answer
        return text

    def _fitting(self, question: str) -> tuple[int, str | Messages]:
        """How many turns the model no longer reads, and the prompt without them."""
        tokenizer, context = self.lm.tokenizer, self.lm.config.max_positions
        room = min(self.max_new_tokens, context // ROOM)
        last = len(self.turns) if question or self.has_template else max(len(self.turns) - 1, 0)  # something has to be left to continue
        dropped = min(self.dropped, last)
        while True:
            kept = self.turns[dropped:]
            prompt = self._messages(kept, question) if self.has_template else self._text(kept, question)
            ids = tokenizer.encode(prompt) if isinstance(prompt, str) else chat_ids(tokenizer, prompt, **self._reading)
            if dropped == last or len(ids) + room <= context:
                return dropped, prompt
            dropped += 1
