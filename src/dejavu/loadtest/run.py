"""A load test of an OpenAI-compatible server over HTTP: models in turns, each with the same requests.

In: a `Load`, prompts for each model, and `ask`, which sends one request and gives its `Reply`. Out: `Segment`s, what came of each model's
part of each round. Rows are made of them in rows.py.

A request's latencies count from its *intended* arrival: in an open loop from when it was due, whether or not this process was late
to send it, and with a 429 that is retried from before the first try. So neither a stalled server nor a stalled client hides the wait
of those that would have come meanwhile. A client of a closed loop means to send when it has read its last answer.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from dejavu.config import Progress, require
from dejavu.loadtest.client import TOO_MANY, Reply
from dejavu.loadtest.workload import WARM_UP, Load, Planned, Prompts, planned_requests
from dejavu.model.texts import CHARACTERS_PER_TOKEN

USUAL_RETRY_S = 1.0  # where a 429 does not say when to come again
OPEN_WARM_UP, WARM_UP_TOKENS = 8, 16  # requests at once where there are no clients to count; tokens of their answers at most
FIRST_PROBE = 4  # the longest prompt, in characters, divided by this: no tokenizer makes that too many tokens


class Ask(Protocol):
    """Send one request and read its answer. Never raises for what a server does."""

    async def __call__(self, model: str, prompt: str, max_tokens: int) -> Reply: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A request and its last reply. intended: when it was to arrive, by the clock. late_s: how much later it was first sent.

    rejected: how many replies were 429.
    """

    intended: float
    late_s: float
    requested_tokens: int
    rejected: int
    reply: Reply

    @property
    def done(self) -> bool:
        return self.reply.error is None

    @property
    def time_to_first_token_s(self) -> float:
        return self.reply.first - self.intended

    @property
    def end_to_end_s(self) -> float:
        return self.reply.ended - self.intended

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between consecutive pieces of text."""
        return np.diff(self.reply.texts).tolist()

    @property
    def per_token_s(self) -> float | None:
        """Seconds per token after the first; None where there is but one."""
        tokens = self.reply.tokens
        return (self.reply.ended - self.reply.first) / (tokens - 1) if tokens > 1 else None


@dataclass(slots=True, kw_only=True)
class Segment:
    """One model's part of a round. seconds: from its start until the last answer was read. busiest: most requests in flight at once."""

    model: str
    seconds: float = 0.0
    busiest: int = 0
    outcomes: list[Outcome] = field(default_factory=list)


class _SegmentRun:
    """The requests of one segment."""

    def __init__(self, segment: Segment, ask: Ask, retries: int, clock: Callable[[], float], noted: Callable[[], None]) -> None:
        self.segment, self.ask, self.retries, self.clock, self.noted = segment, ask, retries, clock, noted
        self.in_flight = 0

    async def open_loop(self, planned: Iterator[Planned]) -> None:
        start = self.clock()
        async with asyncio.TaskGroup() as group:
            for request in planned:
                assert request.due_s is not None
                due = start + request.due_s
                await asyncio.sleep(max(0.0, due - self.clock()))
                group.create_task(self.send(request, due))
        self.segment.seconds = self.clock() - start

    async def closed_loop(self, planned: Iterator[Planned], clients: int, seconds: float | None) -> None:
        start = self.clock()

        async def client() -> None:
            for request in planned:  # of which all clients take their next one
                await self.send(request, self.clock())
                if seconds is not None and self.clock() - start >= seconds:
                    return

        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(client())
        self.segment.seconds = self.clock() - start

    async def send(self, request: Planned, intended: float) -> None:
        """One request to its end, with its retries."""
        self.in_flight += 1
        self.segment.busiest = max(self.segment.busiest, self.in_flight)
        late, rejected = math.nan, 0
        while True:
            reply = await self.ask(self.segment.model, request.prompt, request.output_tokens)
            late = reply.sent - intended if rejected == 0 else late
            if reply.status != TOO_MANY:
                break
            rejected += 1
            if rejected > self.retries:
                break
            await asyncio.sleep(USUAL_RETRY_S if reply.retry_after_s is None else reply.retry_after_s)
        self.in_flight -= 1
        self.segment.outcomes.append(
            Outcome(intended=intended, late_s=late, requested_tokens=request.output_tokens, rejected=rejected, reply=reply)
        )
        self.noted()


