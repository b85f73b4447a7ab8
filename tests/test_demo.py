"""The demo on a tiny model: every step runs, the numbers are those of the steps, and the packaged text is what it says."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import Tiny, open_fp32
from dejavu.engine.backends import make_engine
from dejavu.engine.options import EngineOptions
from dejavu.generation.generation import generate_tokens
from dejavu.kernels.native import missing_reason
from dejavu.loading import load
from dejavu.model.adapter import Adapter
from dejavu.model.bundle import write_bundle
from dejavu.model.checkpoint import Checkpoint
from dejavu.model.tokenizer import Tokenizer
from dejavu.offline.train_config import TrainConfig
from dejavu.report.activation_map import activation_map, binned
from dejavu.report.demo import DATA, PROMPT, DemoSizes, demo_texts, run_demo, stated_quality
from dejavu.report.report import read_results, render
from helpers.adapters import mlp_of, varied_adapter, without_predictors

SMALL = DemoSizes(
    profile_tokens=300,
    train_tokens=1600,
    evaluation_tokens=200,
    oracle_tokens=60,
    recall_tokens=120,
    curve_tokens=120,
    new_tokens=12,
    runs=2,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny, tokenizer: Tokenizer) -> Checkpoint:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_bundle(tiny("opt", max_positions=128), tokenizer, folder)
    return open_fp32(folder)


@pytest.fixture(scope="module")
def adapter(checkpoint: Checkpoint) -> Adapter:
    """Layer 0 with a predictor for neurons, layer 1 for neurons and heads."""
    return varied_adapter(checkpoint.config, checkpoint.base_hash)


def demo(checkpoint: Checkpoint, adapter: Adapter | None, output: Path, **options: Any) -> dict[str, Any]:
    names = [name for name in ("backend", "threads", "dtype") if name in options]
    engine: dict[str, Any] = {"backend": "torch", "threads": 1} | {name: options.pop(name) for name in names}
    settings: dict[str, Any] = {"retrain": False, "options": EngineOptions(**engine), "seed": 0, "sizes": SMALL, **options}
    return run_demo(checkpoint, adapter, output=output, **settings)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, checkpoint: Checkpoint, adapter: Adapter) -> tuple[dict[str, Any], Path, list[str]]:
    output = tmp_path_factory.mktemp("runs") / "demo"
    said: list[str] = []
    return demo(checkpoint, adapter, output, say=said.append), output, said


def test_the_summary_is_what_was_measured(finished: tuple[dict[str, Any], Path, list[str]], adapter: Adapter) -> None:
    summary, output, said = finished
    results = read_results([output])
    assert set(summary) == {
        "dense",
        "sparse",
        "speedup",
        "mlp_density",
        "head_density",
        "read_share",
        "backend",
        "dtype",
        "lookahead",
        "report",
    }
    assert (summary["backend"], summary["dtype"]) == (results["environment"]["backend"], results["environment"]["dtype"])
    for side in ("dense", "sparse"):
        assert set(summary[side]) == {"tok_s", "ppl", "text"}
        assert summary[side]["ppl"] == results["evaluation"][side]["ppl"] > 1
        assert summary[side]["text"] == results["generation"][side]["text"]
        assert len(results["generation"][side]["tok_s_runs"]) == SMALL.runs
    assert summary["speedup"] == pytest.approx(summary["sparse"]["tok_s"] / summary["dense"]["tok_s"])
    assert 0 < summary["mlp_density"] < 1 and summary["mlp_density"] == results["evaluation"]["mlp_density"]
    assert 0 < summary["head_density"] < 1
    assert summary["lookahead"] == [mlp_of(layer).lookahead for layer in adapter.layers] == [0, 1]
    assert summary["dense"]["ppl"] != summary["sparse"]["ppl"]
    json.dumps(summary, allow_nan=False)
    assert any("tokens per second" in line for line in said) and any("perplexity" in line for line in said)


def test_the_page_can_be_drawn_again(finished: tuple[dict[str, Any], Path, list[str]]) -> None:
    summary, output, _ = finished
    page = Path(summary["report"])
    assert page == output / "report.html"
    html = page.read_text(encoding="utf-8")
    assert html == render(read_results([output]))
    for figure in ("density", "mass", "cosine", "recall_mlp", "recall_heads", "ppl_mlp", "ppl_heads", "head_share"):
        assert f'id="figure-{figure}"' in html
    assert html.count('class="firing strips"') == 2
    assert PROMPT in html


def test_retraining(tmp_path: Path, checkpoint: Checkpoint) -> None:
    steps: list[str] = []
    training = TrainConfig(rank=2, budget=0.9, epochs=1.0)  # small and generous, so that sparsity pays in a tiny random model
    summary = demo(
        checkpoint, None, tmp_path / "run", retrain=True, training=training, progress=lambda what, done, total: steps.append(what)
    )
    results = read_results([tmp_path / "run"])
    assert "trained" in results["train"]["source"] and len(results["train"]["layers"]) == 2
    assert results["seconds"]["train"] > 0
    assert len(summary["lookahead"]) == 2
    assert "generate" in steps


def test_what_cannot_be_run(tmp_path: Path, checkpoint: Checkpoint, adapter: Adapter) -> None:
    with pytest.raises(ValueError, match="without an adapter.*--retrain"):
        demo(checkpoint, None, tmp_path / "a")
    with pytest.raises(ValueError, match="unknown backend 'abacus'"):
        demo(checkpoint, adapter, tmp_path / "a", backend="abacus")
    with pytest.raises(ValueError, match="threads must be at least 1, not 0"):
        demo(checkpoint, adapter, tmp_path / "a", threads=0)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="did not write"):
        demo(checkpoint, adapter, tmp_path / "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("method", ["exact", "gate", "input"])
def test_an_adapter_without_predictors_is_shown_too(method: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Layer 0 is dense; figures of predictors are left out."""
    adapter = without_predictors(method, checkpoint.config, checkpoint.base_hash)
    summary = demo(checkpoint, adapter, tmp_path / "run")
    results = read_results([tmp_path / "run"])
    assert summary["lookahead"] == [None, None] and results["train"]["method"] == method
    assert summary["mlp_density"] < 1 and (summary["head_density"] < 1) == (method == "input")
    dense, selected = results["train"]["layers"]
    assert (dense["density"], selected["recall"], selected["lookahead"]) == (1.0, None, None)
    if method == "input":  # points after the first two keep a half; down is one of the two matrices
        assert selected["inputs"] == {"attention": 0.5, "output": 1.0, "mlp": 0.5, "down": 0.5} and selected["density"] == 0.5
        assert selected["attention"] == 0.75 * 0.5 + 0.25
    else:
        assert (selected["density"], selected["mass"]) == (0.25, 0.99)
    html = Path(summary["report"]).read_text(encoding="utf-8")
    assert 'id="figure-ppl_mlp"' in html and 'id="figure-recall_mlp"' not in html
    assert {point["kind"] for point in results["curves"]["mlp"]} == {"oracle"}
    assert (summary["dense"]["ppl"] == pytest.approx(summary["sparse"]["ppl"], rel=1e-6)) == (method == "exact")


