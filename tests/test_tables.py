"""The numbers in README and docs are those of results/: rendering the tables again changes nothing."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dejavu.bench import rows
from dejavu.bench.rows import Measured, QualityRow, SpeedRow, read_rows
from dejavu.loadtest.rows import ServeRow
from dejavu.model.families import FAMILIES

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tables() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "recipes"))
        yield importlib.import_module("tables")


@pytest.fixture(scope="module")
def speeds(tables: ModuleType) -> ModuleType:
    return importlib.import_module("speeds")


def test_pages_show_what_results_hold(tables: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    read_once, found = cache(read_rows), 0
    for name in ("gpu_tables", "records", "speeds", "forms"):
        monkeypatch.setattr(f"{name}.read_rows", read_once)
    for page in tables.PAGES:
        text = page.read_text()
        assert tables.rendered(text) == text, f"{page.name} is stale; run `make tables`"
        found += len(tables.MARK.findall(text))
    assert found >= 3


def test_the_table_of_families_has_them_all_and_a_reason_for_every_no(tables: ModuleType) -> None:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in tables.families().splitlines()[2:]]
    assert {row[0].strip("`") for row in rows} == set(FAMILIES)
    for row in rows:
        assert all(row), f"an empty cell: {row}"
        lacking = [name for name, cell in zip(("GGUF", "torch", "native", "cuda"), row[3:7], strict=True) if cell == "no"]
        told = [reason.split(": ")[0] for reason in row[7].split("; ") if ": " in reason]
        assert lacking == told, row


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("*.jsonl")), ids=lambda path: path.name)
def test_every_line_of_results_is_a_row_of_its_class(tables: ModuleType, path: Path) -> None:
    kinds: dict[str, type[Measured]] = {"bench.jsonl": SpeedRow, "perplexity.jsonl": QualityRow, "quality.jsonl": tables.Record}
    kinds |= {"forms.jsonl": sys.modules["forms"].FormRow, "serve.jsonl": ServeRow}
    assert len(read_rows(path, kinds[path.name])) == len(path.read_text().splitlines()) > 0


def test_a_record_with_another_key_or_type_is_refused(tables: ModuleType, tmp_path: Path) -> None:
    """At any depth, and a kind that nobody knows."""
    lines = [json.loads(line) for line in (ROOT / "results" / "quality.jsonl").read_text().splitlines()]
    line = next(each for each in lines if each["kind"] == "curve")
    path, [point, *others] = tmp_path / "quality.jsonl", line["result"]["points"]
    for change, reason in [
        ({"result": line["result"] | {"points": [point | {"more": 1}, *others]}}, r"line 1.*unknown keys \['more'\]"),
        ({"result": line["result"] | {"points": [point | {"kl": "0.1"}, *others]}}, "kl is no float"),
        ({"result": {"tokens": 9}}, r"missing keys \['points'\]"),
        ({"kind": "guess"}, "unknown kind 'guess'"),
        ({"more": 1}, r"unknown keys \['more'\]"),
    ]:
        path.write_text(json.dumps(line | change) + "\n")
        with pytest.raises(ValueError, match=reason):
            read_rows(path, tables.Record)


def form(name: str, ppl: float, tok_s: float, *, sparse: bool = False, run: str = "b", **changes: Any) -> dict[str, Any]:
    where = {"device": "CPU", "device_kind": "cpu", "versions": {"torch": "9.9"}, "commit": "1" * 40, "time": "2030-01-01T00:00:00+00:00"}
    quality = {"backend": "native", "mode": "sparse" if sparse else "dense", "model": name, "dtype": name, "sparse": sparse, "rule": "r"}
    speed = {"threads": 2, "weight_bytes": 9_000_000, "tok_s": tok_s, "p20_us": 1.0, "p50_us": 2.0, "p80_us": 3.0}
    return where | quality | {"texts_hash": "h", "tokens": 9, "ppl": ppl} | speed | {"form": name, "base": "m", "run": run} | changes


def test_forms_of_a_model_stand_beside_its_fp32_form(tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only those of the newest run, and none of a changed tree."""
    monkeypatch.setattr(tables, "FORMS", tmp_path / "forms.jsonl")
    lines = [form("fp32", 99.0, 1.0, run="a"), form("fp32", 20.0, 50.0), form("fp32", 22.0, 100.0, sparse=True), form("int4", 21.0, 200.0)]
    lines += [form("int4", 24.2, 300.0, sparse=True), form("new", 1.0, 1.0, run="c", dirty=True)]
    tables.FORMS.write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in tables.few_bits("m").splitlines()[2:4]]
    assert shown == [
        ["fp32", "9", "20.00", "+0.00 %", "50", "22.00", "+0.0 %", "100 (2.00)"],
        ["int4", "9", "21.00", "+5.00 %", "200", "24.20", "+10.0 %", "300 (1.50)"],
    ]
    with pytest.raises(SystemExit, match="no forms of other"):
        tables.few_bits("other")


