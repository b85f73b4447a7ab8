"""Tokenizers of GGUF metadata against what they are defined by: SentencePiece's two searches, spelled out, and patterns of llama.cpp."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from dejavu.model.gguf.header import Header
from dejavu.model.gguf.tokenizer import SPACE, Vocabulary, read_tokenizer
from dejavu.model.splitting import SPLITTINGS, splitting_of
from dejavu.model.tokenizer import Tokenizer

TEXT = "the cat sat on the mat and then the other cat ran to the hat there that the man had on his hand in the end"
TEXTS = ("the cat sat", "  then the  other mat ", "a hat\nthere", "", "é, and the", " ", "thethethe anan", "<turn>the end<turn> hat")
Normal, Control, User, Byte, Unknown = (getattr(gguf.TokenType, name) for name in ("NORMAL", "CONTROL", "USER_DEFINED", "BYTE", "UNKNOWN"))


def sentencepiece_tokens() -> list[tuple[str, float, int]]:
    """Token, score and type of a small vocabulary: <unk>, <s>, </s>, <turn>, 256 bytes, then pieces, the earlier merged the likelier."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, "always")
    trained.train_from_iterator([TEXT] * 3, trainers.BpeTrainer(vocab_size=70, show_progress=False))
    pieces = sorted(trained.get_vocab(), key=lambda piece: trained.get_vocab()[piece])
    special = [("<unk>", 0.0, Unknown), ("<s>", 0.0, Control), ("</s>", 0.0, Control), ("<turn>", 0.0, User)]
    return special + [(f"<0x{byte:02X}>", 0.0, Byte) for byte in range(256)] + [(p, -1.0 - i, Normal) for i, p in enumerate(pieces)]