def test_stated_quality_has_the_shape_of_a_training_report(adapter: Adapter, tiny: Tiny) -> None:
    stated = stated_quality(adapter, tiny("opt").config)
    part = {"recall": 0.9, "mass": 0.99, "density": 0.125}
    assert stated["layers"] == [
        {**part, "lookahead": 0, "heads": None},
        {**part, "lookahead": 1, "heads": {**part, "lookahead": 1}},
    ]


def test_the_picture_is_the_engines_record(checkpoint: Checkpoint, adapter: Adapter) -> None:
    engine = make_engine(checkpoint.model, adapter.layers, EngineOptions(backend="torch", record=True))
    prompt_ids = checkpoint.tokenizer.encode("the cat")
    text = generate_tokens(engine, checkpoint.tokenizer, prompt_ids, max_new_tokens=9, ignore_eos=True).result()
    data = activation_map(checkpoint.model, checkpoint.tokenizer, adapter.layers, prompt_ids, text)
    assert len(data["tokens"]) == 8, "the last token is not read"
    assert text.mlp_density == pytest.approx(sum(layer["density"] for layer in data["layers"]) / 2)
    assert text.head_density == pytest.approx(sum(layer["head_density"] for layer in data["layers"]) / 2)
    assert [layer["predicted"] for layer in data["layers"]] == [True, True]
    assert [layer["heads_predicted"] for layer in data["layers"]] == [False, True]
    assert text.trace is not None
    for index, layer in enumerate(data["layers"]):
        heads_HN = np.frombuffer(base64.b64decode(layer["heads"]), dtype=np.uint8).reshape(layer["num_heads"], 8)
        neurons_PN = np.frombuffer(base64.b64decode(layer["neurons"]), dtype=np.uint8).reshape(layer["rows"], 8)
        for column, step in enumerate(text.trace[1:]):
            assert step is not None
            chosen = step[index].heads_A
            ran = list(range(4)) if chosen is None else sorted(chosen.tolist())
            assert heads_HN[:, column].nonzero()[0].tolist() == ran
            neurons = step[index].neurons_A
            assert neurons is not None and (neurons_PN[:, column] > 0).any() == (len(neurons) > 0)
        assert (heads_HN.max(axis=0) == 255).all() or index == 1, "the strongest head of a dense layer is full"


