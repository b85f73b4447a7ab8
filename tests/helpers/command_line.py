"""The command line in a test: a folder to work in, a call, its JSON, the environment of a process.

`work` and `call` are fixtures, which conftest.py offers to every test.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dejavu
from conftest import Tiny
from dejavu.cli.main import run
from dejavu.loading import load
from dejavu.model.bundle import export
from dejavu.model.tokenizer import Tokenizer
from helpers.adapters import make_adapter
from helpers.texts import TEXT

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(dejavu.__file__).parents[1])}
TASK = {"context": "the cat", "choices": [" sat on the mat", " ran to the hat"], "label": 0}


@pytest.fixture(scope="module")
def work(tiny: Tiny, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model (`model`), its adapter (`adapter`), a text and a task."""
    path = tmp_path_factory.mktemp("cli")
    export(tiny("opt"), tokenizer, path / "model")
    lm = load(path / "model")
    make_adapter(lm.config, lm.base_hash).save(path / "adapter")
    (path / "text.txt").write_text(TEXT)
    (path / "other.txt").write_text(TEXT[::-1])
    (path / "quiz.jsonl").write_text("\n".join(json.dumps(TASK | {"label": i % 2}) for i in range(6)))
    return path


@pytest.fixture
def call(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command line in the folder `work`; its stdout, after checking the status and that stderr is empty."""
    monkeypatch.chdir(work)

    def invoke(*arguments: str, status: int = 0) -> str:
        capsys.readouterr()
        found = run(list(arguments))
        captured = capsys.readouterr()
        assert (found, captured.err) == (status, ""), captured.err
        return captured.out

    return invoke


def obj(stdout: str) -> dict[str, Any]:
    """The object of --json, which must be alone on stdout."""
    assert stdout.endswith("\n") and stdout.count("\n") == 1, stdout
    return json.loads(stdout)
