"""One engine at work: carries out what its scheduler decides, and keeps a failure to those whom it concerns.

In: sequences that the worker queues. Out: the events of their streams. A step of the loop: prompts go on, and every sequence that can
decodes a token, or a few where it is alone. A call that refuses its input (ValueError: the slots are then as they were) ends the sequence
that it was for; a step of several rows is done again row by row, so that only those at fault end. After any other error all rows of that
call end; the engine goes on, and one of which step after step fails, or which cannot even free a slot, is made anew.

Letters: V vocabulary  L layers  T tokens
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence

from torch import Tensor

from dejavu.engine.interface import Engine
from dejavu.generation.pieces import Token
from dejavu.generation.rows import advance, draw, draws, runs_together, tokens_at_once
from dejavu.serve.core.interface import EngineFailed, EngineState
from dejavu.serve.core.scheduler import PrefillChunk, Scheduler, SchedulerOutput
from dejavu.serve.core.sequence import TextSequence

COUNTED = ("steps", "tokens", "prompt_tokens", "cached_tokens", "finished", "failed", "cancelled", "fallback_layers")  # of LoadStats
PATIENCE = 2  # steps in which an engine fails at the same thing, for no stated reason and without doing it once, before it is made anew
ALONE = 4  # tokens at once of a text that runs alone: fewer than where nobody else can come, as who comes meanwhile waits for them

log = logging.getLogger(__name__)


class EngineLoop:
    """The sequences of one engine. `step` and what it calls are the worker's thread's; the rest is for any thread.

    engine: the first one. make: makes another where it cannot go on. scheduler: made for this loop, which is its pool;
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
        engine: Engine,
    ) -> None:
        self.mode, self.scheduler = mode, scheduler(self)
        self._make, self._pages, self._publishes, self._lock, self._report = make, pages, publishes, lock, report
        self._engine: Engine | None = engine
        self.broken = False  # it was needed and could not be made
        self._counts: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()  # of "prefill", "draw" and "step": steps in which it failed, since it last worked
        self._computed = 0  # tokens, in this step
        self._worked: set[str] = set()  # in this step, of the three
        self._failed: dict[str, BaseException] = {}  # likewise, by the last error for which no reason is given

    # What the scheduler asks of an engine. One that is to be made anew has all of its pages.

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
        self._prefill(scheduled.prefill)
        drawing, info = draws(self.engine), self.engine.info
        for alike in sorted({runs_together(info, sequence.row) for sequence in scheduled.decode}, reverse=True):
            rows = [sequence for sequence in scheduled.decode if runs_together(info, sequence.row) == alike]
            drawn = [sequence for sequence in rows if drawing and sequence.row.plain]
            stepped = [sequence for sequence in rows if not drawing or not sequence.row.plain]
            if drawn:
                self._decode(drawn, "draw", self._at_once(scheduled) if alone else 1)
            self._decode(stepped, "step")
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
            self._engine = None
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
            self._engine = self._make()
        except Exception as error:
            log.exception("the %s engine cannot be made", self.mode)
            self.broken = True
            self.end_all(error)
            return False
        self.broken = False
        return True

    def _prefill(self, parts: Sequence[PrefillChunk[TextSequence]]) -> None:
        """Ranges of prompts; those whose logits nobody asked for by one call, where the engine reads them together."""
        parts = [part for part in parts if not part.sequence.over and not part.sequence.cancelled]
        together = [part for part in parts if not part.sequence.request.prompt_logprobs]
        read: dict[int, Tensor] = {}
        if len(together) > 1 and self.engine.info.prompts_together:
            sequences = [part.sequence for part in together]
            try:
                logits_BV = self.engine.prefill_batch([each.row.slot for each in sequences], [part.ids for part in together])
                read = {id(part): logits_V for part, logits_V in zip(together, logits_BV, strict=True)}
            except ValueError:  # nothing counts then, and each alone is told what is wrong with it
                pass
            except Exception as error:
                self._fail(sequences, error, "prefill")
        for part in parts:
            if not part.sequence.over and not part.sequence.cancelled:
                self._prefill_part(part, read.get(id(part)))

    def _prefill_part(self, part: PrefillChunk[TextSequence], logits_V: Tensor | None) -> None:
        """A range of a prompt. logits_V: behind it, where it was read."""
        sequence = part.sequence
        try:
            token = self._read(part, logits_V)
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
            self._deliver(sequence, token)

    def _read(self, part: PrefillChunk[TextSequence], logits_V: Tensor | None) -> Token | None:
        """Prefill a range of a prompt, if it is not yet; behind its end the first new token, where one was requested."""
        sequence, engine = part.sequence, self.engine
        slot, ids = sequence.row.slot, part.ids
        if sequence.request.prompt_logprobs:
            logits_TV = engine.prefill_logits(slot, ids).cpu()
            sequence.score_prompt(part.start, logits_TV)
            logits_V = logits_TV[-1]
        elif logits_V is None:
            logits_V = engine.prefill(slot, ids)
        if part.stop < len(sequence.prompt_ids):
            return None
        token = draw(sequence.row, logits_V) if sequence.new_tokens > 0 else None
        if self._publishes:
            engine.publish(slot, sequence.prompt_ids)
        return token

    def _at_once(self, scheduled: SchedulerOutput[TextSequence]) -> int:
        """How many tokens of each sequence a step decodes: one, unless a text is alone. What its end leaves over is dropped."""
        with self._lock:
            if scheduled.prefill or len(scheduled.decode) != 1 or self.scheduler.waiting:
                return 1
        (sequence,) = scheduled.decode
        return tokens_at_once(sequence.done - len(sequence.prompt_ids), sequence.total - sequence.done - 1, most=ALONE)

    def _decode(self, sequences: Sequence[TextSequence], what: str, count: int = 1) -> None:
        """A token or a few of each sequence by one call, or by one for each where they are refused together."""
        sequences = [sequence for sequence in sequences if not sequence.over and not sequence.cancelled]
        if not sequences:
            return
        try:
            steps = advance(self.engine, [sequence.row for sequence in sequences], count)
        except ValueError as error:
            if len(sequences) > 1 and all(self.engine.length(sequence.row.slot) == sequence.done for sequence in sequences):
                for sequence in sequences:
                    self._decode([sequence], what, count)
            else:
                self._fail(sequences, error, what)
            return
        except Exception as error:
            self._fail(sequences, error, what)
            return
        self._worked.add(what)
        self._computed += len(sequences) * len(steps)
        self._counts["steps"] += len(steps)
        self._counts["fallback_layers"] += sum(step.fallback_layers for step in steps)
        with self._lock:
            for sequence in sequences:
                self.scheduler.advance(sequence, len(steps))
        for step in steps:
            union = self._union(step.union_L)
            for sequence, found in zip(sequences, step.tokens_B, strict=True):
                if sequence.over:
                    continue
                if isinstance(found, ValueError):
                    self._fail([sequence], found, what)
                else:
                    self._deliver(sequence, found, union)

    def _union(self, union_L: Tensor | None) -> float | None:
        """The density of what rows read together, mean over the layers."""
        return None if union_L is None else sum(union_L.tolist()) / (self.engine.info.num_layers * self.engine.info.num_neurons)

    def _deliver(self, sequence: TextSequence, token: Token | None, union: float | None = None) -> None:
        """Send what is new, and end the sequence where this is its end: its slot is free before its reader hears of it."""
        try:
            event = sequence.event() if token is None else sequence.push(token, union=union)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # of the tokenizer, whose panics are no Exception: of this text alone
            self._fail([sequence], error, "text")
            return
        self._counts["tokens"] += token is not None
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

    def _fail(self, sequences: Sequence[TextSequence], error: BaseException, what: str) -> None:
        """These end, and the engine goes on for now."""
        log.error("%s of the %s engine failed", "rows" if len(sequences) > 1 else "a row", self.mode, exc_info=error)
        forget_frames(error)
        if not isinstance(error, ValueError) and what != "text":
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