def test_a_dense_layer_shows_what_fired(checkpoint: Checkpoint) -> None:
    layers = tuple(type(layer)() for layer in varied_adapter(checkpoint.config, checkpoint.base_hash).layers)
    engine = make_engine(checkpoint.model, layers, EngineOptions(backend="torch", record=True))
    text = generate_tokens(engine, checkpoint.tokenizer, [5, 6, 7], max_new_tokens=6, ignore_eos=True).result()
    data = activation_map(checkpoint.model, checkpoint.tokenizer, layers, [5, 6, 7], text)
    assert all(not layer["predicted"] and 0.1 < layer["density"] < 0.9 and layer["head_density"] == 1 for layer in data["layers"])


def test_neurons_are_ordered_by_first_use() -> None:
    ran_NF = torch.tensor([[0, 0, 1, 0], [1, 0, 0, 1], [0, 0, 1, 1]], dtype=torch.bool)
    assert binned(ran_NF).tolist() == [[1, 0, 1], [0, 1, 1], [0, 1, 0]], "neurons 2, 3 (twice), 0; neuron 1 never ran"
    assert binned(ran_NF, bins=1).flatten().tolist() == pytest.approx([1 / 3, 2 / 3, 2 / 3])
    assert binned(torch.zeros(3, 4, dtype=torch.bool)).tolist() == [[0, 0, 0]]


@pytest.mark.parametrize(("name", "least"), [("calibration", 90_000), ("evaluation", 45_000)])
def test_packaged_text(name: str, least: int) -> None:
    texts = demo_texts(name)
    assert least < sum(len(text.encode()) for text in texts.values()) < 1.15 * least
    for title, text in texts.items():
        head = dict(line.split(": ", 1) for line in text.splitlines()[:5] if line)
        assert set(head) == {"Title", "Author", "Year"} and title.startswith(head["Title"])
        assert int(head["Year"]) < 1925
        assert head["Title"] in (DATA / "README.md").read_text(encoding="utf-8")
        assert "<|endoftext|>" not in text and "\r" not in text


def test_packaged_texts_do_not_overlap() -> None:
    def passages(name: str) -> set[str]:
        text = " ".join(part.split("\n", 5)[5] for part in demo_texts(name).values())
        return {text[start : start + 50] for start in range(len(text) - 50)}

    def authors(name: str) -> set[str]:
        return {line for text in demo_texts(name).values() for line in text.splitlines() if line.startswith("Author: ")}

    assert not passages("calibration") & passages("evaluation")
    assert not authors("calibration") & authors("evaluation")


@pytest.mark.skipif(missing_reason() is not None, reason="the native library is absent")
@pytest.mark.parametrize("retrain", [False, True])
def test_a_model_that_keeps_its_int8_rows(tmp_path: Path, checkpoint: Checkpoint, adapter: Adapter, retrain: bool) -> None:
    """As `dejavu demo` opens the bundled model for the native engine."""
    lm = load(checkpoint.path, backend="native")
    assert lm.dtype == "int8" and lm.model.blocks[0].up.quantized is not None
    training = TrainConfig(epochs=1, budget=0.5, rank=4) if retrain else None
    options = replace(lm.options, threads=1)
    settings: dict[str, Any] = {"retrain": retrain, "training": training, "options": options, "seed": 0, "sizes": SMALL}
    summary = run_demo(lm.checkpoint, adapter, output=tmp_path / "run", **settings)
    assert summary["dtype"] == "int8" and summary["sparse"]["ppl"] > 0
