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


def process(dense: float, sparse: float, peer: float, ppl: dict[str, float]) -> dict[str, Any]:
    """What `dejavu bench` prints: decode of three programs, and a request."""
    speeds = {"dense": dense, "screened": sparse, "llama.cpp": peer}
    ops: list[dict[str, Any]] = [{"op": "decode", "context": 128, "new_tokens": None}, {"op": "request", "context": 128, "new_tokens": 128}]
    rows = [op | {"mode": mode, "tok_s": speed} for op in ops for mode, speed in speeds.items()]
    pairs = [("dense", "llama.cpp"), ("screened", "dense"), ("screened", "llama.cpp")]
    ratios = [op | {"mode": mode, "against": other, "ratio": speeds[mode] / speeds[other]} for op in ops for mode, other in pairs]
    return {
        "rows": rows,
        "ratios": ratios,
        "perplexity": [{"mode": m, "sparse": m == "screened", "ppl": value} for m, value in ppl.items()],
    }


def test_the_rival_is_the_fastest_of_no_worse_perplexity(automatic: ModuleType) -> None:
    better = [process(10.0, 12.0, 11.0, {"dense": 20.0, "screened": 20.1, "llama.cpp": 20.0}), process(10.0, 14.0, 12.0, {})]
    found = automatic.compared(better)
    assert (found["rival"], found["ppl_rival"], found["ppl"], found["tok_s"]) == ("llama.cpp", 20.0, 20.1, 13.0)
    assert found["ratios"] == {"decode": [12 / 11, 14 / 12], "128+128": [12 / 11, 14 / 12]}
    worse = process(10.0, 12.0, 11.0, {"dense": 20.0, "screened": 20.1, "llama.cpp": 20.2})
    assert automatic.compared([worse])["rival"] == "dense", "one that is worse is no rival, however fast"


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
