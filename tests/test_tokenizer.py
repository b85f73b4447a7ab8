"""Tokenizer: BOS once and only where it is the default, decoding, files of every generation."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers

from conftest import Tiny
from dejavu.model.bundle import export
from dejavu.model.source import open_source
from dejavu.model.tokenizer import Tokenizer, build_tokenizer, load_tokenizer

TEXTS = ["the cat sat", " the  cat", "The hat!\n\nand 123", "", '(then) that\'s "it"']


@pytest.fixture
def folder(tmp_path: Path, tok96: tokenizers.Tokenizer) -> Path:
    tok96.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "</s>", "eos_token": {"content": "</s>"}}))
    return tmp_path


def without_post_processor(tok96: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    content = json.loads(tok96.to_str())
    return tokenizers.Tokenizer.from_str(json.dumps(content | {"post_processor": None}))


def bytes_tokenizer(tok96: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """tok96 with a token for every byte."""
    content = json.loads(tok96.to_str())
    for symbol in sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()):
        content["model"]["vocab"].setdefault(symbol, len(content["model"]["vocab"]))
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def gpt2_files(folder: Path, tok96: tokenizers.Tokenizer) -> None:
    model = json.loads(tok96.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(merge) for merge in model["merges"]) + "\n")


def test_bos_once_by_the_default_of_the_post_processor(folder: Path, tok96: tokenizers.Tokenizer) -> None:
    tokenizer = load_tokenizer(folder)
    assert tokenizer.adds_bos and (tokenizer.bos_token_id, tokenizer.eos_token_ids, tokenizer.vocab_size) == (2, (2,), 96)
    assert tokenizer.document_bos == 2
    for text in TEXTS:
        plain = tok96.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text) == [2, *plain] == tok96.encode(text).ids
        assert tokenizer.encode_plain(text) == tokenizer.encode(text, add_bos=False) == plain
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("</s>the cat") == tokenizer.encode("the cat"), "the text brings its own"


def test_no_bos_where_the_tokenizer_has_no_such_default(folder: Path, tok96: tokenizers.Tokenizer) -> None:
    without_post_processor(tok96).save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    assert not tokenizer.adds_bos and tokenizer.bos_token_id == 2 and tokenizer.document_bos is None
    assert tokenizer.encode("the cat") == tokenizer.encode_plain("the cat")
    (folder / "tokenizer_config.json").unlink()
    assert load_tokenizer(folder).bos_token_id is None, "as Qwen2"


def test_ids_of_the_model_config(folder: Path) -> None:
    assert load_tokenizer(folder, bos_token_id=0, eos_token_ids=(1, 3)).eos_token_ids == (1, 3, 2), "the model's first"
    assert load_tokenizer(folder, bos_token_id=0).bos_token_id == 2, "the tokenizer's own word first"
    (folder / "tokenizer_config.json").unlink()
    assert load_tokenizer(folder, bos_token_id=2).adds_bos
    assert not load_tokenizer(folder, bos_token_id=0).adds_bos
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<s>"}}))
    assert load_tokenizer(folder, bos_token_id=2).bos_token_id == 0


@pytest.mark.parametrize("add_bos", [True, False])
def test_gpt2_files_without_tokenizer_json(tmp_path: Path, tok96: tokenizers.Tokenizer, add_bos: bool) -> None:
    gpt2_files(tmp_path, tok96)
    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", "add_bos_token": add_bos} | special))
    tokenizer = load_tokenizer(tmp_path)
    reference = transformers.GPT2Tokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS, "the</s>cat"]:
        assert tokenizer.encode(text) == reference(text)["input_ids"]
        assert tokenizer.encode(text)[:1] == [2] if add_bos else tokenizer.encode(text)[:1] != [2]
    assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"


def test_saved_tokenizers_load_in_transformers_and_here(tmp_path: Path, tok96: tokenizers.Tokenizer) -> None:
    special = {"bos_token": "</s>", "eos_token": "</s>"}
    tokenizer = build_tokenizer(without_post_processor(tok96), special_tokens=special, adds_bos=True, chat_template="{{ messages[0] }}")
    tokenizer.save(tmp_path)
    again, reference = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(reference, transformers.PreTrainedTokenizerFast)
    for text in TEXTS:
        assert tokenizer.encode(text) == again.encode(text) == reference(text)["input_ids"]
    assert (again.chat_template, reference.chat_template) == ("{{ messages[0] }}", "{{ messages[0] }}")
    assert (again.bos_token_id, again.eos_token_ids) == (reference.bos_token_id, (reference.eos_token_id,)) == (2, (2,))


def test_truncation_and_padding_of_the_file_are_switched_off(folder: Path, tok96: tokenizers.Tokenizer) -> None:
    backend = tokenizers.Tokenizer.from_str(tok96.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    backend.save(str(folder / "tokenizer.json"))
    assert len(load_tokenizer(folder).encode("the cat sat on the mat")) > 4
    assert len(load_tokenizer(folder).encode("a")) == 2


def test_an_unfinished_character_and_foreign_ids_decode() -> None:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[])
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = build_tokenizer(backend, special_tokens={})
    ids = tokenizer.encode("aé🙂")
    assert len(ids) == 7
    assert [tokenizer.decode(ids[:n]) for n in (1, 2, 3)] == ["a", "a\ufffd", "aé"]
    assert tokenizer.decode(ids[:-1]).startswith("aé\ufffd") and tokenizer.decode(ids) == "aé🙂"
    assert tokenizer.decode([*ids, 1000]) == "aé🙂", "rows of the embedding without a token"


def test_missing_and_broken_files(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is damaged"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"no tokenizer in .*vocab\.json with merges\.txt"):
        load_tokenizer(folder)


ADDED = ("<|endoftext|>", "<|im_start|>", "<tool>")
UNICODE_TEXTS = [*TEXTS, "the<|im_start|>cat<tool> <|endoftext|>", "cafe\u0301 the", "12345 don't DON'T\r\n  x"]


@pytest.mark.parametrize("listed", [True, False])
def test_older_files_have_the_ids_of_the_class_that_they_were_saved_for(tmp_path: Path, tok96: tokenizers.Tokenizer, listed: bool) -> None:
    whole = bytes_tokenizer(tok96)
    gpt2_files(tmp_path, whole)
    first = whole.get_vocab_size()
    added = {token: first + place for place, token in enumerate(ADDED)}
    config: dict[str, Any] = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_start|>"}
    if listed:
        tokens = {str(index): {"content": token, "special": token != "<tool>", "normalized": False} for token, index in added.items()}
        config["added_tokens_decoder"] = tokens
    else:
        (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer, reference = load_tokenizer(tmp_path), transformers.Qwen2Tokenizer.from_pretrained(tmp_path)
    for text in UNICODE_TEXTS:
        assert tokenizer.encode(text) == reference(text)["input_ids"], text
    assert tokenizer.eos_token_ids == (reference.eos_token_id,) and tokenizer.special_tokens == reference.special_tokens_map
    del config["tokenizer_class"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    by_kind = load_tokenizer(tmp_path, model_type="qwen2")
    assert [by_kind.encode(text) for text in UNICODE_TEXTS] == [tokenizer.encode(text) for text in UNICODE_TEXTS]


@pytest.mark.parametrize(
    ("config", "files", "message"),
    [
        ({"tokenizer_class": "RobertaTokenizerFast"}, ("vocab.json", "merges.txt"), r"merges.txt of the class RobertaTokenizer;"),
        ({"tokenizer_class": "GemmaTokenizer"}, ("tokenizer.model",), r"is tokenizer.model of the class GemmaTokenizer; .*save_pretrained"),
        ({"tokenizer_class": "LlamaTokenizer"}, ("vocab.json", "merges.txt"), r"merges.txt of the class LlamaTokenizer; "),
        ({"tokenizer_class": "LlamaTokenizer"}, ("tokenizer.model",), r"tokenizer.model is damaged: it is no SentencePiece model"),
        ({"tokenizer_class": "Qwen2Tokenizer"}, ("vocab.json",), r"is vocab.json of the class Qwen2Tokenizer"),
        ({}, ("vocab.json", "merges.txt"), r"of a class that the folder does not name; dejavu reads"),
    ],
)  # fmt: skip
def test_older_files_of_another_class_are_refused_by_its_name(tmp_path: Path, config: Any, files: tuple[str, ...], message: str) -> None:
    for file in files:
        (tmp_path / file).write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


def test_a_tokenizer_whose_marks_have_no_ids_names_its_folder(tmp_path: Path, tok96: tokenizers.Tokenizer) -> None:
    """A post-processor may name a token that it gives no ids for: the library panics at the first text."""
    content = json.loads(tok96.to_str())
    pieces = [{"SpecialToken": {"id": "<none>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    content["post_processor"] = {"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": {}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "</s>"}')
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        load_tokenizer(tmp_path, bos_token_id=2)


def sentencepiece_file(path: Path, pieces: list[tuple[str, int]], *, kind: int = 2) -> None:
    """A tokenizer.model of pieces with their types, a score that falls with the id, and a trainer's kind of model."""

    def field(number: int, content: bytes) -> bytes:
        assert len(content) < 128
        return bytes([number << 3 | 2, len(content)]) + content

    scored = [
        field(1, piece.encode()) + b"\x15" + struct.pack("<f", -place) + bytes([24, type_]) for place, (piece, type_) in enumerate(pieces)
    ]
    path.write_bytes(b"".join(field(1, each) for each in scored) + field(2, bytes([24, kind])))


