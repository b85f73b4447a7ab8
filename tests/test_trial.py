"""`dejavu try`: what each way gains and costs, advice that follows from the numbers, and a refusal before weights are read."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import Tiny
from dejavu.bench.trial import DENSITIES, TrialRow, advise, memory_needed, trial, ways
from dejavu.cli import trial as command
from dejavu.cli.main import run
from dejavu.engine.options import EngineOptions
from dejavu.loading import bundled_adapter_of, bundled_adapters
from dejavu.model.bundle import MODELS_FOLDER, export
from dejavu.model.selectors import GateThreshold, LayerAdapter
from dejavu.model.tokenizer import Tokenizer
from helpers.native import needs_library
from helpers.offline import random_ids
from helpers.screens import screen_of
from helpers.texts import TEXT

ENGINE = {
    "name": "tiny",
    "called": "tiny",
    "chatted": "tiny",
    "chatted_dense": "tiny",
    "options": EngineOptions(backend="torch", dtype="fp32"),
    "bos": None,
}


def test_every_way_is_timed_and_measured(tiny: Tiny) -> None:
    model = tiny("llama", num_layers=2)
    found = trial(model, own=None, threshold_ids=random_ids(200), measured_ids=random_ids(300, 1), **ENGINE)
    assert [row.label for row in found.rows] == ["dense", "gate 0.5", "gate 0.7", "input 0.5", "input 0.7"]
    dense, *others = found.rows
    assert (dense.times, dense.rise, dense.read_share) == (1.0, 0.0, 1.0) and dense.ppl is not None
    for row in others:
        assert row.note is None and row.keeps is not None and row.mlp_density == pytest.approx(row.keeps, abs=0.15)
        assert row.tok_s is not None and row.times == pytest.approx(row.tok_s / (dense.tok_s or 0))
        assert row.ppl is not None and row.rise == pytest.approx(row.ppl / dense.ppl - 1) and row.rise != 0
        assert row.read_share is not None and 0 < row.read_share < 1
    assert (others[0].head_density, (others[2].head_density or 1) < 1) == (1.0, True)
    assert found.weight_bytes == sum(4 * parameter.numel() for parameter in model.parameters())


def test_true_zeros_cost_nothing_and_an_adapter_has_a_row(tiny: Tiny) -> None:
    model = tiny("opt", num_layers=2)
    own = (LayerAdapter(neurons=GateThreshold(threshold=0.01)),) * 2
    assert [way.way for way in ways(model, random_ids(100), own)] == ["its adapter", "exact"]
    found = trial(model, own=own, threshold_ids=random_ids(200), measured_ids=random_ids(300, 1), **ENGINE)
    exact = found.rows[-1]
    assert exact.rise == pytest.approx(0.0, abs=1e-5) and exact.mlp_density is not None and exact.mlp_density < 1


def test_what_an_engine_does_not_compute_is_said(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    import dejavu.bench.trial as module

    checked = module.check_mode

    def refuse(model: object, layers: tuple[LayerAdapter, ...], *arguments: object, **options: object) -> None:
        if layers[0].inputs.selects:
            raise ValueError("inputs are not available in int4")
        checked(model, layers, *arguments, **options)  # pyrefly: ignore

    monkeypatch.setattr(module, "check_mode", refuse)
    found = trial(tiny("llama", num_layers=1), own=None, threshold_ids=random_ids(99), measured_ids=random_ids(300), **ENGINE)
    assert [row.tok_s is None for row in found.rows] == [False, False, False, True, True]
    assert found.rows[-1].note == "inputs are not available in int4"
    with pytest.raises(ValueError, match="9 tokens in a context of 64 are too few to time a step on"):
        trial(tiny("llama", num_layers=1), own=None, threshold_ids=random_ids(99), measured_ids=random_ids(9), **ENGINE)


def row(way: str, times: float, rise: float, keeps: float | None = None) -> TrialRow:
    return TrialRow(way=way, keeps=keeps, times=times, rise=rise)


DENSE = row("dense", 1.0, 0.0)


@pytest.mark.parametrize(
    ("rows", "zeros", "advice", "next_command"),
    [
        (
            [row("gate", 1.2, 0.02, 0.7), row("input", 1.4, 0.5, 0.5)],
            False,
            "by gate 0.7, 1.20x dense for +2.0%",
            "--method auto --budget 0.02",
        ),
        (
            [row("gate", 1.0, 0.02, 0.7), row("input", 1.4, 0.5, 0.5)],
            False,
            "does not pay here; the fastest, input 0.5, is 1.40x",
            "--dense",
        ),
        ([row("exact", 1.3, 0.0)], True, "Sparse by nature, without loss: 1.30x dense", "--method auto"),
        ([row("exact", 0.9, 0.0)], True, "Skipping true zeros alone does not pay here", "--method auto"),
        (
            [row("its adapter", 1.5, 0.12), row("gate", 1.0, 0.1, 0.7)],
            False,
            "1.50x as fast as dense here, for +12.0%",
            "dejavu chat m",
        ),
        (
            [row("its adapter", 1.5, 0.0), row("exact", 1.2, 0.0)],
            True,
            "1.50x as fast as dense here, at no measurable cost",
            "dejavu chat m",
        ),
        ([row("its adapter", 0.9, 0.0), row("exact", 1.2, 0.0)], True, "Sparse by nature", "dejavu train m"),
    ],
)
def test_advice_follows_from_the_numbers(rows: list[TrialRow], zeros: bool, advice: str, next_command: str) -> None:
    text, suggested = advise([DENSE, *rows], "m", "m", "m", zeros=zeros)
    assert advice in text and next_command in suggested


def test_a_large_vocabulary_may_pay_where_layers_do_not() -> None:
    rows = [DENSE, row("gate", 1.0, 0.02, 0.7)]
    text, suggested = advise(rows, "m", "m --adapter a", "m", zeros=False, head=True)
    assert "a screened head is trained" in text and suggested == "dejavu train m --text YOUR.txt -o my-adapter --method auto"
    dense = advise([*rows, row("its adapter", 0.9, 0.0)], "m", "m --cache-dtype fp32 --adapter a", "m --cache-dtype fp32", zeros=False)
    assert dense[1] == "dejavu chat m --cache-dtype fp32 --dense"


@needs_library
def test_an_adapter_that_is_a_screened_head_has_a_row(tiny: Tiny) -> None:
    model = tiny("llama", num_layers=1)
    engine: dict[str, Any] = ENGINE | {"options": EngineOptions(backend="native", dtype="fp32")}
    screen = screen_of(model, threshold=0.2)
    found = trial(model, own=None, screen=screen, threshold_ids=random_ids(99), measured_ids=random_ids(300, 1), **engine)
    own = found.rows[1]
    assert own.way == "its adapter" and own.rise == 0.0 and own.tok_s and own.mlp_density == 1.0


@pytest.fixture
def work(tiny: Tiny, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    export(tiny("llama", num_layers=1), tokenizer, tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT * 4)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["try", "model", "--text", "text.txt", "--backend", "torch"]
    assert run([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["rows"]) == 1 + 2 * len(DENSITIES) and found["advice"] and found["command"].startswith("dejavu ")
    assert "model --backend torch" in found["command"]  # it runs as it was tried
    assert found["peak_bytes"] > 1e7 and found["model"] == "model" and math.isfinite(found["rows"][1]["rise"])
    assert run(["try", str(work / "model"), *arguments[2:]]) == 0  # a path is no name for results, and yet a model
    shown = capsys.readouterr().out
    assert "What it gains here" in shown and "gate 0.7" in shown and "Next: dejavu" in shown


def test_a_system_that_does_not_tell_memory(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)
    assert run(["try", "model", "--text", "text.txt", "--backend", "torch", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["peak_bytes"] is None


def test_what_does_not_fit_is_said_before_weights_are_read(
    work: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dejavu.model.checkpoint.Assembler.add", None)
    monkeypatch.setattr("dejavu.kernels.memory.available_bytes", lambda root: 10_000)
    assert run(["try", "model", "--backend", "torch"]) == 2
    error = capsys.readouterr().err
    assert "model in fp32 takes about 0.0 GB, and 0.0 GB are free on this machine; take a smaller model" in error and error.count("\n") == 1
    config = tiny("llama").config
    sizes = {"fp16": 1000, "q4_1": 320}
    assert memory_needed(sizes, config, backend="torch", dtype="fp32") == 4 * 1320
    assert memory_needed(sizes, config, backend="native", dtype="stored") == 4 * (2000 + 200)
    assert (command.peak_bytes("torch") or 0) > 1e7


def test_a_bundled_adapter_of_the_model_is_named() -> None:
    [name] = bundled_adapters()
    config = json.loads((MODELS_FOLDER / name / "adapter" / "config.json").read_text())
    assert bundled_adapter_of(config["base_hashes"][0]) == name and bundled_adapter_of("another") is None
