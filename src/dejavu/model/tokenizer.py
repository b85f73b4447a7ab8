"""Text to token ids and back, on top of the `tokenizers` library.

In: `tokenizer.json` (or the older files that slow_tokenizer.py knows), and what `tokenizer_config.json`, `special_tokens_map.json` and
the model's config say about special tokens. Out: a Tokenizer.

Whether a text begins with BOS is the tokenizer's own default: that of its post-processor, or `add_bos_token` where the
tokenizer has no tokenizer.json (the rule of transformers). BOS is added once: a text that begins with it gets no second.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers

from dejavu.config import require
from dejavu.damage import damaged, misplaced
from dejavu.files import read_object, read_text, require_utf8, write_json, write_text
from dejavu.model import bounded, encoding
from dejavu.model.slow_tokenizer import slow_tokenizer
from dejavu.model.token_bytes import token_bytes

TOKENIZER_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
TEMPLATE_FILE, TEMPLATES_FOLDER = "chat_template.jinja", "additional_chat_templates"


AddedTokens = tuple[tuple[str, bool], ...]  # each with whether it is special


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenizer:
    """A tokenizer with its special ids.

    special_tokens maps bos_token, eos_token, unk_token, pad_token and what else the model names to their strings. named_templates: those
    next to chat_template, which is the default. added_tokens: what is found in a text before it is split. num_rows: of the model's
    embedding, None where that is not known. foreign: the tokenizer.json of one that encodes in a process of its own (encoding.py), of which
    `backend` has the vocabulary alone.
    """

    backend: tokenizers.Tokenizer = field(repr=False)
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    adds_bos: bool
    special_tokens: Mapping[str, str]
    chat_template: str | None = field(default=None, repr=False)
    named_templates: Mapping[str, str] = field(default_factory=dict, repr=False)
    added_tokens: AddedTokens = field(default=(), repr=False)
    num_rows: int | None = None
    foreign: str | None = field(default=None, repr=False)

    @property
    def has_template(self) -> bool:
        """Whether messages can be read, and not texts alone."""
        return self.chat_template is not None or bool(self.named_templates)

    @property
    def vocab_size(self) -> int:
        """Number of entries, special tokens included. A model's embedding may have more rows, or fewer."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def longest_token(self) -> int | None:
        """Characters of a text that a token stands for at most; None where that is not told by the vocabulary: where a normalizer may take
        some away, an added token the white space next to it, or one token stands for all that are unknown."""
        strips = any(token.lstrip or token.rstrip for token in self.backend.get_added_tokens_decoder().values())
        rewrites = self.backend.normalizer is not None or self.foreign is not None
        unknown = strips or rewrites or getattr(self.backend.model, "fuse_unk", False)
        return None if unknown else max(map(len, self.backend.get_vocab()))

    @property
    def document_bos(self) -> int | None:
        """The BOS that begins a document by the tokenizer's own default; None where it adds none."""
        return self.bos_token_id if self.adds_bos else None

    def encode_plain(self, text: str) -> list[int]:
        """Ids of the text alone; no special token is added (one spelled out in the text is still recognised).

        Raises ValueError for a text that is not UTF-8 throughout, what the tokenizer fails at, and a token that the model has no row for.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """As encode_plain of each, on several cores."""
        for text in texts:
            require_utf8(text)
        ids = encoding.encode_batch(self.backend, list(texts)) if self.foreign is None else [self._elsewhere(text)[0] for text in texts]
        return [self._held(each) for each in ids]

    def encode_spans(self, text: str) -> tuple[list[int], encoding.Spans]:
        """As encode_plain, and the characters of the text that each id stands for."""
        require_utf8(text)
        ids, spans = encoding.encode(self.backend, text) if self.foreign is None else self._elsewhere(text)
        return self._held(ids), spans

    def encode_after(self, text: str, *, as_text: bool) -> list[int]:
        """Ids of a text that goes on where another ended. as_text: no added token is recognised, so that control tokens stay a text.

        Raises ValueError where the tokenizer makes a control token of a plain text.
        """
        encode = self._encode_as_text if as_text else self.encode_plain
        before = encode("\n")  # without a line before it some tokenizers put a space in front of a text
        ids = encode("\n" + text)
        ids = ids[len(before) :] if ids[: len(before)] == before else encode(text)
        if not as_text or self.backend.token_to_id(text) not in ids:
            return ids
        ids = encode(text[:1]) + encode(text[1:])  # a vocabulary may hold the token as a word
        require(self.backend.token_to_id(text) not in ids, f"the tokenizer cannot read {text!r} as a text; leave it out of the message")
        return ids

    def _encode_as_text(self, text: str) -> list[int]:
        require_utf8(text)
        return self._held(encoding.encode_as_text(self.backend, text) if self.foreign is None else self._elsewhere(text, as_text=True)[0])

    def _elsewhere(self, text: str, *, as_text: bool = False) -> tuple[list[int], encoding.Spans]:
        """Encoded in a process of its own, which is given the tokenizer where it does not have it yet."""
        assert self.foreign is not None
        digest, what = _digest(self.foreign), "the tokenizer"
        answer = bounded.call("encode", digest, None, text, as_text, characters=len(text), what=what)
        if answer is None:
            answer = bounded.call("encode", digest, self.foreign, text, as_text, characters=len(text) + len(self.foreign), what=what)
        ids, spans = answer
        return ids, [(first, last) for first, last in spans]

    def _held(self, ids: list[int]) -> list[int]:
        """The ids, each of which has a row of the embedding."""
        if self.num_rows is not None and max(ids, default=0) >= self.num_rows:
            beyond = next(token_id for token_id in ids if token_id >= self.num_rows)
            raise ValueError(
                f"the text has the token {self.backend.id_to_token(beyond)!r} of id {beyond}, and the model has {self.num_rows} tokens: "
                "its tokenizer has more; leave that one out, or use the tokenizer that the model was trained with"
            )
        return ids

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        """Ids of the text, led by one BOS where that is the tokenizer's default and `add_bos` is true."""
        ids = self.encode_plain(text)
        bos = self.document_bos if add_bos else None
        return ids if bos is None or ids[:1] == [bos] else self._held([bos, *ids])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids without special tokens. An unfinished UTF-8 sequence at the end decodes to U+FFFD."""
        with encoding.no_panic():
            return self.backend.decode(list(ids), skip_special_tokens=True)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text; none of a special one."""
        return token_bytes(self.backend, token_id)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, as transformers' PreTrainedTokenizerFast reads them."""
        backend = tokenizers.Tokenizer.from_str(self.foreign or self.backend.to_str())
        if self.adds_bos and not _post_processor_adds(backend, self.bos_token_id):
            bos = self.special_tokens["bos_token"]
            backend.post_processor = tokenizers.processors.TemplateProcessing(  # pyrefly: ignore[bad-assignment]
                single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, self.bos_token_id)]
            )
        write_text(folder / TOKENIZER_FILE, backend.to_str(pretty=True))
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        if self.named_templates:
            default = {} if self.chat_template is None else {"default": self.chat_template}
            named = {**default, **self.named_templates}
            config["chat_template"] = [{"name": name, "template": template} for name, template in named.items()]
        elif self.chat_template is not None:
            config["chat_template"] = self.chat_template
        write_json(folder / "tokenizer_config.json", config | self._named_tokens())

    def _named_tokens(self) -> dict[str, str]:
        """The special tokens, also those known by their ids alone. Where there is no unknown token it is EOS, as in GPT-2: a byte-level
        BPE never yields it, and CTranslate2 loads no model without one."""
        ids = {"bos_token": self.bos_token_id, "eos_token": self.eos_token_ids[0] if self.eos_token_ids else None}
        found = {role: self.backend.id_to_token(token_id) for role, token_id in ids.items() if token_id is not None}
        named = {role: token for role, token in found.items() if token is not None} | dict(self.special_tokens)
        return named | ({"unk_token": named["eos_token"]} if "eos_token" in named and "unk_token" not in named else {})


