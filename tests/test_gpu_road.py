"""recipes/gpu_road.py on a tiny made-up model: every step, a run that goes on, a step that fails; the files of results/community."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from dejavu.bench.fastest import SPEEDS
from dejavu.bench.models.folder import write_planted
from dejavu.bench.models.made_up import made_up
from dejavu.bench.models.random import SHAPES, shape_of
from dejavu.model.families import parameter_shapes

ROOT = Path(__file__).resolve().parents[1]
STEPS = ["load", "text", "profile", "train", "eval", "tasks", "generate", "serve"]
SIZES: dict[str, Any] = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 96, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4, "head_dim": 8,
    "max_positions": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def recipe() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "recipes"))
        yield importlib.import_module("gpu_road")


@pytest.fixture(scope="module")
def rows(recipe: ModuleType) -> ModuleType:
    return sys.modules["road_rows"]


@pytest.fixture(autouse=True)
def small_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(shape_of("opt-6.7b"), **SIZES)
    monkeypatch.setitem(SHAPES, "opt-small", lambda: config)
    monkeypatch.setattr("dejavu.bench.fastest.speeds", lambda *_, **__: dict.fromkeys(SPEEDS))  # seconds of timing


def arguments(model: str, folder: Path, *more: str) -> list[str]:
    sizes = {
        "train-tokens": 1500,
        "eval-tokens": 300,
        "profile-tokens": 300,
        "new-tokens": 5,
        "piece": 40,
        "epochs": 1,
        "rank": 8,
        "budget": 0.9,
    }
    return [
        model,
        "-o",
        str(folder),
        "--backend",
        "torch",
        *(part for key, value in sizes.items() for part in (f"--{key}", str(value))),
        *more,
    ]


def road(recipe: ModuleType, given: list[str]) -> int:
    return recipe.Road(recipe.options(given)).run()


def row_of(rows: ModuleType, folder: Path) -> Any:
    [path] = folder.glob("opt-small-*.json")
    return rows.read_road(path)


def test_a_shape_goes_the_whole_road_and_a_second_run_does_nothing_again(
    recipe: ModuleType, rows: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert road(recipe, arguments("opt-small", tmp_path)) == 0
    row, shown = row_of(rows, tmp_path), capsys.readouterr().out
    steps = row.result["steps"]
    assert list(steps) == STEPS and {name for name in STEPS if steps[name]["state"] != "done"} == {"tasks"}
    assert steps["tasks"]["why"] == "weights are made up" and steps["train"]["host_gb"] > 0.05
    found = row.result["found"]
    assert 200 < found["eval_tokens"] <= 300 and found["mlp_density"] < 1 and found["tok_s_sparse"] > 0 and found["natural_density"] < 0.2
    assert (row.model, row.result["shape"], row.result["parameters"]) == (
        "opt-small",
        "opt-small",
        sum(map(math.prod, parameter_shapes(shape_of("opt-small")).values())),
    )
    assert f"{found['cosine']:.3f}" in shown and "2 times FasterTransformer" in shown
    assert road(recipe, arguments("opt-small", tmp_path)) == 0
    assert "train: done before" in capsys.readouterr().out
    again = row_of(rows, tmp_path).result
    assert again["found"] == found and again["steps"]["train"] == steps["train"]
    with pytest.raises(ValueError, match="is of a run with other options; choose another folder"):
        road(recipe, arguments("opt-small", tmp_path, "--seed", "1"))


def harness_results(lm: Any, tasks: list[str], *, limit: int | None) -> dict[str, Any]:
    """Of a machine on which the data of one task is not."""
    if tasks == ["cb"]:
        raise ConnectionError("no network")
    return {"dense": {"copa": {"acc": 0.5}}, "sparse": None}


def test_a_step_that_fails_is_reported_and_tried_again_and_the_others_are_done(
    recipe: ModuleType, rows: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_planted(made_up("opt-small", rank=8), tmp_path / "opt-small")
    given = arguments(str(tmp_path / "opt-small"), tmp_path / "run", "--harness", "cb", "copa")
    monkeypatch.setattr(recipe.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "dejavu.harness", SimpleNamespace(harness_results=harness_results))
    with monkeypatch.context() as patch:
        patch.setattr(
            recipe.LanguageModel, "train_measured", lambda *_, **__: (_ for _ in ()).throw(MemoryError(f"lower it, see {tmp_path}/x"))
        )
        assert road(recipe, given) == 1
    steps = row_of(rows, tmp_path / "run").result["steps"]
    assert steps["train"]["state"] == "failed" and steps["train"]["why"] == "MemoryError: lower it, see x"
    assert steps["profile"]["state"] == "done" and steps["serve"]["why"] == "there is no adapter"
    assert "lower it" in (tmp_path / "run" / "errors.txt").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(recipe.LanguageModel, "evaluate", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            road(recipe, given)
    assert road(recipe, given) == 0
    row = row_of(rows, tmp_path / "run")
    assert row.result["shape"] == "opt-small" and row.result["steps"]["serve"]["state"] == "done"
    assert row.result["claims"][0]["measured"] is not None and row.result["found"]["tasks"] == {"copa dense": {"acc": 0.5}}
    assert {name: step["runs"] for name, step in row.result["steps"].items() if "runs" in step} == {"eval": 2}


def test_files_of_other_people_are_of_the_schema(rows: ModuleType) -> None:
    for path in sorted(rows.COMMUNITY.glob("*")):
        assert path.suffix in (".json", ".md")
        if path.suffix == ".json":
            rows.read_road(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, "unknown keys.*extra"),
        ({"steps": {"load": {"state": "sleeping", "seconds": None, "gpu_gb": None, "host_gb": None}}}, "state is no"),
        (
            {"steps": {"load": {"state": "failed", "seconds": None, "gpu_gb": None, "host_gb": None, "why": "no /somebody/x/y"}}},
            "names folders",
        ),
        ({"layers": "two"}, "layers is no int"),
    ],
)
def test_a_file_that_is_not_of_the_schema_is_named(rows: ModuleType, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    result = {"shape": None, "layers": 2, "parameters": 9, "backend": "cuda", "dtype": "fp16", "method": "predicted", "budget": 0.005}
    result |= {"text": "wiki.txt", "steps": {}, "found": {}, "claims": []} | change
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"model": "m", "result": result}))
    with pytest.raises(ValueError, match=f"mine.json: .*{message}"):
        rows.read_road(path)
