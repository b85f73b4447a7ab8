"""Which speeds may be shown: a speed without its quality, a dtype that costs too much, a changed tree and a lone process are refused."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dejavu.bench.rows import QualityRow, SpeedRow

ROOT = Path(__file__).resolve().parents[1]
CPU, ADAPTER = "AMD EPYC, 2 cores", "0123456789abcdef"


@pytest.fixture(scope="module")
def speeds() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "recipes"))
        yield importlib.import_module("speeds")


def where(backend: str, commit: str, minute: int) -> dict[str, Any]:
    versions = {"torch": "9.9"}
    return {
        "backend": backend,
        "device": CPU,
        "device_kind": "cpu",
        "dirty": commit.endswith("-dirty"),
        "versions": versions,
        "commit": commit,
        "time": f"2030-01-01T00:{minute:02}:00+00:00",
    }


def bench(mode: str, tok_s: float, *, dtype: str = "bf16", commit: str = "1" * 40, processes: int = 5, **changes: Any) -> list[SpeedRow]:
    """A decode row of each of so many processes; each is a little faster than the one before. A peer's mode is its backend."""
    own = mode in ("dense", "sparse", "sparse+heads")
    values = {"op": "decode", "mode": mode, "model": "m", "layers": 2, "dtype": dtype, "batch": 1, "context": 128, "threads": 2}
    values |= {"peer": not own, "sparse": own and mode != "dense", "sparse_heads": mode == "sparse+heads"}
    values |= {"synthetic": False, "mlp_density": 0.2 if mode == "sparse" else 1.0, "head_density": 1.0, "read_share": 0.5 if own else None}
    values |= {"cache_dtype": "fp16" if own else None, "adapter": ADAPTER if own and mode != "dense" else None} | changes
    backend = "native" if own else mode
    return [
        SpeedRow.from_dict(values | where(backend, commit, minute) | {"tok_s": tok_s * (1 + 0.01 * minute)}) for minute in range(processes)
    ]


def quality(mode: str, ppl: float, *, dtype: str = "bf16", commit: str = "2" * 40, **changes: Any) -> QualityRow:
    own = mode in ("dense", "sparse")
    values = {"model": "m", "mode": mode, "dtype": dtype, "cache_dtype": "fp16" if own else None, "rule": "r", "texts": ["t"], "ppl": ppl}
    values |= {"peer": not own, "sparse": mode == "sparse", "sparse_heads": changes.get("head_density", 1.0) < 1}
    values |= {"adapter": ADAPTER if mode == "sparse" else None, "texts_hash": "h", "tokens": 9} | where(
        "native" if own else mode, commit, 0
    )
    return QualityRow.from_dict(values | changes)


@pytest.fixture
def results(speeds: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[SpeedRow], list[QualityRow]], None]:
    """results(rows, qualities): from now on these are what was measured."""
    for name in ("BENCH", "PERPLEXITY"):
        monkeypatch.setattr(speeds, name, tmp_path / f"{name}.jsonl")
    monkeypatch.setattr(speeds, "_said", set())

    def write(rows: list[SpeedRow], qualities: list[QualityRow]) -> None:
        for path, found in ((speeds.BENCH, rows), (speeds.PERPLEXITY, qualities)):
            path.write_text("".join(json.dumps(each.to_dict()) + "\n" for each in found))

    return write


FP32 = [quality("dense", 20.0, dtype="fp32", cache_dtype="fp32"), quality("sparse", 22.0, dtype="fp32", cache_dtype="fp32")]
GOOD = [*FP32, quality("dense", 20.1), quality("sparse", 22.2)]


def shown(speeds: ModuleType) -> list[tuple[str, str]]:
    return [(speed.program, speed.row.dtype) for speed in speeds.speeds("m")]


def test_a_speed_with_its_quality_is_shown(speeds: ModuleType, results: Any, capsys: pytest.CaptureFixture[str]) -> None:
    results([*bench("dense", 100.0), *bench("sparse", 150.0)], GOOD)
    dense, sparse = speeds.speeds("m")
    assert capsys.readouterr().err == "" and (dense.median, sparse.least, sparse.most) == (pytest.approx(102), 150, pytest.approx(156))
    assert (dense.ppl, sparse.ppl) == (20.1, 22.2)


