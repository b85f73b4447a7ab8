"""The tokenizer of a GGUF file's metadata, `tokenizer.*`.

In: the metadata. Out: a Tokenizer, and notes on what was taken for granted. Three kinds of vocabulary are read:

    gpt2    byte-level BPE with its merges; texts are split first as `tokenizer.ggml.pre` says (splitting.py)
    llama   SentencePiece's BPE: the pair whose union has the highest score is merged first; what is in no token falls back to bytes
    t5      SentencePiece's Unigram: the pieces with the highest sum of scores
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers

from dejavu.config import require, shown
from dejavu.model.encoding import GROWTH, charsmap_growth
from dejavu.model.gguf.header import Strings
from dejavu.model.sentencepiece import scored_merges
from dejavu.model.slow_tokenizer import byte_level_bpe
from dejavu.model.splitting import splitting_of
from dejavu.model.tokenizer import Tokenizer, build_tokenizer

KINDS = ("gpt2", "llama", "t5")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # of tokenizer.ggml.token_type
TYPES = {"model": str, "pre": str} | dict.fromkeys(("add_bos_token", "add_eos_token", "add_space_prefix", "remove_extra_whitespaces"), bool)
SPACE = "▁"  # SentencePiece's sign for one
ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
DEFAULT_IDS = {"llama": {"bos": 1, "eos": 2, "unknown": 0}, "t5": {"eos": 1, "unknown": 2, "padding": 0}, "gpt2": {}}  # llama.cpp's
ENDS = ("eos", "eot", "eom")
TEMPLATE = "tokenizer.chat_template"  # and behind a dot the name of one that is not the default
END_TOKENS = {
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<|eom_id|>",
    "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "</s>", "<eos>", "<end_of_utterance>", "<\uff5cend▁of▁sentence\uff5c>",
}  # fmt: skip
"""Control tokens at which a text ends although no key says so: converters often write the end of a text and leave out that of a turn."""


class Vocabulary:
    """What the metadata say of the tokens. ValueError for what is missing, of another length, or twice there."""

    def __init__(self, metadata: Mapping[str, Any], where: str) -> None:
        self.metadata, self.where = metadata, where
        self.model = self.key("model")
        require(self.model in KINDS, f"{where}: GGUF tokenizer {self.model!r} is not supported; supported: {', '.join(KINDS)}")
        self._stored = self.key("tokens")
        require(isinstance(self._stored, Strings), f"{where}: tokenizer.ggml.tokens is no array of strings")
        self.types = self._numbers("token_type", NORMAL)

    @functools.cached_property
    def tokens(self) -> list[str]:
        return [token or f"[EMPTY_{index}]" for index, token in enumerate(self._stored)]

    @functools.cached_property
    def ids(self) -> dict[str, int]:
        found = {token: index for index, token in enumerate(self.tokens)}
        require(len(found) == len(self), f"{self.where}: {len(self) - len(found)} tokens of the vocabulary are there twice")
        return found

    def __len__(self) -> int:
        return len(self._stored)

    def key(self, name: str, default: Any = None, *, required: bool = True) -> Any:
        value = self.metadata.get(f"tokenizer.ggml.{name}", default)
        require(value is not None or not required, f"{self.where}: GGUF metadata has no 'tokenizer.ggml.{name}'")
        kind = TYPES.get(name, object)
        require(value is None or isinstance(value, kind), f"{self.where}: tokenizer.ggml.{name} is no {kind.__name__} but {shown(value)}")
        return value

    def _numbers(self, name: str, default: float) -> np.ndarray:
        """An array with a number for each token."""
        found = self.key(name, required=False)
        if found is None:
            return np.full(len(self), default)
        whole = isinstance(found, np.ndarray) and len(found) >= len(self)
        require(whole, f"{self.where}: tokenizer.ggml.{name} has no number for each of the {len(self)} tokens")
        return found[: len(self)]

    @property
    def scores(self) -> list[float]:
        return self._numbers("scores", 0.0).tolist()

    def of_type(self, kind: int) -> dict[int, str]:
        """The tokens of a type by their ids."""
        return {index: self._stored[index] for index in np.flatnonzero(self.types == kind).tolist()}

    def special_id(self, name: str) -> int | None:
        """The id of bos, eos, ...; llama.cpp's where the file does not say. None where there is none, or one beyond the vocabulary."""
        value = self.key(f"{name}_token_id", DEFAULT_IDS[self.model].get(name), required=False)
        return value if isinstance(value, int) and 0 <= value < len(self) else None

    @property
    def ends(self) -> tuple[int, ...]:
        """Ids at which a text ends, that of the end of a text first."""
        stated = [found for found in map(self.special_id, ENDS) if found is not None]
        known = [index for index, token in self.of_type(CONTROL).items() if token in END_TOKENS]
        return tuple(dict.fromkeys([*stated, *known]))


