"""SentencePiece's BPE: its merges, and the file tokenizer.model.

In: tokens and their scores, or a file of Protocol Buffers (sentencepiece_model.proto: pieces are field 1 with piece 1, score 2 and type 3;
the trainer's field 2 has the kind of model as 3). Out: merges as the `tokenizers` library wants them; pieces and what they are.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dejavu.config import require
from dejavu.damage import damaged
from dejavu.files import absolute

ODD = 0x9E3779B97F4A7C15  # any odd number of many bits
CONTROL, USER_DEFINED = 3, 4  # types of pieces
BPE = 2  # kinds of models; 1, which is not written, is Unigram
KINDS = {1: "Unigram", 2: "BPE", 3: "words", 4: "characters"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """tokens in the order of their ids. added: those that are found in a text before it is split, with whether they are control tokens."""

    kind: str
    tokens: list[str]
    added: list[tuple[str, bool]]


def read_pieces(path: Path) -> Pieces:
    """The pieces of a tokenizer.model. ValueError for what is none."""
    try:
        content = absolute(path).read_bytes()
        kind, tokens, types = 1, [], []
        for field, value in _fields(content):
            if field == 1 and isinstance(value, bytes):
                found = dict(_fields(value))
                token, type_ = found.get(1, b""), found.get(3, 1)
                require(isinstance(token, bytes) and isinstance(type_, int), "a piece is damaged")
                assert isinstance(token, bytes) and isinstance(type_, int)
                tokens.append(token.decode())
                types.append(type_)
            elif field == 2 and isinstance(value, bytes):
                stated = dict(_fields(value)).get(3, 1)
                kind = stated if isinstance(stated, int) else 0
        require(0 < len(tokens) == len(set(tokens)), "pieces are missing, or there twice")
    except (OSError, ValueError, IndexError, struct.error) as error:
        raise damaged(absolute(path), f"it is no SentencePiece model ({error})") from error
    added = [(token, type_ == CONTROL) for token, type_ in zip(tokens, types, strict=True) if type_ in (CONTROL, USER_DEFINED)]
    return Pieces(kind=KINDS.get(kind, str(kind)), tokens=tokens, added=added)


def _fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of a message: varints as numbers, the rest as bytes."""
    at = 0
    while at < len(content):
        tag, at = _varint(content, at)
        match tag & 7:
            case 0:
                value, at = _varint(content, at)
                yield tag >> 3, value
                continue
            case 1:
                size = 8
            case 5:
                size = 4
            case 2:
                size, at = _varint(content, at)
            case other:
                raise ValueError(f"no field is of wire type {other}")
        require(at + size <= len(content), "it is cut off")
        yield tag >> 3, content[at : at + size]
        at += size


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        require(shift < 70, "a number has too many bytes")


def scored_merges(tokens: Sequence[str], scores: np.ndarray, texts: np.ndarray) -> list[tuple[str, str]]:
    """Every pair of tokens whose union is a token, the highest score of the union first; of one union the shortest first token first.
    texts: which tokens may be unions.

    A vocabulary of 262,144 tokens has a million places to cut one, so parts of tokens are looked up by numbers, all at once: by the sum of
    their characters times powers of an odd number, modulo 2^64. Two of the same number would be refused by the library as no union.
    """
    order = np.argsort(-scores, kind="stable")
    tokens, texts = [tokens[index] for index in order.tolist()], texts[order]
    lengths = np.fromiter(map(len, tokens), np.int64, len(tokens))
    ends = np.cumsum(lengths)
    starts = ends - lengths
    characters = np.frombuffer("".join(tokens).encode("utf-32-le"), "<u4").astype(np.uint64) + 1
    powers, inverses = (np.cumprod(np.full(len(characters) + 1, each, np.uint64)) for each in (ODD, pow(ODD, -1, 1 << 64)))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(characters * powers[:-1])])

    def number(start: np.ndarray, end: np.ndarray) -> np.ndarray:
        return (sums[end] - sums[start]) * inverses[start]

    numbers = number(starts, ends)
    sorted_ids = np.argsort(numbers)
    sorted_numbers = numbers[sorted_ids]

    def token_of(part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        at = np.searchsorted(sorted_numbers, part).clip(max=len(tokens) - 1)
        return sorted_ids[at], sorted_numbers[at] == part

    owner = np.repeat(np.arange(len(tokens)), lengths)
    inside = np.repeat(texts, lengths)
    inside[starts[lengths > 0]] = False
    cuts = np.flatnonzero(inside)
    (first, found), (second, also) = token_of(number(starts[owner[cuts]], cuts)), token_of(number(cuts, ends[owner[cuts]]))
    pairs = np.flatnonzero(found & also)
    return [(tokens[one], tokens[other]) for one, other in zip(first[pairs].tolist(), second[pairs].tolist(), strict=True)]