PIECES = [("<unk>", 2), ("<s>", 3), ("</s>", 3), ("<turn>", 4), *((f"<0x{byte:02X}>", 6) for byte in range(256))]
PIECES += [(piece, 1) for piece in "he at ▁t th ▁the the hat ▁c cat ▁cat ▁ th t h e a c s o n ▁o ▁on".split()]


@pytest.mark.parametrize("config", [{}, {"legacy": True}, {"add_prefix_space": False, "add_bos_token": True}])
def test_the_pieces_of_a_llama_tokenizer_have_the_ids_of_transformers(tmp_path: Path, config: dict[str, Any]) -> None:
    pieces = list(dict.fromkeys(PIECES))
    sentencepiece_file(tmp_path / "tokenizer.model", pieces)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **config}))
    tokenizer = load_tokenizer(tmp_path)
    vocabulary = {piece: index for index, (piece, _) in enumerate(pieces)}
    added = [tokenizers.AddedToken(piece, normalized=False, special=kind == 3) for piece, kind in pieces if kind in (3, 4)]
    merges: Any = transformers.tokenization_utils_base.generate_merges(vocabulary)
    reference = transformers.LlamaTokenizer(vocab=vocabulary, merges=merges, extra_special_tokens=added, **config)
    for text in ("the cat sat on the hat", " the  cat", "caf\u00e9<turn> then", "", " ", "the</s>the", "thethehat<s> the"):
        assert tokenizer.encode(text) == reference(text)["input_ids"], text
        assert tokenizer.decode(tokenizer.encode(text)) == reference.decode(tokenizer.encode(text), skip_special_tokens=True)
    assert tokenizer.special_tokens == reference.special_tokens_map and tokenizer.eos_token_ids == (2,)
    sentencepiece_file(tmp_path / "tokenizer.model", pieces, kind=1)
    with pytest.raises(ValueError, match=r"tokenizer.model is a model of kind Unigram"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("vocab.json", '["a"]'),
        ("vocab.json", '{"a": true}'),
        ("added_tokens.json", '{"a": "x"}'),
        ("tokenizer_config.json", '{"tokenizer_class": "GPT2Tokenizer", "added_tokens_decoder": {"7": 5}}'),
        ("tokenizer_config.json", "[1]"),
    ],
)
def test_damaged_older_files_are_named(tmp_path: Path, tok96: tokenizers.Tokenizer, file: str, content: str) -> None:
    gpt2_files(tmp_path, tok96)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path)) + r".*(mend or replace|damaged)"):
        load_tokenizer(tmp_path)


