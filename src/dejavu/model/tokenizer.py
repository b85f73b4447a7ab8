"""Text to token ids and back, on top of the `tokenizers` library.

In: `tokenizer.json` (or `vocab.json` + `merges.txt` of a GPT-2 tokenizer), and what `tokenizer_config.json`,
`special_tokens_map.json` and the model's config say about special tokens. Out: a Tokenizer.

Whether a text begins with BOS is the tokenizer's own default: that of its post-processor, or `add_bos_token` where the
tokenizer has no tokenizer.json (the rule of transformers). BOS is added once: a text that begins with it gets no second.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from dejavu.files import read_json, write_json
from dejavu.model.token_bytes import token_bytes

TOKENIZER_FILE = "tokenizer.json"
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def byte_level_bpe(
    vocabulary: dict[str, int], merges: Iterable[tuple[str, str]], pre: pre_tokenizers.PreTokenizer, *, whole: bool = False
) -> tokenizers.Tokenizer:
    """A byte-level BPE (the GPT-2 kind) without special tokens. whole: a piece that is a token is taken as it is, whatever merges say."""
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges), fuse_unk=False, ignore_merges=whole))
    backend.pre_tokenizer = pre  # pyrefly: ignore[bad-assignment]  # properties of the compiled class
    backend.decoder = decoders.ByteLevel()  # pyrefly: ignore[bad-assignment]
    return backend


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenizer:
    """A tokenizer with its special ids. `special_tokens` maps bos_token, eos_token, unk_token, pad_token to their strings."""

    backend: tokenizers.Tokenizer = field(repr=False)
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    adds_bos: bool
    special_tokens: dict[str, str]
    chat_template: str | None = field(default=None, repr=False)

    @property
    def vocab_size(self) -> int:
        """Number of entries, special tokens included. A model's embedding may have more rows."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def longest_token(self) -> int | None:
        """Characters of a text that a token stands for at most; None where that is not told by the vocabulary: where a normalizer may take
        some away, an added token the white space next to it, or one token stands for all that are unknown."""
        strips = any(token.lstrip or token.rstrip for token in self.backend.get_added_tokens_decoder().values())
        unknown = strips or self.backend.normalizer is not None or getattr(self.backend.model, "fuse_unk", False)
        return None if unknown else max(map(len, self.backend.get_vocab()))

    @property
    def document_bos(self) -> int | None:
        """The BOS that begins a document by the tokenizer's own default; None where it adds none."""
        return self.bos_token_id if self.adds_bos else None

    def encode_plain(self, text: str) -> list[int]:
        """Ids of the text alone; no special token is added (one spelled out in the text is still recognised).

        Raises ValueError for half a surrogate pair, which is what Python makes of bytes that are no UTF-8.
        """
        try:
            (found,) = self.backend.encode_batch_fast([text], add_special_tokens=False)  # unlike `encode` it lets other threads run
        except TypeError as error:  # the library's word for a str that UTF-8 cannot spell
            raise ValueError(f"{text!r} is not UTF-8 throughout; give it in UTF-8") from error
        return found.ids

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        """Ids of the text, led by one BOS where that is the tokenizer's default and `add_bos` is true."""
        ids = self.encode_plain(text)
        bos = self.document_bos if add_bos else None
        return ids if bos is None or ids[:1] == [bos] else [bos, *ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids without special tokens. An unfinished UTF-8 sequence at the end decodes to U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text; none of a special one."""
        return token_bytes(self.backend, token_id)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, as transformers' PreTrainedTokenizerFast reads them."""
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        if self.adds_bos and not _post_processor_adds(backend, self.bos_token_id):
            bos = self.special_tokens["bos_token"]
            backend.post_processor = tokenizers.processors.TemplateProcessing(  # pyrefly: ignore[bad-assignment]
                single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, self.bos_token_id)]
            )
        backend.save(str(folder / TOKENIZER_FILE))
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        write_json(folder / "tokenizer_config.json", config | self._named_tokens())

    def _named_tokens(self) -> dict[str, str]:
        """The special tokens, also those known by their ids alone. Where there is no unknown token it is EOS, as in GPT-2: a byte-level
        BPE never yields it, and CTranslate2 loads no model without one."""
        ids = {"bos_token": self.bos_token_id, "eos_token": self.eos_token_ids[0] if self.eos_token_ids else None}
        found = {role: self.backend.id_to_token(token_id) for role, token_id in ids.items() if token_id is not None}
        named = {role: token for role, token in found.items() if token is not None} | self.special_tokens
        return named | ({"unk_token": named["eos_token"]} if "eos_token" in named and "unk_token" not in named else {})


