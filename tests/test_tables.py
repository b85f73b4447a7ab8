"""The numbers in README and docs are those of results/: rendering the tables again changes nothing."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "recipes" / "tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tables"] = module
    spec.loader.exec_module(module)
    return module


def test_pages_show_what_results_hold(tables: ModuleType) -> None:
    found = 0
    for page in tables.PAGES:
        text = page.read_text()
        assert tables.rendered(text) == text, f"{page.name} is stale; run `make tables`"
        found += len(tables.MARK.findall(text))
    assert found >= 3


def test_a_stale_number_is_replaced(tables: ModuleType) -> None:
    stale = "<!-- table: headline -->\n| 1 |\n<!-- end -->\n"
    assert "| 1 |" not in tables.rendered(stale)
    assert tables.rendered(stale).endswith("<!-- end -->\n")