def read(path: Path, tokens: list[tuple[str, float, int]], model: str, **keys: Any) -> tuple[Tokenizer, list[str]]:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list([token for token, _, _ in tokens])
    writer.add_token_scores([score for _, score, _ in tokens])
    writer.add_token_types([kind for _, _, kind in tokens])
    for key, value in keys.items():
        (writer.add_bool if isinstance(value, bool) else writer.add_uint32 if isinstance(value, int) else writer.add_array)(
            f"tokenizer.ggml.{key}", value
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read_tokenizer(Vocabulary(Header(path).metadata, "m.gguf"))


def spaced(text: str, *, prefix: bool, single: bool) -> str:
    text = " ".join(part for part in text.split(" ") if part) if single else text
    return (SPACE + text if prefix and text else text).replace(" ", SPACE)


def merged(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's BPE: again and again the neighbours whose union has the highest score, the leftmost of equals, become one."""
    symbols = list(text)
    while True:
        pairs = [(scores[a + b], -i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in scores]
        if not pairs:
            return symbols
        at = -max(pairs)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]


def likeliest(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's Unigram: the pieces with the highest sum of scores; a character that is no piece costs more than any."""
    best: list[tuple[float, list[str]]] = [(0.0, [])]
    for end in range(1, len(text) + 1):
        found = [(best[start][0] + scores[text[start:end]], start) for start in range(end) if text[start:end] in scores]
        total, start = max(found) if found else (best[end - 1][0] + min(scores.values()) - 10, end - 1)
        best.append((total, [*best[start][1], text[start:end]]))
    return best[-1][1]


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize(("model", "search"), [("llama", merged), ("t5", likeliest)])
def test_sentencepiece_finds_the_pieces_of_its_definition(tmp_path: Path, model: str, search: Any, prefix: bool, single: bool) -> None:
    tokens = sentencepiece_tokens()
    special = {"unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    tokenizer, notes = read(tmp_path / "m.gguf", tokens, model, add_space_prefix=prefix, remove_extra_whitespaces=single, **special)
    assert notes == [] and tokenizer.eos_token_ids == (2,) and tokenizer.adds_bos == (model == "llama")
    scores = {token: score for token, score, kind in tokens if kind == Normal}
    ids = {token: index for index, (token, _, _) in enumerate(tokens)}
    for text in TEXTS:
        want: list[int] = []
        for index, part in enumerate(text.split("<turn>")):  # a token of its own cuts the text
            want += [3] if index else []
            for piece in search(spaced(part, prefix=prefix, single=single), scores):
                want += [ids[piece]] if piece in scores else [ids[f"<0x{byte:02X}>"] for byte in piece.encode()]
        assert tokenizer.encode_plain(text) == want
        if not single:
            assert tokenizer.decode(tokenizer.encode_plain(text)) == text or "<turn>" in text


def test_the_longest_token_wins_although_merges_would_not_find_it(tmp_path: Path) -> None:
    """As the score says, and not the order of the tokens: `the` is made of t and he, whose union comes late in the file."""
    tokens = [("<unk>", 0.0, Unknown), ("t", -9.0, Normal), ("h", -9.0, Normal), ("e", -9.0, Normal)]
    tokens += [("the", -3.0, Normal), ("he", -1.0, Normal), ("th", -2.0, Normal)]
    tokenizer, _ = read(tmp_path / "m.gguf", tokens, "llama", add_space_prefix=False, add_bos_token=False)
    assert tokenizer.encode("thethhe") == [4, 6, 5]


def test_what_a_vocabulary_lacks_is_named(tmp_path: Path) -> None:
    twice = [("<unk>", 0.0, Unknown), ("a", -1.0, Normal), ("a", -2.0, Normal)]
    with pytest.raises(ValueError, match="1 tokens of the vocabulary are there twice"):
        read(tmp_path / "m.gguf", twice, "llama")
    with pytest.raises(ValueError, match="no 'tokenizer.ggml.merges'"):
        read(tmp_path / "m.gguf", twice[:2], "gpt2")
    with pytest.raises(ValueError, match="1 merges are not of two tokens that make a third"):
        read(tmp_path / "m.gguf", twice[:2], "gpt2", merges=["a b"])
    tokenizer, notes = read(tmp_path / "m.gguf", [*twice[:2], ("", 0.0, Normal)], "llama", add_eos_token=True)
    assert tokenizer.backend.token_to_id("[EMPTY_2]") == 2 and "add_eos_token" in notes[0]


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("gpt-2", ["It", "'s", " 12345", " DONTgo", "\n\n ", " x", "=(", "y", ")!"]),
        ("smollm", ["It", "'s", " ", "1", "2", "3", "4", "5", " DONTgo", "\n\n ", " x", "=(", "y", ")!"]),
        ("llama-bpe", ["It", "'s", " ", "123", "45", " DONTgo", "\n\n", " ", " x", "=(", "y", ")!"]),
        ("qwen2", ["It", "'s", " ", "1", "2", "3", "4", "5", " DONTgo", "\n\n", " ", " x", "=(", "y", ")!"]),
        ("tekken", ["It", "'s", " ", "1", "2", "3", "4", "5", " DONTgo", "\n\n", " ", " x", "=(", "y", ")!"]),
        ("gpt-4o", ["It's", " ", "123", "45", " DONTgo", "\n\n", " ", " x", "=(", "y", ")!"]),
        ("deepseek-v3", ["It", "'s", " ", "123", "45", " DONTgo", "\n\n", " ", " x", "=(", "y", ")!"]),
        ("falcon", ["It", "'", "s", " ", "123", "45", " DONTgo", "\n\n ", " x", "=(", "y", ")!"]),
    ],
)
def test_texts_are_split_as_the_name_says(name: str, pieces: list[str]) -> None:
    text = "It's 12345 DONTgo\n\n  x=(y)!"
    assert "".join(pieces) == text
    found = splitting_of(name).pre_tokenizer().pre_tokenize_str(text)
    assert [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece, _ in found] == pieces


def test_every_splitting_keeps_all_of_a_text() -> None:
    text = "Ünï  DONTgo\n\n it's\t12345 日本語 (x)!? \r\n"
    for name in SPLITTINGS:
        pieces = splitting_of(name).pre_tokenizer().pre_tokenize_str(text)
        assert [start for _, (start, _) in pieces] == [0, *(end for _, (_, end) in pieces[:-1])] and pieces[-1][1][1] == len(text), name
    assert SPLITTINGS["llama-bpe"].bos and SPLITTINGS["llama-bpe"].whole and not SPLITTINGS["qwen2"].bos
