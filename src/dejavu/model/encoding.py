"""Texts to ids on a backend of the `tokenizers` library, and which backends may do that in this process.

In: a backend, or the content of a tokenizer.json, which comes with a model. Out: ids and the spans of the text that they stand for.

A normalizer can multiply a text, and a pattern can take for ever. So a tokenizer is *bounded* where every pattern is one that models are
known to use, or has no quantifier but at its end, and no normalizer makes more than GROWTH characters of one. Any other runs in a process
that can be ended (bounded.py), half a millisecond a text.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import tokenizers

from dejavu.damage import is_panic
from dejavu.model.splitting import BLOOM, GPT2, SPLITTINGS

GROWTH = 64
GROWTHS = {"NFKC": 18, "NFKD": 18, "NFD": 4, "NFC": 3, "Lowercase": 3, "BertNormalizer": 12, "ByteLevel": 4}  # characters of one, at most
BLOOM_OLD = BLOOM.replace("(\\s|", "(\\s|[").replace("\u060c)]", "\u060c])]")  # as its tokenizer.json has it
KNOWN = {pattern for splitting in SPLITTINGS.values() for pattern in splitting.patterns}
KNOWN |= {GPT2 + "|", "^ +| +$", r"\s+$", r"[^\S\n]+|\n", BLOOM_OLD}
SIMPLE = re.compile(r"(?:[^\\\[\](){}*+?|]|\\[pP]\{\^?\w+\}|\\.|\[(?:[^\[\]\\]|\\.)+\])*(?:[*+]|\{\d{1,3},?\d{0,3}\})?")
DAMAGED = (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError)  # what reading it raises

Spans = list[tuple[int, int]]


def is_bounded(content: Mapping[str, Any]) -> bool:
    """Whether texts may be encoded here by the tokenizer of this content, which may be damaged."""
    try:
        steps = [*_steps(content.get("normalizer"), "normalizers"), *_steps(content.get("pre_tokenizer"), "pretokenizers")]
        return math.prod(map(_growth, steps)) <= GROWTH and all(map(_is_known, steps))
    except DAMAGED:
        return False


def is_bounded_decoder(content: Mapping[str, Any]) -> bool:
    """Likewise whether ids may be decoded."""
    try:
        steps = [step for step in _steps(content.get("decoder"), "decoders") if step["type"] == "Replace"]
        return all("String" in step["pattern"] for step in steps) and math.prod(map(_growth, steps)) <= GROWTH
    except DAMAGED:
        return False


def encode(backend: tokenizers.Tokenizer, text: str) -> tuple[list[int], Spans]:
    """Ids of a text, and the characters that each stands for; no special token is added."""
    with no_panic():
        found = backend.encode(text, add_special_tokens=False)
    return found.ids, found.offsets


def encode_batch(backend: tokenizers.Tokenizer, texts: list[str]) -> list[list[int]]:
    """Ids of each text; other threads run meanwhile."""
    with no_panic():
        return [found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=False)]


def encode_as_text(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    """Ids of a text in which no added token is recognised."""
    with no_panic():
        normalized = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
        cut = [(normalized, None)] if backend.pre_tokenizer is None else backend.pre_tokenizer.pre_tokenize_str(normalized)
        return [token.id for piece, _ in cut for token in backend.model.tokenize(piece)]


@contextmanager
def no_panic() -> Generator[None]:
    """A panic of the library as a ValueError; it is no Exception of Python's."""
    try:
        yield
    except BaseException as error:
        if not is_panic(error):
            raise
        raise ValueError(f"the tokenizer failed ({error}): tokenizer.json is damaged, or its patterns do not take this text") from error


def backend_of(content: str) -> tokenizers.Tokenizer:
    """The backend of a tokenizer.json. ValueError for what is none."""
    with no_panic():
        try:
            backend = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # the library raises a bare Exception
            raise ValueError(str(error)) from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _steps(part: Any, name: str) -> Iterator[Mapping[str, Any]]:
    if part is None:
        return
    if part["type"] == "Sequence":
        for each in part[name]:
            yield from _steps(each, name)
    else:
        yield part


def _growth(step: Mapping[str, Any]) -> float:
    """How many characters a step makes of one, at most; of a step that is no normalizer 1."""
    match step["type"]:
        case "Replace":
            pattern = step["pattern"].get("String")
            content = len(step["content"])
            return 1 + content if pattern is None else max(1.0, content / len(pattern)) if pattern else math.inf
        case "Prepend":
            return 1 + len(step["prepend"])
        case "Precompiled":
            return charsmap_growth(base64.b64decode(step["precompiled_charsmap"]))
        case "Metaspace":
            return 1 + len(step.get("replacement", ""))
    return GROWTHS.get(step["type"], 1)


def charsmap_growth(table: bytes) -> int:
    """How many bytes SentencePiece's table of replacements makes of one, at most: a trie behind its size, then texts that end with 0."""
    return max(map(len, table[4 + int.from_bytes(table[:4], "little") :].split(b"\0")))


def _is_known(step: Mapping[str, Any]) -> bool:
    pattern = step.get("pattern")
    if not isinstance(pattern, Mapping) or "Regex" not in pattern:
        return True
    return pattern["Regex"] in KNOWN or SIMPLE.fullmatch(pattern["Regex"]) is not None
