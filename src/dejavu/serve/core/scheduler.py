"""Who waits, who reads its prompt, who decodes: decided step by step, with numbers alone.

In: sequences (a prompt, and how many new tokens at most), what came of the last step, and an engine's pages. Out: the SchedulerOutput of
the next step: ranges of prompts to prefill, and the sequences that decode one token. No clock, no thread, no tensor: the worker has those.

A sequence that is admitted has its slot and, in numbers, the pages for its prompt and all of its new tokens: nothing that runs is ever
put back, and nothing that runs can lack a page. First come, first served, but a small sequence may pass one that does not fit yet, up to
MAX_PASSED times. Every sequence that can decode does so in every step, together with at most `prefill_chunk` tokens of prompts; those are
shared among the prompts, so that a long one does not hold up the short ones behind it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from dejavu.serve.core.interface import QueueFull, TooLong

QUANTUM = 32  # tokens that a prompt gets at least in a step where it gets any: fewer waste a read of the weights
MAX_PASSED = 8  # how many later sequences may go before one that does not fit yet
LONGEST_WAIT_S = 3600


class Pool(Protocol):
    """What the scheduler asks of an engine: see `dejavu.engine.interface.Engine`."""

    @property
    def free_pages(self) -> int: ...

    def reuse(self, slot: int, token_ids: Sequence[int]) -> int: ...

    def free(self, slot: int) -> None: ...


@dataclass(slots=True, kw_only=True, eq=False)
class ScheduledSequence:
    """A sequence that wants a slot: prompt_ids, and new_tokens at most.

    share: it may begin with a prefix that another one left. after: not before this other's prompt is read, as it begins with the same.
    The rest is the scheduler's: slot, tokens done (that the slot holds), cached (of those, what a prefix saved), and whether it is over.
    """

    prompt_ids: Sequence[int]
    new_tokens: int
    share: bool = True
    after: ScheduledSequence | None = None
    slot: int | None = None
    done: int = 0
    cached: int = 0
    cancelled: bool = False
    over: bool = False
    passed: int = 0  # later sequences that went before it
    tried: int = -1  # the change of the pool's state at which it last did not fit
    served: int = 0  # the step that last had tokens of its prompt; at first the one before its admission

    @property
    def total(self) -> int:
        return len(self.prompt_ids) + self.new_tokens

    @property
    def unread(self) -> int:
        """Tokens of the prompt that are still to be prefilled."""
        return max(0, len(self.prompt_ids) - self.done)


S = TypeVar("S", bound=ScheduledSequence)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillChunk(Generic[S]):
    """Tokens start to stop of a sequence's prompt, to be prefilled."""

    sequence: S
    start: int
    stop: int

    @property
    def ids(self) -> Sequence[int]:
        return self.sequence.prompt_ids[self.start : self.stop]


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerOutput(Generic[S]):
    """One step: prompts that go on, and sequences that decode one token."""

    prefill: tuple[PrefillChunk[S], ...]
    decode: tuple[S, ...]


