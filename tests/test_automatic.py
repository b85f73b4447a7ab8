"""recipes/automatic.py: what `auto` took beside the fastest program of no worse perplexity, and the table of it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def automatic() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "recipes"))
        yield importlib.import_module("automatic")


def process(
    speeds_of: tuple[float, float, float], ppl: dict[str, float], mode: str = "screened", missed: float | None = 0.01
) -> dict[str, Any]:
    """What `dejavu bench` prints: decode of three programs, and a request. A screened head alone has no perplexity but that of dense."""
    dense, ours, peer = speeds_of
    speeds = {"dense": dense, "llama.cpp": peer, mode: ours}
    ops: list[dict[str, Any]] = [{"op": "decode", "context": 128, "new_tokens": None}, {"op": "request", "context": 128, "new_tokens": 128}]
    rows = [op | {"mode": each, "peer": each == "llama.cpp", "tok_s": speed} for op in ops for each, speed in speeds.items()]
    pairs = [("dense", mode), ("dense", "llama.cpp"), (mode, "dense"), (mode, "llama.cpp")]
    ratios = [op | {"mode": one, "against": other, "ratio": speeds[one] / speeds[other]} for op in ops for one, other in pairs]
    quality = [{"mode": each.split("+")[0], "sparse_heads": "+" in each, "ppl": value} for each, value in ppl.items()]
    screen = {} if missed is None else {"screen": {"missed": missed}}  # bench leaves it out where there is none
    return {"rows": rows, "ratios": ratios, "perplexity": quality} | screen


def test_the_rival_is_the_fastest_of_no_worse_perplexity(automatic: ModuleType) -> None:
    found = automatic.compared([process((10.0, 12.0, 11.0), {"dense": 20.0, "llama.cpp": 20.1}), process((10.0, 14.0, 12.0), {})])
    assert (found["rival"], found["ppl_rival"], found["ppl"], found["tok_s"]) == ("llama.cpp", 20.1, 20.2, 13.0)
    assert found["ratios"] == {"decode": [12 / 11, 14 / 12], "128+128": [12 / 11, 14 / 12]}
    worse = process((10.0, 12.0, 11.0), {"dense": 20.0, "llama.cpp": 20.3})
    found = automatic.compared([worse])
    assert found["rival"] == "dense", "one that is worse is no rival, however fast"
    assert found["tok_s"] == 12.0 and found["ratios"]["decode"] == [1.2]


def test_a_sparse_mode_has_its_own_perplexity(automatic: ModuleType) -> None:
    gate = process((10.0, 12.0, 11.0), {"dense": 20.0, "sparse": 20.4, "llama.cpp": 20.3}, mode="sparse", missed=None)
    found = automatic.compared([gate])
    assert (found["rival"], found["ppl"]) == ("llama.cpp", 20.4)
    heads = process((10.0, 12.0, 11.0), {"dense": 20.0, "sparse+heads": 20.5, "llama.cpp": 20.3}, mode="sparse+heads", missed=None)
    assert automatic.compared([heads])["ppl"] == 20.5
    better = process((10.0, 12.0, 11.0), {"dense": 20.5, "sparse": 20.4, "llama.cpp": 20.6}, mode="sparse", missed=None)
    assert automatic.compared([better])["rival"] == "llama.cpp", "worse ones are rivals where none is as good"


def test_the_table_shows_the_least_and_says_where_dense_is_better(automatic: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = importlib.import_module("tables")
    records = importlib.import_module("records")
    result: dict[str, Any] = {"takes": "screened head", "rival": "dense", "ppl": 20.1, "ppl_rival": 20.0, "tok_s": 12.0, "budget": 0.01}
    found = [result | {"ratios": {"decode": [1.3, 1.2]}}, result | {"ratios": {"decode": [1.3, 0.9]}, "budget": 0.03}]
    found.append(result | {"takes": "dense", "ppl": None, "ppl_rival": None, "tok_s": None, "ratios": {}, "budget": 0.05})
    monkeypatch.setattr(tables, "records", lambda kind, path: [records.Record(kind="automatic", model="M", result=each) for each in found])
    monkeypatch.setattr(tables, "origins", lambda found: "")
    shown = tables.automatic().splitlines()[2:]
    assert shown[0] == "| M | 1 % | screened head | 20.10 | dense, 20.00 | 1.20x | - | - |"
    assert shown[1] == "| M | 3 % | screened head: run it dense | 20.10 | dense, 20.00 | 0.90x | - | - |"
    assert shown[2] == "| M | 5 % | nothing: run it dense | - | - | - | - | - |"
