"""Every command once on a tiny model: what it prints, the object of --json, what it leaves on disk, and how it resumes."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress

from dejavu.bench.rows import read_rows
from dejavu.cli.main import run
from dejavu.cli.output import Output, plain, ratio
from dejavu.engine.backends import pick_backend
from dejavu.engine.footprint import RUNTIME, check_fits
from dejavu.loading import load
from dejavu.model.bundle import export
from dejavu.model.families import parameter_shapes
from dejavu.model.source import read_config
from dejavu.report.demo import DemoSizes, run_demo
from helpers.command_line import obj
from helpers.native import needs_library
from helpers.screens import screen_of, with_screen
from helpers.texts import PROMPT


def test_help_and_version(call) -> None:
    assert call("--version").startswith("dejavu ")
    listed = call()
    assert call("--help") == listed
    commands = "demo profile train adapt eval generate chat bench serve bench-serve report export info"
    for command in commands.split():
        assert f"\n│ {command} " in listed and "--json" in call(command, "--help")


def test_info(call) -> None:
    result = obj(call("info", "--json"))
    assert {"backends", "cpu", "gpu", "threads", "versions", "models"} <= set(result)
    assert {b["name"]: b["available"] for b in result["backends"]}["torch"] is True
    assert "not available" in call("info") and result["cpu"] in call("info")


def test_info_of_a_model_reads_no_weights(call, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dejavu.model.checkpoint.Assembler.add", None)
    free = 600 << 20
    monkeypatch.setattr("dejavu.engine.footprint.available_bytes", lambda root: free)
    found = obj(call("info", "model", "--json"))
    config = read_config(work / "model")
    assert (found["family"], found["context"], found["stored_dtype"]) == (config.family, config.max_positions, "fp32")
    assert found["parameters"] == sum(math.prod(shape) for shape in parameter_shapes(config).values()) == found["types"]["fp32"]
    row = next(row for row in found["memory"] if row["backend"] == "torch" and row["dtype"] == "fp32")
    vector = config.head_dim * 4
    assert row["auto"] and row["weights"] == 4 * found["parameters"] and row["free"] == free
    assert row["cache_per_token"] == 2 * config.num_layers * config.num_kv_heads * vector
    assert row["cache_tokens"] == (free - RUNTIME - row["weights"]) // row["cache_per_token"]
    assert row["max_context"] == config.max_positions and row["max_batch"] == row["cache_tokens"] // config.max_positions
    assert found["tokenizer_error"] is None
    shutil.copytree(work / "model", work / "unread")
    (work / "unread" / "tokenizer.json").write_text("{}")
    found = obj(call("info", "unread", "--json"))
    assert found["chat_template"] is None and "tokenizer.json" in found["tokenizer_error"] and found["memory"]


def test_the_ways_out_of_too_little_memory_are_ways_out() -> None:
    sizes, dtypes = {"q4_k": 9_200_000_000}, ["fp32", "bf16", "stored"]
    with pytest.raises(ValueError, match=r"in fp32 takes about 37.2 GB of memory and 14.0 GB are free; take --dtype stored$"):
        check_fits("m", sizes, dtypes=dtypes, dtype="fp32", free=14_000_000_000)
    with pytest.raises(ValueError, match="take a smaller model$"):
        check_fits("m", sizes, dtypes=dtypes, dtype="fp32", free=1_000_000_000)
    with pytest.raises(ValueError, match="take a smaller model, or a file of fewer bits"):
        check_fits("m", sizes, dtypes=["fp32"], dtype="stored", free=1_000_000_000)


def test_what_does_not_fit_is_said_before_weights_are_read(work: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("dejavu.model.checkpoint.Assembler.add", None)
    monkeypatch.setattr("dejavu.engine.footprint.available_bytes", lambda root: RUNTIME + 10_000)
    assert run(["generate", str(work / "model"), "-p", "the", "--backend", "torch"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(
        r"model in fp32 takes about 0.4 GB of memory and 0.4 GB are free; take a smaller model", error
    )


def test_a_cache_that_does_not_fit_is_refused_before_it_is_made(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = load(work / "model", backend="torch")
    monkeypatch.setattr("dejavu.engine.footprint.available_bytes", lambda root: 50_000)
    monkeypatch.setattr("dejavu.engine.paged.PagedCache", None)
    with pytest.raises(MemoryError, match=r"1,008 tokens does not fit into memory: it takes [\d.]+ MB, and 0.05 MB are free, room"):
        lm.engine(num_slots=1, cache_tokens=1000)


def test_generate_for_people_and_programs(call) -> None:
    arguments = ("generate", "model", "--prompt", PROMPT, "-n", "6", "--ignore-eos", "--adapter", "adapter")
    result = obj(call(*arguments, "--json"))
    assert {"text", "tok_s", "prefill_tok_s", "mlp_density", "head_density", "read_share", "backend", "dtype"} <= set(result)
    assert result["backend"] == pick_backend() and result["new_tokens"] == 6 and 0 < result["mlp_density"] < 1
    shown = call(*arguments)
    assert PROMPT + result["text"] in shown and "tok/s" in shown and f"{result['mlp_density']:.3f}" in shown
    assert f"cache {result['cache_dtype']}" in shown and result["screened_head"] == 0 and "screened head" not in shown
    dense = obj(call("generate", "model", "--prompt", PROMPT, "-n", "6", "--ignore-eos", "--dense", "--json"))
    assert dense["mlp_density"] == dense["read_share"] == 1.0
    assert f"reads {result['read_share']:.1%} of a dense" in " ".join(shown.split())


def test_generate_says_that_the_context_is_full(work: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(work)
    assert run(["generate", "model", "-p", PROMPT, "-n", "99", "--ignore-eos", "--json"]) == 0
    captured = capsys.readouterr()
    result = obj(captured.out)
    assert result["finish_reason"] == "length" and result["prompt_tokens"] + result["new_tokens"] == 64
    note = f"the context of 64 tokens is full: {result['new_tokens']} of 99 tokens were written"
    assert captured.err == f"note: {note}\n" and note in result["notes"]


def test_a_seed_repeats_what_generate_draws(call) -> None:
    def drawn(seed: str) -> str:
        return obj(call("generate", "model", "-p", PROMPT, "-n", "12", "--temperature", "2", "--ignore-eos", "--seed", seed, "--json"))[
            "text"
        ]

    assert drawn("3") == drawn("3") != drawn("4")


def test_eval(call, work: Path) -> None:
    arguments = ("eval", "model", "--text", "*.txt", "--tasks", "quiz.jsonl", "--adapter", "adapter", "--max-tokens", "150", "--limit", "4")
    result = obj(call(*arguments, "--json"))
    for side in ("dense", "sparse"):
        assert set(result[side]["texts"]) == {"text.txt", "other.txt"} and result[side]["tasks"]["quiz"]["n"] == 4
        assert {"ppl", "bits_per_byte", "stderr", "tokens"} <= set(result[side]["texts"]["text.txt"])
    assert result["sparse"]["mlp_density"] == result["mlp_density"] < 1
    shown = call(*arguments)
    assert (
        f"{result['dense']['ppl']:.3f}" in shown and f"{result['sparse']['ppl']:.3f}" in shown and f"{result['mlp_density']:.3f}" in shown
    )
    assert obj(call("eval", "model", "--text", "text.txt", "--dense", "--max-tokens", "60", "--json"))["sparse"] is None


@pytest.fixture
def screened(work: Path) -> Path:
    """The adapter of `work`, with a screened head as well."""
    lm = load(work / "model", backend="native", adapter=work / "adapter")
    assert lm.adapter is not None
    folder = work / "screened"
    if not folder.exists():
        with_screen(lm.adapter, screen_of(lm.model, threshold=0.004)).save(folder)
    return folder


@needs_library
def test_eval_measures_a_screened_head(call, work: Path, screened: Path) -> None:
    """And does not take what was measured with another cache for its own."""
    arguments = ("eval", "model", "--text", "text.txt", "--adapter", "screened", "--max-tokens", "150", "-o", "runs/screen")
    plain = obj(call(*arguments, "--screened-head", "0", "--json"))
    result = obj(call(*arguments, "--cache-dtype", "int8", "--json"))
    assert "screen" not in plain and result["cache_dtype"] == "int8" and result["dense"]["ppl"] != plain["dense"]["ppl"]
    assert result["screen"]["screened_head"] == 0.004 and 0 < result["screen"]["agreement"] <= 1 and 0 < result["screen"]["missed"] < 1
    held = json.loads((work / "runs/screen/results.json").read_text())
    assert held["evaluation"]["screen"] == result["screen"] and held["environment"]["screened_head"] == 0.004
    assert held["environment"]["screen_agreement"] == result["screen"]["agreement"]
    shown = " ".join(call(*arguments).split())
    assert (
        "screened head at 0.004: 12 tokens, 0.40% of probability missed, agreement 99.00%" in shown and "of its probability missed" in shown
    )
    other = obj(call(*arguments, "--screened-head", "0.02", "--json"))["screen"]
    assert other["screened_head"] == 0.02 and other["missed"] > result["screen"]["missed"]
    call("bench", "model", "--text", "text.txt", "--adapter", "screened", "--steps", "5", "--context", "16", "-o", "runs/screened-bench")
    held = json.loads((work / "runs/screened-bench/results.json").read_text())
    assert 0 < held["environment"]["screen_agreement"] <= 1 and held["environment"]["screen_missed"] > 0
    assert {row["screened_head"] for row in held["rows"] if row["mode"] == "dense"} == {0}
    assert {row["screened_head"] for row in held["rows"] if row["mode"] == "sparse"} == {0.004}
    for run_folder in ("runs/screen", "runs/screened-bench"):
        page = Path(obj(call("report", run_folder, "--json"))["report"]).read_text(encoding="utf-8")
        assert "screened head at 0.0" in page and "of its probability missed" in page and ", cache " in page


@needs_library
def test_eval_measures_a_screened_head_on_every_text(call, work: Path, screened: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []

    def agreement(model: Any, layers: Any, ids: list[int], options: Any, **_: Any) -> dict[str, Any]:
        seen.append(list(ids))
        return {"screened_head": 0.004, "shortlist": 1.0, "tokens": len(ids), "agreement": 1.0, "missed": 0.0}

    monkeypatch.setattr("dejavu.quality.head_agreement.head_agreement", agreement)
    monkeypatch.setattr("dejavu.cli.evaluation.MAX_SCREEN_TOKENS", 41)
    arguments = ("eval", "model", "--adapter", "screened", "--max-tokens", "20")
    for texts in (("text.txt",), ("other.txt",), ("text.txt", "other.txt")):
        call(*arguments, *(part for text in texts for part in ("--text", text)))
    first, second, both = seen
    assert len(first) == len(second) == 41 and first != second
    assert both in (first[:20] + second[:20], second[:20] + first[:20])


def test_eval_says_that_separator_lines_are_scored(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(work)
    (tmp_path / "two.txt").write_text("the cat\n<|endoftext|>\nthe mat\n")
    assert run(["eval", "model", "--text", str(tmp_path / "two.txt"), "--text", "text.txt", "--dense", "--max-tokens", "60", "--json"]) == 0
    captured = capsys.readouterr()
    note = "scored as stored, as one document, <|endoftext|> lines included: two.txt"
    assert captured.err == f"note: {note}\n" and note in obj(captured.out)["notes"]


def test_eval_goes_on_where_it_was_interrupted(call, work: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    arguments = ("eval", "model", "--text", "*.txt", "--max-tokens", "150", "-o", "runs/e")
    measured = []

    def interrupted(*given: Any, **options: Any) -> Any:
        measured.append(1)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return perplexity(*given, **options)

    from dejavu.quality.perplexity import perplexity

    monkeypatch.setattr("dejavu.quality.evaluate.perplexity", interrupted)
    assert run(list(arguments)) == 130
    assert "runs/e" in capsys.readouterr().err and not (work / "runs/e/results.json").exists()
    shown = call(*arguments)
    assert "1 texts and tasks were already measured" in shown and len(measured) == 3
    assert set(json.loads((work / "runs/e/results.json").read_text())["evaluation"]["dense"]["texts"]) == {"text.txt", "other.txt"}


def test_profile(call, work: Path) -> None:
    result = obj(call("profile", "model", "--text", "text.txt", "--max-tokens", "200", "-o", "runs/p", "--json"))
    keys = {"mlp_density", "dead", "always_on", "contextual", "mass99_density", "cosine", "heads90"}
    assert len(result["layers"]) == 2 and all(keys <= set(layer) for layer in result["layers"])
    assert {point["part"] for point in result["oracle"]} == {"mlp", "heads"}
    assert {"profile", "model", "environment"} <= set(json.loads((work / "runs/p/results.json").read_text()))
    assert "contextual" in call("profile", "model", "--text", "text.txt", "--max-tokens", "200")


def test_train_report_export_and_another_base(call, work: Path, capsys) -> None:
    options = ("--budget", "0.1", "--rank", "4", "--epochs", "0.5", "--max-tokens", "600")
    result = obj(call("train", "model", "--text", "text.txt", "-o", "runs/a", *options, "--json"))
    assert {"recall", "mass", "density", "lookahead"} <= set(result["layers"][0])
    assert {"ppl_dense", "ppl_sparse", "mlp_density", "head_density"} <= set(result)
    lm = load(work / "model", adapter=work / "runs/a")
    assert lm.adapter is not None and lm.adapter.config.quality["ppl_dense"] == pytest.approx(result["ppl_dense"])
    assert not (work / "runs/a.partial").exists()
    assert "perplexity" in call("train", "model", "--text", "text.txt", "-o", "runs/a", *options)

    call("eval", "model", "--text", "text.txt", "--max-tokens", "200", "--adapter", "runs/a", "-o", "runs/b")
    report = Path(obj(call("report", "runs/a", "runs/b", "--json"))["report"])
    assert report == work / "runs/a/report.html" and "</html>" in report.read_text()

    exported = obj(call("export", "model", "runs/hf", "--dtype", "bf16", "--adapter", "runs/a", "--json"))
    assert exported["adapter"] is True and load(work / "runs/hf").adapter is not None

    # A copy whose hash nobody has vouched for: the same weights but one, which perplexity hardly feels.
    export(_changed(lm.model, 1e-4), lm.tokenizer, work / "copy")
    use = ("generate", "copy", "-p", PROMPT, "-n", "2", "--adapter", "runs/a")
    assert run([*use]) == 2 and "--accept-base" in capsys.readouterr().err
    for given in ((), ("--text", "other.txt")):
        assert run([*use, "--accept-base", *given]) == 2
        assert "the text that it was trained on (text.txt, SHA-256 " in capsys.readouterr().err
    assert "now accepts copy" in call(*use, "--accept-base", "--text", "text.txt")
    call(*use)
    assert load(work / "copy").base_hash in json.loads((work / "runs/a/config.json").read_text())["base_hashes"]
    export(_changed(lm.model, 3.0), lm.tokenizer, work / "fake")
    assert run(["generate", "fake", *use[2:], "--accept-base", "--text", "text.txt"]) == 2
    assert "they may differ by at most 2 %" in capsys.readouterr().err


def _changed(model: Any, by: float) -> Any:
    import copy

    changed = copy.deepcopy(model)
    changed.embed.weight.mul_(1 + by)
    return changed


def test_train_goes_on_where_it_was_interrupted(call, work: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    arguments = [
        "train",
        "model",
        "--text",
        "text.txt",
        "-o",
        "runs/i",
        "--rank",
        "4",
        "--epochs",
        "0.5",
        "--max-tokens",
        "600",
        "--budget",
        "0.1",
    ]
    from dejavu.offline.train_predicted import train_layer

    trained: list[int] = []

    def interrupted(data: Any, *given: Any) -> Any:
        trained.append(data.layer)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return train_layer(data, *given)

    monkeypatch.setattr("dejavu.offline.train_predicted.train_layer", interrupted)
    assert run(arguments) == 130
    assert "again" in capsys.readouterr().err and not (work / "runs/i").exists()
    call(*arguments)
    assert trained == [0, 1, 1] and (work / "runs/i/adapter.safetensors").exists()
    assert not (work / "runs/i.partial").exists()


def test_bench(call, work: Path) -> None:
    arguments = (
        "bench",
        "model",
        "--text",
        "text.txt",
        "--adapter",
        "adapter",
        "--backend",
        "torch",
        "--steps",
        "6",
        "--context",
        "16",
        "--batch",
        "1",
        "--batch",
        "2",
    )
    rows = obj(call(*arguments, "--results", "rows.jsonl", "-o", "runs/s", "--json"))["rows"]
    assert [(row["op"], row["mode"], row["batch"]) for row in rows] == [
        (op, mode, batch) for op, mode, batch in (
            ("prefill", "dense", 1), ("read", "dense", 1), ("decode", "dense", 1), ("decode", "sparse", 1), ("decode", "sparse+heads", 1),
            ("prefill", "dense", 1), ("read", "dense", 2), ("decode", "dense", 2), ("decode", "sparse", 2), ("decode", "sparse+heads", 2),
        )
    ]  # fmt: skip
    dense, sparse, heads = rows[2:5]
    assert dense["mlp_density"] == 1 and 0 < sparse["mlp_density"] < 1 == sparse["head_density"] > heads["head_density"]
    assert all(0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"] and row["time"] for row in rows)
    assert all((row["tok_s"] is None) == (row["op"] == "read") and (row["gbs"] is None) == (row["op"] == "prefill") for row in rows)
    assert [row.to_dict() for row in read_rows(work / "rows.jsonl")] == rows
    assert "speed ratio sparse / dense" in call(*arguments)


def test_bench_reports_nothing_when_the_engine_is_wrong(work: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(work)
    monkeypatch.setattr("dejavu.engine.torch_engine.sparse_mlp", lambda x_D, weights, idx_A: x_D)
    assert (
        run(["bench", "model", "--text", "text.txt", "--adapter", "adapter", "--steps", "6", "--context", "16", "--backend", "torch"]) == 2
    )
    captured = capsys.readouterr()
    assert "not timed" in captured.err and "decode" not in captured.out


def test_demo(call, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = DemoSizes(profile_tokens=300, evaluation_tokens=200, oracle_tokens=60, recall_tokens=120, curve_tokens=120, new_tokens=12, runs=2)
    monkeypatch.setattr("dejavu.report.demo.run_demo", partial(run_demo, sizes=few))
    shutil.rmtree(work / "runs/demo", ignore_errors=True)
    result = obj(call("demo", "--model", "model", "--adapter", "adapter", "-o", "runs/demo", "--json"))
    assert {"dense", "sparse", "speedup", "mlp_density", "head_density", "lookahead", "report"} <= set(result)
    assert all({"tok_s", "ppl", "text"} <= set(result[side]) for side in ("dense", "sparse"))
    assert "</html>" in Path(result["report"]).read_text()
    shown = call("demo", "--model", "model", "--adapter", "adapter", "-o", "runs/demo")
    assert shown.splitlines()[-1] == f"Report: {result['report']}"
    table = shown[shown.index("Dense and sparse") : shown.index("Report: ")]
    assert max(map(len, table.splitlines())) <= 80, "no column wraps in a terminal of the usual width"
    assert re.search(r"tokens per second +[\d.,]+ +[\d.,]+ +[\d.,]+×", shown) and re.search(r"share of the MLP read.* 100.0% +\d", shown)  # noqa: RUF001


def test_the_speed_ratio_is_told_also_below_one() -> None:
    assert "0.50×" in ratio(1.0, 2.0) and "slower" in ratio(1.0, 2.0)  # noqa: RUF001
    assert "2.00×" in ratio(2.0, 1.0) and "faster" in ratio(2.0, 1.0)  # noqa: RUF001


def test_a_line_stands_above_the_bars() -> None:
    """On one terminal: else it is written into the bar, which stays behind."""
    bars, rest, out = io.StringIO(), io.StringIO(), Output(False)
    out.console = Console(file=rest, force_terminal=True)
    with Progress(console=Console(file=bars, force_terminal=True)):
        out.say("through [them]")
    out.say("after")
    out.console = Console(file=rest)
    with Progress(console=Console(file=bars, force_terminal=True)):
        out.say("to a file")
    assert "through [them]" in bars.getvalue() and rest.getvalue() == "after\nto a file\n"


def test_what_is_not_finite_is_null() -> None:
    assert plain({"a": [float("inf"), 1.0], "b": (float("nan"), "x")}) == {"a": [None, 1.0], "b": [None, "x"]}