def test_speeds_of_forms_are_medians_over_the_runs_of_one_commit(
    tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other programs stand below; a run of other forms, or of another commit, is left out."""
    monkeypatch.setattr(tables, "FORMS", tmp_path / "forms.jsonl")
    peer = {"peer": True, "mode": "llama.cpp", "backend": "llama.cpp", "weight_bytes": None}
    lines = [form("fp32", 20.0, 1.0, run="old", commit="2" * 40), form("q8_0", 21.0, 1.0, run="old", commit="2" * 40, **peer)]
    lines += [form("fp32", 20.0, 9.0, run="alone")]
    for run, speed in (("a", 50.0), ("b", 70.0), ("c", 60.0)):
        lines += [form("fp32", 20.0, speed, run=run), form("q8_0", 21.0, 2 * speed, run=run, **peer)]
    tables.FORMS.write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = tables.few_bits("m")
    assert "| fp32 | 9 | 20.00 | +0.00 % | 60 |" in shown and "| llama.cpp, q8_0 |  | 21.00 | +5.00 % | 120 |" in shown


def test_a_stale_number_is_replaced(tables: ModuleType) -> None:
    stale = "<!-- table: headline -->\n| 1 |\n<!-- end -->\n"
    assert "| 1 |" not in tables.rendered(stale)
    assert tables.rendered(stale).endswith("<!-- end -->\n")


GPU = "NVIDIA H200"
GPU_TABLES = ("gpu-speed", "gpu-batches", "gpu-batches-h100", "gpu-kept", "gpu-prompts", "gpu-ahead", "gpu-ops")


def row(mode: str, tok_s: float, **changes: Any) -> SpeedRow:
    """A decode row of the cuda backend, or of a peer on a GPU."""
    values = {"op": "decode", "mode": mode, "backend": "cuda", "model": "opt-6.7b", "layers": 32, "dtype": "fp16", "batch": 1}
    values |= {
        "shape": changes.get("model", "opt-6.7b"),
        "shape_layers": 32,
        "device_kind": "gpu",
        "peer": "backend" in changes,
        "sparse": mode == "sparse",
    }
    values |= {
        "context": 128,
        "threads": 1,
        "synthetic": True,
        "mlp_density": 1.0,
        "head_density": 1.0,
        "p50_us": 1e6 / tok_s,
        "tok_s": tok_s,
    }
    values |= {"device": GPU, "versions": {"torch": "9.9"}, "commit": "0123456789abcdef", "time": "2030-01-01T00:00:00+00:00"}
    return SpeedRow.from_dict(values | changes)


@pytest.fixture
def measured(speeds: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """measured(rows): from now on these are the results, after one of a CPU."""
    path = tmp_path / "bench.jsonl"
    monkeypatch.setattr(speeds, "BENCH", path)

    def write(*rows: SpeedRow) -> None:
        cpu = row("dense", 7.0, backend="native", peer=False, device="AMD EPYC, 2 cores", device_kind="cpu", dtype="int8")
        path.write_text("".join(json.dumps(each.to_dict()) + "\n" for each in (cpu, *rows)))

    return write


def lines(tables: ModuleType, name: str) -> list[list[str]]:
    """The cells of a table's rows, without header."""
    return [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in tables.TABLES[name]().splitlines() if line.startswith("|")][
        2:
    ]


def test_nothing_was_measured_on_a_gpu_yet(tables: ModuleType, measured: Any) -> None:
    measured()
    assert [tables.TABLES[name]() for name in GPU_TABLES] == ["Not measured yet.\n"] * len(GPU_TABLES)


def test_rows_of_a_gpu_are_not_among_those_of_a_cpu(speeds: ModuleType, measured: Any) -> None:
    real = {"synthetic": False, "model": "m", "dtype": "fp32", "commit": "1" * 40}
    measured(*[row("dense", 90.0, **real)] * 5)
    assert speeds.speeds("m") == []


def test_speed_on_a_gpu(tables: ModuleType, measured: Any) -> None:
    """From one run for each model: the newest with peers, though a newer one has none."""
    peer = row("transformers", 50.0, backend="transformers", gbs=None)
    compiled = row("transformers-compile", 80.0, backend="transformers-compile")
    later = "2031-01-01T00:00:00+00:00"
    measured(
        row("dense", 100.0, nodes=170, gbs=1500.0, pct_ceiling=55.0), compiled, peer,
        row("sparse", 200.0, mlp_density=0.1, nodes=171, gbs=1200.0, pct_ceiling=55.0),
        row("dense", 10.0, time=later), row("sparse", 11.0, time=later), row("dense", 5.0, batch=4), row("dense", 3.0, model="opt-13b"),
    )  # fmt: skip
    assert lines(tables, "gpu-speed") == [
        ["transformers, eager", "planted, OPT-6.7B's shape", "fp16", "128", "", "", "", "20.00", "50.0", "0.50", "", "", ""],
        ["transformers, compiled", "planted, OPT-6.7B's shape", "fp16", "128", "", "", "", "12.50", "80.0", "0.80", "", "", ""],
        [
            "dejavu dense",
            "planted, OPT-6.7B's shape",
            "fp16",
            "128",
            "100.0 %",
            "100.0 %",
            "100.0 %",
            "10.00",
            "100.0",
            "1.00",
            "170",
            "1500",
            "55 %",
        ],
        [
            "dejavu sparse",
            "planted, OPT-6.7B's shape",
            "fp16",
            "128",
            "10.0 %",
            "100.0 %",
            "40.0 %",
            "5.00",
            "200.0",
            "2.00",
            "171",
            "1200",
            "55 %",
        ],
    ]
    assert f"{GPU}, torch 9.9, commit 0123456789, 2030-01-01." in tables.TABLES["gpu-speed"]()


def test_batches_on_a_gpu(tables: ModuleType, measured: Any) -> None:
    """Of each mode the newest, with the dense of its own run; each GPU has a table."""
    later = "2031-01-01T00:00:00+00:00"
    measured(
        row("dense", 80.0, batch=4), row("sparse", 100.0, batch=4, union_density=0.3, mlp_density=0.1),
        row("dense", 20.0, context=1024), row("dense", 25.0), row("dense", 40.0, batch=4, time=later),
        row("dense", 9.0, device="NVIDIA H100 80GB HBM3"),
    )  # fmt: skip
    found = lines(tables, "gpu-batches")
    assert [(cells[0], cells[3], cells[4], cells[10], cells[11]) for cells in found] == [
        ("dejavu dense", "128", "1", "25.0", "1.00"),
        ("dejavu dense", "128", "4", "40.0", "1.00"),
        ("dejavu sparse", "128", "4", "100.0", "1.25"),
        ("dejavu dense", "1024", "1", "20.0", "1.00"),
    ]
    assert [cells[10] for cells in lines(tables, "gpu-batches-h100")] == ["9.0"]
    measured(row("dense", 80.0, batch=4), row("sparse", 100.0, batch=4, union_density=0.3, mlp_density=0.1))
    assert lines(tables, "gpu-batches")[1][5:] == ["30.0 %", "10.0 %", "100.0 %", "", "10.00", "100.0", "1.25"]


def test_batches_tell_methods_and_selections_apart(tables: ModuleType, measured: Any) -> None:
    """Of gates and inputs every density is a row, of predictors the newest; nothing is planted where no predictor selects."""
    later, shape = "2031-01-01T00:00:00+00:00", {"model": "llama-2-7b"}
    measured(
        row("dense", 10.0, **shape), row("sparse", 12.0, method="input", mlp_density=0.7499, **shape),
        row("sparse", 15.0, method="input", mlp_density=0.501, **shape), row("dense", 10.0, time=later, **shape),
        row("sparse", 11.0, method="gate", mlp_density=0.5, time=later, **shape), row("dense", 10.0, batch=2),
        row("sparse", 13.0, batch=2, method="predicted", selection="published"),
        row("sparse", 12.0, batch=2, method="predicted", mlp_density=0.1),
    )  # fmt: skip
    assert [(cells[0], cells[1], cells[8]) for cells in lines(tables, "gpu-kept")] == [
        ("dejavu dense", "Llama-2-7B's shape", "1.00"),
        ("dejavu sparse, gate", "Llama-2-7B's shape", "1.10"),
        ("dejavu sparse, input", "Llama-2-7B's shape", "1.20"),
        ("dejavu sparse, input", "Llama-2-7B's shape", "1.50"),
    ]
    assert [(cells[0], cells[1], cells[11]) for cells in lines(tables, "gpu-batches")] == [
        ("dejavu dense", "planted, OPT-6.7B's shape", "1.00"),
        ("dejavu sparse", "planted, OPT-6.7B's shape", "1.20"),
        ("dejavu sparse, published", "planted, OPT-6.7B's shape", "1.30"),
    ]


def test_prompts_and_requests_beside_transformers(tables: ModuleType, measured: Any) -> None:
    """Of the newest run that timed both; a prompt is read densely, so its sparse rows say nothing."""
    peer, later = {"backend": "transformers"}, "2031-01-01T00:00:00+00:00"
    prompt, request = {"op": "prefill", "context": 256}, {"op": "request", "context": 256, "new_tokens": 64}
    measured(
        row("dense", 300.0, **prompt), row("sparse", 301.0, **prompt), row("transformers", 100.0, **prompt, **peer),
        row("dense", 30.0, **request), row("sparse", 60.0, **request), row("transformers", 10.0, **request, **peer),
        row("dense", 999.0, **prompt, time=later),
    )  # fmt: skip
    assert [(cells[0], cells[3], cells[6]) for cells in lines(tables, "gpu-prompts")] == [
        ("transformers, eager", "prompt of 256", "1.00"),
        ("dejavu dense", "prompt of 256", "3.00"),
        ("transformers, eager", "prompt of 256, answer of 64", "1.00"),
        ("dejavu dense", "prompt of 256, answer of 64", "3.00"),
        ("dejavu sparse", "prompt of 256, answer of 64", "6.00"),
    ]


def test_a_later_run_by_gates_is_not_the_planted_headline(tables: ModuleType, measured: Any) -> None:
    later = "2031-01-01T00:00:00+00:00"
    measured(row("dense", 100.0), row("sparse", 200.0), row("dense", 90.0, time=later), row("sparse", 99.0, method="gate", time=later))
    assert [(cells[0], cells[8]) for cells in lines(tables, "gpu-speed")] == [("dejavu dense", "100.0"), ("dejavu sparse", "200.0")]


def test_single_ops_on_a_gpu(tables: ModuleType, measured: Any) -> None:
    op = {"op": "mlp", "p20_us": 9.0, "p80_us": 11.0, "gbs": 1234.0, "pct_ceiling": 61.0}
    measured(
        row("sparse", 1e5, **(op | {"gbs": 1.0})),
        row("sparse", 1e5, **op, mlp_density=0.05, selection="hot-set", time="2031-01-01T00:00:00+00:00"),
        row("dense", 50.0),
        row("dense", 50.0, op="request", new_tokens=64),
    )
    assert lines(tables, "gpu-ops") == [["mlp, sparse", "planted, OPT-6.7B's shape", "fp16", "1", "5 %", "", "", "10.0, 1234, 61 %"]]


def test_ways_of_looking_ahead_stay_apart(tables: ModuleType, measured: Any) -> None:
    """A run whose sparse modes looked ahead another way is no run of the other tables."""
    later = "2031-01-01T00:00:00+00:00"
    measured(
        row("dense", 100.0), row("sparse", 200.0, nodes=130), row("dense", 90.0, time=later),
        row("sparse in-line", 150.0, sparse=True, ahead="in-line", time=later, nodes=162),
        row("dense", 7.0, model="opt-13b"),
    )  # fmt: skip
    assert [(cells[0], cells[4], cells[10], cells[11]) for cells in lines(tables, "gpu-ahead")] == [
        ("beside", "sparse", "2.00", "130"),
        ("in-line", "sparse", "1.67", "162"),
    ]
    for table, column in (("gpu-speed", 8), ("gpu-batches", 10)):
        assert [cells[column] for cells in lines(tables, table)][:2] == ["100.0", "200.0"]


def test_methods_and_the_curve(tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest record of each model and method; points of a curve by density."""
    monkeypatch.setattr(tables, "QUALITY", tmp_path / "quality.jsonl")
    monkeypatch.setattr(rows, "commit_facts", lambda: {"commit": "0123456789abcdef", "dirty": False})
    side = {"tok_s": 9.0, "ppl": 3.0, "text": "a"}
    demo = {"dense": side, "sparse": side, "speedup": 1.0, "mlp_density": 0.5, "head_density": 1.0, "lookahead": [0, None]}
    assert tables.record("demo", "opt-mini", demo) is None and tables.methods() == tables.curve() == tables.NOT_MEASURED
    result = {
        **{"model": "m", "method": "gate", "mlp_density": 0.25, "head_density": 1.0, "rise": 0.012, "dtype": "int8"},
        **{"rise_stderr": 0.001, "tokens": 9, "items": 4},
        "text_rises": {"a": 0.01, "b": 0.03},
        "accuracy": {"dense": {"x": 0.5, "y": 0.7}, "sparse": {"x": 0.4, "y": 0.6}},
        "tok_s": {"dense": 100.0, "sparse": 150.0},
    }
    for density in (0.5, 0.25):
        tables.record("method", "m: gate", result | {"mlp_density": density})
    row = "| m | gate | 25.0 % | 100.0 % | +1.2 % | +3.0 % | 60.0 % | 50.0 % |"
    assert row in tables.methods() and "50.0 % | 100.0 %" not in tables.methods()
    points = [{"shift": 1.0, "density": 0.2, "kl": 0.3, "rise": 0.1}, {"shift": 2.0, "density": 0.1, "kl": 0.5, "rise": 0.2}]
    tables.record("curve", "m", {"tokens": 9, "points": points})
    assert [line.split(" | ")[0] for line in tables.curve().splitlines()[2:4]] == ["| 10.0 %", "| 20.0 %"]


def test_the_package_knows_what_results_say_of_rounding(tables: ModuleType) -> None:
    assert json.loads(tables.ROUNDING_FILE.read_text()) == tables.rounding()
