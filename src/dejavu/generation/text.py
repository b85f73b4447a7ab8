"""Token ids to text that can be sent at once: nothing sent is ever taken back.

`TextStream` holds back bytes that can still become a UTF-8 character; `StopStrings` holds back the tail that may become a stop
string, and cuts the text where the first one completes. Whatever the token borders, the pieces joined are the same text.
`Writing` is a text in the making: both, and what ends it.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Literal, Protocol

from dejavu.files import require_utf8

FinishReason = Literal["stop", "length"]
REPLACEMENT = "\ufffd"
PROMPT_TOKENS = 6


class Detokenizer(Protocol):
    """What generation needs of a tokenizer."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text, none for one that is not written."""
        ...


def unfinished(tail: bytes) -> int:
    """How many bytes at the end are the beginning of a UTF-8 character that could still be finished: 0 to 3."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    decoder.decode(tail)
    return len(decoder.getstate()[0])


class TextStream:
    """Text of a growing list of tokens, piece by piece.

    A window of tokens is decoded each time; what it has beyond the text that was sent is new. The window begins with the end of the
    prompt, since the text of a token can depend on the one before it (a leading space, for one). A character that is finished here
    and begun by the prompt is text; where it is not finished, what the prompt began is none, unless it is echoed.
    """

    def __init__(self, tokenizer: Detokenizer, prompt_ids: Sequence[int], *, echoed: bool = False) -> None:
        self._tokenizer = tokenizer
        self._window = self._prompt_end(list(prompt_ids))
        self._read = len(self._window)  # tokens of it whose text was sent
        self._alone = False  # whether tokens before the window are out of sight
        text = self._text()
        sent = len(text) - self._open_end(text)
        self._sent, self._begun = text[:sent], "" if echoed else text[sent:]

    @property
    def begun(self) -> str:
        """The replacements at the end of the prompt's text for a character that can still be finished."""
        return self._begun

    def push(self, token_id: int) -> str:
        """New text after one more token: all but what can still become a character."""
        self._window.append(token_id)
        text = self._text()
        if not text.startswith(self._sent):  # some decoders take a character back where bytes follow that are none
            self._begin(self._window[self._read :])
            text = self._text()
        end = len(text) - self._open_end(text)
        new = text[:end].removeprefix(self._sent).removeprefix(self._begun)
        if not new:
            return ""
        self._sent, self._begun = text[:end], ""
        if text.endswith(REPLACEMENT) and end == len(text):  # such a decoder would join what follows to it
            self._begin([])
        elif end == len(text):
            self._window = self._window[self._read :]
            self._read, self._sent = len(self._window), self._text()
        return new

    def flush(self) -> str:
        """What is left at the end, unfinished characters as U+FFFD."""
        text = self._text()
        new = text.removeprefix(self._sent).removeprefix(self._begun)
        self._sent, self._begun = text, ""
        return new

    def _begin(self, window: list[int]) -> None:
        """Go on with a window of tokens that are not sent."""
        self._window, self._read, self._sent, self._begun, self._alone = window, 0, "", "", True

    def _text(self) -> str:
        """The window's text, with the space that some decoders drop at the beginning where the text does not begin here."""
        text = self._tokenizer.decode(self._window)
        if not self._alone:
            return text
        whole = b"".join(map(self._tokenizer.token_bytes, self._window))
        return " " * (len(whole) - len(whole.lstrip(b" ")) - (len(text) - len(text.lstrip(" ")))) + text

    def _open_end(self, text: str) -> int:
        """Replacements at the end of the window's text that stand for a character which can still be finished."""
        if not text.endswith(REPLACEMENT):
            return 0
        tokens = [self._tokenizer.token_bytes(token_id) for token_id in self._window[-PROMPT_TOKENS:]]
        count = unfinished(b"".join(tokens))
        taken = 1
        while count > 0 and len(b"".join(tokens[-taken:])) < count:
            taken += 1
        # Decoders write one replacement for all that is unfinished, or one for each byte.
        written = self._tokenizer.decode(self._window[-taken:])
        return min(count, len(written) - len(written.rstrip(REPLACEMENT)))

    def _prompt_end(self, prompt_ids: list[int]) -> list[int]:
        """The last tokens of the prompt, some more where they would begin within a character (of at most 4 bytes)."""
        for count in range(PROMPT_TOKENS, PROMPT_TOKENS + 4):
            if not self._tokenizer.decode(prompt_ids[-count:]).startswith(REPLACEMENT):
                return prompt_ids[-count:]
        return prompt_ids[-PROMPT_TOKENS:]


class StopStrings:
    """Cuts a stream of text before the stop string that completes first; of two that complete at once, the first listed.

    Raises ValueError for an empty stop string, which every text contains, and for one that is no text.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = (stops,) if isinstance(stops, str) else tuple(stops)
        if "" in self.stops:
            raise ValueError('a stop string must not be empty (stop ""): every text contains it; leave it out')
        for stop in self.stops:
            require_utf8(stop, "a stop string")
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
    not searched for stop strings. echoed: a character that the prompt began is in the text though nothing finishes it.

    Raises ValueError for an empty stop string.
    """

    def __init__(
        self, tokenizer: Detokenizer, prompt_ids: Sequence[int], *, stop: Sequence[str], stop_ids: frozenset[int], max_tokens: int,
        echoed: bool = False,
    ) -> None:  # fmt: skip
        assert max_tokens >= 0
        self._stream, self._stops = TextStream(tokenizer, prompt_ids, echoed=echoed), StopStrings(stop)
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
