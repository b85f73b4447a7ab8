"""recipes/processes.py: medians over processes, of speeds and of ratios within each, and perplexity once."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def processes() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "recipes"))
        return importlib.import_module("processes")


def measured(dense: float, sparse: float) -> dict[str, Any]:
    """What a process says: dense and sparse decode, a read, and their ratio."""
    common = {"context": 128, "new_tokens": None, "batch": 1, "dtype": "int8", "selection": None, "op": "decode", "p50_us": 1e6}
    rows = [
        common | {"mode": "dense", "method": None, "mlp_density": 1.0, "tok_s": dense},
        common | {"mode": "sparse", "method": "gate", "mlp_density": 0.496 + dense / 1e4, "tok_s": sparse},
        common | {"mode": "dense", "method": None, "mlp_density": 1.0, "tok_s": None, "op": "read"},
        common | {"mode": "dense", "method": None, "mlp_density": 1.0, "tok_s": 40.0, "op": "request", "new_tokens": 64, "p50_us": 1.6e6},
    ]
    ratio = common | {"mode": "sparse", "mlp_density": 0.5, "against": "dense", "against_dtype": "int8", "ratio": sparse / dense}
    return {"rows": rows, "ratios": [ratio]}


def test_medians_are_over_processes_and_ratios_within_each(processes: ModuleType) -> None:
    found = [measured(10.0, 12.0), measured(20.0, 22.0), measured(12.0, 18.0)]
    shown = processes.speeds_of(found)
    assert "| decode 128 | 1 | sparse, gate | int8 | 0.50 | 18.0 | 12.0 to 22.0 |  |" in shown and "read" not in shown
    assert "| request 128+64 | 1 | dense | int8 | 1.00 | 40.0 | 40.0 to 40.0 | 1.600 |" in shown
    assert "| decode 128 | 1 | sparse | int8 | 0.50 | dense int8 | 1.20 | 1.10 to 1.50 |" in processes.ratios_of(found)


def test_perplexity_is_measured_once(processes: ModuleType) -> None:
    asked: list[Sequence[str]] = []

    def run(arguments: Sequence[str]) -> dict[str, Any]:
        asked.append(arguments)
        return {}

    assert len(processes.repeated(["model", "--dense"], 3, run)) == 3
    assert asked == [["model", "--dense"], *[["model", "--dense", "--perplexity", "0"]] * 2]