@pytest.mark.parametrize(
    ("rows", "qualities", "reason"),
    [
        (
            bench("sparse", 150.0),
            [*FP32, quality("dense", 20.1)],
            f"no perplexity in bf16, cache fp16, backend native with adapter {ADAPTER}",
        ),
        (bench("sparse", 150.0), [*FP32, quality("sparse", 22.2, adapter="another")], "no perplexity in bf16"),
        (bench("sparse", 150.0), [*FP32, quality("sparse", 22.2, cache_dtype="int8")], "no perplexity in bf16, cache fp16"),
        (bench("sparse", 150.0), [*FP32, quality("sparse", 22.2, backend="torch")], "backend native"),
        (
            bench("sparse", 150.0, dtype="int4"),
            [*FP32, quality("sparse", 30.6, dtype="int4")],
            "int4 costs 39.1 % of perplexity beside fp32",
        ),
        (bench("sparse", 150.0), [quality("sparse", 22.2)], "its perplexity in fp32 on the same text is not known"),
        (bench("sparse", 150.0), [quality("sparse", 22.0, dtype="fp32", texts_hash="other"), GOOD[-1]], "in fp32 on the same text is not"),
        (bench("sparse", 150.0, commit="3" * 40 + "-dirty"), GOOD, "commit 3333333333-dirty: files were changed"),
        (
            bench("sparse", 150.0),
            [*FP32, quality("sparse", 22.2, commit="4" * 40 + "-dirty")],
            "its perplexity is of commit 4444444444-dirty",
        ),
        (bench("sparse", 150.0, processes=4), GOOD, "measured in 4 processes, not 5"),
        (bench("sparse", 150.0, processes=1) * 5, GOOD, "measured in 1 processes, not 5"),
        (bench("sparse", 150.0, threads=64)[:3] + bench("sparse", 150.0)[3:], GOOD, "measured in"),
        ([SpeedRow.from_dict(row.to_dict() | {"commit": None}) for row in bench("sparse", 150.0)], GOOD, "no commit is known"),
        (
            bench("sparse", 150.0, dtype="fp32", cache_dtype="int8"),
            [*FP32, quality("sparse", 33.0, dtype="fp32", cache_dtype="int8")],
            "a cache in int8 costs 50.0 % of perplexity beside fp32",
        ),
    ],
)
def test_a_speed_is_refused_and_said_to_be(
    rows: list[SpeedRow], qualities: list[QualityRow], reason: str, speeds: ModuleType, results: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    results([*bench("dense", 100.0), *rows], qualities)
    assert ("dejavu sparse", rows[0].dtype) not in shown(speeds)
    said = capsys.readouterr().err
    assert f"not shown: m, dejavu sparse, {rows[0].dtype}" in said and reason in said
    with pytest.raises(speeds.Refused, match="no sparse speed of m may be shown"):
        speeds.headline("m", "m")


def test_an_adapter_with_heads_has_the_quality_of_both(speeds: ModuleType, results: Any) -> None:
    """Its MLP alone is another model, whose perplexity nobody measured."""
    with_heads = [quality("sparse", 22.0, dtype="fp32", cache_dtype="fp32", head_density=0.5), quality("sparse", 22.2, head_density=0.5)]
    results([*bench("sparse+heads", 150.0), *bench("sparse", 140.0)], with_heads)
    assert shown(speeds) == [("dejavu sparse+heads", "bf16")]


def test_what_came_before_stays_where_the_newest_is_refused(speeds: ModuleType, results: Any, capsys: pytest.CaptureFixture[str]) -> None:
    later = [
        row.to_dict() | {"time": "2031-01-01T00:00:00+00:00", "commit": "5" * 40 + "-dirty", "dirty": True, "tok_s": 999.0}
        for row in bench("dense", 9.0)
    ]
    results([*bench("dense", 100.0), *map(SpeedRow.from_dict, later)], GOOD)
    [speed] = speeds.speeds("m")
    assert speed.median == pytest.approx(102) and "5555555555-dirty" in capsys.readouterr().err


def test_rows_of_an_older_schema_are_left_out_without_a_word(speeds: ModuleType, results: Any, capsys: pytest.CaptureFixture[str]) -> None:
    results(bench("dense", 100.0, cache_dtype=None), GOOD)
    assert speeds.speeds("m") == [] and capsys.readouterr().err == ""


def test_the_headline_is_over_the_fastest_program_of_no_worse_perplexity(speeds: ModuleType, results: Any) -> None:
    rows = [
        *bench("dense", 100.0),
        *bench("sparse", 150.0),
        *bench("llama.cpp", 120.0, dtype="q8_0"),
        *bench("llama.cpp", 140.0, dtype="q4_0"),
    ]
    peers = [quality("llama.cpp", 20.2, dtype="q8_0"), quality("llama.cpp", 24.0, dtype="q4_0")]
    results(rows, [*GOOD, *peers])
    text = speeds.headline("m", "M")
    assert text.count("llama.cpp, q8_0") == 1
    assert "**1.25 times as fast as llama.cpp in q8_0**, the fastest program of no worse perplexity, and 1.50 times" in text
    assert "| dejavu sparse, bf16 | 20 % | 50 % | 22.20 | 150 |" in text and "each the least of 5 processes" in text
    # Half a percent is noise: such a program counts as no worse.
    results(rows, [*GOOD, peers[0], quality("llama.cpp", 22.3, dtype="q4_0")])
    assert "1.07 times as fast as llama.cpp in q4_0" in speeds.headline("m", "M")
    everything = speeds.programs("m")
    assert everything.index("dejavu sparse") < everything.index("q4_0") < everything.index("q8_0") < everything.index("dejavu dense")
    assert "| 50.0 % | 22.20 | 153.0 | 150.0 to 156.0 | 1.50 |" in everything


def test_only_one_setting_and_one_text_stand_together(speeds: ModuleType, results: Any) -> None:
    """A larger machine, a longer context and a perplexity of other texts are for another table."""
    elsewhere = [
        row.to_dict() | {"device": "Big, 64 cores", "time": f"2029-01-01T00:{i:02}:00+00:00"} for i, row in enumerate(bench("dense", 9e3))
    ]
    longer = [row.to_dict() | {"context": 4096, "time": f"2029-02-01T00:{i:02}:00+00:00"} for i, row in enumerate(bench("dense", 8e3))]
    others = [*map(SpeedRow.from_dict, elsewhere), *map(SpeedRow.from_dict, longer), *bench("llama.cpp", 900.0, dtype="q8_0")]
    results(
        [*others, *bench("dense", 100.0), *bench("sparse", 150.0)], [*GOOD, quality("llama.cpp", 9.0, dtype="q8_0", texts_hash="other")]
    )
    assert {(speed.program, round(speed.median)) for speed in speeds.speeds("m")} == {("dejavu dense", 102), ("dejavu sparse", 153)}


def test_what_never_ran_together_is_compared_at_its_worst(speeds: ModuleType, results: Any) -> None:
    apart = [row.to_dict() | {"time": f"2030-02-01T00:{i:02}:00+00:00"} for i, row in enumerate(bench("dense", 140.0, dtype="int8"))]
    rows = [*bench("dense", 100.0), *bench("sparse", 150.0), *map(SpeedRow.from_dict, apart)]
    results(rows, [*GOOD, quality("dense", 20.2, dtype="int8")])
    text = speeds.second("m", "M")
    assert f"**{150 / (140 * 1.04):.2f} times as fast as our own dense engine in int8**" in text and "of separate processes" in text
    assert "Run it dense" not in text


def test_a_ratio_below_one_says_dense(speeds: ModuleType, results: Any) -> None:
    results(
        [*bench("dense", 100.0), *bench("sparse", 150.0), *bench("dense", 170.0, dtype="int8")],
        [*GOOD, quality("dense", 20.2, dtype="int8")],
    )
    assert speeds.second("m", "M").startswith("M: **Run it dense.**\nSparse in bf16: 150 tokens/s")
    assert "**Run it dense.** Sparse is **0.88 times as fast as our own dense engine in int8**" in speeds.headline("m", "M")


def test_ratios_are_of_the_same_process_where_there_is_one(speeds: ModuleType, results: Any) -> None:
    slow = [row.to_dict() | {"tok_s": (row.tok_s or 0) / 2} for row in bench("sparse", 150.0)[:1]]
    results([*bench("dense", 100.0), *map(SpeedRow.from_dict, slow), *bench("sparse", 150.0)[1:]], GOOD)
    dense, sparse = speeds.speeds("m")
    assert speeds.ratios(sparse, dense) == [pytest.approx(each) for each in (0.75, 1.5, 1.5, 1.5, 1.5)]
    assert "0.75 times as fast as our own dense engine" in speeds.headline("m", "M")  # the least
