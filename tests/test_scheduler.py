"""The scheduler: admission, sharing, fairness and limits by example, and whole days of traffic by simulation."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dejavu.serve.core.interface import QueueFull, TooLong
from dejavu.serve.core.scheduler import MAX_PASSED, QUANTUM, ScheduledSequence, Scheduler, SchedulerOutput
from helpers.stub_engine import StubPool

NUMBERS = itertools.count()


@dataclass(slots=True, kw_only=True, eq=False)
class Traced(ScheduledSequence):
    """A sequence with its story: how many tokens it will generate, and what the simulation counts."""

    answer: int = 0
    generated: int = 0
    number: int = 0
    overtaken: int = 0
    unserved: int = 0


def sequence(prompt: int | Sequence[int], new: int, **options: Any) -> Traced:
    """A sequence whose prompt is given, or has so many tokens that no other prompt begins with."""
    number = next(NUMBERS)
    ids = [1000 + number] * prompt if isinstance(prompt, int) else prompt
    return Traced(prompt_ids=tuple(ids), new_tokens=new, answer=new, number=number, **options)


@dataclass
class Simulation:
    """A scheduler and the pool that its plans are carried out on; every step is checked."""

    slots: int = 2
    pages: int = 100
    page_size: int = 4
    chunk: int = 64
    queue: int = 1000
    max_tokens: int = 1_000_000
    pool: StubPool = field(init=False)
    scheduler: Scheduler[Traced] = field(init=False)
    all: list[Traced] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pool = self.new_pool()
        self.scheduler = Scheduler(
            self.pool, slots=self.slots, pages=self.pages, page_size=self.page_size, max_tokens=self.max_tokens,
            prefill_chunk=self.chunk, queue=self.queue,
        )  # fmt: skip

    def new_pool(self) -> StubPool:
        return StubPool(slots=self.slots, pages=self.pages, page_size=self.page_size)

    def submit(self, *sequences: Traced) -> tuple[Traced, ...]:
        self.scheduler.submit(sequences)
        self.all += sequences
        return sequences

    def step(self) -> SchedulerOutput[Traced]:
        """Schedule, check the plan, carry it out."""
        before = self.scheduler.waiting
        plan = self.scheduler.schedule()
        self.check(plan, before)
        for part in plan.prefill:
            self.pool.grow(part.sequence.slot or 0, part.stop - part.start)
            if part.stop == len(part.sequence.prompt_ids):
                self.pool.publish(part.sequence.slot or 0, part.sequence.prompt_ids)
            self.scheduler.advance(part.sequence, part.stop - part.start)
            if part.sequence.unread == 0:
                self.generated(part.sequence)
        for row in plan.decode:
            self.pool.grow(row.slot or 0, 1)
            self.scheduler.advance(row, 1)
            self.generated(row)
        return plan

    def generated(self, row: Traced) -> None:
        row.generated += row.new_tokens > 0
        if row.generated >= row.answer:
            self.scheduler.end(row)

    def check(self, plan: SchedulerOutput[Traced], before: Sequence[Traced]) -> None:
        running = self.scheduler.running
        slots = [row.slot for row in running]
        assert len(set(slots)) == len(slots) <= self.slots and all(slot is not None and 0 <= slot < self.slots for slot in slots)
        assert not any(row.cancelled or row.over for row in running), "what is cancelled or over has no slot"
        assert [row for row in running if row.unread == 0] == list(plan.decode), "whoever can decode does"
        assert sum(part.stop - part.start for part in plan.prefill) <= self.chunk
        for part in plan.prefill:
            assert part.sequence in running and part.start == part.sequence.done < part.stop <= len(part.sequence.prompt_ids)
        for row in running:
            assert self.pool.lengths[row.slot or 0] == row.done
        served = [part.sequence for part in plan.prefill]
        assert len(set(map(id, served))) == len(served)
        for row in running:
            row.unserved = 0 if row in served else row.unserved + (row.unread > 0)
            assert row.unserved <= -(-self.slots // max(1, self.chunk // QUANTUM)), "prompts take turns"
        promised = sum((-row.done // self.page_size) - (-row.total // self.page_size) for row in running)
        assert promised <= self.pool.free_pages, "what runs has the pages for its end"
        for late in [each for each in running if each in before]:
            for early in self.scheduler.waiting:
                ready = early.after is None or early.after.unread == 0 or early.after.over
                early.overtaken += ready and early.number < late.number
        assert all(row.overtaken <= MAX_PASSED for row in self.scheduler.waiting), "nobody is passed without end"

    def drain(self) -> int:
        """Steps until everything is over; everything is then as it was at first."""
        steps, most = 0, sum(row.total + 1 for row in self.all) + 2
        while self.scheduler.running or self.scheduler.waiting:
            self.step()
            steps += 1
            assert steps <= most, "it comes to an end"
        assert all(row.over for row in self.all)
        assert self.pool.free_pages == self.pages and self.pool.lengths == [0] * self.slots
        assert self.step() == SchedulerOutput(prefill=(), decode=())
        return steps


def ranges(plan: SchedulerOutput[Traced]) -> list[tuple[int, int]]:
    return sorted((part.start, part.stop) for part in plan.prefill)


# By simulation

PROMPTS = st.builds(
    lambda family, shared, own: [family] * shared + [100 + own] * own, st.integers(0, 1), st.integers(0, 40), st.integers(1, 30)
)
ACTIONS = st.one_of(
    st.tuples(st.just("submit"), PROMPTS, st.integers(0, 30), st.integers(0, 100), st.integers(1, 3), st.booleans()),
    st.tuples(st.just("step"), st.integers(1, 6)),
    st.tuples(st.sampled_from(["cancel", "fail"]), st.integers(0, 50)),
    st.just(("reset",)),
)


@settings(max_examples=250)
@given(
    slots=st.integers(1, 4), pages=st.integers(1, 14), page_size=st.sampled_from([1, 4, 16]), chunk=st.integers(1, 70),
    queue=st.integers(0, 6), actions=st.lists(ACTIONS, max_size=40),
)  # fmt: skip
def test_whatever_comes_everything_ends(
    slots: int, pages: int, page_size: int, chunk: int, queue: int, actions: list[tuple[Any, ...]]
) -> None:
    """Arrivals, cancellations, failures of rows and of whole engines, in any order: the checks of every step hold."""
    simulation = Simulation(slots=slots, pages=pages, page_size=page_size, chunk=chunk, queue=queue)
    scheduler = simulation.scheduler
    for action, *given_ in actions:
        if action == "submit":
            prompt, new, percent, copies, share = given_
            first = sequence(prompt, new, share=share)
            sequences = [first, *(sequence(prompt, new, share=share, after=first) for _ in range(copies - 1))]
            for each in sequences:
                each.answer = new * percent // 100
            room = len(scheduler.waiting) + copies <= queue + slots - len(scheduler.running)
            try:
                simulation.submit(*sequences)
            except TooLong as error:
                assert first.total > pages * page_size and (error.prompt, error.requested) == (len(prompt), new)
            except QueueFull as error:
                assert not room and error.retry_after_s >= 1
            else:
                assert room and first.total <= pages * page_size
        elif action == "step":
            for _ in range(given_[0]):
                simulation.step()
        elif action == "reset":
            running = scheduler.running
            simulation.pool = simulation.new_pool()
            assert tuple(scheduler.reset(simulation.pool)) == running and all(each.over for each in running)
        elif simulation.all:
            chosen = simulation.all[given_[0] % len(simulation.all)]
            if action == "cancel":
                scheduler.cancel(chosen)
            else:
                scheduler.end(chosen)
            assert chosen not in scheduler.waiting
    simulation.drain()


def test_a_simulation_that_leaks_a_page_is_found() -> None:
    """The checks can fail: a slot that keeps a page behind the scheduler's back."""
    simulation = Simulation(pages=3, page_size=4)
    simulation.pool.grow(1, 1)
    simulation.submit(sequence(5, 4))
    with pytest.raises(AssertionError, match="not given back"):
        simulation.drain()


