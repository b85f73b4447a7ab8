"""The repository as a whole: no machine's paths, a size that clones quickly, sources that say what they are."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MAX_BYTES = 48_000_000
# An absolute path of someone's machine: a home, a work folder. Not after a letter, digit, dot or dash (URLs, relative paths).
MACHINE_PATH = re.compile(r"(?<![\w.-])/(?:(?:home|Users)/\w|(?:root|work|farm|workspace)/)")


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    """Every file that git tracks and that is in the work tree."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    paths = [ROOT / name for name in listed.split("\0") if name]
    if not paths:
        pytest.skip("git tracks nothing yet")
    return [path for path in paths if path.is_file()]


def test_no_machine_paths(tracked: list[Path]) -> None:
    found = []
    for path in tracked:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {match.group()}" for match in MACHINE_PATH.finditer(text)]
    assert found == []


@pytest.mark.parametrize("text", ["/home{}x", "see /root{}", "'/work{}a'", "file:///Users{}me/a"])
def test_machine_paths_are_recognised(text: str) -> None:
    assert MACHINE_PATH.search(text.format("/"))


@pytest.mark.parametrize("text", ["https://x.org/home/page", "../work/a", "src/work/", "/tmp/x", "/homework/"])
def test_other_paths_are_allowed(text: str) -> None:
    assert not MACHINE_PATH.search(text)


def test_tracked_files_stay_small(tracked: list[Path]) -> None:
    total = sum(path.stat().st_size for path in tracked)
    largest = sorted(tracked, key=lambda path: path.stat().st_size)[-3:]
    assert total < MAX_BYTES, f"{total} bytes; the largest are {[str(path.relative_to(ROOT)) for path in largest]}"


def test_python_sources_start_with_a_docstring(tracked: list[Path]) -> None:
    texts = {path: path.read_text(encoding="utf-8") for path in tracked if path.suffix == ".py"}
    assert [str(path) for path, text in texts.items() if text.strip() and not re.match(r'(#.*\n|\s)*r?"""\S', text)] == []


def imports_of(source: str) -> set[str]:
    """The first part of the name of every module that a line imports, also within functions."""
    found = re.findall(r"^ *(?:from +([\w.]+) +import\b|import +([\w., ]+))", source, re.MULTILINE)
    return {name.split(".")[0].split()[0] for module, modules in found for name in (module or modules).split(",")}


def test_no_test_file_is_imported() -> None:
    """What tests share lies in tests/helpers, or is a fixture."""
    folder = Path(__file__).parent
    tests = {path.stem for path in folder.glob("test_*.py")}
    found = {path.name: imports_of(path.read_text(encoding="utf-8")) & tests for path in folder.rglob("*.py")}
    assert {name: shared for name, shared in found.items() if shared} == {}
    assert "test_project" in tests and imports_of("import test_a.b, c\ndef f():\n    from test_d import e") == {"test_a", "c", "test_d"}


IMPORT_UNINSTALLED = """
import importlib.metadata, sys
find = importlib.metadata.Distribution.from_name.__func__
def from_name(cls, name):
    if name == "dejavu-llm":
        raise importlib.metadata.PackageNotFoundError(name)
    return find(cls, name)
importlib.metadata.Distribution.from_name = classmethod(from_name)
sys.meta_path = [finder for finder in sys.meta_path if "Editable" not in type(finder).__name__]
import dejavu, dejavu.files, dejavu.version
print(dejavu.__file__)
"""


def test_the_source_tree_imports_without_an_installation(tmp_path: Path) -> None:
    """PYTHONPATH=src is enough: neither installed metadata nor the hook of an editable installation is needed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    run = subprocess.run([sys.executable, "-c", IMPORT_UNINSTALLED], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert Path(run.stdout.strip()) == ROOT / "src" / "dejavu" / "__init__.py"


def test_extras_are_named_by_the_distribution_and_exist(tracked: list[Path]) -> None:
    """`dejavu` on PyPI is another project's: its name before an extra would bring that one. The changelog tells history."""
    extras = set(PROJECT["project"]["optional-dependencies"])
    texts = {path: path.read_text(encoding="utf-8") for path in tracked if path.suffix in {".py", ".md"} and path.name != "CHANGELOG.md"}
    named = [(path.name, *found) for path, text in texts.items() for found in re.findall(r"\b(dejavu(?:-llm)?)\[([a-z]+)\]", text)]
    assert named and [entry for entry in named if entry[1] != PROJECT["project"]["name"] or entry[2] not in extras] == []


def test_the_version_is_the_same_everywhere() -> None:
    from dejavu.version import __version__

    assert "version" in PROJECT["project"]["dynamic"] and "version" not in PROJECT["project"]
    assert f"version: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_installs_again_where_the_list_of_modules_changed_and_not_else(tmp_path: Path) -> None:
    names = ("Makefile", "pyproject.toml", "constraints.txt", "CMakeLists.txt", "src/dejavu/version.py")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    package = tmp_path / "src/dejavu"
    (package / "gguf.py").touch()
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/.created").touch()

    def make(*arguments: str) -> int:
        return subprocess.run(["make", "-s", "PIP_INSTALL=true", "FIRST_RUN=true", *arguments, "install"], cwd=tmp_path).returncode

    assert make("-q") == 1 and make() == 0 and make("-q") == make("-q") == 0
    (package / "__pycache__").mkdir()
    (package / "__pycache__/gguf.cpython-311.pyc").touch()
    (package / "gguf.py").write_text("x = 1\n")
    assert make("-q") == 0
    (package / "gguf").mkdir()
    (package / "gguf.py").rename(package / "gguf/__init__.py")
    assert make("-q") == 1 and make("-n") == 0 and make("-q") == 1
    assert make() == 0 and make("-q") == 0
