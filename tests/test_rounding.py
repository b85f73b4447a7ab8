"""Who chooses a dtype that costs a model much is told, with the figure where it is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import dejavu
from conftest import Tiny
from dejavu.engine.backends import pick_backend
from dejavu.model import rounding
from dejavu.model.bundle import export
from dejavu.model.rounding import rounding_note
from dejavu.model.tokenizer import Tokenizer
from helpers.transformers_models import SIZES, reference_of

RISES = {"int4": {"dense": 0.39, "own": 0.69}, "int8": {"dense": 0.021, "own": 0.035}}


@pytest.fixture(autouse=True)
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rounding.json"
    path.write_text(json.dumps([{"model": "m", "base_hashes": ["hash"], "rises": RISES}]))
    monkeypatch.setattr(rounding, "ROUNDING_FILE", path)


@pytest.mark.parametrize(
    ("dtype", "adapter", "note"),
    [
        ("int4", None, "int4 costs this model 39 % of perplexity, dense, beside fp32"),
        ("int4", "own", "int4 costs this model 69 % of perplexity, sparse, beside fp32"),
        ("int4", "another", "int4 costs this model 39 % of perplexity, dense, beside fp32; with this adapter it was not measured"),
        ("int8", "another", None),
        ("int8", "own", "int8 costs this model 4 % of perplexity, sparse, beside fp32"),
        ("int8", None, None),
        ("bf16", None, None),
        ("fp32", "own", None),
    ],
)
def test_known(dtype: str, adapter: str | None, note: str | None) -> None:
    assert rounding_note("hash", dtype, stored_dtype="q4_1", adapter=adapter) == note
    assert rounding_note("hash", dtype, stored_dtype=dtype, adapter=adapter) is None  # nothing is rounded


def test_not_known() -> None:
    note = rounding_note("other", "int4", stored_dtype="fp32", adapter=None)
    assert note is not None and "is not known (others measured, in int4: +39%)" in note
    assert rounding_note("other", "int8", stored_dtype="fp32", adapter=None) is None


@pytest.mark.skipif(pick_backend() != "native", reason="int4 needs the native engine")
def test_loading_says_so(tiny: Tiny, tokenizer: Tokenizer, tmp_path: Path) -> None:
    export(tiny("llama"), tokenizer, tmp_path / "model")
    notes = {dtype: dejavu.load(tmp_path / "model", dtype=dtype).notes for dtype in ("int4", "bf16")}
    assert any("what int4 costs this model" in note for note in notes["int4"]) and notes["bf16"] == ()


@pytest.mark.skipif(pick_backend() != "native", reason="int4 needs the native engine")
def test_attaching_says_so() -> None:
    net = reference_of("llama", SIZES).eval()
    with pytest.warns(UserWarning, match="dejavu: what int4 costs this model"):
        dejavu.attach(net, backend="native", dtype="int4")
    dejavu.attach(dejavu.detach(net), backend="native", dtype="int8")