# Limits


@pytest.mark.parametrize("prompt", [1, 23, 24, 25, 31, 32, 33])
@pytest.mark.parametrize("new", [0, 1, 8, 16])
@pytest.mark.parametrize(("pages", "limit"), [(3, 24), (100, 32)])
def test_what_does_not_fit_is_refused_at_once(prompt: int, new: int, pages: int, limit: int) -> None:
    simulation = Simulation(pages=pages, page_size=8, max_tokens=32)
    if prompt + new > limit:
        with pytest.raises(TooLong, match=f"{prompt} tokens and {new} more were requested.*the limit is {limit}") as caught:
            simulation.submit(sequence(2, 1), sequence(prompt, new))
        assert (caught.value.prompt, caught.value.requested, caught.value.limit) == (prompt, new, limit)
        assert simulation.scheduler.waiting == (), "all or none"
    else:
        simulation.submit(sequence(prompt, new))
    simulation.submit(sequence(2, 1))
    simulation.drain()


# Admission


def test_first_come_first_served() -> None:
    simulation = Simulation(slots=2)
    sequences = simulation.submit(*(sequence(4, 5) for _ in range(5)))
    simulation.step()
    assert (simulation.scheduler.running, simulation.scheduler.waiting) == (sequences[:2], sequences[2:])
    simulation.drain()


