"""The bytes of single tokens, which tell where a text ends within a character. In: a tokenizer's backend, names of tokens. Out: bytes.

Byte-level tokenizers write each byte of a token as a character of an alphabet of their own; others have a token such as <0xE2> for each
byte of what they have no word for, and a word's space as "▁".
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

import tokenizers

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
SPACE = "▁"


def _byte_level_alphabet() -> dict[str, int]:
    """The character that a byte-level tokenizer writes for each byte: itself where it can be seen, else one from 256 on."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


BYTE_LEVEL = _byte_level_alphabet()


def decoder_kinds(backend: tokenizers.Tokenizer) -> frozenset[str]:
    """The kinds of decoders that a tokenizer chains."""
    decoder: Any = backend.decoder
    return frozenset() if decoder is None else frozenset(_kinds(json.loads(decoder.__getstate__())))


def _kinds(decoder: dict[str, Any]) -> Iterable[str]:
    return [decoder["type"], *(kind for part in decoder.get("decoders", []) for kind in _kinds(part))]


def bytes_of(name: str, kinds: frozenset[str]) -> bytes:
    """The bytes of a token of that name, which is not special, as decoders of those kinds write it."""
    if "ByteLevel" in kinds:
        return bytes(BYTE_LEVEL[character] for character in name) if set(name) <= BYTE_LEVEL.keys() else name.encode()
    byte = BYTE_TOKEN.fullmatch(name)
    if byte is not None:
        return bytes.fromhex(byte[1])
    return (name.replace(SPACE, " ") if kinds & {"Metaspace", "Replace"} else name).encode()


def token_bytes(backend: tokenizers.Tokenizer, token_id: int) -> bytes:
    """What a token adds to a text; nothing for a special one, and for an id that no token has."""
    name = backend.id_to_token(token_id)
    if name is None:
        return b""
    special = backend.decode([token_id], skip_special_tokens=True) == "" != backend.decode([token_id], skip_special_tokens=False)
    return b"" if special else bytes_of(name, decoder_kinds(backend))
