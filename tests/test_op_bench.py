"""The table of single ops: what is checked before any is timed, over what its calls rotate, and what a row says."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from dejavu.bench.models.random import SELECTIONS
from dejavu.bench.ops import ENOUGH_BYTES, MIN_CALLS, ROTATED_BYTES, OpRun, bench_ops, copies_for, graph_sampler, index_lists
from dejavu.bench.rows import SpeedRow

TEMPLATE = SpeedRow.from_dict(
    {"op": "", "mode": "", "backend": "cuda", "model": "m", "layers": 2, "dtype": "fp16", "batch": 1, "context": 0, "threads": 1}
    | {"synthetic": True, "device": "a GPU"}
)


class Bench:
    """Ops on a fake clock: a call of an op takes as long as its name says, and what was asked for and run is kept."""

    def __init__(self, seconds: Mapping[str, float], errors: Mapping[str, float] | None = None, copies: int = 3) -> None:
        self.seconds, self.errors, self.copies = seconds, errors or {}, copies
        self.now, self.requested, self.ran = 0.0, list[Any](), list[tuple[str, int]]()

    def clock(self) -> float:
        return self.now

    def op(self, name: str, size: float, **changes: Any) -> OpRun:
        def run(copy: int) -> None:
            self.ran.append((name, copy))
            self.now += self.seconds[name]

        return OpRun(run=run, bytes=size, check=lambda: self.errors.get(name, 0.5), copies=self.copies, **changes)

    def ops_at(self, density: float | None, selection: str | None) -> dict[str, OpRun]:
        self.requested.append((density, selection))
        if density is None:
            return {"head": self.op("head", 4000.0, sparse=False)}
        return {"mlp": self.op("mlp", 1e4 * density)}

    def rows(self, **options: Any) -> list[SpeedRow]:
        read = OpRun(run=self.op("read", 0).run, bytes=1e6, check=lambda: 0.0, copies=1)
        return bench_ops(self.ops_at, read=read, template=TEMPLATE, clock=self.clock, **options)


def test_rows_of_every_point() -> None:
    bench = Bench({"read": 1e-4, "mlp": 2e-6, "head": 8e-7})  # the read: 10 GB/s
    rows = bench.rows(densities=(0.1, 1.0), selections=("uniform", "hot-set"))
    assert {(row.op, row.mode, row.sparse) for row in rows} >= {("head", "dense", False), ("mlp", "sparse", True)}
    assert bench.requested == [(None, None), (0.1, "uniform"), (0.1, "hot-set"), (1.0, "uniform")]
    found = [(row.op, row.mode, row.mlp_density, row.selection) for row in rows]
    assert found == [
        ("head", "dense", None, None), ("mlp", "sparse", 0.1, "uniform"), ("mlp", "sparse", 0.1, "hot-set"), ("mlp", "sparse", 1.0, None),
    ]  # fmt: skip
    assert [row.p50_us for row in rows] == pytest.approx([0.8, 2, 2, 2]) and rows[0].p20_us == pytest.approx(rows[0].p80_us)
    assert [row.gbs for row in rows] == pytest.approx([5, 0.5, 0.5, 5])
    assert [row.pct_ceiling for row in rows] == pytest.approx([50, 5, 5, 50])
    assert {(row.backend, row.device, row.synthetic, row.tok_s) for row in rows} == {("cuda", "a GPU", True, None)}


@pytest.mark.parametrize("copies", [1, 3, 50])
def test_calls_rotate_over_the_copies_in_turns_with_the_read(copies: int) -> None:
    bench = Bench({"read": 1e-4, "mlp": 2e-6, "head": 8e-7}, copies=copies)
    bench.rows(densities=(), selections=("uniform",), repeats=7)
    calls = -(-MIN_CALLS // copies) * copies
    assert [copy for name, copy in bench.ran if name == "head"] == list(range(copies)) * (8 * calls // copies)
    samples = [name for name, copy in bench.ran if copy == 0 and name == "read"]
    assert len(samples) == 8 * MIN_CALLS
    # In the rounds after the warm-up who is first changes.
    timed = bench.ran[calls + MIN_CALLS :]
    assert [timed[at][0] for at in range(0, len(timed), calls + MIN_CALLS)] == ["read", "head", "head", "read", "read", "head", "head"]


@pytest.mark.parametrize("error", [1.01, float("nan")])
def test_an_op_that_is_wrong_means_that_nothing_is_timed(error: float) -> None:
    bench = Bench({"read": 1e-4, "mlp": 2e-6, "head": 8e-7}, errors={"mlp": error})
    with pytest.raises(ValueError, match=r"mlp \(density 0.05, uniform\) is wrong: its error is .* nothing was timed"):
        bench.rows()
    assert bench.ran == []
    bench.errors = {"mlp": 1.0}
    assert len(bench.rows()) == 1 + 4 * 3 + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repeats": 6}, "repeats must be at least 7, not 6"),
        ({"densities": (0.0,)}, r"density must lie in \(0, 1\], not 0"),
        ({"densities": (2,)}, r"density must lie in \(0, 1\], not 2"),
        ({"selections": ("odd",)}, "unknown selection 'odd'; choose one of uniform, clustered, hot-set"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    bench = Bench({})
    with pytest.raises(ValueError, match=message):
        bench.rows(**options)
    assert bench.requested == []


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize(("neurons", "density"), [(1000, 0.1), (1000, 0.5), (1009, 0.37), (1000, 1.0), (7, 0.01)])
def test_index_lists(selection: str, neurons: int, density: float) -> None:
    lists = index_lists(neurons, density, selection, 5, seed=3)
    expected = max(1, round(density * neurons))
    assert len(lists) == 5
    for indices in lists:
        assert indices.dtype == torch.int32 and indices.shape == (expected,) and bool((indices.diff() > 0).all())
        assert int(indices[0]) >= 0 and int(indices[-1]) < neurons
    assert all(torch.equal(one, other) for one, other in zip(lists, index_lists(neurons, density, selection, 5, seed=3), strict=True))
    if density == 0.1:
        assert not torch.equal(lists[0], index_lists(neurons, density, selection, 1, seed=4)[0])


def shared(lists: list[Tensor]) -> int:
    """Neurons that are in every list."""
    return len(set.intersection(*({int(index) for index in indices} for indices in lists)))


def test_kinds_of_selection() -> None:
    uniform, clustered, hot = (index_lists(16000, 0.1, kind, 8, seed=0) for kind in SELECTIONS)
    assert shared(uniform) == 0 and shared(clustered) == 0 and shared(hot) == 1280
    # 1600 neurons are 100 runs of 16; independent ones have a neighbour in one case out of ten.
    breaks = [int((indices.diff() > 1).sum()) for indices in (uniform[0], clustered[0], hot[0])]
    assert breaks[1] < 100 and breaks[0] > 1300 and breaks[2] > 1300
    assert bool((clustered[0].view(-1, 16) % 16 == torch.arange(16)).all())


def test_few_calls_are_enough_where_each_reads_much() -> None:
    bench = Bench({"read": 1e-4, "head": 1.0}, copies=1)
    read = OpRun(run=bench.op("read", 0).run, bytes=ENOUGH_BYTES / 4, check=lambda: 0.0, copies=1)
    bench_ops(lambda *_: {"head": bench.op("head", 1)}, read=read, template=TEMPLATE, densities=(), clock=bench.clock, repeats=7)
    assert len([name for name, _ in bench.ran if name == "read"]) == 8 * 4


def test_copies() -> None:
    assert copies_for(ROTATED_BYTES) == 1 and copies_for(ROTATED_BYTES / 3) == 3 and copies_for(ROTATED_BYTES * 9.0) == 1
    with pytest.raises(ValueError, match="unknown selection 'odd'"):
        index_lists(8, 0.5, "odd", 1, seed=0)
    with pytest.raises(ValueError, match=r"density must lie in \(0, 1\]"):
        index_lists(8, 0.0, "uniform", 1, seed=0)


@pytest.mark.gpu
def test_on_a_gpu_a_sample_is_a_graph_of_all_calls() -> None:
    counts = torch.zeros(3, device="cuda")

    def count(copy: int) -> None:
        counts[copy].add_(1)

    sample = graph_sampler([partial(count, copy) for copy in (0, 1, 2, 1)])
    before = counts.clone()
    assert sample() > 0
    # Once while the timed ones wait, and once timed.
    assert (counts - before).tolist() == [2, 4, 2]
