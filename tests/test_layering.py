"""Imports inside the package point down only, and none is relative."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "dejavu"
RANKS = (
    {"config", "damage", "figures", "files", "locks", "version"},
    {"kernels"},
    {"model"},
    {"offline", "engine"},
    {"generation"},
    {"quality"},
    {"bench"},
    {"loadtest", "report"},
    {"offline_methods"},
    {"language_model"},
    {"attached", "conversation", "loading", "serve"},
    {"harness"},
    {"__init__"},
    {"cli"},
    {"__main__"},
)
RANK = {part: rank for rank, parts in enumerate(RANKS) for part in parts}


def part_of(module: str) -> str:
    """`kernels` of `dejavu.kernels.attention`; `__init__` of `dejavu` itself."""
    return module.split(".")[1] if "." in module else "__init__"


def imported_modules(source: str) -> Iterator[tuple[int, str]]:
    """(line, module of dejavu) of every import, also within functions and `if TYPE_CHECKING`. A relative one is '.'."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] == "dejavu")
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield node.lineno, "."
        elif isinstance(node, ast.ImportFrom) and node.module == "dejavu":
            parts = [alias.name for alias in node.names]
            yield from ((node.lineno, f"dejavu.{name}" if name in RANK else "dejavu") for name in parts)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("dejavu."):
            yield node.lineno, node.module


def violations(part: str, source: str) -> list[str]:
    """What is wrong with the imports of a file in `part` of the package."""
    wrong = []
    for line, module in imported_modules(source):
        if module == ".":
            wrong.append(f"line {line}: relative import; write `from dejavu.x import y`")
            continue
        target = part_of(module)
        lower = RANK[target] < RANK[part] or target == part or RANK[target] == RANK[part] == 0
        if not lower:
            wrong.append(f"line {line}: {part} imports {target}, which is not below it")
    return wrong


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def test_imports_point_down() -> None:
    wrong = []
    for path in sources():
        name = path.relative_to(PACKAGE)
        part = name.parts[0].removesuffix(".py")
        assert part in RANK, f"{part} has no rank; give it one in {Path(__file__).name}"
        wrong += [f"{name}, {each}" for each in violations(part, path.read_text(encoding="utf-8"))]
    assert wrong == []


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("model", "from dejavu.engine.cache import Pages"),
        ("kernels", "import dejavu.model.layers"),
        ("engine", "from dejavu.offline import train"),
        ("offline", "from dejavu.engine import cache"),
        ("config", "from dejavu import kernels"),
        ("report", "def f():\n    from dejavu.cli.main import main"),
        ("cli", "from . import options"),
        ("language_model", "import dejavu"),
        ("model", "from dejavu import load"),
    ],
)
def test_an_import_that_points_up_is_found(part: str, source: str) -> None:
    assert len(violations(part, source)) == 1


def test_imports_that_point_down_are_allowed() -> None:
    assert violations("files", "from dejavu.config import ModelConfig\nfrom dejavu.version import __version__") == []
    assert violations("cli", "import dejavu\nfrom dejavu import load, files\nimport torch\nfrom dejavu.cli.options import x") == []
    assert violations("engine", "from dejavu.engine.cache import Pages\nfrom dejavu.kernels import attention") == []


def test_the_documentation_ranks_the_parts_so() -> None:
    text = (PACKAGE.parent.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:3] for line in text.splitlines() if re.match(r"\| \d+ \|", line)]
    told = {part.removesuffix(".py").rstrip("/"): int(rank) for rank, parts in rows for part in re.findall(r"`([^`]+)`", parts)}
    assert told == {part: rank + 1 for part, rank in RANK.items()}