def _post_processor_adds(backend: tokenizers.Tokenizer, bos_token_id: int | None) -> bool:
    """Whether the tokenizer's own post-processor puts BOS before a text."""
    return bos_token_id is not None and backend.encode("").ids[:1] == [bos_token_id]


def build_tokenizer(
    backend: tokenizers.Tokenizer,
    *,
    special_tokens: dict[str, str],
    bos_token_id: int | None = None,
    eos_token_ids: tuple[int, ...] = (),
    adds_bos: bool | None = None,
    chat_template: str | None = None,
) -> Tokenizer:
    """Tokenizer around a backend; ids left open come from the special tokens, adds_bos from the post-processor."""
    backend.no_truncation()
    backend.no_padding()
    special_ids = {name: backend.token_to_id(token) for name, token in special_tokens.items()}
    bos = special_ids.get("bos_token")
    bos = bos_token_id if bos is None else bos
    eos = special_ids.get("eos_token")
    return Tokenizer(
        backend=backend,
        bos_token_id=bos,
        eos_token_ids=eos_token_ids or (() if eos is None else (eos,)),
        adds_bos=_post_processor_adds(backend, bos) if adds_bos is None else adds_bos and bos is not None,
        special_tokens=special_tokens,
        chat_template=chat_template,
    )


def load_tokenizer(folder: Path, *, bos_token_id: int | None = None, eos_token_ids: tuple[int, ...] = ()) -> Tokenizer:
    """The tokenizer of a checkpoint folder. The ids are the model config's: BOS where the tokenizer names none, EOS first of all.

    Raises ValueError naming what is missing or unreadable.
    """
    config = _optional_json(folder / "tokenizer_config.json")
    special_tokens = _special_tokens(config, _optional_json(folder / "special_tokens_map.json"))
    template = folder / "chat_template.jinja"
    chat_template = template.read_text(encoding="utf-8") if template.is_file() else config.get("chat_template")
    adds_bos = None
    if (folder / TOKENIZER_FILE).is_file():
        try:
            backend = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER_FILE))
        except Exception as error:  # the library raises a bare Exception
            raise ValueError(f"{folder / TOKENIZER_FILE} is no tokenizer file: {error}") from error
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        backend = _gpt2_backend(folder, config, special_tokens)
        adds_bos = bool(config.get("add_bos_token", False))
    else:
        raise ValueError(f"no tokenizer in {folder}: neither {TOKENIZER_FILE} nor vocab.json with merges.txt")
    return build_tokenizer(
        backend,
        special_tokens=special_tokens,
        bos_token_id=bos_token_id,
        eos_token_ids=eos_token_ids,
        adds_bos=adds_bos,
        chat_template=chat_template if isinstance(chat_template, str) else None,
    )


def _gpt2_backend(folder: Path, config: dict[str, Any], special_tokens: dict[str, str]) -> tokenizers.Tokenizer:
    vocabulary = read_json(folder / "vocab.json")
    lines = [line for line in (folder / "merges.txt").read_text(encoding="utf-8").split("\n") if line and not line.startswith("#version")]
    merges = [(first, second) for first, _, second in (line.partition(" ") for line in lines)]
    pre = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space", False)), use_regex=True)
    backend = byte_level_bpe(vocabulary, merges, pre)
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special_tokens.values()])
    return backend


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _special_tokens(*sources: dict[str, Any]) -> dict[str, str]:
    """Special tokens by role from files that spell one as a string or as {"content": ...}; the first file wins."""
    found: dict[str, str] = {}
    for source in sources:
        for name in SPECIAL_TOKENS:
            value = source.get(name)
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str):
                found.setdefault(name, content)
    return found
