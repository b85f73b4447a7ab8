"""One engine at work: carries out what its scheduler decides, and keeps a failure to those whom it concerns.

In: sequences that the worker queues. Out: the events of their streams. A step of the loop: prompts go on, and every row that can decodes a
token, or a few where it is alone. A call that refuses its input (ValueError: the slots are then as they were) ends the sequence that it was
for; a step of several rows is done again row by row, so that only those at fault end. After any other error all rows of that call end; the
engine goes on, and one of which step after step fails, or which cannot even free a slot, is made anew.

Letters: B rows of a step  V vocabulary  L layers  T tokens  P points that read inputs
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence

from torch import Tensor

from dejavu.engine.interface import DecodesTokens, Engine
from dejavu.engine.sampling import NOT_NUMBERS
from dejavu.serve.core.interface import EngineFailed, EngineState, TokenInfo
from dejavu.serve.core.scheduler import PrefillChunk, Scheduler, SchedulerOutput
from dejavu.serve.core.sequence import TextSequence
from dejavu.serve.core.trace import step_trace

COUNTED = ("steps", "tokens", "prompt_tokens", "cached_tokens", "finished", "failed", "cancelled", "fallback_layers")  # of LoadStats
PATIENCE = 2  # steps in which an engine fails at the same thing, for no stated reason and without doing it once, before it is made anew

ALONE = 4  # tokens of a step where one text runs and none waits, of an engine that draws: each wait for a device costs a part of a token

Made = tuple[list[TokenInfo | ValueError], float | None]
"""What a step made of each of its rows, a token or why there is none, and the density of what it read for all of them."""

log = logging.getLogger(__name__)


class EngineLoop:
    """The sequences of one engine. `step` and what it calls are the worker's thread's; the rest is for any thread.

    make: makes the engine, first when it is needed and again where it cannot go on. scheduler: made for this loop, which is its pool;
    lock guards it. report: told of each failure. pages: of an engine. publishes: whether prompts are offered for reuse.
    """

    def __init__(
        self,
        mode: str,
        make: Callable[[], Engine],
        scheduler: Callable[[EngineLoop], Scheduler[TextSequence]],
        *,
        pages: int,
        publishes: bool,
        lock: threading.Condition,
        report: Callable[[BaseException], None],
        engine: Engine | None = None,
    ) -> None:
        self.mode, self.scheduler = mode, scheduler(self)
        self._make, self._pages, self._publishes, self._lock, self._report = make, pages, publishes, lock, report
        self._use(engine)
        self.broken = False  # it was needed and could not be made
        self._counts: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()  # of "prefill", "draw" and "step": steps in which it failed, since it last worked
        self._computed = 0  # tokens, in this step
        self._worked: set[str] = set()  # in this step, of the three
        self._failed: dict[str, Exception] = {}  # likewise, by the last error for which no reason is given

    # What the scheduler asks of an engine. One that is not made yet has all of its pages.

    @property
    def engine(self) -> Engine:
        assert self._engine is not None, "steps are scheduled for an engine"
        return self._engine

    @property
    def free_pages(self) -> int:
        engine = self._engine
        return self._pages if engine is None else engine.free_pages

    def reuse(self, slot: int, token_ids: Sequence[int]) -> int:
        return self.engine.reuse(slot, token_ids)

    def free(self, slot: int) -> None:
        self.engine.free(slot)

    def _use(self, engine: Engine | None) -> None:
        self._engine = engine
        self._decoder = engine if isinstance(engine, DecodesTokens) and not engine.records else None

    # For any thread

    @property
    def busy(self) -> bool:
        """Whether there is something to do; asked with the lock."""
        return bool(self.scheduler.waiting or self.scheduler.running)

    def cancel(self, sequence: TextSequence) -> None:
        """Its reader has left: the sequence is over by the next step."""
        with self._lock:
            if sequence.over:  # its last event is on its way
                return
            self.scheduler.cancel(sequence)
            self._counts["cancelled"] += 1
            self._lock.notify_all()

    def state(self) -> EngineState:
        with self._lock:
            return EngineState(
                mode=self.mode,
                made=self._engine is not None,
                queued=len(self.scheduler.waiting),
                running=len(self.scheduler.running),
                slots=self.scheduler.slots,
                pages_free=self.free_pages,
                pages_total=self._pages,
                **{name: self._counts[name] for name in COUNTED},
            )

    # For the worker's thread

    def step(self, *, alone: bool = True) -> int:
        """One step of the engine, which is made where there is none; tokens of prompts and answers that were computed.

        alone: no other engine waits for its turn.
        """
        self._computed = 0
        self._worked.clear()
        self._failed.clear()
        if self._engine is None and not self._engine_made():
            return 0
        with self._lock:
            scheduled: SchedulerOutput[TextSequence] = self.scheduler.schedule()
        for part in scheduled.prefill:
            self._prefill(part)
        decoder = self._decoder
        drawn = [row for row in scheduled.decode if decoder is not None and row.plain]
        stepped = [row for row in scheduled.decode if decoder is None or not row.plain]
        if decoder is not None:
            count = self._count(scheduled) if alone else 1
            self._decode(drawn, lambda rows: self._drawn(decoder, rows, count), "draw")
        self._decode(stepped, self._stepped, "step")
        self._judge()
        return self._computed

    def _judge(self) -> None:
        """Whether the engine goes on. One that decodes is not given up for prompts that fail: others' texts are in it."""
        worked = self._worked | ({"prefill"} if self._worked - {"prefill"} else set())
        for what in worked:
            del self._failures[what]
        for what in sorted(self._failed.keys() - worked):
            self._failures[what] += 1
            if self._failures[what] >= PATIENCE:
                return self.abandon(self._failed[what])

    def abandon(self, error: BaseException) -> None:
        """The engine cannot go on: all that run in it fail, and those that wait get a new one."""
        self._report(error)
        forget_frames(error)
        with self._lock:
            ended = self.scheduler.reset(self)
            self._use(None)
        self._failures.clear()
        self._failed.clear()
        for sequence in ended:
            self._tell(sequence, error)

    def end_all(self, error: BaseException) -> None:
        """All that run and all that wait fail."""
        self.abandon(error)
        with self._lock:
            waiting = self.scheduler.waiting
            for sequence in waiting:
                self.scheduler.end(sequence)
        for sequence in waiting:
            self._tell(sequence, error)

    def _engine_made(self) -> bool:
        try:
            self._use(self._make())
        except Exception as error:
            log.exception("the %s engine cannot be made", self.mode)
            self.broken = True
            self.end_all(error)
            return False
        self.broken = False
        return True

    def _prefill(self, part: PrefillChunk[TextSequence]) -> None:
        sequence = part.sequence
        if sequence.over or sequence.cancelled:
            return
        try:
            info = self._read(part)
        except Exception as error:
            self._fail([sequence], error, "prefill")
            return
        self._worked.add("prefill")
        tokens = part.stop - part.start
        self._computed += tokens
        self._counts["prompt_tokens"] += tokens
        self._counts["cached_tokens"] += sequence.cached if part.start == sequence.cached else 0
        with self._lock:
            self.scheduler.advance(sequence, tokens)
        if sequence.unread == 0:
            self._deliver(sequence, info)

    def _read(self, part: PrefillChunk[TextSequence]) -> TokenInfo | None:
        """Prefill a range of a prompt; behind its end the first new token, where one is wanted."""
        sequence, engine = part.sequence, self.engine
        slot, ids = slot_of(sequence), sequence.prompt_ids[part.start : part.stop]
        if sequence.request.prompt_logprobs:
            logits_TV = engine.prefill_logits(slot, ids).cpu()
            sequence.score_prompt(part.start, logits_TV)
            logits_V = logits_TV[-1]
        else:
            logits_V = engine.prefill(slot, ids)
        if part.stop < len(sequence.prompt_ids):
            return None
        info = sequence.drawn(logits_V) if sequence.new_tokens > 0 else None
        if self._publishes:
            engine.publish(slot, sequence.prompt_ids)
        return info

    def _count(self, scheduled: SchedulerOutput[TextSequence]) -> int:
        """How many tokens of each row a step decodes. What a text's end leaves over is dropped."""
        with self._lock:
            if scheduled.prefill or len(scheduled.decode) > 1 or self.scheduler.waiting:
                return 1
        return max(1, min([ALONE, *(row.total - row.done - 1 for row in scheduled.decode)]))

    def _decode(self, rows: Sequence[TextSequence], call: Callable[[Sequence[TextSequence]], list[Made]], what: str) -> None:
        """A token or a few of each row by one call, or by one for each row where the rows together are refused."""
        rows = [row for row in rows if not row.over and not row.cancelled]
        if not rows:
            return
        try:
            steps = call(rows)
        except ValueError as error:
            if len(rows) > 1 and all(self.engine.length(slot_of(row)) == row.done for row in rows):
                for row in rows:
                    self._decode([row], call, what)
            else:
                self._fail(rows, error, what)
            return
        except Exception as error:
            self._fail(rows, error, what)
            return
        self._worked.add(what)
        self._computed += len(rows) * len(steps)
        self._counts["steps"] += len(steps)
        with self._lock:
            for row in rows:
                self.scheduler.advance(row, len(steps))
        for made, union in steps:
            for row, found in zip(rows, made, strict=True):
                if row.over:
                    continue
                if isinstance(found, ValueError):
                    self._fail([row], found, what)
                else:
                    self._deliver(row, found, union)

    def _stepped(self, rows: Sequence[TextSequence]) -> list[Made]:
        """A token of each row, drawn here, and the density of what all of them together read."""
        info = self.engine.info
        result = self.engine.step([last_of(row) for row in rows], [slot_of(row) for row in rows])
        logits_BV = result.logits_BV.cpu()
        density_B = result.counts.mean_densities(info)
        made: list[TokenInfo | ValueError] = []
        for at, (row, (mlp, heads)) in enumerate(zip(rows, density_B, strict=True)):
            try:
                found = row.drawn(logits_BV[at])
            except ValueError as error:
                made.append(error)
                continue
            trace = step_trace(info, None if result.selections is None else result.selections[at]) if row.request.trace else None
            made.append(dataclasses.replace(found, mlp_density=mlp, head_density=heads, trace=trace))
        self._counts["fallback_layers"] += result.fallback_layers or 0
        return [(made, self._union(result.union_L))]

    def _drawn(self, decoder: DecodesTokens, rows: Sequence[TextSequence], count: int) -> list[Made]:
        """So many tokens of each row, drawn by the engine."""
        settings = [row.request.sampling for row in rows], [row.request.index for row in rows]
        found = decoder.decode([last_of(row) for row in rows], [slot_of(row) for row in rows], count, *settings).cpu()
        self._counts["fallback_layers"] += count * (found.fallback_layers or 0)
        steps: list[Made] = []
        for at, token_B in enumerate(found.token_NB.tolist()):
            density_B = found.counts[at].mean_densities(self.engine.info)
            made = [
                ValueError(NOT_NUMBERS) if token_id < 0 else TokenInfo(token_id=token_id, mlp_density=mlp, head_density=heads)
                for token_id, (mlp, heads) in zip(token_B, density_B, strict=True)
            ]
            steps.append((made, self._union(None if found.union_NL is None else found.union_NL[at])))
        return steps

    def _union(self, union_L: Tensor | None) -> float | None:
        """The density of what rows read together, mean over the layers."""
        return None if union_L is None else sum(union_L.tolist()) / (self.engine.info.num_layers * self.engine.info.num_neurons)

    def _deliver(self, sequence: TextSequence, info: TokenInfo | None, union: float | None = None) -> None:
        """Send what is new, and end the sequence where this is its end: its slot is free before its reader hears of it."""
        event = sequence.event() if info is None else sequence.push(info, union=union)
        self._counts["tokens"] += info is not None
        if event is None:
            return
        if event.finish_reason is not None:
            self._end(sequence, counts="finished")
        sequence.stream.put(event)

    def _end(self, sequence: TextSequence, *, counts: str | None = None) -> None:
        try:
            with self._lock:  # either it counts as this, or as cancelled
                if counts is not None and not sequence.cancelled:
                    self._counts[counts] += 1
                self.scheduler.end(sequence)
        except Exception as error:
            log.exception("the %s engine cannot free a slot and is made anew", self.mode)
            self.abandon(error)

    def _fail(self, sequences: Sequence[TextSequence], error: Exception, what: str) -> None:
        """These end, and the engine goes on for now."""
        log.error("%s of the %s engine failed", "rows" if len(sequences) > 1 else "a row", self.mode, exc_info=error)
        forget_frames(error)
        if not isinstance(error, ValueError):
            self._failed[what] = error
        for sequence in sequences:
            if not sequence.over:  # else it was told: the engine was abandoned for one before it
                self._end(sequence)
                self._tell(sequence, error)

    def _tell(self, sequence: TextSequence, error: BaseException) -> None:
        """Why it failed; what is not a refusal may hold paths and the like, which are for the log alone."""
        if sequence.cancelled:
            return
        self._counts["failed"] += 1
        self._report(error)
        reason = str(error) if isinstance(error, ValueError | EngineFailed) else f"the engine failed ({type(error).__name__})"
        failed = EngineFailed(reason)
        failed.__cause__ = error
        sequence.stream.fail(failed)


def forget_frames(error: BaseException) -> None:
    """Drop the tracebacks of an error and of those that led to it: their frames hold the engine, whose memory the next one needs."""
    seen: set[int] = set()
    found: list[BaseException | None] = [error]
    while found:
        each = found.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            each.__traceback__ = None
            found += [each.__cause__, each.__context__]


def slot_of(sequence: TextSequence) -> int:
    assert sequence.slot is not None, "what runs has a slot"
    return sequence.slot


def last_of(sequence: TextSequence) -> int:
    assert sequence.last is not None, "what decodes has a token"
    return sequence.last
