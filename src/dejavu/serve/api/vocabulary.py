"""Single tokens as clients see them in log-probabilities: a string and bytes for each id, and where in a text each token begins.

In: a tokenizer. Out: strings that tell tokens apart though one may hold a part of a character only: such a token is written "bytes:" and
its bytes in hexadecimal, as OpenAI's API does. A special token is its own name here; in a text it is nothing.
"""

from __future__ import annotations

import codecs

from dejavu.model.token_bytes import bytes_of, decoder_kinds
from dejavu.model.tokenizer import Tokenizer


class Vocabulary:
    """Strings and bytes of a tokenizer's tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = {token_id: added.content for token_id, added in tokenizer.backend.get_added_tokens_decoder().items()}
        self._special = {token_id for token_id, added in tokenizer.backend.get_added_tokens_decoder().items() if added.special}
        self._kinds = decoder_kinds(tokenizer.backend)

    def raw(self, token_id: int) -> bytes:
        """The bytes of a token; of a special one those of its name."""
        name = self._added.get(token_id)
        if name is not None:
            return name.encode()
        name = self._tokenizer.backend.id_to_token(token_id)
        if name is None:  # an embedding may have more rows than the tokenizer has tokens
            return f"<{token_id}>".encode()
        return bytes_of(name, self._kinds)

    def written(self, token_id: int) -> bytes:
        """The bytes of a token in a text: none of a special one."""
        return b"" if token_id in self._special else self.raw(token_id)

    def text(self, token_id: int) -> str:
        """The string of a token; no other token of the same bytes has another one."""
        raw = self.raw(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def offsets(self, *, first: bool) -> Offsets:
        """Counts where tokens begin. first: whether they begin a text, where some tokenizers drop a space."""
        return Offsets(self, first=first)

    def in_text(self, token_id: int, *, first: bool) -> bytes:
        """What a token adds to a text, in bytes."""
        if token_id in self._special:
            return b""
        raw = self.raw(token_id)
        drops = first and raw.startswith(b" ") and not self._tokenizer.decode([token_id]).startswith(" ")
        return raw[1:] if drops else raw


class Offsets:
    """Where each token of a growing list begins in its text, in characters; one that ends a character begins where the character does."""

    def __init__(self, vocabulary: Vocabulary, *, first: bool) -> None:
        self._vocabulary, self._first = vocabulary, first
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._length = 0

    def begin(self, token_id: int) -> int:
        """The offset of the next token, which is this one."""
        offset = self._length
        raw = self._vocabulary.in_text(token_id, first=self._first)
        self._first = self._first and not raw
        self._length += len(self._decoder.decode(raw))
        return offset
