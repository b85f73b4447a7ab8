"""Interleaved timing, with a clock and a device that are made up: what is measured is the work, all of it and nothing else."""

from __future__ import annotations

from itertools import pairwise

import pytest

from dejavu.bench.timing import Work, percentiles, time_interleaved


class Device:
    """A clock, and a queue of work in seconds: asking for work takes no time, waiting for it does."""

    def __init__(self) -> None:
        self.now, self.queue = 100.0, 0.0

    def clock(self) -> float:
        return self.now

    def ask(self, seconds: float) -> None:
        self.queue += seconds

    def sync(self) -> None:
        self.now, self.queue = self.now + self.queue, 0.0


def test_measured_time_is_exactly_the_timed_work() -> None:
    """10 ms that were queued before do not count, the work's own 3 and 5 ms do, and neither does what is done with the result."""
    device = Device()

    def work(seconds: float) -> Work:
        def done(number: int, found: float) -> None:
            assert found == seconds
            device.now += 1.0
            device.ask(0.010)

        def run(number: int) -> float:
            device.ask(seconds)
            return seconds

        return Work(run=run, sync=device.sync, done=done)

    device.ask(0.010)
    seconds = time_interleaved({"a": work(0.003), "b": work(0.005)}, 6, clock=device.clock)
    assert seconds["a"] == pytest.approx([0.003] * 6, abs=1e-9) and seconds["b"] == pytest.approx([0.005] * 6, abs=1e-9)


def test_skipped_runs_do_not_count_and_numbers_go_on() -> None:
    device, numbers = Device(), []

    def run(number: int) -> None:
        numbers.append(number)
        device.now += number

    seconds = time_interleaved({"a": Work(run=run)}, 3, runs=4, skipped=2, clock=device.clock)
    assert numbers == list(range(12)) and seconds["a"] == [2, 3, 6, 7, 10, 11]


def test_everyone_comes_first_and_follows_everyone() -> None:
    names: list[str] = []
    time_interleaved({name: Work(run=lambda number, name=name: names.append(name)) for name in "abc"}, 6)
    rounds = ["".join(names[start : start + 3]) for start in range(0, 18, 3)]
    assert sorted(each[0] for each in rounds) == sorted("aabbcc")
    pairs = {pair for each in rounds for pair in pairwise(each)}
    assert len(pairs) == 6, "each follows each of the others in some round"
    two: list[str] = []
    time_interleaved({name: Work(run=lambda number, name=name: two.append(name)) for name in "ab"}, 8)
    assert {"".join(two[start : start + 2]) for start in range(0, 16, 2)} == {"ab", "ba"}


def test_too_few_repeats_are_refused() -> None:
    with pytest.raises(ValueError, match="4 repeats are too few"):
        time_interleaved({"a": Work(run=lambda number: None)}, 2, runs=3, skipped=1)
    with pytest.raises(ValueError, match="4 repeats are too few"):
        percentiles([1.0] * 4)


def test_percentiles_are_microseconds() -> None:
    assert percentiles([1e-6, 2e-6, 3e-6, 4e-6, 5e-6, 100e-6]) == pytest.approx((2.0, 3.5, 5.0))
