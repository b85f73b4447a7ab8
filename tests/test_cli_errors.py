"""A user's mistake: exit status 2, one line on stderr that names the value and the fix, nothing half-written, no traceback."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import Tiny
from dejavu.cli import main
from dejavu.cli.main import run
from dejavu.loading import load
from dejavu.model.bundle import export
from dejavu.model.tokenizer import Tokenizer
from helpers.adapters import make_adapter
from helpers.command_line import ENVIRONMENT
from helpers.texts import PROMPT, TEXT

GENERATE = ("generate", "model", "-p", PROMPT)


@pytest.fixture(scope="module")
def work(tiny: Tiny, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its adapter, and everything that can be wrong with them."""
    path = tmp_path_factory.mktemp("errors")
    export(tiny("opt"), tokenizer, path / "model")
    lm = load(path / "model")
    make_adapter(lm.config, lm.base_hash).save(path / "adapter")
    make_adapter(lm.config, "f" * 64).save(path / "foreign-adapter")
    for name in ("truncated", "nan", "no-config", "no-weights"):
        shutil.copytree(path / "model", path / name)
    weights = path / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    tensors = load_file(path / "nan" / "model.safetensors")
    tensors["model.decoder.layers.1.fc1.weight"][3, 4] = torch.nan
    save_file(tensors, path / "nan" / "model.safetensors", metadata={"format": "pt"})
    (path / "no-config" / "config.json").unlink()
    (path / "no-weights" / "model.safetensors").unlink()
    shutil.copytree(path / "adapter", path / "truncated-adapter")
    weights = path / "truncated-adapter" / "adapter.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    shutil.copytree(path / "adapter", path / "lacking-adapter")
    config = json.loads((path / "adapter" / "config.json").read_text())
    config["layers"] = config["layers"][:1]
    (path / "lacking-adapter" / "config.json").write_text(json.dumps(config))
    (path / "text.txt").write_text(TEXT)
    (path / "empty.txt").write_text(" \n")
    (path / "binary.txt").write_bytes(b"\x00\x01\xff")
    (path / "short.txt").write_text("the cat")
    (path / "half.jsonl").write_text('{"context": "caf\\ud800", "target": "x"}\n')
    (path / "bad.jsonl").write_text('{"context": "a"\n')
    (path / "mine").mkdir()
    (path / "mine" / "thesis.txt").write_text("precious")
    return path