class Scheduler(Generic[S]):
    """The sequences of one engine.

    pool: the engine, all of its slots empty. slots, pages, page_size: what it has. max_tokens: of the longest sequence.
    queue: sequences that may wait beyond those for which a slot is free. prefill_chunk: tokens of prompts in a step.
    """

    def __init__(self, pool: Pool, *, slots: int, pages: int, page_size: int, max_tokens: int, prefill_chunk: int, queue: int) -> None:
        assert min(slots, pages, page_size, max_tokens, prefill_chunk) >= 1 and queue >= 0
        self._pool, self._page_size, self._chunk, self._queue = pool, page_size, prefill_chunk, queue
        self.slots, self.limit = slots, min(max_tokens, pages * page_size)
        self._empty = list(range(slots - 1, -1, -1))
        self._waiting: list[S] = []
        self._running: list[S] = []  # in the order of their admission
        self._steps = self._changes = 0

    @property
    def waiting(self) -> tuple[S, ...]:
        return tuple(self._waiting)

    @property
    def running(self) -> tuple[S, ...]:
        return tuple(self._running)

    def check_length(self, sequence: ScheduledSequence) -> None:
        """Raise TooLong for a sequence that could never run."""
        if sequence.total > self.limit:
            raise TooLong(prompt=len(sequence.prompt_ids), requested=sequence.new_tokens, limit=self.limit)

    def check_room(self, count: int, *, tokens_per_s: float | None = None) -> None:
        """Raise QueueFull where so many sequences more are more than may wait.

        tokens_per_s: what was lately computed, for the estimate of when there may be room.
        """
        waiting = len(self._waiting)
        surplus = waiting + count - len(self._empty) - self._queue
        if count > 0 and surplus > 0:
            raise QueueFull(waiting=waiting, retry_after_s=self._retry_after(surplus, tokens_per_s))

    def submit(self, sequences: Sequence[S], *, tokens_per_s: float | None = None) -> None:
        """Queue the sequences, all or none. Raises TooLong and QueueFull as the checks do."""
        for sequence in sequences:
            self.check_length(sequence)
        self.check_room(len(sequences), tokens_per_s=tokens_per_s)
        self._waiting += sequences

    def cancel(self, sequence: S) -> None:
        """End a sequence: at once where it waits, else by the next step. One that is over stays so."""
        sequence.cancelled = True
        if sequence in self._waiting:
            self._waiting.remove(sequence)
            sequence.over = True

    def schedule(self) -> SchedulerOutput[S]:
        """The next step, once cancelled sequences have lost their slots and those that fit have theirs. Empty where nothing is to do."""
        self._steps += 1
        for sequence in [sequence for sequence in self._running if sequence.cancelled]:
            self.end(sequence)
        self._admit()
        assert self._running or not self._waiting, "the first sequence fits an empty pool: pages of ended sequences were not given back"
        return SchedulerOutput(prefill=tuple(self._shares()), decode=tuple(sequence for sequence in self._running if sequence.unread == 0))

    def advance(self, sequence: S, tokens: int) -> None:
        """So many tokens more are in the slot, of the sequence's prompt, or decoded. A prompt is published before it is done."""
        reading = sequence.unread > 0
        sequence.done += tokens
        assert sequence.done <= (len(sequence.prompt_ids) if reading else sequence.total), f"{sequence.done=} {sequence.total=}"
        self._changes += reading and sequence.unread == 0  # who waits may share the prompt from now on

    def end(self, sequence: S) -> None:
        """The sequence is over: its slot and pages are free. One that waits leaves the queue."""
        sequence.over = True
        self._changes += 1
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        elif sequence in self._running:
            self._running.remove(sequence)
            assert sequence.slot is not None
            self._empty.append(sequence.slot)
            self._pool.free(sequence.slot)

    def reset(self, pool: Pool) -> list[S]:
        """Go on with another engine, of the same sizes: the running sequences are over, those that wait stay. Returns the former."""
        ended, self._running = self._running, []
        for sequence in ended:
            sequence.over = True
        self._pool, self._empty = pool, list(range(self.slots - 1, -1, -1))
        self._changes += 1
        return ended

    def _retry_after(self, surplus: int, tokens_per_s: float | None) -> int:
        """Seconds until so many of the sequences there are may have ended, if all of them get on as those lately did; at least 1."""
        sequences = self._waiting + self._running
        if not tokens_per_s or not sequences:
            return 1
        mean = sum(sequence.total - sequence.done for sequence in sequences) / len(sequences)
        return max(1, min(LONGEST_WAIT_S, math.ceil(surplus * mean / tokens_per_s)))

    def _admit(self) -> None:
        """Give slots to those that wait, in their order."""
        blocked: list[S] = []
        for sequence in tuple(self._waiting):
            if not self._empty or any(each.passed >= MAX_PASSED for each in blocked):
                return
            if sequence.after is not None and sequence.after.unread > 0 and not sequence.after.over:
                continue
            if self._take(sequence):
                for each in blocked:
                    each.passed += 1
            else:
                blocked.append(sequence)

    def _take(self, sequence: S) -> bool:
        """Give a waiting sequence a slot, and what is cached of its prompt; False, changing nothing, where it lacks pages.

        What it can share with sequences that run is known only once it does: it tries, where that could be enough.
        """
        sharable = (len(sequence.prompt_ids) - 1) // self._page_size if sequence.share else 0
        if sequence.tried == self._changes or self._pages(sequence.total) - sharable > self._spare():
            return False
        place = self._waiting.index(sequence)
        slot = sequence.slot = self._empty.pop()
        del self._waiting[place]
        self._running.append(sequence)
        sequence.served = self._steps - 1
        if sharable:
            sequence.done = sequence.cached = self._pool.reuse(slot, sequence.prompt_ids)
        if self._spare() >= 0:
            return True
        self._pool.free(slot)
        self._running.pop()
        self._waiting.insert(place, sequence)
        self._empty.append(slot)
        sequence.slot, sequence.done, sequence.cached, sequence.tried = None, 0, 0, self._changes
        return False

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self._page_size)

    def _spare(self) -> int:
        """Free pages that nothing that runs will need. It stays the same while sequences grow."""
        return self._pool.free_pages - sum(self._pages(sequence.total) - self._pages(sequence.done) for sequence in self._running)

    def _shares(self) -> list[PrefillChunk[S]]:
        """What each prompt gets of the step's tokens.

        A few prompts at a time, those first that were served longest ago; among these the same for each, and what a short one leaves
        for the others.
        """
        found: list[PrefillChunk[S]] = []
        queue = sorted((sequence for sequence in self._running if sequence.unread > 0), key=lambda sequence: sequence.served)
        budget, at_once = self._chunk, max(1, self._chunk // QUANTUM)
        while queue and budget:
            chosen, queue = sorted(queue[:at_once], key=lambda sequence: sequence.unread), queue[at_once:]
            for left, sequence in zip(range(len(chosen), 0, -1), chosen, strict=True):
                tokens = min(sequence.unread, budget // left)
                if tokens > 0:
                    found.append(PrefillChunk(sequence=sequence, start=sequence.done, stop=sequence.done + tokens))
                    sequence.served = self._steps
                    budget -= tokens
        return found