async def run_load(
    load: Load,
    prompts: Mapping[str, Prompts],
    ask: Ask,
    *,
    clock: Callable[[], float],
    retries: int = 0,
    after_round: Callable[[], Awaitable[None]] | None = None,
    progress: Progress | None = None,
) -> list[Segment]:
    """The load, round by round, for each model of `prompts` in turn; who comes first changes from round to round.

    retries: how often a request that gets a 429 is sent again, when Retry-After says. after_round: awaited when a round's requests
    are all answered. progress(what, done, total): total is 0 where it is not known.
    """
    models, segments = list(prompts), []
    total = 0 if load.requests is None else load.requests * len(models)

    def noted() -> None:
        if progress is not None:
            progress("requests", sum(len(segment.outcomes) for segment in segments), total)

    for index in range(load.rounds):
        first = index % len(models)
        for model in models[first:] + models[:first]:
            segments.append(Segment(model=model))
            run, planned = _SegmentRun(segments[-1], ask, retries, clock, noted), planned_requests(load, prompts[model], index)
            if load.concurrency is None:
                await run.open_loop(planned)
            else:
                await run.closed_loop(planned, load.concurrency, load.seconds_of_round)
        if after_round is not None:
            await after_round()
    return segments


async def probe(ask: Ask, model: str, text: str, longest: int) -> tuple[Prompts, str | None]:
    """How the server counts the text's tokens, from two prompts of it, the longer of about `longest` tokens; a note where it does not.

    Raises ValueError with the server's words where it does not answer.
    """
    counts: list[tuple[int, int]] = []
    size = max(8, longest // FIRST_PROBE)
    for _ in range(2):
        require(
            size < len(text), f"a prompt of {longest} tokens takes more than the {len(text)} characters of the text; give a longer --text"
        )
        reply = await ask(model, text[:size], 1)
        require(reply.error is None, f"the server does not answer for model {model!r}: {reply.error}: {reply.message}")
        if reply.prompt_tokens is None:
            note = (
                f"the server does not count tokens: a token of prompts is {CHARACTERS_PER_TOKEN} characters, one of answers a piece of text"
            )
            return Prompts(text=text), note
        counts.append((size, reply.prompt_tokens))
        size = max(2 * size, longest * size // max(1, reply.prompt_tokens))
    (short, few), (long, many) = counts
    require(many > few, f"the server counts {few} tokens in {short} characters and {many} in {long}: no prompt can be cut to a length")
    ratio = (long - short) / (many - few)
    prompts = Prompts(text=text, characters_per_token=ratio, extra_tokens=max(0.0, few - short / ratio))
    prompts.check(longest)
    return prompts, None


async def warm_up(load: Load, prompts: Mapping[str, Prompts], ask: Ask, requests: int | None = None) -> list[str]:
    """As many requests at once as there are clients (open loop: OPEN_WARM_UP), or as given, to each model; notes of failures."""
    count = (load.concurrency or OPEN_WARM_UP) if requests is None else requests
    notes = []
    for model, source in prompts.items():
        generator = np.random.default_rng([load.seed, WARM_UP])
        texts = [source.cut(load.prompt_tokens.draw(generator), generator) for _ in range(count)]
        replies = await asyncio.gather(*(ask(model, prompt, min(WARM_UP_TOKENS, load.output_tokens.longest)) for prompt in texts))
        failed = [reply for reply in replies if reply.error is not None]
        if failed:
            notes.append(f"warm-up: {len(failed)} of {count} requests to {model} failed, e.g. {failed[0].error}: {failed[0].message}")
    return notes
