"""A worker in a test: run requests, and read their events."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

from dejavu.config import SamplingConfig
from dejavu.generation.pieces import Token
from dejavu.language_model import LanguageModel
from dejavu.serve.config import ServeConfig
from dejavu.serve.core.interface import EngineFailed, Event, SequenceRequest, Summary
from dejavu.serve.core.stream import Stream
from dejavu.serve.core.worker import Worker
from helpers.stub_engine import StubModel

GREEDY = SamplingConfig()


@contextmanager
def serving(model: StubModel | LanguageModel, **config: Any) -> Generator[Worker]:
    """A worker that runs, and is closed at the end whatever happens."""
    worker = Worker(model, ServeConfig(**config))
    worker.start()
    try:
        yield worker
    finally:
        for engine in model.engines if isinstance(model, StubModel) else ():
            engine.release()
        worker.close()


def request(prompt: str | Sequence[int] = "Once", new: int = 40, **options: Any) -> SequenceRequest:
    ids = prompt.encode() if isinstance(prompt, str) else prompt
    settings: dict[str, Any] = {"sampling": GREEDY, **options}
    return SequenceRequest(prompt_ids=tuple(ids), max_new_tokens=new, **settings)


def text_of(events: Sequence[Event]) -> str:
    return "".join(event.text for event in events)


def tokens_of(events: Sequence[Event]) -> list[Token]:
    return [info for event in events for info in event.tokens]


def run(worker: Worker, *requests: SequenceRequest) -> list[list[Event]]:
    """The events of requests that are submitted together."""
    return [list(stream.events()) for stream in worker.submit_all(requests)]


def summary_of(events: Sequence[Event]) -> Summary:
    assert [event.finish_reason is not None for event in events] == [False] * (len(events) - 1) + [True], "one end, the last event"
    assert events[-1].summary is not None
    return events[-1].summary


def until(condition: Callable[[], object], *, seconds: float = 20) -> None:
    """Wait for what another thread does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to be in time"
        time.sleep(0.001)


def is_idle(model: StubModel) -> bool:
    return all(engine.live_sequences == 0 and engine.free_kv_pages == engine.info.num_pages for engine in model.engines)


def failing(
    error: Exception, what: str, *, when: Callable[[Sequence[int]], bool] = lambda slots: True
) -> Callable[[str, Sequence[int]], None]:
    def before(called: str, slots: Sequence[int]) -> None:
        if called == what and when(slots):
            raise error

    return before


def outcomes(streams: Sequence[Stream]) -> list[str]:
    """The text of each stream, or what it raised."""
    found = []
    for stream in streams:
        try:
            found.append(text_of(list(stream.events())))
        except EngineFailed as error:
            found.append(f"failed: {error}")
    return found
