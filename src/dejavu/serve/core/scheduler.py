"""Who waits, who reads its prompt, who decodes: decided step by step, with numbers alone.

In: claims (a prompt, and how many new tokens at most), what came of the last step, and an engine's pages. Out: the Plan of the next step:
ranges of prompts to prefill, and the sequences that decode one token. No clock, no thread, no tensor: the worker has those.

A claim that is admitted has its slot and, in numbers, the pages for its prompt and all of its new tokens: nothing that runs is ever
put back, and nothing that runs can lack a page. First come, first served, but a small claim may pass one that does not fit yet, up to
MAX_PASSED times. Every sequence that can decode does so in every step, beside at most `prefill_chunk` tokens of prompts; those are
shared among the prompts, so that a long one does not hold up the short ones behind it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from dejavu.serve.core.interface import QueueFull, TooLong

QUANTUM = 32  # tokens that a prompt gets at least in a step where it gets any: fewer waste a read of the weights
MAX_PASSED = 8  # how many later claims may go before one that does not fit yet
LONGEST_WAIT_S = 3600


class Pool(Protocol):
    """What the scheduler asks of an engine: see `dejavu.engine.interface.Engine`."""

    @property
    def free_pages(self) -> int: ...

    def reuse(self, slot: int, token_ids: Sequence[int]) -> int: ...

    def free(self, slot: int) -> None: ...


@dataclass(slots=True, kw_only=True, eq=False)
class Claim:
    """A sequence that wants a slot: prompt_ids, and new_tokens at most.

    share: it may begin with a prefix that another one left. after: not before this other's prompt is read, as it begins with the same.
    The rest is the scheduler's: slot, tokens done (that the slot holds), cached (of those, what a prefix saved), and whether it is over.
    """

    prompt_ids: Sequence[int]
    new_tokens: int
    share: bool = True
    after: Claim | None = None
    slot: int | None = None
    done: int = 0
    cached: int = 0
    cancelled: bool = False
    over: bool = False
    passed: int = 0  # later claims that went before it
    tried: int = -1  # the change of the pool's state at which it last did not fit
    served: int = 0  # the plan that last had tokens of its prompt; at first the one before its admission

    @property
    def total(self) -> int:
        return len(self.prompt_ids) + self.new_tokens

    @property
    def unread(self) -> int:
        """Tokens of the prompt that are still to be prefilled."""
        return max(0, len(self.prompt_ids) - self.done)


C = TypeVar("C", bound=Claim)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefill(Generic[C]):
    """Tokens start to stop of a claim's prompt, to be prefilled."""

    claim: C
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan(Generic[C]):
    """One step: prompts that go on, and sequences that decode one token."""

    prefill: tuple[Prefill[C], ...]
    decode: tuple[C, ...]


