"""recipes/gpu_speeds.py: its commands are ones that `dejavu bench` takes, and one that fails is told without ending the others."""

from __future__ import annotations

import importlib
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer.main

from dejavu.bench.models.random import SHAPES
from dejavu.cli.main import app

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def recipe() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "recipes"))
        yield importlib.import_module("gpu_speeds")


def test_every_command_is_one_of_bench(recipe: ModuleType) -> None:
    bench: Any = typer.main.get_command(app).commands["bench"]  # pyrefly: ignore[missing-attribute]
    for name, words in recipe.COMMANDS.items():
        found = bench.make_context("bench", recipe.arguments(words)).params
        assert found["synthetic"] in SHAPES, name
    found = bench.make_context("bench", recipe.arguments(recipe.COMMANDS["planted-6.7b"])).params
    assert found["batch"] == [1, 4, 16] and found["context"] == [256, 2000] and found["against"] == ["transformers"]
    assert bench.make_context("bench", recipe.arguments(recipe.COMMANDS["ops"])).params["ops"] is True


def test_a_command_that_fails_does_not_end_the_others(
    recipe: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[list[str]] = []

    def run(command: list[str], *, check: bool) -> subprocess.CompletedProcess[str]:
        assert not check
        started.append(command)
        return subprocess.CompletedProcess(command, int("minitron-4b" in command))

    monkeypatch.setattr(recipe.subprocess, "run", run)
    monkeypatch.setattr("sys.argv", ["gpu_speeds.py", "--results", "r.jsonl", "--only", "planted-nemotron", "--only", "ops"])
    assert recipe.main() == 1
    assert [command[5] for command in started] == ["minitron-4b", "opt-6.7b"] and started[0][-2:] == ["--results", "r.jsonl"]
    assert "failed: planted-nemotron" in capsys.readouterr().err
