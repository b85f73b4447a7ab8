"""Tokenizers that do not end, fill the memory or panic: a ValueError, and the next text is read. Usual ones run in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers

from dejavu.model import bounded, encoding
from dejavu.model.splitting import SPLITTINGS
from dejavu.model.tokenizer import Tokenizer, load_tokenizer

SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def written(folder: Path, tok96: tokenizers.Tokenizer, **changes: Any) -> Path:
    """A folder with the tokenizer, parts of it replaced."""
    (folder / "tokenizer.json").write_text(json.dumps(json.loads(tok96.to_str()) | changes))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "</s>", "eos_token": "</s>"}))
    return folder


def split_by(*patterns: str) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": [*({**SPLIT, "pattern": {"Regex": pattern}} for pattern in patterns), BYTES]}


def replaced(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        *({"pre_tokenizer": split_by(*splitting.patterns)} for splitting in SPLITTINGS.values()),
        {"pre_tokenizer": split_by("[0-9][0-9][0-9]", r"\p{N}{1,3}", " {2,}")},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replaced({"String": " "}, "▁")]}},
        {"normalizer": {"type": "NFKC"}, "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"}},
    ],
)
def test_tokenizers_as_models_have_them_encode_in_this_process(changes: dict[str, Any]) -> None:
    assert encoding.is_bounded(changes) and encoding.is_bounded_decoder(changes)


TEN_TIMES = {"type": "Sequence", "normalizers": [replaced({"String": "a"}, "a" * 10)] * 10}


@pytest.mark.parametrize(
    ("changes", "hostile"),
    [
        ({"pre_tokenizer": split_by("(a+)+$")}, "a" * 30 + "b"),
        ({"pre_tokenizer": split_by("a*b")}, "a" * 300_000 + "db"),
        ({"normalizer": TEN_TIMES}, "a"),
        ({"normalizer": replaced({"String": "a"}, "a" * 100_000)}, "a" * 50_000),
    ],
    ids=["a pattern that panics", "a pattern without an end", "a text multiplied by steps", "a text multiplied at once"],
)
def test_a_text_that_a_tokenizer_does_not_end_with_is_refused_and_the_next_is_read(
    changes: dict[str, Any], hostile: str, tmp_path: Path, tok96: tokenizers.Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded, "SECONDS", 0)
    monkeypatch.setattr(bounded, "MORE_SECONDS", 0)
    tokenizer = load_tokenizer(written(tmp_path, tok96, **changes))
    assert tokenizer.foreign is not None and tokenizer.longest_token is None
    with pytest.raises(ValueError, match=r"the tokenizer (failed \(Onig|took more than)"):
        tokenizer.encode(hostile)
    ids = tokenizer.encode_plain("The hot")
    assert ids == tok96.encode("The hot", add_special_tokens=False).ids and tokenizer.decode(ids) == "The hot"


def test_a_tokenizer_in_a_process_of_its_own_gives_the_ids_of_transformers(tmp_path: Path, tok96: tokenizers.Tokenizer) -> None:
    changes = {"pre_tokenizer": split_by("(?:the|cat)*|a+b?"), "normalizer": replaced({"Regex": "o(o|u)*"}, "o")}
    tokenizer = load_tokenizer(written(tmp_path, tok96, **changes))
    reference: Any = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    texts = ["the cat sat on the mat", "thethe you aab</s> soouth", ""]
    for text in texts:
        plain = reference(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.foreign is not None and tokenizer.encode_plain(text) == plain and tokenizer.encode(text) == [2, *plain]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode_plain(text) for text in texts]
    assert tokenizer.encode_spans("the cat")[1] == [(0, 3), (3, 4), (4, 7)]
    assert 2 in tokenizer.encode_plain("</s>") and 2 not in tokenizer.encode_after("</s>", as_text=True)
    (tmp_path / "copy").mkdir()
    tokenizer.save(tmp_path / "copy")
    assert [load_tokenizer(tmp_path / "copy").encode(text) for text in texts] == [tokenizer.encode(text) for text in texts]


def test_a_text_is_neither_cut_nor_filled_up_wherever_it_is_encoded(tmp_path: Path, tok96: tokenizers.Tokenizer) -> None:
    changes: dict[str, Any] = {"truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}}
    changes |= {"padding": {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 1, "pad_type_id": 0,
                            "pad_token": "<pad>"}}  # fmt: skip
    for name, pre in (("here", None), ("elsewhere", split_by("(?:the|cat)*|."))):
        (tmp_path / name).mkdir()
        found = load_tokenizer(written(tmp_path / name, tok96, **changes, **({} if pre is None else {"pre_tokenizer": pre})))
        assert (found.foreign is None) == (name == "here") and len(found.encode_plain("abcdefghij")) == 10


def test_whether_a_pattern_is_bounded_is_told_in_no_time_and_repeats_are_not() -> None:
    assert not encoding.is_bounded({"pre_tokenizer": split_by(r"\p{1}" * 2000 + "(")})
    assert not encoding.is_bounded({"pre_tokenizer": split_by("a{999}{999}{9}b*")})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder": replaced({"Regex": "(a+)+$"}, "")}, "its decoder is damaged, has patterns"),
        ({"decoder": replaced({"String": "a"}, "a" * 1000)}, "or makes long texts of short ones"),
        ({"decoder": [5]}, "tokenizer.json is damaged"),
        ({"normalizer": {"type": "NFD", "what": 5}, "model": 5}, "tokenizer.json is damaged"),
        ({"pre_tokenizer": split_by("(a")}, "tokenizer.json is damaged"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "tokenizer.json is damaged"),
        ({"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<nobody>", "type_id": 0}}], "pair": [],
                             "special_tokens": {}}}, "tokenizer.json is damaged|the tokenizer failed"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_is_damaged_or_cannot_be_bounded_is_refused_when_it_is_loaded(
    changes: dict[str, Any], message: str, tmp_path: Path, tok96: tokenizers.Tokenizer
) -> None:
    with pytest.raises(ValueError, match=message):
        load_tokenizer(written(tmp_path, tok96, **changes))


def test_what_interrupts_a_call_ends_its_process_and_not_the_next_call(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(pipe: object) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bounded, "_read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            bounded.call("render", "first", {}, what="the chat template")
    assert bounded.call("render", "second", {}, what="the chat template") == "second"