CASES = {
    "unknown command": (("fly",), r"No such command 'fly'.*dejavu --help"),
    "unknown option": ((*GENERATE, "--fast"), r"No such option: --fast.*dejavu generate --help"),
    "no model": (("generate",), r"Missing argument 'MODEL'"),
    "no prompt": (("generate", "model"), r"Missing option.*--prompt"),
    "not a number": ((*GENERATE, "-n", "many"), r"-n(?=.*'many').* int"),
    "wrong path": (("generate", "./nowhere", "-p", "x"), r"model directory not found: /.*nowhere"),
    "unknown model": (("generate", "gpt-9", "-p", "x"), r"unknown model 'gpt-9'.*opt-mini"),
    "unknown hub model": (("generate", "nobody/nothing", "-p", "x"), r"'nobody/nothing' is not on this machine.*--download"),
    "no config": (("generate", "no-config", "-p", "x"), r"no-config is no model folder: it has no config.json"),
    "no weights": (("generate", "no-weights", "-p", "x"), r"no-weights has no weights"),
    "truncated weights": (("generate", "truncated", "-p", "x"), r"truncated.*model.safetensors is truncated.*again"),
    "NaN in the weights": (("generate", "nan", "-p", "x"), r"layers.1.fc1.weight.*1 NaN"),
    "no adapter there": ((*GENERATE, "--adapter", "nowhere"), r"adapter not found: /.*nowhere"),
    "another model's adapter": ((*GENERATE, "--adapter", "foreign-adapter"), r"foreign-adapter belongs to tiny.*f{64}.*--accept-base"),
    "truncated adapter": ((*GENERATE, "--adapter", "truncated-adapter"), r"adapter.safetensors is truncated"),
    "adapter without a layer": ((*GENERATE, "--adapter", "lacking-adapter"), r"predictor for layer 1 not found: .*lacking-adapter"),
    "adapter and dense": ((*GENERATE, "--adapter", "adapter", "--dense"), r"--dense.*--adapter"),
    "accept-base alone": ((*GENERATE, "--accept-base"), r"--accept-base needs --adapter"),
    "text that nothing reads": ((*GENERATE, "--text", "text.txt"), r"--text is the calibration text for --accept-base"),
    "prompt beyond the context": (("generate", "model", "-p", TEXT), r"prompt has \d+ tokens and the context holds 64; shorten"),
    "a prompt that is no UTF-8": (
        ("generate", "model", "-p", "caf\udce9"),
        r"the text is not UTF-8 throughout: 'caf.udce9' at",
    ),
    "a stop string that is none": (("generate", "nowhere", "-p", "x", "--stop", "\udce9"), r"a stop string is not UTF-8 throughout"),
    "a task that is none": (("eval", "model", "--tasks", "half.jsonl"), r"half.jsonl, line 1: not JSON \(a string is not UTF-8 throughout"),
    "variables without a template": (
        (*GENERATE, "--chat-template-kwargs", '{"a": 1}'),
        r"for a chat template, which model has none of",
    ),
    "variables that are none": (
        ("generate", "nowhere", "-p", "x", "--chat-template-kwargs", "[1]"),
        r"'\[1\]' is no JSON object; give",
    ),
    "variables that are no JSON": (("serve", "nowhere", "--chat-template-kwargs", "{a"), r"'\{a' is no JSON .*give an object"),
    "empty prompt is BOS alone, but a negative count is not": ((*GENERATE, "-n", "-3"), r"must be 0 or more, not -3"),
    "negative temperature": ((*GENERATE, "--temperature", "-1"), r"temperature must be 0.*not -1"),
    "top-p": ((*GENERATE, "--top-p", "1.5"), r"top_p must lie in \(0, 1\], not 1.5"),
    "negative count before the model": (("generate", "nowhere", "-p", "x", "-n", "-3"), r"must be 0 or more, not -3"),
    "temperature before the model": (("generate", "nowhere", "-p", "x", "--temperature", "-1"), r"temperature must be 0.*not -1"),
    "empty stop string before the model": (("generate", "nowhere", "-p", "x", "--stop", ""), r"stop string must not be empty"),
    "unavailable backend": ((*GENERATE, "--backend", "cuda"), r"backend 'cuda' is not available: .*available: .*torch"),
    "unknown backend": ((*GENERATE, "--backend", "tpu"), r"unknown backend 'tpu'; choose one of auto, torch"),
    "unknown dtype": ((*GENERATE, "--dtype", "foo"), r"unknown dtype 'foo'; choose one of auto, stored, fp32"),
    "no threads": ((*GENERATE, "--threads", "0"), r"threads must lie between 1 and \d+.*not 0"),
    "negative seed": ((*GENERATE, "--seed", "-1"), r"seed must lie between 0 and .*not -1"),
    "nothing to evaluate": (("eval", "model"), r"nothing to evaluate.*--text"),
    "no text there": (("eval", "model", "--text", "nowhere.txt"), r"nowhere.txt names no file"),
    "glob without a file": (("profile", "model", "--text", "*.rst"), r"\*.rst names no file"),
    "empty text": (("eval", "model", "--text", "empty.txt"), r"empty.txt holds no text; give"),
    "empty text to profile": (("profile", "model", "--text", "empty.txt"), r"empty.txt holds no text"),
    "empty text to train": (("train", "model", "--text", "empty.txt", "-o", "new"), r"empty.txt holds no text"),
    "binary text": (("eval", "model", "--text", "binary.txt"), r"binary.txt .*"),
    "bad task": (("eval", "model", "--tasks", "bad.jsonl"), r"bad.jsonl, line 1: not JSON"),
    "negative tokens": (("eval", "model", "--text", "text.txt", "--max-tokens", "-5"), r"max_tokens must be at least 1, not -5"),
    "negative limit": (("eval", "model", "--text", "text.txt", "--limit", "0"), r"limit must be at least 1, not 0"),
    "stride": (("eval", "model", "--text", "text.txt", "--stride", "65"), r"stride must lie between 1 and the context 64, not 65"),
    "negative profile": (("profile", "model", "--text", "text.txt", "--max-tokens", "0"), r"at least 1, not 0"),
    "eval into a foreign folder": (("eval", "model", "--text", "text.txt", "-o", "mine"), r"mine holds files that dejavu did not write"),
    "train into a foreign folder": (("train", "model", "--text", "text.txt", "-o", "mine"), r"mine holds files that dejavu did not write"),
    "train into a file": (("train", "model", "--text", "text.txt", "-o", "text.txt"), r"text.txt is a file; choose another folder"),
    "export into a foreign folder": (("export", "model", "mine"), r"mine holds files that dejavu did not write"),
    "budget": (("train", "model", "--text", "text.txt", "-o", "new", "--budget", "-1"), r"budget must lie in \[0, 1\).*not -1"),
    "method": (("train", "model", "--text", "text.txt", "-o", "new", "--method", "magic"), r"method 'magic' is not supported"),
    "loss": (("train", "model", "--text", "text.txt", "-o", "new", "--loss", "mse"), r"loss 'mse' is not supported; choose"),
    "text too short to train": (("train", "model", "--text", "short.txt", "-o", "new"), r"give a longer text"),
    "no output folder": (("train", "model", "--text", "text.txt"), r"Missing option '-o'"),
    "export dtype": (("export", "model", "new", "--dtype", "fp16"), r"dtype 'fp16' cannot be exported; choose one of fp32, bf16"),
    "cache dtype": ((*GENERATE, "--cache-dtype", "int3"), r"cache dtype 'int3' is not available on backend .*choose one of auto, "),
    "screen without a text": (
        ("eval", "model", "--tasks", "quiz.jsonl", "--screened-head", "0.1"),
        r"--screened-head is measured on a text",
    ),
    "no run": (("report", "nowhere"), r"run folder not found: /.*nowhere"),
    "no results in the run": (("report", "mine"), r"mine has no results.json"),
    "batch": (("bench", "model", "--text", "text.txt", "--batch", "0"), r"batch must be at least 1, not 0"),
    "bench context": (("bench", "model", "--text", "text.txt", "--context", "99"), r"context 99 .*the model has 64"),
    "demo without an adapter": (("demo", "--model", "model", "-o", "new"), r"model has no adapter; train one with --retrain"),
    "retrain and adapter": (("demo", "--retrain", "--adapter", "adapter"), r"--retrain trains an adapter, --adapter names one"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_one_line(name: str, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = CASES[name]
    monkeypatch.chdir(work)
    assert run(list(arguments)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("dejavu: ") and re.search(message, error), error
    left = [path.name for path in work.iterdir() if path.name.startswith(("new", "."))]
    assert left == [], "an output folder of a failed command looks whole"
    assert [path.name for path in (work / "mine").iterdir()] == ["thesis.txt"]


def test_with_json_a_mistake_leaves_stdout_empty(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(work)
    assert run([*GENERATE, "-n", "-1", "--json"]) == 2
    assert capsys.readouterr().out == ""


def test_our_own_mistake_has_a_traceback_and_status_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(name: str = "auto") -> str:
        raise AssertionError("impossible")

    monkeypatch.setattr("dejavu.engine.backends.pick_backend", broken)
    assert run(["info"]) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error and "impossible" in error and "bug" in error


def test_a_full_gpu_is_one_line_and_keeps_what_is_finished(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the second layer of a training; and where a command has nothing to say about it."""
    from dejavu.offline import train_predicted

    layer_of = train_predicted.train_layer

    def full(data: Any, *options: Any) -> Any:
        if data.layer == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79 GiB")
        return layer_of(data, *options)

    monkeypatch.setattr(train_predicted, "train_layer", full)
    (tmp_path / "text.txt").write_text(TEXT * 20)
    arguments = ("train", str(work / "model"), "--text", str(tmp_path / "text.txt"), "-o", str(tmp_path / "made"), "--backend", "torch")
    assert run([*arguments, "--epochs", "0.1"]) == 2
    said = capsys.readouterr().err
    assert (
        said.count("\n") == 1
        and "2.50 GiB more" in said
        and "lower --work-memory, --rank" in said
        and str(tmp_path / "made.partial") in said
    )
    assert [path.name for path in (tmp_path / "made.partial").glob("layer_*")] == ["layer_0.safetensors"]

    def full_too(name: str = "auto") -> str:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("dejavu.engine.backends.pick_backend", full_too)
    assert run(["info"]) == 2
    assert capsys.readouterr().err.startswith("dejavu: the GPU's memory is not enough")


def test_the_command_itself(work: Path) -> None:
    """`python -m dejavu` in a process of its own: status, streams, and an import that costs no torch for a usage error."""
    command = [sys.executable, "-X", "importtime", "-m", "dejavu", "fly"]
    usage = subprocess.run(command, cwd=work, env=ENVIRONMENT, capture_output=True, text=True)
    assert usage.returncode == 2 and "No such command 'fly'" in usage.stderr
    assert not re.search(r"\| +torch$", usage.stderr, re.MULTILINE), "usage errors must not wait for torch"
    command = [sys.executable, "-m", "dejavu", *GENERATE, "--adapter", "foreign-adapter"]
    mistake = subprocess.run(command, cwd=work, env=ENVIRONMENT, capture_output=True, text=True)
    assert mistake.returncode == 2 and mistake.stderr.count("\n") == 1 and "Traceback" not in mistake.stderr


INTERRUPT = """
import os, signal, sys
from dejavu.cli import main
import dejavu.quality.evaluate as evaluate
def perplexity(*given, **options):
    os.kill(os.getpid(), signal.SIGINT)
    while True:
        pass
evaluate.perplexity = perplexity
sys.argv[1:] = ["eval", "model", "--text", "text.txt", "-o", "out"]
main.main()
"""


@pytest.mark.skipif(os.name == "nt", reason="sends a POSIX signal")
def test_an_interrupt_ends_with_130_and_no_traceback(work: Path) -> None:
    command = [sys.executable, "-c", INTERRUPT]
    # A job that a shell started in the background ignores the signal, and its children would too.
    listening = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    found = subprocess.run(command, cwd=work, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, preexec_fn=listening)
    assert found.returncode == main.INTERRUPTED == 130, found.stderr
    assert "Traceback" not in found.stderr and "kept in" in found.stderr
    assert not (work / "out").exists(), "nothing was finished"
