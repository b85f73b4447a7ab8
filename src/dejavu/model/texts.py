"""Texts as measurements and training read them: documents, named files, and windows spread evenly over a long text.

In: texts, paths and globs. Out: documents as token ids. In a text for profiling or training a line `<|endoftext|>` ends a
document and is itself no text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from dejavu.config import require
from dejavu.files import expand_paths, read_text, text_hash
from dejavu.model.tokenizer import Tokenizer

DATA = Path(__file__).resolve().parents[1] / "data"  # the texts that come with the package
SEPARATOR = "<|endoftext|>"
CHARACTERS_PER_TOKEN = 4  # of a window that is cut before it is tokenised
GOLDEN = 0.6180339887498949


def documents(text: str) -> list[str]:
    """The documents of a text that hold more than white space."""
    parts, lines = [], []
    for line in text.splitlines(keepends=True):
        if line.strip() == SEPARATOR:
            parts.append("".join(lines))
            lines = []
        else:
            lines.append(line)
    parts.append("".join(lines))
    return [part for part in parts if part.strip()]


def has_separator(text: str) -> bool:
    """Whether a line of the text would end a document, where documents are told apart."""
    return any(line.strip() == SEPARATOR for line in text.splitlines())


def corpus_hash(texts: Sequence[str]) -> str:
    """SHA-256 of one text, or of several laid end to end with a separator line between them."""
    return text_hash(f"\n{SEPARATOR}\n".join(texts))


def named_files(patterns: Sequence[str]) -> dict[str, Path]:
    """The files of paths and globs by their name, with the folder in front where two share a name."""
    paths = expand_paths(patterns)
    names = [path.name for path in paths]
    return {path.name if names.count(path.name) == 1 else path.as_posix(): path for path in paths}


def named_texts(patterns: Sequence[str]) -> dict[str, str]:
    """The texts of paths and globs, by name."""
    return {name: read_text(path) for name, path in named_files(patterns).items()}


def document_ids(tokenizer: Tokenizer, texts: Mapping[str, str], *, max_tokens: int) -> dict[str, list[int]]:
    """Ids without BOS of the documents of each text, the first max_tokens tokens of each text; several get a number."""
    require(max_tokens >= 1, f"max_tokens must be at least 1, not {max_tokens}")
    found: dict[str, list[int]] = {}
    for name, text in texts.items():
        parts, left = documents(text), max_tokens
        require(len(parts) > 0, f"text {name!r} is empty; give a file with text")
        for number, part in enumerate(parts, start=1):
            ids = tokenizer.encode_plain(part)[:left]
            if ids:
                found[name if len(parts) == 1 else f"{name} #{number}"] = ids
            left -= len(ids)
            if left <= 0:
                break
    return found


def spread_windows(tokenizer: Tokenizer, texts: Sequence[str], *, max_tokens: int, length: int) -> list[list[int]]:
    """Up to max_tokens tokens in windows of at most `length`, spread evenly over all documents; ids without BOS.

    Documents are cut into pieces of about `length` tokens, and pieces are taken in golden-ratio order, of which every
    beginning is evenly spread, until there are enough. So only what is used is tokenised. Windows keep the text's order.
    """
    require(max_tokens >= 1, f"max_tokens must be at least 1, not {max_tokens}")
    size = length * CHARACTERS_PER_TOKEN
    pieces = [part[start : start + size] for text in texts for part in documents(text) for start in range(0, len(part), size)]
    require(len(pieces) > 0, "the text is empty; give a file with text")
    chosen: dict[int, list[int]] = {}
    left = max_tokens
    for index in sorted(range(len(pieces)), key=lambda i: i * GOLDEN % 1):
        ids = tokenizer.encode_plain(pieces[index])[: min(length, left)]
        if ids:
            chosen[index] = ids
        left -= len(ids)
        if left == 0:
            break
    return [chosen[index] for index in sorted(chosen)]
