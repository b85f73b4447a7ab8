"""Tokenizers in the files from before tokenizer.json: vocab.json with merges.txt, or tokenizer.model.

In: a folder, its tokenizer_config.json, and the special tokens that it names. Out: a backend, the special tokens with those that its class
has by default, and whether a text begins with BOS. What the files mean depends on the class that they were saved for; for each of CLASSES
ids are those of transformers.

    GPT2Tokenizer     byte-level BPE
    Qwen2Tokenizer    the same on text in NFC, which is split in another way
    LlamaTokenizer    SentencePiece's BPE, the earlier piece merged first, with bytes for what is in no piece
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from dejavu.config import require
from dejavu.files import read_json, read_text
from dejavu.model.sentencepiece import read_pieces, scored_merges
from dejavu.model.splitting import QWEN2

END = "<|endoftext|>"
SPACE = "▁"  # SentencePiece's sign for one
FIX = "open it with transformers' AutoTokenizer and save it with save_pretrained, which writes tokenizer.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Class:
    """files: what it is read from. pattern: how texts are split, None as GPT-2. special: tokens that count where tokenizer_config.json does
    not name them."""

    files: tuple[str, ...] = ("vocab.json", "merges.txt")
    pattern: str | None = None
    nfc: bool = False
    special: Mapping[str, str] = field(default_factory=dict)


CLASSES = {
    "GPT2Tokenizer": Class(special={"bos_token": END, "eos_token": END, "unk_token": END}),
    "Qwen2Tokenizer": Class(pattern=QWEN2, nfc=True, special={"eos_token": END, "unk_token": END, "pad_token": END}),
    "LlamaTokenizer": Class(files=("tokenizer.model",), special={"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
}
KINDS = {
    "GPT2Tokenizer": ("opt", "phi", "starcoder2", "gpt2"),
    "Qwen2Tokenizer": ("qwen2", "qwen3"),
    "LlamaTokenizer": ("llama",),
}
"""Kinds of models whose tokenizer is of the class where the folder does not say."""


def byte_level_bpe(
    vocabulary: dict[str, int], merges: Iterable[tuple[str, str]], pre: pre_tokenizers.PreTokenizer, *, whole: bool = False
) -> tokenizers.Tokenizer:
    """A byte-level BPE (the GPT-2 kind) without special tokens. whole: a piece that is a token is taken as it is, whatever merges say."""
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges), fuse_unk=False, ignore_merges=whole))
    backend.pre_tokenizer = pre  # pyrefly: ignore[bad-assignment]  # properties of the compiled class
    backend.decoder = decoders.ByteLevel()  # pyrefly: ignore[bad-assignment]
    return backend


def slow_tokenizer(
    folder: Path, config: Mapping[str, Any], special_tokens: Mapping[str, str], model_type: str
) -> tuple[tokenizers.Tokenizer, dict[str, str], bool]:
    """Also whether a text begins with BOS.

    Raises ValueError where files are missing or damaged, or of a class that is not among CLASSES.
    """
    stated = config.get("tokenizer_class")
    name = stated.removesuffix("Fast") if isinstance(stated, str) else next((each for each in KINDS if model_type in KINDS[each]), None)
    files = [each for each in ("vocab.json", "merges.txt", "tokenizer.model") if (folder / each).is_file()]
    of = "a class that the folder does not name" if name is None else f"the class {name}"
    missing = "neither tokenizer.json nor vocab.json with merges.txt nor tokenizer.model"
    require(bool(files), f"no tokenizer in {folder}: {missing}; incomplete download?")
    kind = None if name is None else CLASSES.get(name)
    known = "; ".join(f"{' with '.join(each.files)} of {named}" for named, each in CLASSES.items())
    require(
        kind is not None and set(kind.files) <= set(files),
        f"the tokenizer in {folder} is {' and '.join(files)} of {of}; dejavu reads tokenizer.json, else: {known}. Or {FIX}",
    )
    assert kind is not None
    special = {**{role: token for role, token in kind.special.items() if role not in config}, **special_tokens}
    if "tokenizer.model" in kind.files:
        backend = _sentencepiece(folder / "tokenizer.model", config)
    else:
        backend = _byte_level(folder, config, kind)
    for token in _added_tokens(folder, config, special):
        backend.add_special_tokens([token]) if token.special else backend.add_tokens([token])
    return backend, special, bool(config.get("add_bos_token", False))


def _sentencepiece(path: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    pieces = read_pieces(path)
    require(pieces.kind == "BPE", f"{path} is a model of kind {pieces.kind}, which a LlamaTokenizer has not; {FIX}")
    size = len(pieces.tokens)
    merges = scored_merges(pieces.tokens, -np.arange(size), np.ones(size, bool))
    vocabulary = {token: index for index, token in enumerate(pieces.tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, fuse_unk=True, byte_fallback=True))
    prefixed = config.get("add_prefix_space") is not False
    scheme = "never" if not prefixed else "always" if config.get("legacy", False) else "first"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, scheme, split=False)  # pyrefly: ignore[bad-assignment]
    strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
    backend.decoder = decoders.Sequence(  # pyrefly: ignore[bad-assignment]
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    for token, special in pieces.added:
        added = [AddedToken(token, normalized=False, special=special)]
        backend.add_special_tokens(added) if special else backend.add_tokens(added)
    return backend


def _byte_level(folder: Path, config: Mapping[str, Any], kind: Class) -> tokenizers.Tokenizer:
    vocabulary, merges = _vocabulary(folder / "vocab.json"), _merges(folder / "merges.txt")
    prefixed = bool(config.get("add_prefix_space", False))
    pre: pre_tokenizers.PreTokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefixed, use_regex=kind.pattern is None)
    if kind.pattern is not None:
        pre = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(kind.pattern), "isolated"), pre])
    try:
        backend = byte_level_bpe(vocabulary, merges, pre)
    except Exception as error:  # the library raises a bare Exception
        raise ValueError(f"{folder}: vocab.json and merges.txt do not fit each other: {error}") from error
    if kind.nfc:
        backend.normalizer = normalizers.NFC()  # pyrefly: ignore[bad-assignment]
    return backend


def _vocabulary(path: Path) -> dict[str, int]:
    vocabulary = read_json(path)
    good = isinstance(vocabulary, dict) and all(type(index) is int and index >= 0 for index in vocabulary.values())
    require(good, f"{path} is no object of tokens and their ids; mend or replace the file")
    return vocabulary


def _merges(path: Path) -> list[tuple[str, str]]:
    lines = [line for line in read_text(path).split("\n") if line and not line.startswith("#version")]
    return [(first, second) for first, _, second in (line.partition(" ") for line in lines)]


def _added_tokens(folder: Path, config: Mapping[str, Any], special: Mapping[str, str]) -> list[AddedToken]:
    """Tokens that are added to the vocabulary, by their ids: those that tokenizer_config.json lists, else those of added_tokens.json, and
    the special ones that neither has."""
    listed = config.get("added_tokens_decoder")
    found: dict[int, AddedToken] = {}
    try:
        if isinstance(listed, dict):
            found = {int(index): AddedToken(**fields) for index, fields in listed.items()}
        elif (folder / "added_tokens.json").is_file():
            for token, index in read_json(folder / "added_tokens.json").items():
                is_special = token in special.values()
                found[int(index)] = AddedToken(token, normalized=not is_special, special=is_special)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder}: the list of added tokens is damaged: {error}; mend or replace the file") from error
    tokens = [found[index] for index in sorted(found)]
    known = {token.content for token in tokens}
    rest = [token for token in dict.fromkeys(special.values()) if token not in known]
    return tokens + [AddedToken(token, normalized=False, special=True) for token in rest]