def read_tokenizer(vocabulary: Vocabulary, *, num_rows: int | None = None) -> tuple[Tokenizer, list[str]]:
    """The tokenizer, and lines for the user. num_rows: of the embedding.

    ValueError names a splitting or a key that is not supported or missing.
    """
    notes: list[str] = []
    match vocabulary.model:
        case "gpt2":
            pre = vocabulary.key("pre", required=False)
            if pre is None:
                notes.append("the file does not say how texts are split into words (tokenizer.ggml.pre): llama.cpp's default is used")
            splitting = splitting_of(pre)
            adds_bos = splitting.bos
            backend = byte_level_bpe(vocabulary.ids, _stated_merges(vocabulary), splitting.pre_tokenizer(), whole=splitting.whole)
        case "llama":
            adds_bos, backend = True, _sentencepiece_bpe(vocabulary)
        case _:
            adds_bos, backend = False, _unigram(vocabulary)
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in vocabulary.of_type(CONTROL).values()])
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in vocabulary.of_type(USER_DEFINED).values()])
    if vocabulary.key("add_eos_token", False):
        notes.append("the file asks for an end after every text (add_eos_token); texts are to be continued, so none is added")
    ids = {role: vocabulary.special_id(name) for role, name in ROLES.items()}
    texts = {key: value for key, value in vocabulary.metadata.items() if isinstance(value, str)}
    named = {key.removeprefix(f"{TEMPLATE}."): text for key, text in texts.items() if key.startswith(f"{TEMPLATE}.")}
    tokenizer = build_tokenizer(
        backend,
        special_tokens={role: vocabulary.tokens[index] for role, index in ids.items() if index is not None},
        eos_token_ids=vocabulary.ends,
        adds_bos=bool(vocabulary.key("add_bos_token", adds_bos)),
        chat_template=texts.get(TEMPLATE),
        named_templates=named,
        num_rows=num_rows,
    )
    return tokenizer, notes


def _stated_merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Pairs as the file has them, first and second with a space between; a first one may itself begin with a space."""
    merges = vocabulary.key("merges")
    require(isinstance(merges, Strings), f"{vocabulary.where}: tokenizer.ggml.merges is no array of strings")
    pairs = [(merge[:cut], merge[cut + 1 :]) for merge in merges if (cut := merge.find(" ", 1)) > 0]
    ids = vocabulary.ids
    known = [(first, second) for first, second in pairs if first in ids and second in ids and first + second in ids]
    require(len(known) == len(merges), f"{vocabulary.where}: {len(merges) - len(known)} merges are not of two tokens that make a third")
    return known


def _sentencepiece_bpe(vocabulary: Vocabulary) -> tokenizers.Tokenizer:
    """SentencePiece's BPE on the `tokenizers` library, whose merges are pairs in order: of every token all pairs that make it, by score."""
    unknown = vocabulary.special_id("unknown")
    model = models.BPE(
        vocab=vocabulary.ids,
        merges=scored_merges(vocabulary.tokens, np.asarray(vocabulary.scores), np.isin(vocabulary.types, (NORMAL, USER_DEFINED, UNUSED))),
        unk_token=None if unknown is None else vocabulary.tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    return _with_spaces(tokenizers.Tokenizer(model), vocabulary)


def _unigram(vocabulary: Vocabulary) -> tokenizers.Tokenizer:
    pieces = list(zip(vocabulary.tokens, vocabulary.scores, strict=True))
    model = models.Unigram(pieces, unk_id=vocabulary.special_id("unknown"), byte_fallback=bool(vocabulary.of_type(BYTE)))
    return _with_spaces(tokenizers.Tokenizer(model), vocabulary)


def _with_spaces(backend: tokenizers.Tokenizer, vocabulary: Vocabulary) -> tokenizers.Tokenizer:
    """SentencePiece's way with them: each is a sign of its own, one more before a text, and, where the file says that spaces in excess are
    none, only one of a row and none at the ends."""
    stated = vocabulary.key("precompiled_charsmap", required=False)
    table = b"" if stated is None else np.asarray(stated).tobytes()
    fits = charsmap_growth(table) <= GROWTH
    require(fits, f"{vocabulary.where}: tokenizer.ggml.precompiled_charsmap makes over {GROWTH} bytes of one; the file is damaged")
    steps: list[normalizers.Normalizer] = [normalizers.Precompiled(table)] if table else []
    if vocabulary.key("remove_extra_whitespaces", False):
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    prefixed = bool(vocabulary.key("add_space_prefix", True))
    steps += [normalizers.Prepend(SPACE)] if prefixed else []
    backend.normalizer = normalizers.Sequence(  # pyrefly: ignore[bad-assignment]  # properties of the compiled class
        [*steps, normalizers.Replace(" ", SPACE)]
    )
    strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
    backend.decoder = decoders.Sequence(  # pyrefly: ignore[bad-assignment]
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend
