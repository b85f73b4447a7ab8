"""docs/api.md and the code agree: what the page names exists and is described, and what `import dejavu` offers is on it."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

import dejavu

PAGE = (Path(__file__).parent.parent / "docs" / "api.md").read_text(encoding="utf-8")
ENTRIES = re.findall(r"^::: (\S+)$((?:\n .*)*)", PAGE, re.MULTILINE)
EXTRA = {"dejavu.harness.DejaVuLM": "lm_eval"}


def found(name: str) -> Any:
    """The module, or the member of a module, of that name."""
    module, _, member = name.rpartition(".")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return getattr(importlib.import_module(module), member)


@pytest.mark.parametrize(("name", "options"), ENTRIES, ids=[name for name, _ in ENTRIES])
def test_what_the_page_names_exists_and_is_described(name: str, options: str) -> None:
    if name in EXTRA:
        pytest.importorskip(EXTRA[name])
    item = found(name)
    assert item.__doc__
    for member in re.findall(r"\w+", "".join(re.findall(r" members: \[(.*)\]", options))):
        assert member == "__init__" or getattr(item, member).__doc__, f"{name}.{member} has no docstring"


def test_the_page_has_everything_that_the_package_offers() -> None:
    offered = {f"dejavu.{name}" for name in dejavu.__all__ if not name.startswith("_")}
    assert offered and offered <= {name for name, _ in ENTRIES}
