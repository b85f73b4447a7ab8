"""Speed of single ops, at several densities and kinds of selection: what a kernel gets out of the memory it reads.

In: for each density and selection, ops by name, each an `OpRun`. Out: `SpeedRow`s. In order:

    check   every op at every point, against its definition; where one fails nothing is timed
    time    at each point its ops and a sequential read in turns. A sample is many calls, one after the other, each on the next of
            the op's copies (other weights, another selection), so that no call finds in a cache what the one before it read

On a GPU the calls of a sample are one CUDA graph, and its duration is that between two events on the device: no launch and no
Python is in it. On the CPU they are a loop, and its duration is the clock's. Rows have the percentiles of a sample's duration over
its calls; `pct_ceiling` is in per cent of the read's median at the same point.

Letters: F neurons  A selected neurons
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dejavu.bench.models.random import HOT_SHARE, RUN, SELECTIONS
from dejavu.bench.rows import SpeedRow
from dejavu.bench.timing import percentiles
from dejavu.config import Progress, require

OP_DENSITIES = (0.05, 0.1, 0.2, 0.5, 1.0)
REPEATS, MIN_REPEATS = 9, 7
MIN_CALLS, ENOUGH_BYTES = 64, 1 << 33  # of a sample: so many calls, or fewer that read so much
ROTATED_BYTES = 1 << 29  # what the copies of an op should come to: ten times the largest cache of a GPU of today
READ = "read"


@dataclass(frozen=True, slots=True, kw_only=True)
class OpRun:
    """One op at one density and selection.

    run(i) asks for one call on copy i of `copies` (weights, selection) and does not wait for it: it must be possible to capture it
    in a CUDA graph. bytes: what one call cannot do without reading, on average over the copies. check() runs the op and returns
    its error over the error that is allowed: at most 1 passes. sparse: whether it reads what is selected alone.
    """

    run: Callable[[int], None]
    bytes: float
    check: Callable[[], float]
    copies: int
    sparse: bool = True


# ops_at(density, selection): ops by name (the row's `op`). (None, None) asks for those that know no density.
OpsAt = Callable[[float | None, str | None], Mapping[str, OpRun]]
# sampler(calls): what runs them all once, and returns the seconds that took.
Sampler = Callable[[Sequence[Callable[[], None]]], Callable[[], float]]


@dataclass(frozen=True, slots=True)
class _Point:
    """Where ops are measured; selection is None where it makes no difference."""

    density: float | None
    selection: str | None
    ops: Mapping[str, OpRun]

    def __str__(self) -> str:
        parts = [None if self.density is None else f"density {self.density:g}", self.selection]
        return ", ".join(part for part in parts if part is not None) or "no density"


def copies_for(one: float) -> int:
    """How many copies of an op that reads so many bytes come to ROTATED_BYTES."""
    return max(1, -(-ROTATED_BYTES // max(1, round(one))))


def index_lists(neurons: int, density: float, selection: str, count: int, seed: int, device: str | torch.device = "cpu") -> list[Tensor]:
    """`count` selections: sorted int32 [A] of different neurons, A = density x neurons, at least 1; the same for one seed.

    uniform: each its own; clustered: whole runs of RUN neighbours, of which the last may be cut; hot-set: HOT_SHARE of A the same
    in all. Raises ValueError for an unknown selection or a density outside (0, 1].
    """
    require(selection in SELECTIONS, f"unknown selection {selection!r}; choose one of {', '.join(SELECTIONS)}")
    require(0 < density <= 1, f"density must lie in (0, 1], not {density:g}")
    generator = torch.Generator().manual_seed(seed)
    kept = max(1, round(density * neurons))

    def chosen() -> Tensor:
        if selection == "clustered":
            starts = torch.randperm(-(-neurons // RUN), generator=generator) * RUN
            indices = (starts[:, None] + torch.arange(RUN)).flatten()
            return indices[indices < neurons][:kept]
        return torch.cat([hot, cold[torch.randperm(len(cold), generator=generator)[: kept - len(hot)]]])

    shared = round(HOT_SHARE * kept) if selection == "hot-set" else 0
    hot, cold = torch.randperm(neurons, generator=generator).split([shared, neurons - shared])
    return [chosen().sort().values.to(device, torch.int32) for _ in range(count)]


def bench_ops(
    ops_at: OpsAt,
    *,
    read: OpRun,
    template: SpeedRow,
    densities: Sequence[float] = OP_DENSITIES,
    selections: Sequence[str] = SELECTIONS,
    repeats: int = REPEATS,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
    progress: Progress | None = None,
) -> list[SpeedRow]:
    """Rows of every op at every density and selection, and once where it knows none.

    ops_at: see OpsAt; called once for each point before any is timed, so what it returns should share its weights. At density 1
    every selection is the same and is asked for as the first of them. read: a sequential read of a large buffer, the ceiling.
    template: what all rows have in common; what is of an op is replaced. Raises ValueError for
    an op whose check fails, a density outside (0, 1], an unknown selection and fewer than MIN_REPEATS repeats.
    """
    require(repeats >= MIN_REPEATS, f"repeats must be at least {MIN_REPEATS}, not {repeats}")
    points = _points(ops_at, densities, selections)
    for point in points:
        for name, op in point.ops.items():
            error = op.check()
            require(error <= 1, f"{name} ({point}) is wrong: its error is {error:.3g} times what is allowed; nothing was timed")
    sampler = graph_sampler if device.startswith("cuda") else loop_sampler(clock)
    rows: list[SpeedRow] = []
    for index, point in enumerate(points):
        rows += _timed(point, read, template, repeats, sampler)
        if progress is not None:
            progress("ops", index + 1, len(points))
    return rows


def _points(ops_at: OpsAt, densities: Sequence[float], selections: Sequence[str]) -> list[_Point]:
    for selection in selections:
        require(selection in SELECTIONS, f"unknown selection {selection!r}; choose one of {', '.join(SELECTIONS)}")
    for density in densities:
        require(0 < density <= 1, f"density must lie in (0, 1], not {density:g}")
    assert selections, "a density needs a selection"
    points = [_Point(None, None, ops_at(None, None))]
    for density in densities:
        if density == 1:
            points.append(_Point(1.0, None, ops_at(1.0, selections[0])))
        else:
            points += [_Point(density, selection, ops_at(density, selection)) for selection in selections]
    return [point for point in points if point.ops]


def _timed(point: _Point, read: OpRun, template: SpeedRow, repeats: int, sampler: Sampler) -> list[SpeedRow]:
    """Rows of the point's ops, which take turns with the read."""
    assert READ not in point.ops, f"{READ!r} is the ceiling"
    ops = {READ: read, **point.ops}
    calls = {name: _calls(op) for name, op in ops.items()}
    samples = {name: sampler(each) for name, each in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ops}
    for sample in samples.values():
        sample()  # warms up
    for index in range(repeats):
        order = list(ops)[index % len(ops) :] + list(ops)[: index % len(ops)]
        for name in order if index // len(ops) % 2 == 0 else reversed(order):
            seconds[name].append(samples[name]() / len(calls[name]))
    ceiling = read.bytes / float(np.median(seconds[READ]))
    rows = []
    for name, op in point.ops.items():
        p20, p50, p80 = percentiles(seconds[name])
        speed = op.bytes * 1e6 / p50
        rows.append(
            dataclasses.replace(
                template, op=name, mode="sparse" if op.sparse else "dense", sparse=op.sparse, mlp_density=point.density,
                selection=point.selection, p20_us=p20, p50_us=p50, p80_us=p80,
                tok_s=None, nodes=None, head_density=None, union_density=None, gbs=speed / 1e9, pct_ceiling=100 * speed / ceiling,
            )
        )  # fmt: skip
    return rows


def _calls(op: OpRun) -> list[Callable[[], None]]:
    """Whole rounds over the copies, at least MIN_CALLS in all, or what reads ENOUGH_BYTES."""
    assert op.copies >= 1, f"{op.copies=}"
    calls = min(MIN_CALLS, -(-ENOUGH_BYTES // max(1, round(op.bytes))))
    rounds = -(-calls // op.copies)
    return [lambda copy=copy: op.run(copy) for _ in range(rounds) for copy in range(op.copies)]


def loop_sampler(clock: Callable[[], float]) -> Sampler:
    """Calls one after the other, by the clock."""

    def sampler(calls: Sequence[Callable[[], None]]) -> Callable[[], float]:
        def sample() -> float:
            start = clock()
            for call in calls:
                call()
            return clock() - start

        return sample

    return sampler


def graph_sampler(calls: Sequence[Callable[[], None]]) -> Callable[[], float]:
    """All calls as one CUDA graph on the current device, by its events."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what compiles or picks a kernel on its first call must have done so
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def sample() -> float:
        graph.replay()  # while it runs, what is timed is queued: it does not wait for its launch
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return sample
