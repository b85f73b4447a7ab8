"""Interleaved timing: what slows the machine for a while slows everything that is compared.

In: what to do in each round, by name. Out: its durations. In a round each has a turn, and which comes first changes from round
to round. A turn may be several runs one after the other, the first of which find the caches as others left them and are
not counted. A duration is that of the work alone: what was queued before is waited for before the clock starts, the work's
own before it stops.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from dejavu.config import Progress, require

Key = TypeVar("Key", bound=Hashable)
MIN_REPEATS = 5  # fewer durations have no 20th and 80th percentile to speak of


def nothing() -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """run(number) is timed; sync() waits until the device has done what was asked of it; done(number, what run returned) is not timed."""

    run: Callable[[int], Any]
    sync: Callable[[], None] = nothing
    done: Callable[[int, Any], None] | None = None


def time_interleaved(
    works: Mapping[Key, Work],
    rounds: int,
    *,
    runs: int = 1,
    skipped: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    progress: Progress | None = None,
    name: str = "rounds",
) -> dict[Key, list[float]]:
    """Seconds of the runs that count, by name: of each turn's `runs` all but the first `skipped`. Numbers of runs go on over the rounds."""
    repeats = rounds * (runs - skipped)
    require(repeats >= MIN_REPEATS, f"{repeats} repeats are too few to tell a median from noise; give at least {MIN_REPEATS}")
    seconds: dict[Key, list[float]] = {key: [] for key in works}
    order = list(works)
    for index in range(rounds):
        first = index % len(order)
        rotated = order[first:] + order[:first]
        # Each cycle of first ones the other way round: nobody always follows the same one and finds what it left in the caches.
        for key in rotated if index // len(order) % 2 == 0 else reversed(rotated):
            work = works[key]
            for run in range(runs):
                number = index * runs + run
                work.sync()
                start = clock()
                found = work.run(number)
                work.sync()
                elapsed = clock() - start
                if run >= skipped:
                    seconds[key].append(elapsed)
                if work.done is not None:
                    work.done(number, found)
        if progress is not None:
            progress(name, index + 1, rounds)
    return seconds


def percentiles(seconds: list[float]) -> tuple[float, float, float]:
    """20th, 50th and 80th percentile in microseconds. Raises ValueError for fewer than MIN_REPEATS durations."""
    require(len(seconds) >= MIN_REPEATS, f"{len(seconds)} repeats are too few to tell a median from noise; give at least {MIN_REPEATS}")
    p20, p50, p80 = (float(value) * 1e6 for value in np.quantile(seconds, [0.2, 0.5, 0.8]))
    return p20, p50, p80
