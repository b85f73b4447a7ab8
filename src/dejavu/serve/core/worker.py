"""The worker: one thread that owns the engines and lets all that is asked of a model run in them.

In: requests for sequences, from any thread. Out: a stream of events for each. An engine runs them, sparse and dense; where the adapter
changes weights, or has them lie in another order, dense ones have an engine of their own. Each has a scheduler and a queue of its own;
those that have work take turns: a step each, or a few tokens of one that is alone.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Protocol

from dejavu.config import ModelConfig, require
from dejavu.engine.interface import Engine
from dejavu.model.tokenizer import Tokenizer
from dejavu.serve.config import ServeConfig
from dejavu.serve.core.engine_loop import EngineLoop
from dejavu.serve.core.interface import EngineFailed, LoadStats, NotRunning, SequenceRequest, WorkerState
from dejavu.serve.core.scheduler import Scheduler
from dejavu.serve.core.sequence import TextSequence
from dejavu.serve.core.stream import Stream
from dejavu.serve.core.warm_up import warm_up

REMEMBERED = 0.95  # of the throughput, from one step to the next

log = logging.getLogger(__name__)


class ServedModel(Protocol):
    """What the worker needs of a LanguageModel."""

    @property
    def name(self) -> str: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def config(self) -> ModelConfig: ...

    @property
    def adapter(self) -> object | None: ...

    @property
    def one_engine(self) -> bool: ...

    def engine(self, *, num_slots: int, cache_tokens: int, dense: bool = False) -> Engine: ...


class Worker:
    """Runs the sequences of a model. Engines are made here, the thread by `start`; requests may be submitted before it.

    Raises ValueError for a configuration that the model cannot have, and what making the engines raises.
    """

    def __init__(self, lm: ServedModel, config: ServeConfig) -> None:
        self._lm, self._config = lm, config
        self._lock = threading.Condition()
        self._longest = config.longest(lm.config.max_positions)
        tokens = config.cached(lm.config.max_positions)
        main = functools.partial(self._engine, num_slots=config.slots, cache_tokens=tokens)
        dense = functools.partial(main, dense=True)
        modes = {"dense": (dense, dense())} if lm.adapter is None or not lm.one_engine else {}
        if lm.adapter is not None:
            modes = {"sparse": (main, main()), **modes}
        self._info = next(iter(modes.values()))[1].info
        self._loops = {mode: self._engine_loop(mode, make, tokens, engine) for mode, (make, engine) in modes.items()}
        self._thread = threading.Thread(target=self._run, name="dejavu-worker", daemon=True)
        self._closing = self._ended = False
        self._last_error: str | None = None
        self._work = self._busy_s = 0.0  # what was computed lately, and how long it took

    def _engine(self, **settings: Any) -> Engine:
        engine = self._lm.engine(**settings)
        warm_up(engine, self._lm.tokenizer, longest=self._longest, both=engine.info.sparse and self._lm.one_engine)
        return engine

    def _engine_loop(self, mode: str, make: functools.partial[Engine], tokens: int, engine: Engine) -> EngineLoop:
        config, pages = self._config, engine.info.num_pages

        def scheduler(loop: EngineLoop) -> Scheduler[TextSequence]:
            limit = min(self._longest, tokens)
            return Scheduler(
                loop,
                slots=config.slots,
                pages=pages,
                page_size=engine.info.page_size,
                max_tokens=limit,
                prefill_chunk=config.prefill_chunk or engine.info.prefill_chunk,
                queue=config.queue,
            )

        return EngineLoop(
            mode, make, scheduler, pages=pages, publishes=config.prefix_reuse, lock=self._lock, report=self._report, engine=engine
        )

    def start(self) -> None:
        """Start the thread. Once."""
        self._thread.start()

    def close(self) -> None:
        """End the thread after the step that it is at; whatever is queued or runs fails. A worker that is closed stays so."""
        with self._lock:
            self._closing = True
            self._lock.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        self._end(EngineFailed("the server is shutting down"))

    def submit(self, request: SequenceRequest) -> Stream:
        """Queue a sequence; its events come by the stream.

        Raises at once: ValueError for a request that makes no sense, TooLong for one that can never fit, QueueFull, and NotRunning.
        """
        return self.submit_all([request])[0]

    def submit_all(self, requests: Sequence[SequenceRequest]) -> list[Stream]:
        """As `submit`, all or none. Sequences with the same prompt let the first one read it and share what it read."""
        made = [self._sequence(request) for request in requests]
        for loop, sequence in made:
            loop.scheduler.check_length(sequence)
        with self._lock:
            if self._closing or self._ended:
                raise NotRunning("the server is shutting down" if self._closing else "the server's worker has ended; start it again")
            queued = {
                loop: [sequence for its, sequence in made if its is loop and not sequence.nothing_to_do] for loop in self._loops.values()
            }
            for loop, sequences in queued.items():
                loop.scheduler.check_room(len(sequences), tokens_per_s=self._tokens_per_s)
            for loop, sequences in queued.items():
                self._let_share(sequences)
                loop.scheduler.submit(sequences)
            self._lock.notify_all()
        for _, sequence in made:
            if sequence.nothing_to_do:
                sequence.stream.put(sequence.event())
        return [sequence.stream for _, sequence in made]

    def state(self) -> WorkerState:
        """How it does, from any thread."""
        with self._lock:
            engines = tuple(loop.state() for loop in self._loops.values())
            sums = {field.name: sum(getattr(engine, field.name) for engine in engines) for field in fields(LoadStats)}
            info, loops = self._info, self._loops.values()
            return WorkerState(
                alive=self._thread.is_alive() and not self._closing and not any(loop.broken for loop in loops),
                last_error=self._last_error,
                tok_s=self._tokens_per_s,
                engines=engines,
                model=self._lm.name,
                backend=info.backend,
                dtype=info.dtype,
                device=info.device,
                max_model_len=min(loop.scheduler.limit for loop in loops),
                layers=info.num_layers,
                neurons=info.num_neurons,
                heads=info.num_heads,
                vocab_size=info.vocab_size,
                sparse=self._lm.adapter is not None,
                **sums,
            )

    def _sequence(self, request: SequenceRequest) -> tuple[EngineLoop, TextSequence]:
        """What carries a request out, and where it runs. Raises ValueError for what no engine could run."""
        require(len(request.prompt_ids) > 0, "the prompt has no tokens; give at least one word")
        require(request.max_new_tokens >= 0, f"max_new_tokens must be 0 or more, not {request.max_new_tokens}")
        vocab = self._info.vocab_size
        for token_id in (min(request.prompt_ids), max(request.prompt_ids), *request.logit_bias):
            require(0 <= token_id < vocab, f"token id {token_id} is outside the model's vocabulary of {vocab}")
        dense = request.dense or self._lm.adapter is None
        loop = self._loops["dense" if dense and "dense" in self._loops else "sparse"]
        stream = Stream(lambda: loop.cancel(sequence))
        sequence = TextSequence(request, self._lm.tokenizer, stream, share=self._config.prefix_reuse)
        return loop, sequence

    def _let_share(self, sequences: Sequence[TextSequence]) -> None:
        """Choices with one prompt wait for the first of them to read it."""
        firsts: dict[tuple[int, ...], TextSequence] = {}
        for sequence in sequences:
            first = firsts.setdefault(sequence.request.prompt_ids, sequence)
            sequence.after = first if sequence.share and first is not sequence else None

    def _report(self, error: BaseException) -> None:
        if not self._closing:  # what ends then is no failure
            self._last_error = f"{type(error).__name__}: {error}"

    @property
    def _tokens_per_s(self) -> float | None:
        return self._work / self._busy_s if self._busy_s > 0 else None

    def _run(self) -> None:
        """The thread: steps of the loops that have work, in turn, until the worker is closed."""
        error: BaseException = EngineFailed("the server is shutting down")
        try:
            while busy := self._wait():
                for loop in busy:
                    self._step(loop, alone=len(busy) == 1)
        except BaseException as found:  # nothing that ends a thread may leave a reader waiting
            log.critical("the worker ends", exc_info=found)
            error = found
            raise
        finally:
            self._end(error)

    def _wait(self) -> list[EngineLoop]:
        """Wait for work: the loops that have some. None where there will be none."""
        with self._lock:
            self._lock.wait_for(lambda: self._closing or any(loop.busy for loop in self._loops.values()))
            return [] if self._closing else [loop for loop in self._loops.values() if loop.busy]

    def _step(self, loop: EngineLoop, *, alone: bool) -> None:
        start = time.perf_counter()
        try:
            computed = loop.step(alone=alone)
        except Exception as error:  # of ours, or of an engine that cannot even say what it holds
            log.exception("a step of the %s engine failed, which is made anew", loop.mode)
            loop.abandon(error)
            return
        self._work = REMEMBERED * self._work + computed
        self._busy_s = REMEMBERED * self._busy_s + time.perf_counter() - start

    def _end(self, error: BaseException) -> None:
        with self._lock:
            self._ended = True
        for loop in self._loops.values():
            loop.end_all(error)