def test_pages_are_kept_for_every_new_token() -> None:
    """7 of 8 pages are promised to the first, of which it has one so far: the second does not get them."""
    simulation = Simulation(pages=8, page_size=4)
    first, second = simulation.submit(sequence(4, 24), sequence(4, 4))
    simulation.step()
    assert simulation.pool.free_pages == 7
    assert simulation.scheduler.running == (first,)
    simulation.scheduler.cancel(first)
    simulation.step()
    assert simulation.scheduler.running == (second,)


def test_a_small_claim_passes_a_large_one_but_not_for_ever() -> None:
    simulation = Simulation(slots=2, pages=10, page_size=4)
    long_lived = sequence(4, 16)  # 5 pages
    simulation.submit(long_lived)
    simulation.step()
    large = sequence(4, 20)  # 6 pages
    small = [sequence(4, 1) for _ in range(MAX_PASSED + 3)]
    simulation.submit(large, *small)
    gone = []
    while large.slot is None:
        gone.append(sum(each.over for each in small))
        simulation.step()
    assert gone == [*range(MAX_PASSED), *[MAX_PASSED] * (16 - MAX_PASSED)], "one in each step, and then it is its turn"
    while not large.over:
        simulation.step()
    assert large.generated == 20
    simulation.drain()


def test_who_fits_goes_before_whom_it_would_delay() -> None:
    """Nothing passes where the first one fits, however small what is behind it."""
    simulation = Simulation(slots=1, pages=10, page_size=4)
    large, small = simulation.submit(sequence(4, 20), sequence(1, 0))
    simulation.step()
    assert simulation.scheduler.running == (large,) and small.passed == 0


def test_a_shared_prefix_needs_its_pages_once() -> None:
    """Each needs 9 of 12 pages; 7 of them are of the prompt that both have."""
    prompt = [5] * 28
    simulation = Simulation(pages=12, page_size=4)
    first, second = simulation.submit(sequence([*prompt, 1], 7), sequence([*prompt, 2], 7))
    simulation.step()
    assert simulation.scheduler.running == (first,), "nothing is published yet"
    simulation.step()
    assert simulation.scheduler.running == (first, second) and second.cached == 28
    assert simulation.pool.free_pages == 12 - 8 - 1
    while not first.over:
        simulation.step()
    late = sequence(4, 16)  # 5 pages: those of the prompt are still the second's
    simulation.submit(late)
    simulation.drain()
    alone = Simulation(pages=12, page_size=4)
    alone.submit(sequence([*prompt, 1], 7, share=False), sequence([*prompt, 2], 7, share=False))
    alone.step()
    alone.step()
    assert len(alone.scheduler.running) == 1


