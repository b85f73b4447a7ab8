"""recipes/forms.py: forms and another program take turns, each with its perplexity, which a second run does not measure again."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dejavu.bench import comparison
from dejavu.bench.rows import append_rows
from dejavu.loading import load
from dejavu.quality.perplexity import half_windows
from helpers.native import needs_library
from helpers.peers import FakePeer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def forms() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "recipes"))
        yield importlib.import_module("forms")


@needs_library
def test_forms_and_a_program_take_turns(forms: ModuleType, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "HALF_CONTEXT", 16)
    monkeypatch.setattr(comparison, "half_windows", lambda ids, *, bos: half_windows(ids, bos=bos, context=16))
    monkeypatch.setattr(forms, "CONTEXT", 4)
    monkeypatch.setattr(forms, "STEPS", 6)
    peer = FakePeer(load(work / "model", backend="torch").model, mode="llama.cpp", dtype="q8_0")
    monkeypatch.setattr(forms, "open_peers", lambda *_, **named: ([peer], []))
    model, text = str(work / "model"), [str(work / "text.txt")]
    values: dict[str, Any] = {"base": "tiny", "form": [f"fp32={model}", f"int8={model}={work / 'adapter'}"], "adapter": None, "text": text}
    values |= {"max_tokens": 32, "cache_dtype": "auto", "rounds": 3, "results": tmp_path / "forms.jsonl", "against": True, "gguf": None}
    found = forms.rows(argparse.Namespace(**values, again=False))
    shown = [(row.form, row.mode, row.peer, row.weight_bytes is None) for row in found]
    assert shown == [
        ("fp32", "dense", False, False),
        ("int8", "dense", False, False),
        ("int8", "sparse", False, False),
        ("q8_0", "llama.cpp", True, True),
    ]
    assert len({row.run for row in found}) == 1 and found[3].ppl == pytest.approx(found[0].ppl, rel=1e-5)
    assert all(row.tok_s > 0 for row in found)
    monkeypatch.setattr("dejavu.bench.rows.commit_facts", lambda: {"commit": "1" * 40, "dirty": False})
    append_rows(values["results"], found)
    monkeypatch.setattr(forms, "own_quality", None)
    monkeypatch.setattr(forms, "peer_quality", None)
    again = forms.rows(argparse.Namespace(**values, again=True))
    assert [row.ppl for row in again] == [row.ppl for row in found] and all(row.commit is None for row in again)
    with pytest.raises(ValueError, match="--again: the last run has no bf16, dense on these texts"):
        forms.rows(argparse.Namespace(**values | {"form": [f"bf16={model}"]}, again=True))
