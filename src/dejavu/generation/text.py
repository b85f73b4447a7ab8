"""Token ids to text that can be sent at once: nothing sent is ever taken back.

`TextStream` holds back what ends within a UTF-8 character; `StopStrings` holds back the tail that may become a stop
string, and cuts the text where the first one completes. Whatever the token borders, the pieces joined are the same text.
`Writing` is a text in the making: both, and what ends it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

FinishReason = Literal["stop", "length"]
REPLACEMENT = "\ufffd"
PROMPT_TOKENS = 6


class Detokenizer(Protocol):
    """What generation needs of a tokenizer."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class TextStream:
    """Text of a growing list of tokens, piece by piece.

    A window of tokens is decoded twice, without and with the new ones; the difference is new text. The window begins with
    the end of the prompt, since the text of a token can depend on the one before it (a leading space, for one).
    """

    def __init__(self, tokenizer: Detokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._window = self._prompt_end(list(prompt_ids))
        self._read = len(self._window)

    def push(self, token_id: int) -> str:
        """New text after one more token; empty while a character is unfinished."""
        self._window.append(token_id)
        new = self._new_text()
        if not new or new.endswith(REPLACEMENT):
            return ""
        self._window = self._window[self._read :]
        self._read = len(self._window)
        return new

    def flush(self) -> str:
        """What is left at the end, unfinished characters as U+FFFD."""
        new = self._new_text()
        self._read = len(self._window)
        return new

    def _prompt_end(self, prompt_ids: list[int]) -> list[int]:
        """The last tokens of the prompt, some more where they would begin within a character (of at most 4 bytes)."""
        for count in range(PROMPT_TOKENS, PROMPT_TOKENS + 4):
            if not self._tokenizer.decode(prompt_ids[-count:]).startswith(REPLACEMENT):
                return prompt_ids[-count:]
        return prompt_ids[-PROMPT_TOKENS:]

    def _new_text(self) -> str:
        known = self._tokenizer.decode(self._window[: self._read])
        return self._tokenizer.decode(self._window)[len(known) :]


class StopStrings:
    """Cuts a stream of text before the stop string that completes first; of two that complete at once, the first listed.

    Raises ValueError for an empty stop string, which every text contains.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = (stops,) if isinstance(stops, str) else tuple(stops)
        if "" in self.stops:
            raise ValueError('a stop string must not be empty (stop ""): every text contains it; leave it out')
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The part of the text so far that is certain and was not returned yet. Nothing may be pushed after a stop."""
        assert not self.stopped
        text = self._held + text
        matches = [(text.find(stop) + len(stop), order) for order, stop in enumerate(self.stops) if stop in text]
        if matches:
            end, order = min(matches)
            self.stopped, self._held = True, ""
            return text[: end - len(self.stops[order])]
        keep = len(text) - self._open_tail(text)
        self._held = text[keep:]
        return text[:keep]

    def flush(self) -> str:
        """What was held back and did not become a stop string."""
        held, self._held = self._held, ""
        return held

    def _open_tail(self, text: str) -> int:
        """Length of the longest end of the text that is a proper prefix of a stop string."""
        longest = max((len(stop) - 1 for stop in self.stops), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(len(stop) > length and stop.startswith(text[-length:]) for stop in self.stops):
                return length
        return 0


class Writing:
    """The text of one sequence, token by token, until something ends it.

    finish_reason: "stop" (a stop string or one of stop_ids), "length" (max_tokens), None while it goes on. tokens: so far. The prompt is
    not searched for stop strings. Raises ValueError for an empty stop string.
    """

    def __init__(
        self, tokenizer: Detokenizer, prompt_ids: Sequence[int], *, stop: Sequence[str], stop_ids: frozenset[int], max_tokens: int
    ) -> None:
        assert max_tokens >= 0
        self._stream, self._stops = TextStream(tokenizer, prompt_ids), StopStrings(stop)
        self._stop_ids, self._max_tokens = stop_ids, max_tokens
        self.tokens = 0
        self.finish_reason: FinishReason | None = "length" if max_tokens == 0 else None

    def push(self, token_id: int) -> str:
        """New text that is certain after one more token; with the last token all that was held back. Nothing may be pushed behind it."""
        assert self.finish_reason is None
        self.tokens += 1
        text = ""
        if token_id in self._stop_ids:
            self.finish_reason = "stop"
        else:
            text = self._stops.push(self._stream.push(token_id))
            if self._stops.stopped:
                self.finish_reason = "stop"
            elif self.tokens == self._max_tokens:
                self.finish_reason = "length"
        return text if self.finish_reason is None else text + self._rest()

    def _rest(self) -> str:
        """Text held back until the end; it may still hold a stop string that an unfinished character had delayed."""
        if self._stops.stopped:
            return ""
        text = self._stops.push(self._stream.flush())
        if self._stops.stopped:
            self.finish_reason = "stop"
            return text
        return text + self._stops.flush()


def stop_ids_of(tokenizer: Detokenizer, stop_ids: Sequence[int] = (), *, ignore_eos: bool = False) -> frozenset[int]:
    """The tokens that end a text: the given ones, and the tokenizer's EOS unless it is to be ignored."""
    return frozenset(stop_ids) | (frozenset() if ignore_eos else frozenset(tokenizer.eos_token_ids))
