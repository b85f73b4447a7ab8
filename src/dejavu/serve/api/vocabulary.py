"""Single tokens as clients see them in log-probabilities: a string and bytes for each id, and where in a text each token begins.

In: a tokenizer. Out: strings that tell tokens apart though one may hold a part of a character only: such a token is written "bytes:" and
its bytes in hexadecimal, as OpenAI's API does. A special token is its own name here; in a text it is nothing.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable
from typing import Any

from dejavu.model.tokenizer import Tokenizer

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
SPACE = "▁"


def _byte_level_alphabet() -> dict[str, int]:
    """The character that a byte-level tokenizer writes for each byte: itself where it can be seen, else one from 256 on."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


BYTE_LEVEL = _byte_level_alphabet()


class Vocabulary:
    """Strings and bytes of a tokenizer's tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = {token_id: added.content for token_id, added in tokenizer.backend.get_added_tokens_decoder().items()}
        self._special = {token_id for token_id, added in tokenizer.backend.get_added_tokens_decoder().items() if added.special}
        kinds = set(_kinds(json.loads(tokenizer.backend.to_str()).get("decoder")))
        self._byte_level = "ByteLevel" in kinds
        self._spaced = bool(kinds & {"Metaspace", "Replace"})

    def raw(self, token_id: int) -> bytes:
        """The bytes of a token; of a special one those of its name."""
        name = self._added.get(token_id)
        if name is not None:
            return name.encode()
        name = self._tokenizer.backend.id_to_token(token_id)
        if name is None:  # an embedding may have more rows than the tokenizer has tokens
            return f"<{token_id}>".encode()
        if self._byte_level:
            return bytes(BYTE_LEVEL[character] for character in name) if set(name) <= BYTE_LEVEL.keys() else name.encode()
        byte = BYTE_TOKEN.fullmatch(name)
        if byte is not None:
            return bytes.fromhex(byte[1])
        return (name.replace(SPACE, " ") if self._spaced else name).encode()

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


def _kinds(decoder: dict[str, Any] | None) -> Iterable[str]:
    """The kinds of decoders that a tokenizer chains."""
    if decoder is None:
        return []
    return [decoder["type"], *(kind for part in decoder.get("decoders", []) for kind in _kinds(part))]