def test_a_try_that_fails_leaves_the_queue_as_it_was_and_is_not_repeated() -> None:
    """What could fit by sharing is tried, and again only once something has ended or was published."""
    simulation = Simulation(slots=3, pages=8, page_size=4)
    running, first, second = simulation.submit(sequence(4, 12), sequence(20, 4), sequence(20, 4, share=False))
    tries: list[int] = []
    reuse = simulation.pool.reuse
    simulation.pool.reuse = lambda slot, ids: tries.append(ids[0]) or reuse(slot, ids)  # pyrefly: ignore[bad-assignment]
    for _ in range(8):
        simulation.step()
    assert simulation.scheduler.running == (running,) and simulation.scheduler.waiting == (first, second)
    assert tries == [first.prompt_ids[0]] * 2
    simulation.drain()


def test_a_prefix_that_nobody_holds_is_not_for_nothing() -> None:
    """Cached pages are free pages until they are taken: the third sequence does not fit next to the second, which took them."""
    simulation = Simulation(slots=3, pages=8, page_size=4)
    simulation.submit(sequence([5] * 17, 3))
    simulation.drain()
    second, third = simulation.submit(sequence([5] * 17, 3), sequence([6] * 13, 3))
    simulation.step()
    assert simulation.scheduler.running == (second,) and second.cached == 16
    assert third.overtaken == 0
    simulation.drain()


def test_choices_of_a_request_wait_for_their_prompt() -> None:
    simulation = Simulation(slots=4, page_size=4, chunk=32)
    first = sequence([5] * 50, 4)
    others = [sequence([5] * 50, 4, after=first) for _ in range(2)]
    behind = sequence(3, 4)
    simulation.submit(first, *others, behind)
    assert ranges(simulation.step()) == [(0, 32)]
    assert simulation.scheduler.running == (first, behind)
    while first.unread:
        simulation.step()
    simulation.step()
    assert [other.cached for other in others] == [48, 48]
    simulation.drain()


@pytest.mark.parametrize("step_first", [False, True])
def test_choices_go_on_when_the_first_is_cancelled(step_first: bool) -> None:
    simulation = Simulation(chunk=8)
    first = sequence([5] * 50, 4)
    other = sequence([5] * 50, 4, after=first)
    simulation.submit(first, other)
    if step_first:
        simulation.step()
    simulation.scheduler.cancel(first)
    simulation.step()
    assert simulation.scheduler.running == (other,)
    simulation.drain()
    assert other.generated == 4


# Prefill along with decode


def test_a_long_prompt_does_not_hold_up_short_ones() -> None:
    simulation = Simulation(slots=4, pages=1000, page_size=4, chunk=128)
    long, short, shorter = simulation.submit(sequence(1000, 1), sequence(40, 1), sequence(20, 1))
    assert ranges(simulation.step()) == [(0, 20), (0, 40), (0, 68)]
    assert short.over and shorter.over and not long.over
    assert ranges(simulation.step()) == [(68, 196)], "alone it has the whole chunk"


def test_prompts_share_a_chunk_evenly() -> None:
    simulation = Simulation(slots=3, pages=1000, chunk=128)
    simulation.submit(*(sequence(500, 1) for _ in range(3)))
    assert sorted(part.stop - part.start for part in simulation.step().prefill) == [42, 43, 43]


def test_a_chunk_is_not_cut_into_crumbs() -> None:
    """With more prompts than QUANTUM fits into the chunk they take turns."""
    simulation = Simulation(slots=6, pages=10_000, chunk=2 * QUANTUM)
    sequences = simulation.submit(*(sequence(500, 1) for _ in range(6)))
    turns = [[part.sequence for part in simulation.step().prefill] for _ in range(4)]
    assert turns == [list(sequences[:2]), list(sequences[2:4]), list(sequences[4:]), list(sequences[:2])]


