"""The recipe trains, resumes where it stopped, keeps its layers alive and leaves a bundle that loads."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import dejavu
from conftest import open_fp32

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "train_opt.py"
WORDS = "the keeper of a lighthouse saw one ship go by and wrote it down in his book before night came over".split()


def arguments(folder: Path, *options: str) -> list[str]:
    given = [str(RECIPE), "--size", "nano", "--device", "cpu", "--log-interval", "4", "-o", str(folder / "run")]
    return [*given, "--text", str(folder / "*.txt"), "--valid", str(folder / "valid.md"), *options]


def run(folder: Path, *options: str) -> list[dict[str, Any]]:
    # one thread, for tests run side by side
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(dejavu.__file__).parents[1])}
    done = subprocess.run([sys.executable, *arguments(folder, *options)], capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    generator = random.Random(0)
    story = [" ".join(generator.choice(WORDS) for _ in range(400)) for _ in range(30)]
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(story[:25]))
    (tmp_path / "valid.md").write_text("\n".join(story[25:]))
    return tmp_path


@pytest.fixture
def train_opt(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The recipe as a module."""
    monkeypatch.syspath_prepend(str(RECIPE.parent))
    return importlib.import_module("train_opt")


@pytest.mark.slow
def test_recipe_trains_resumes_and_bundles(text: Path, train_opt: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = ("--steps", "24", "--control-interval", "2")
    stopped = run(text, *steps, "--max-minutes", "0.00001")
    assert stopped[-1]["step"] != 24 and not (text / "run" / "model").exists()
    step_file = text / "run" / "checkpoint" / "step.json"
    step_file.write_text(json.dumps(json.loads(step_file.read_text()) | {"step": 0}))  # as where the second file was not written any more
    rows = run(text, *steps)
    assert rows[0]["step"] == stopped[-1]["step"]
    assert rows[-1]["step"] == 24
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0]
    assert all(density > 0 for row in rows if row.get("density") for density in row["density"])
    assert "masked_0.1" in rows[-1]["foresight"]

    checkpoint = open_fp32(text / "run" / "model")
    assert checkpoint.config.activation == "relu" and checkpoint.config.num_layers == 2
    assert checkpoint.tokenizer.encode("the keeper")[0] == 0
    assert torch.isfinite(checkpoint.model(torch.tensor([checkpoint.tokenizer.encode("the keeper")]))).all()

    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)  # it would last for other tests
    monkeypatch.setattr(sys, "argv", arguments(text, "--steps", "25"))
    with pytest.raises(ValueError, match="another recipe"):
        train_opt.main()
    (text / "b.txt").write_text("one more text")
    monkeypatch.setattr(sys, "argv", arguments(text, *steps))
    with pytest.raises(ValueError, match="tokens.json names another text"):
        train_opt.main()


def test_tokens_are_used_again_only_for_the_same_text(text: Path, train_opt: ModuleType) -> None:
    options, recipe = argparse.Namespace(text=[str(text / "*.txt")], output=text / "run"), train_opt.SIZES["nano"]
    _, ids = train_opt.prepare(options, recipe)
    assert ids.tolist().count(0) == 25  # one a document
    (text / "other").mkdir()
    shutil.copy(text / "run" / "tokenizer.json", text / "other")  # the user's own
    other = argparse.Namespace(text=options.text, output=text / "other")
    assert (train_opt.prepare(other, recipe)[1] == ids).all()
    with pytest.raises(ValueError, match=r"tokens.json names another text or vocabulary size"):
        train_opt.prepare(other, dataclasses.replace(recipe, vocab_size=recipe.vocab_size + 1))
    (text / "other" / "tokens.json").unlink()
    with pytest.raises(ValueError, match=r"tokens.npy has no tokens.json"):
        train_opt.prepare(other, recipe)
    (text / "other" / "tokens.npy").unlink()
    with pytest.raises(ValueError, match=r"tokenizer.json has \d+ tokens and the model 10; raise"):
        train_opt.prepare(other, dataclasses.replace(recipe, vocab_size=10))
    assert (train_opt.prepare(other, recipe)[1] == ids).all()  # the mistake left no record behind