class Scheduler(Generic[C]):
    """The claims of one engine.

    pool: the engine, all of its slots empty. slots, pages, page_size: what it has. max_tokens: of the longest sequence.
    queue: claims that may wait beyond those for which a slot is free. prefill_chunk: tokens of prompts in a step.
    """

    def __init__(self, pool: Pool, *, slots: int, pages: int, page_size: int, max_tokens: int, prefill_chunk: int, queue: int) -> None:
        assert min(slots, pages, page_size, max_tokens, prefill_chunk) >= 1 and queue >= 0
        self._pool, self._page_size, self._chunk, self._queue = pool, page_size, prefill_chunk, queue
        self.slots, self.limit = slots, min(max_tokens, pages * page_size)
        self._empty = list(range(slots - 1, -1, -1))
        self._waiting: list[C] = []
        self._running: list[C] = []  # in the order of their admission
        self._plans = self._changes = 0

    @property
    def waiting(self) -> tuple[C, ...]:
        return tuple(self._waiting)

    @property
    def running(self) -> tuple[C, ...]:
        return tuple(self._running)

    def check_length(self, claim: Claim) -> None:
        """Raise TooLong for a claim that could never run."""
        if claim.total > self.limit:
            raise TooLong(prompt=len(claim.prompt_ids), requested=claim.new_tokens, limit=self.limit)

    def check_room(self, count: int, *, tokens_per_s: float | None = None) -> None:
        """Raise QueueFull where so many claims more are more than may wait.

        tokens_per_s: what was lately computed, for the estimate of when there may be room.
        """
        waiting = len(self._waiting)
        surplus = waiting + count - len(self._empty) - self._queue
        if count > 0 and surplus > 0:
            raise QueueFull(waiting=waiting, retry_after_s=self._retry_after(surplus, tokens_per_s))

    def submit(self, claims: Sequence[C], *, tokens_per_s: float | None = None) -> None:
        """Queue the claims, all or none. Raises TooLong and QueueFull as the checks do."""
        for claim in claims:
            self.check_length(claim)
        self.check_room(len(claims), tokens_per_s=tokens_per_s)
        self._waiting += claims

    def cancel(self, claim: C) -> None:
        """End a claim: at once where it waits, else by the next plan. One that is over stays so."""
        claim.cancelled = True
        if claim in self._waiting:
            self._waiting.remove(claim)
            claim.over = True

    def plan(self) -> Plan[C]:
        """The next step, once the slots of cancelled claims are free and those that fit have theirs. Empty where there is nothing to do."""
        self._plans += 1
        for claim in [claim for claim in self._running if claim.cancelled]:
            self.end(claim)
        self._admit()
        assert self._running or not self._waiting, "the first claim fits an empty pool: pages of ended sequences were not given back"
        return Plan(prefill=tuple(self._shares()), decode=tuple(claim for claim in self._running if claim.unread == 0))

    def advance(self, claim: C, tokens: int) -> None:
        """So many tokens more are in the claim's slot, of its prompt, or one that it decoded. A prompt is published before it is done."""
        reading = claim.unread > 0
        claim.done += tokens
        assert claim.done <= (len(claim.prompt_ids) if reading else claim.total), f"{claim.done=} {claim.total=}"
        self._changes += reading and claim.unread == 0  # who waits may share the prompt from now on

    def end(self, claim: C) -> None:
        """The claim is over: its slot and pages are free. One that waits leaves the queue."""
        claim.over = True
        self._changes += 1
        if claim in self._waiting:
            self._waiting.remove(claim)
        elif claim in self._running:
            self._running.remove(claim)
            assert claim.slot is not None
            self._empty.append(claim.slot)
            self._pool.free(claim.slot)

    def reset(self, pool: Pool) -> list[C]:
        """Go on with another engine, of the same sizes: the running claims are over, those that wait stay. Returns the former."""
        ended, self._running = self._running, []
        for claim in ended:
            claim.over = True
        self._pool, self._empty = pool, list(range(self.slots - 1, -1, -1))
        self._changes += 1
        return ended

    def _retry_after(self, surplus: int, tokens_per_s: float | None) -> int:
        """Seconds until so many of the claims there are may have ended, if all of them get on as those lately did; at least 1."""
        claims = self._waiting + self._running
        if not tokens_per_s or not claims:
            return 1
        mean = sum(claim.total - claim.done for claim in claims) / len(claims)
        return max(1, min(LONGEST_WAIT_S, math.ceil(surplus * mean / tokens_per_s)))

    def _admit(self) -> None:
        """Give slots to those that wait, in their order."""
        blocked: list[C] = []
        for claim in tuple(self._waiting):
            if not self._empty or any(each.passed >= MAX_PASSED for each in blocked):
                return
            if claim.after is not None and claim.after.unread > 0 and not claim.after.over:
                continue
            if self._take(claim):
                for each in blocked:
                    each.passed += 1
            else:
                blocked.append(claim)

    def _take(self, claim: C) -> bool:
        """Give a waiting claim a slot, and what is cached of its prompt; False, changing nothing, where it lacks pages.

        What it can share with sequences that run is known only once it does: it tries, where that could be enough.
        """
        sharable = (len(claim.prompt_ids) - 1) // self._page_size if claim.share else 0
        if claim.tried == self._changes or self._pages(claim.total) - sharable > self._spare():
            return False
        place = self._waiting.index(claim)
        slot = claim.slot = self._empty.pop()
        del self._waiting[place]
        self._running.append(claim)
        claim.served = self._plans - 1
        if sharable:
            claim.done = claim.cached = self._pool.reuse(slot, claim.prompt_ids)
        if self._spare() >= 0:
            return True
        self._pool.free(slot)
        self._running.pop()
        self._waiting.insert(place, claim)
        self._empty.append(slot)
        claim.slot, claim.done, claim.cached, claim.tried = None, 0, 0, self._changes
        return False

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self._page_size)

    def _spare(self) -> int:
        """Free pages that nothing that runs will need. It stays the same while sequences grow."""
        return self._pool.free_pages - sum(self._pages(claim.total) - self._pages(claim.done) for claim in self._running)

    def _shares(self) -> list[Prefill[C]]:
        """What each prompt gets of the step's tokens.

        A few prompts at a time, those first that were served longest ago; among these the same for each, and what a short one leaves
        for the others.
        """
        found: list[Prefill[C]] = []
        queue = sorted((claim for claim in self._running if claim.unread > 0), key=lambda claim: claim.served)
        budget, at_once = self._chunk, max(1, self._chunk // QUANTUM)
        while queue and budget:
            chosen, queue = sorted(queue[:at_once], key=lambda claim: claim.unread), queue[at_once:]
            for left, claim in zip(range(len(chosen), 0, -1), chosen, strict=True):
                tokens = min(claim.unread, budget // left)
                if tokens > 0:
                    found.append(Prefill(claim=claim, start=claim.done, stop=claim.done + tokens))
                    claim.served = self._plans
                    budget -= tokens
        return found