def _post_processor_adds(backend: tokenizers.Tokenizer, bos_token_id: int | None) -> bool:
    """Whether the tokenizer's own post-processor puts BOS before a text."""
    with encoding.no_panic():
        return bos_token_id is not None and backend.encode("").ids[:1] == [bos_token_id]


def build_tokenizer(
    backend: tokenizers.Tokenizer,
    *,
    special_tokens: Mapping[str, str],
    bos_token_id: int | None = None,
    eos_token_ids: tuple[int, ...] = (),
    adds_bos: bool | None = None,
    chat_template: str | None = None,
    named_templates: Mapping[str, str] | None = None,
    num_rows: int | None = None,
    foreign: str | None = None,
) -> Tokenizer:
    """Tokenizer around a backend. A text ends at each of eos_token_ids and at the token named eos_token; BOS and adds_bos, where left open,
    come from the special tokens and the post-processor."""
    backend.no_truncation()
    backend.no_padding()
    special_ids = {name: backend.token_to_id(token) for name, token in special_tokens.items()}
    bos = special_ids.get("bos_token")
    bos = bos_token_id if bos is None else bos
    eos = special_ids.get("eos_token")
    added = sorted(backend.get_added_tokens_decoder().items())
    return Tokenizer(
        backend=backend,
        bos_token_id=bos,
        eos_token_ids=tuple(dict.fromkeys([*eos_token_ids, *([] if eos is None else [eos])])),
        adds_bos=_post_processor_adds(backend, bos) if adds_bos is None else adds_bos and bos is not None,
        special_tokens=special_tokens,
        chat_template=chat_template,
        named_templates=named_templates or {},
        added_tokens=tuple((token.content, token.special) for _, token in added),
        num_rows=num_rows,
        foreign=foreign,
    )


