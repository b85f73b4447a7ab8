"""Training without predictors: candidates, what they read and cost, the budget, and which method auto takes."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import dejavu
from conftest import Tiny
from dejavu.bench import comparison, fastest, fastest_head
from dejavu.bench.fastest import chosen, speeds
from dejavu.cli.main import run
from dejavu.engine.options import EngineOptions
from dejavu.engine.torch_engine import TorchEngine
from dejavu.model.adapter import Adapter
from dejavu.model.bundle import export
from dejavu.model.checkpoint import Checkpoint
from dejavu.model.fingerprint import model_hash
from dejavu.model.masked import MaskedSelection
from dejavu.model.selectors import POINTS, GateThreshold, InputPoints, InputThresholds, LayerAdapter
from dejavu.model.selectors.dense import head_reads, mlp_reads
from dejavu.model.selectors.gate import gate_reads
from dejavu.model.selectors.inputs import input_reads
from dejavu.model.tokenizer import Tokenizer
from dejavu.model.transformer import Transformer
from dejavu.offline import curvature, train
from dejavu.offline.budget import Fitted
from dejavu.offline.calibrate import token_reads
from dejavu.offline.collect import pack_windows
from dejavu.offline.fidelity import Comparison, divergences, token_nll
from dejavu.offline.split import LONGEST, split_windows, training_context
from dejavu.offline.train import Trained, methods_of, train_adapter, train_adapters
from dejavu.offline.train_config import TrainConfig
from dejavu.offline.train_plain import plain_parts
from dejavu.offline.training_text import TrainingText
from dejavu.quality.perplexity import half_windows
from helpers.engines import decode
from helpers.native import needs_library
from helpers.offline import random_ids, skewed
from helpers.texts import TEXT

AUTO = ("--method", "auto", "--json")
DOCUMENTS = [random_ids(300, seed) for seed in range(6)]


def checkpoint_of(model: Transformer, tokenizer: Tokenizer) -> Checkpoint:
    return Checkpoint(
        model=model, tokenizer=tokenizer, config=model.config, name="tiny", base_hash=model_hash(model), stored_dtype="fp32", notes=(),
        path=Path("tiny"),
    )  # fmt: skip


@pytest.fixture
def relu(tiny: Tiny, tokenizer: Tokenizer) -> Checkpoint:
    return checkpoint_of(skewed(tiny), tokenizer)


@pytest.fixture
def silu(tiny: Tiny, tokenizer: Tokenizer) -> Checkpoint:
    return checkpoint_of(tiny("llama", num_layers=3), tokenizer)


def test_a_rise_is_within_the_budget_with_its_standard_error(silu: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """As each check holds it against the budget: what none of them let pass is not said to keep it, and auto does not take it."""
    for error, held in ((0.05, True), (0.3, False)):
        found = Comparison(10.0, 10.2, 0.016, error * 0.02)
        monkeypatch.setattr("dejavu.offline.budget.compare_runs", lambda *_, found=found: found)
        assert trained(silu, "gate", budget=0.02)[1]["within_budget"] is held


def test_slopes_are_the_same_of_a_few_tokens_at_a_time(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the likeliest token in the place of a drawn one; the last piece is smaller."""
    model, ids = tiny("llama"), torch.tensor([random_ids(14, seed) for seed in range(3)])
    monkeypatch.setattr(torch, "multinomial", lambda probability_NV, _, generator: probability_NV.argmax(1, keepdim=True))
    found = []
    for tokens in (1000, 5):
        monkeypatch.setattr(curvature, "LOGITS", tokens * model.config.vocab_size + 1)
        found.append(list(curvature.layer_slopes(model, ids, seed=0)))
    for one, other in zip(*found, strict=True):
        assert one.slopes["down"].abs().max() > 0
        for point, slope_NI in one.slopes.items():
            torch.testing.assert_close(other.slopes[point], slope_NI)


def trained(checkpoint: Checkpoint, method: str, budget: float = 0.02, **more: Any) -> tuple[Adapter, dict[str, Any]]:
    config = TrainConfig.from_dict({"method": method, "budget": budget, "rank": 8, "epochs": 1})
    return train_adapter(checkpoint, DOCUMENTS, config, text_hash="abc", **more)