def test_a_token_that_the_embedding_has_no_row_for_is_named_wherever_a_text_becomes_ids(folder: Path) -> None:
    assert load_tokenizer(folder, num_rows=96).encode("the cat")
    tokenizer = load_tokenizer(folder, num_rows=50)
    assert tokenizer.encode_plain("?") and max(tokenizer.encode_plain("?")) < 50
    for encode in (tokenizer.encode, tokenizer.encode_plain, tokenizer.encode_spans, lambda text: tokenizer.encode_batch(["?", text])):
        with pytest.raises(ValueError, match=r"has the token 'the' of id \d+, and the model has 50 tokens"):
            encode("the")


def test_half_a_surrogate_pair_is_named_wherever_a_text_becomes_ids(tokenizer: Tokenizer) -> None:
    with_it = "the caf\udce9"
    encoders = (tokenizer.encode, tokenizer.encode_plain, tokenizer.encode_spans, lambda text: tokenizer.encode_batch(["?", text]))
    for encode in (*encoders, lambda text: tokenizer.encode_after(text, as_text=True)):
        with pytest.raises(ValueError, match=r"not UTF-8 throughout: .*\\udce9"):
            encode(with_it)


def test_a_text_ends_at_the_end_tokens_of_every_file(tiny: Tiny, tokenizer: Tokenizer, tmp_path: Path) -> None:
    export(tiny("opt", eos_token_ids=(7,)), tokenizer, tmp_path / "model")
    for name, value in (("config.json", 7), ("generation_config.json", [5, 7])):
        path = tmp_path / "model" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": value}))
    source = open_source(tmp_path / "model")
    assert source.config.eos_token_ids == (5, 7) and source.tokenizer().eos_token_ids == (5, 7, 2)
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": true}')
    assert open_source(tmp_path / "model").tokenizer().eos_token_ids == (7, 2), "true is no id"
    (tmp_path / "model" / "config.json").write_text(
        json.dumps(json.loads((tmp_path / "model" / "config.json").read_text()) | {"eos_token_id": [7, True]})
    )
    with pytest.raises(ValueError, match=r"eos_token_id must be one id or a list of ids, not \[7, True\]"):
        open_source(tmp_path / "model")