def load_tokenizer(
    folder: Path, *, model_type: str = "", bos_token_id: int | None = None, eos_token_ids: tuple[int, ...] = (), num_rows: int | None = None
) -> Tokenizer:
    """The tokenizer of a checkpoint folder. The rest is the model config's: BOS where the tokenizer names none, ids at which a text ends
    too, the model's kind where the tokenizer does not name its class, and how many rows the embedding has.

    Raises ValueError naming what is missing, unreadable, or of a class that is not supported.
    """
    config = _optional_object(folder / CONFIG_FILE)
    chat_template, named_templates = _templates(folder, config.get("chat_template"))
    foreign, adds_bos = None, None
    special_tokens = _special_tokens(folder, config)
    if (folder / TOKENIZER_FILE).is_file():
        backend, foreign = _file_backend(folder / TOKENIZER_FILE)
    else:
        backend, special_tokens, adds_bos = slow_tokenizer(folder, config, special_tokens, model_type)
    try:
        return build_tokenizer(
            backend,
            special_tokens=special_tokens,
            bos_token_id=bos_token_id,
            eos_token_ids=eos_token_ids,
            adds_bos=adds_bos,
            chat_template=chat_template,
            named_templates=named_templates,
            num_rows=num_rows,
            foreign=foreign,
        )
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


@functools.lru_cache(maxsize=4)
def _digest(content: str) -> str:
    """By which a process knows a tokenizer again."""
    return hashlib.sha256(content.encode()).hexdigest()


def _file_backend(path: Path) -> tuple[tokenizers.Tokenizer, str | None]:
    """The backend of a tokenizer.json, and the file's text where encoding is not for this process: the backend then has what ids mean."""
    told = misplaced(path)
    require(told is None, str(told))
    text = read_text(path, kind="a tokenizer.json")
    try:
        content = json.loads(text)
        require(isinstance(content, dict), "it holds no JSON object")
        require(encoding.is_bounded_decoder(content), "its decoder is damaged, has patterns, or makes long texts of short ones")
        if encoding.is_bounded(content):
            return encoding.backend_of(text), None
        bounded.call("check", text, characters=len(text), what="the tokenizer")
        return encoding.backend_of(json.dumps(content | {"normalizer": None, "pre_tokenizer": None})), text
    except (ValueError, RecursionError) as error:
        raise damaged(path, error) from error


def _optional_object(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _templates(folder: Path, stated: Any) -> tuple[str | None, dict[str, str]]:
    """The default chat template of a folder and the named ones: of files of their own, or else what tokenizer_config.json states, which is
    one template, or several as {"name", "template"}."""
    files = {path.stem: path for path in sorted((folder / TEMPLATES_FOLDER).glob("*.jinja"))}
    if (folder / TEMPLATE_FILE).is_file():
        files["default"] = folder / TEMPLATE_FILE
    if files:
        named = {name: read_text(path, kind="a file with a Jinja template") for name, path in files.items()}
    elif isinstance(stated, list) and all(isinstance(each, dict) for each in stated):
        named = {each.get("name"): each.get("template") for each in stated}
    else:
        named = {} if stated is None else stated if isinstance(stated, dict) else {"default": stated}
    good = all(isinstance(each, str) for pair in named.items() for each in pair)
    require(good, f"{folder / CONFIG_FILE}: chat_template must be a text, or a list of {{name, template}}; mend or replace the file")
    return named.pop("default", None), named


def _special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by their names, each spelled as a string or as {"content": ...}. The rule of transformers: the older
    special_tokens_map.json counts, and comes first, where tokenizer_config.json does not list added tokens."""
    older = {} if "added_tokens_decoder" in config else _optional_object(folder / "special_tokens_map.json")
    stated = {**config, **older}
    extra = stated.get("extra_special_tokens")
    named = {name: value for name, value in stated.items() if name.endswith("_token")} | (extra if isinstance(extra, dict) else {})
    found = {name: value.get("content") if isinstance(value, dict) else value for name, value in named.items()}
    return {name: token for name, token in found.items() if isinstance(token, str)}