@pytest.mark.parametrize("kind", ["relu", "silu"])
@pytest.mark.parametrize("method", ["gate", "input"])
def test_an_adapter_keeps_its_budget_on_disk_and_where_it_decodes(
    method: str, kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    checkpoint = request.getfixturevalue(kind)
    adapter, result = trained(checkpoint, method, work_folder=tmp_path / "work")
    assert (adapter.config.method, result["method"]) == (method, method) and len(result["layers"]) == 3
    assert result["within_budget"] and result["rise"] <= 0.02
    assert result["mlp_density"] < 1 and (result["head_density"] < 1) == (method == "input")
    assert result["read_share"] < 1
    # The numbers are those of the saved adapter on the windows that nothing else has seen.
    adapter.save(tmp_path / "adapter")
    loaded = Adapter.load(tmp_path / "adapter", model=checkpoint.config, base_hash=checkpoint.base_hash)
    check = split_windows(pack_windows(DOCUMENTS, context=64, bos=2)).check
    selection = MaskedSelection(loaded.layers)
    nll = token_nll(checkpoint.model, check, selection)
    assert math.exp(float(nll.double().mean())) == pytest.approx(result["ppl_sparse"], rel=1e-6)
    assert selection.counter.mlp_density() == pytest.approx(result["mlp_density"])
    # Decode reads that much.
    engine = TorchEngine(checkpoint.model, loaded.layers)
    _, steps = decode(engine, check[0].tolist())
    counted = [step.counts.densities(engine.info)[0] for step in steps]
    assert float(torch.cat(counted).mean()) == pytest.approx(result["mlp_density"], abs=0.1)
    # A second run finds the priced parts and gives the same.
    seen: list[str] = []
    again, _ = trained(checkpoint, method, work_folder=tmp_path / "work", progress=lambda what, *_: seen.append(what))
    assert again.config == adapter.config and "what each part costs" not in seen
    nothing_lost, result = trained(checkpoint, method, budget=0.0, work_folder=tmp_path / "work")
    assert result["rise"] == 0
    for layer in nothing_lost.layers:  # dense, or without what is exactly zero
        zeros = LayerAdapter(neurons=GateThreshold(threshold=0.0)) if method == "gate" else LayerAdapter(inputs=InputThresholds(down=0.0))
        assert layer == (zeros if kind == "relu" else LayerAdapter())


def test_exact_loses_nothing(relu: Checkpoint, silu: Checkpoint) -> None:
    adapter, result = trained(relu, "exact", budget=0.0)
    assert (result["rise"], result["rise_stderr"]) == (0.0, 0.0) and result["within_budget"]
    assert all(layer.neurons == GateThreshold(threshold=0.0) for layer in adapter.layers)
    assert 0 < result["mlp_density"] < 0.9 and result["head_density"] == 1
    measured = [entry.entries["gate"].density for entry in adapter.config.layers]
    assert sum(measured) / 3 == pytest.approx(result["mlp_density"])
    with pytest.raises(ValueError, match=r"method exact needs a gate with exact zeros \(relu, relu2, fatrelu\), and this model has silu"):
        trained(silu, "exact")


def test_candidates_keep_what_they_say_and_cost_less_the_more_they_keep(silu: Checkpoint) -> None:
    model, ids = silu.model, torch.tensor([random_ids(60, seed) for seed in range(4)])
    found = plain_parts(model, ids, ("gate", "input"), seed=0)
    for method, kinds in (("gate", ("gate",)), ("input", POINTS)):
        assert [(part.layer, part.kind) for part in found[method]] == [(layer, kind) for layer in range(3) for kind in kinds]
        for part in found[method]:
            density = [candidate.quality.density for candidate in part.candidates]
            cost = [candidate.divergence for candidate in part.candidates]
            threshold = [candidate.threshold for candidate in part.candidates]
            assert density == sorted(density) and density[0] < 0.6 and density[-1] > 0.9
            assert threshold == sorted(threshold, reverse=True) and threshold[-1] >= 0
            assert cost[0] > 2 * cost[-2] > 0 and (threshold[-1], cost[-1], part.candidates[-1].quality.mass) == (0, 0, 1)
            chosen = part.candidates[len(part.candidates) // 2]
            assert chosen.reads < part.dense_reads
    # What the passes that price count is what the thresholds say.
    part = found["input"][0]
    candidate = part.candidates[len(part.candidates) // 2]
    option = LayerAdapter(inputs=InputThresholds(attention=candidate.threshold))
    only = tuple(option if i == part.layer else LayerAdapter() for i in range(3))
    selection = MaskedSelection(only)
    with torch.inference_mode():
        model(ids, selection)
    attention = InputPoints.of(model.config).shares[0]
    assert selection.counter.heads_per_layer()[0] == pytest.approx(attention * candidate.quality.density + 1 - attention, abs=1e-5)


def test_what_a_token_reads(tiny: Tiny) -> None:
    for family in ("opt", "llama"):
        model = tiny(family)
        config, block = model.config, model.blocks[0]
        weights = sum(parameter.numel() for name, parameter in block.named_parameters() if parameter.dim() == 2)
        cache = 2 * config.num_kv_heads * config.head_dim * 100
        ones = [1.0] * 2
        assert token_reads(config, [LayerAdapter()] * 2, ones, ones, 100) == 2 * (weights + cache)
        assert sum(input_reads(config, point, None) for point in POINTS) == weights
        assert gate_reads(config, 1.0) == mlp_reads(config, 1.0, None)
        matrices = 3 if config.gated else 2
        assert gate_reads(config, 0.25) == (0.25 + 0.75 / matrices) * mlp_reads(config, 1.0, None)
        assert input_reads(config, "down", 0.5) == block.down.weight.numel() / 2 + config.intermediate_size
        key_value = 2 * config.num_kv_heads * config.head_dim * config.hidden_size
        assert head_reads(config, 1.0, None, 0) + key_value == weights - mlp_reads(config, 1.0, None)


def test_auto_trains_what_a_model_can_have(relu: Checkpoint, silu: Checkpoint) -> None:
    for checkpoint, methods in ((relu, ["predicted", "exact", "gate", "input"]), (silu, ["gate", "input"])):
        assert list(methods_of(checkpoint.config)) == methods
        config = TrainConfig.from_dict({"method": "auto", "budget": 0.02, "rank": 8, "epochs": 1})
        found = train_adapters(checkpoint, TrainingText.of(checkpoint, DOCUMENTS), config, text_hash="abc")
        assert [adapter.config.method for adapter, _ in found] == [result["method"] for _, result in found] == methods
        alone, reached = trained(checkpoint, methods[-1])
        assert alone.config == found[-1][0].config and reached["reads"] == found[-1][1]["reads"]


@pytest.mark.parametrize("method", ["predicted", "input"])
def test_a_large_model_is_measured_on_beginnings_of_windows(method: str, relu: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Predictors train on whole windows all the same."""
    for name, value in (("CHECKED", 0.0), ("LEAST_CHECKED", 80), ("SHORTEST", 20)):
        monkeypatch.setattr(f"dejavu.offline.split.{name}", value)
    measured = split_windows(pack_windows(DOCUMENTS, context=64, bos=2)).measured(1)
    assert measured.check.shape[1] < 64 and measured.calibrate.shape == (1, 20)
    adapter, result = trained(relu, method)
    nll = token_nll(relu.model, measured.check, MaskedSelection(adapter.layers))
    assert math.exp(float(nll.double().mean())) == pytest.approx(result["ppl_sparse"], rel=1e-6)


def test_auto_does_not_try_what_cannot_be_faster(silu: Checkpoint) -> None:
    config = TrainConfig.from_dict({"method": "auto", "budget": 1e-7})
    seen: list[str] = []
    found = train_adapters(silu, TrainingText.of(silu, DOCUMENTS), config, text_hash="abc", progress=lambda what, *_: seen.append(what))
    for adapter, result in found:
        assert "not tried" in result["speed_note"] and not any(layer.sparse for layer in adapter.layers)
        assert (result["rise"], result["mlp_density"], result["read_share"], result["within_budget"]) == (0.0, 1.0, 1.0, True)
    assert seen and not [what for what in seen if "budget" in what]
    _, result = trained(silu, "gate", budget=1e-7)  # what is asked for by name is tried
    assert "speed_note" not in result


def measured(speeds: dict[str, float | None], over: tuple[str, ...] = ()) -> list[Trained]:
    """Made-up measurements by method; those in `over` do not keep the budget."""
    common = {"rise": 0.01, "rise_stderr": 0.0, "mlp_density": 0.5, "head_density": 1.0, "reads": 60.0, "read_share": 0.6, "seconds": 1.0}
    common |= {"ppl_dense": 9.0, "ppl_sparse": 9.1, "budget": 0.02, "tokens": 10, "tokens_given": 10, "layers": [1, 2]}
    adapters: Any = {method: method for method in speeds}
    return [
        (
            adapters[method],
            common | {"method": method, "within_budget": method not in over, "speedup": speedup, "tok_s": 1, "tok_s_dense": 1},
        )
        for method, speedup in speeds.items()
    ]


@pytest.mark.parametrize(
    ("speeds", "over", "method", "why"),
    [
        ({"gate": 1.2, "input": 1.4}, (), "input", "input is fastest here: 1.40x dense, perplexity +1.00%"),
        ({"gate": 1.2, "input": 1.4}, ("input",), "gate", "gate is fastest here: 1.20x dense"),
        ({"gate": 0.97, "input": 0.82}, (), None, "sparsity does not pay here (gate, the fastest, 0.97x dense): the model stays dense"),
        ({"gate": 1.01, "input": None}, (), None, "does not pay here (gate, the fastest, 1.01x dense)"),
        ({"gate": 1.2}, ("gate",), None, "does not pay here: no method keeps the budget"),
        ({"gate": 0.9, "input": 1.4}, ("input",), None, "does not pay here (gate, the fastest, 0.90x dense)"),
    ],
)
def test_the_fastest_within_the_budget_or_dense(
    speeds: dict[str, float | None], over: tuple[str, ...], method: str | None, why: str
) -> None:
    taken, result = chosen(measured(speeds, over))
    assert (None if taken is None else taken[0]) == method and why in result["why"]
    assert [each["method"] for each in result["candidates"]] == list(speeds) and all("layers" not in each for each in result["candidates"])
    assert result["method"] == (method or "dense") and (method is not None or (result["ppl_sparse"], result["mlp_density"]) == (9.0, 1.0))


def test_auto_takes_no_method_that_went_over_the_budget(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The faster one lost more than the budget on the check windows: the slower one is written."""
    rises, speedups, fit = iter([0.0501, 0.05]), iter([1.9, 1.2]), train.fit

    def fitted(*arguments: Any) -> Fitted:
        found, rise = fit(*arguments), next(rises)
        return dataclasses.replace(found, checked=dataclasses.replace(found.checked, rise=rise), held=rise <= 0.05)

    monkeypatch.setattr(train, "fit", fitted)
    monkeypatch.setattr(fastest, "speeds", lambda *_, **__: {"tok_s": 9.0, "tok_s_dense": 9.0, "speedup": next(speedups)})
    assert (
        run(
            [
                "train",
                "model",
                "--text",
                "text.txt",
                "--max-tokens",
                "900",
                "--budget",
                "0.05",
                "-o",
                "adapter",
                *AUTO,
                "--backend",
                "torch",
            ]
        )
        == 0
    )
    result = json.loads(capsys.readouterr().out)
    assert [(found["method"], found["within_budget"]) for found in result["candidates"]] == [("gate", False), ("input", True)]
    assert (result["method"], result["rise"], result["speedup"]) == ("input", 0.05, 1.2)
    assert json.loads((work / "adapter" / "config.json").read_text())["method"] == "input"


def test_what_cannot_be_timed_says_why(relu: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = relu.model, DOCUMENTS[0]
    engine = {"options": EngineOptions(backend="torch"), "name": "tiny"}
    layers = (LayerAdapter(neurons=GateThreshold(threshold=0.0)),) * 3
    timed = speeds(model, layers, ids, **engine)
    assert timed["tok_s"] > 0 and timed["speedup"] == timed["tok_s"] / timed["tok_s_dense"]
    assert speeds(model, (LayerAdapter(),) * 3, ids, **engine)["speed_note"] == "no layer selects"
    assert "too short" in speeds(model, layers, ids[:9], **engine)["speed_note"]
    assert "not available" in speeds(model, layers, ids, EngineOptions(backend="torch", dtype="int8"), name="tiny")["speed_note"]

    timings: list[None] = []

    def slow(*arguments: Any, **options: Any) -> Any:
        timings.append(None)
        return bench(*arguments, **options)

    bench = fastest.bench
    monkeypatch.setattr(fastest, "bench", slow)
    monkeypatch.setattr(fastest, "LONG", 0.0)
    assert speeds(model, layers, ids, **engine)["speedup"] > 0 and len(timings) == 1  # a pass that takes long counts alone

    def full(*_: object, **__: object) -> None:
        raise MemoryError("8 GB are not free")

    monkeypatch.setattr(fastest, "bench", full)  # what was trained is not lost for want of memory to time it
    assert speeds(model, layers, ids, **engine) == {"tok_s": None, "tok_s_dense": None, "speedup": None, "speed_note": "8 GB are not free"}


def test_what_a_model_cannot_have_points_to_what_it_can(silu: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"method predicted needs .* this model has silu; use --method auto.*dejavu adapt"):
        trained(silu, "predicted")
    with pytest.raises(ValueError, match="method 'guess' is not supported; supported: predicted, exact, gate, input, head, auto"):
        TrainConfig.from_dict({"method": "guess"})


def test_windows_are_not_longer_than_they_need_be(tiny: Tiny) -> None:
    config = tiny("llama").config
    assert training_context(config) == config.max_positions
    assert training_context(dataclasses.replace(config, max_positions=8192)) == LONGEST


@pytest.fixture
def work(tiny: Tiny, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny SiLU model and a text, which is where commands run."""
    export(tiny("llama", num_layers=2), tokenizer, tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT * 4)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("method", ["gate", "input"])
def test_every_command_runs_with_such_an_adapter(work: Path, method: str, capsys: pytest.CaptureFixture[str]) -> None:
    def call(*arguments: str) -> dict[str, Any]:
        assert run([*arguments, "--backend", "torch", "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    text = ("--text", "text.txt")
    found = call("train", "model", *text, "-o", "adapter", "--method", method, "--budget", "0.05", "--max-tokens", "1500")
    assert found["method"] == method and found["read_share"] < 1
    adapter = ("--adapter", "adapter")
    made = call("generate", "model", *adapter, "--prompt", "the cat", "-n", "8", "--ignore-eos")
    assert made["mlp_density"] < 1 and (made["head_density"] < 1) == (method == "input")
    rated = call("eval", "model", *adapter, *text, "--max-tokens", "200", "-o", "run")
    assert rated["sparse"]["mode"] == method and rated["mlp_density"] < 1 and rated["rise"] is not None
    timed = call("bench", "model", *adapter, *text, "--context", "8", "--steps", "6", "--density", "0.5")
    decoded = {row["mode"]: row for row in timed["rows"] if row["op"] == "decode"}
    assert 0.3 < decoded["sparse"]["mlp_density"] < 0.7 and decoded["dense"]["mlp_density"] == 1
    assert run(["report", "run", "adapter", "-o", "page.html"]) == 0
    page = (work / "page.html").read_text()
    assert "MLP density" in page and ("of the MLP's weights" in page.replace("&#39;", "'")) == (method == "input")
    lm = dejavu.load("model", adapter="adapter", backend="torch")
    assert lm.adapter is not None and lm.adapter.config.method == method


def test_auto_prints_what_each_method_reached(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "model", "--text", "text.txt", "--max-tokens", "2000"]
    assert run([*command, "-o", "adapter", "--method", "auto", "--budget", "0.05"]) == 0
    shown = capsys.readouterr().out
    assert "Methods" in shown and "gate" in shown and ("is fastest here" in shown) == (work / "adapter").is_dir()
    assert run([*command, "-o", "other"]) == 2
    assert "use --method auto" in capsys.readouterr().err.replace("\n", " ")


def test_auto_writes_no_adapter_where_dense_is_as_fast(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fastest, "speeds", lambda *_, **__: {"tok_s": 9.0, "tok_s_dense": 10.0, "speedup": 0.9})
    command = ["train", "model", "--text", "text.txt", "--max-tokens", "2000", "--budget", "0.05", "--backend", "torch", "-o", "adapter"]
    assert run([*command, "--method", "auto", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["adapter"] is None and result["method"] == "dense" and "does not pay here" in result["why"]
    assert [path.name for path in work.iterdir() if path.name.startswith("adapter")] == ["adapter.partial"]  # for another budget
    assert run([*command, "--method", "gate"]) == 0  # what is asked for by name is written, and said to be slower
    assert "slower than dense here" in capsys.readouterr().out and (work / "adapter").is_dir()
    monkeypatch.setattr(fastest, "speeds", lambda *_, **__: {"tok_s": 19.0, "tok_s_dense": 10.0, "speedup": 1.9})
    assert run([*command[:-1], "faster", "--method", "auto"]) == 0
    assert "is fastest here: 1.90x dense" in capsys.readouterr().out and (work / "faster").is_dir()


@needs_library
@pytest.mark.parametrize("method", ["gate+head", "head"])
def test_auto_writes_a_screened_head_where_that_is_faster(
    method: str, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And says what it misses; the adapter then generates, and is evaluated and timed."""

    def timed(model: Any, layers: Any, ids: Any, options: Any, *, screen: Any = None, **_: Any) -> dict[str, float]:
        speedup = (1.1 if method == "gate+head" and any(layer.sparse for layer in layers) else 1.0) * (1.0 if screen is None else 1.2)
        return {"tok_s": 10.0 * speedup, "tok_s_dense": 10.0, "speedup": speedup}

    monkeypatch.setattr(fastest, "speeds", timed)
    monkeypatch.setattr(fastest_head, "speeds", timed)
    monkeypatch.setattr("dejavu.offline.train.methods_of", lambda config: ("gate",))
    command = ["train", "model", "--text", "text.txt", "--max-tokens", "2000", "--budget", "0.3", "--backend", "native", "-o", "adapter"]
    assert run([*command, "--method", "auto"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{method} is fastest here: " in shown and "of probability missed, agreement" in shown
    more = ["model", "--adapter", "adapter", "--backend", "native"]
    assert run(["generate", *more, "--prompt", "the cat", "-n", "4"]) == 0
    assert "screened head at " in capsys.readouterr().out
    monkeypatch.setattr(comparison, "HALF_CONTEXT", 16)
    monkeypatch.setattr(comparison, "half_windows", lambda ids, *, bos: half_windows(ids, bos=bos, context=16))
    assert run(["bench", *more, "--text", "text.txt", "--context", "8", "--steps", "6", "--perplexity", "32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    qualities = [row["mode"] for row in found["perplexity"]]
    assert qualities == ["dense", *(["sparse"] if method == "gate+head" else [])], "a screened head alone is measured once, as dense"
    modes = {row["mode"]: row["screened_head"] for row in found["rows"] if row["op"] == "decode"}
    assert modes.keys() == {"dense", "sparse" if method == "gate+head" else "screened"} and modes.pop("dense") == 0 < next(
        iter(modes.values())
    )
    assert run(["report", "adapter", "-o", "page.html"]) == 0


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_slopes_tell_the_divergence_of_leaving_inputs_out(family: str, tiny: Tiny) -> None:
    model = tiny(family, **({"pre_norm": False, "final_norm": False, "embed_size": 16} if family == "opt" else {}))
    ids = torch.tensor([random_ids(60, seed) for seed in range(48)])
    for part in plain_parts(model, ids, ("input",), seed=0)["input"]:
        candidate = next(each for each in part.candidates if each.quality.mass > 0.97)
        option = LayerAdapter(inputs=InputThresholds(**{part.kind: candidate.threshold}))
        variants = [[option] if layer == part.layer else [] for layer in range(2)]
        measured = divergences(model, ids[:12], variants)[part.layer][0]
        assert candidate.divergence == pytest.approx(measured, rel=0.35), (part.layer, part.kind)