def test_short_prompts_that_keep_coming_do_not_starve_a_long_one() -> None:
    simulation = Simulation(slots=2, pages=1000, chunk=QUANTUM)
    (long,) = simulation.submit(sequence(10 * QUANTUM, 1))
    for _ in range(25):
        simulation.submit(sequence(QUANTUM, 1))
        simulation.step()
    assert long.over


def test_rows_decode_while_a_prompt_is_read() -> None:
    simulation = Simulation(slots=2, pages=1000, chunk=16)
    (row,) = simulation.submit(sequence(4, 30))
    simulation.step()
    simulation.submit(sequence(200, 1))
    for generated in range(2, 14):
        plan = simulation.step()
        assert plan.decode == (row,) and row.generated == generated
        assert [part.stop - part.start for part in plan.prefill] == [16]


# The queue


def test_a_full_queue_refuses_all_or_none_and_says_when_to_come_back() -> None:
    simulation = Simulation(slots=1, queue=2)
    simulation.submit(sequence(10, 10), sequence(10, 10), sequence(10, 10))
    with pytest.raises(QueueFull, match="3 requests are waiting"):
        simulation.submit(sequence(1, 1))
    simulation.step()
    with pytest.raises(QueueFull) as caught:
        simulation.scheduler.submit([sequence(1, 1)], tokens_per_s=4.0)
    # 10 tokens of the first's prompt are read, so 10 + 20 + 20 are left for three: one ends in (50 / 3) / 4 s in the mean
    assert (caught.value.waiting, caught.value.retry_after_s) == (2, 5)
    with pytest.raises(QueueFull) as caught:
        simulation.scheduler.submit([sequence(1, 1), sequence(1, 1)], tokens_per_s=4.0)
    assert caught.value.retry_after_s == 9
    for speed, wait in ((None, 1), (1e9, 1), (1e-9, 3600)):
        with pytest.raises(QueueFull) as caught:
            simulation.scheduler.submit([sequence(1, 1)], tokens_per_s=speed)
        assert caught.value.retry_after_s == wait
    simulation.scheduler.cancel(simulation.scheduler.waiting[0])
    with pytest.raises(QueueFull):
        simulation.submit(sequence(1, 1), sequence(1, 1))
    assert len(simulation.scheduler.waiting) == 1
    simulation.submit(sequence(1, 1))
    simulation.drain()


def test_without_a_queue_free_slots_still_serve() -> None:
    simulation = Simulation(slots=2, queue=0)
    simulation.submit(sequence(2, 2), sequence(2, 2))
    with pytest.raises(QueueFull):
        simulation.submit(sequence(2, 2))
    simulation.drain()
    simulation.submit(sequence(2, 2))
    simulation.drain()


# Cancelling


def test_cancelling_frees_slot_and_pages_by_the_next_plan() -> None:
    simulation = Simulation(slots=2, chunk=16)
    reading, decoding, waiting = simulation.submit(sequence(100, 10), sequence(4, 10), sequence(4, 10))
    simulation.step()
    simulation.step()
    assert reading.unread and not decoding.unread and simulation.scheduler.waiting == (waiting,)
    for each in (reading, decoding, waiting):
        simulation.scheduler.cancel(each)
        simulation.scheduler.cancel(each)
    assert simulation.scheduler.waiting == ()
    assert simulation.step() == SchedulerOutput(prefill=(), decode=())
    assert simulation.pool.free_pages == 100 and simulation.scheduler.running == ()
    simulation.drain()


def test_cancelling_what_is_over_frees_nothing_twice() -> None:
    simulation = Simulation(slots=1)
    (first,) = simulation.submit(sequence(4, 1))
    simulation.step()
    assert first.over
    (second,) = simulation.submit(sequence(4, 5))
    simulation.step()
    simulation.scheduler.cancel(first)
    simulation.scheduler.end(first)
    simulation.step()
    assert simulation.scheduler.running == (second,)
    simulation.drain()
