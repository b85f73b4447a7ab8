"""A worker whose streams follow a script, and the real server in front of it.

    worker = FakeWorker(lambda request: spoken("Hel", "lo"))
    with serving(create_app(served(tokenizer), worker)) as url:
        httpx.post(f"{url}/v1/completions", json=...)

With `by_hand` nothing happens until `worker.step()`, which gives every live stream its next event: no test depends on time.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from fastapi import FastAPI

from dejavu.generation.pieces import Token
from dejavu.model.tokenizer import Tokenizer
from dejavu.serve.api.requests import Served
from dejavu.serve.api.server import bound_socket, new_server, url_of
from dejavu.serve.api.vocabulary import Vocabulary
from dejavu.serve.core.interface import Event, NotRunning, QueueFull, SequenceRequest, Summary, TooLong, WorkerState

DEADLINE_S = 20
Script = Callable[[SequenceRequest], Iterable[Event | Exception]]


class FakeStream:
    """One request's events. cancels: how often it was cancelled."""

    def __init__(self, worker: FakeWorker, request: SequenceRequest) -> None:
        self.request, self._worker, self._events = request, worker, iter(worker.script(request))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._permits: asyncio.Queue[None] = asyncio.Queue()
        self.ended, self.cancels = False, 0

    def __aiter__(self) -> FakeStream:
        return self

    async def __anext__(self) -> Event:
        if self.ended:
            raise StopAsyncIteration
        if self._worker.by_hand:
            with self._worker.lock:
                self._loop = asyncio.get_running_loop()
            await self._permits.get()
        event = next(self._events)
        if isinstance(event, Exception) or event.finish_reason is not None:
            self._end()
        if isinstance(event, Exception):
            raise event
        return event

    def permit(self) -> None:
        with self._worker.lock:
            if self._loop is None:
                self._permits.put_nowait(None)
            else:
                self._loop.call_soon_threadsafe(self._permits.put_nowait, None)

    def cancel(self) -> None:
        self.cancels += 1
        self._end()

    def _end(self) -> None:
        if not self.ended:
            self.ended = True
            self._worker.live.remove(self)


class FakeWorker:
    """script: the events of a request. waiting: None, or how many requests wait already, all that may. limit: tokens of both.

    requests: all that were submitted; streams: theirs; live: those that have not ended; steps: how often `step` was called.
    """

    def __init__(self, script: Script, *, by_hand: bool = False, limit: int = 64) -> None:
        self.script, self.by_hand, self.limit = script, by_hand, limit
        self.waiting: int | None = None
        self.alive = True
        self.last_error: str | None = None
        self.lock = threading.Lock()
        self.requests: list[SequenceRequest] = []
        self.streams: list[FakeStream] = []
        self.live: list[FakeStream] = []
        self.steps = 0

    def submit_all(self, requests: Sequence[SequenceRequest]) -> list[FakeStream]:
        for request in requests:
            if len(request.prompt_ids) + request.max_new_tokens > self.limit:
                raise TooLong(prompt=len(request.prompt_ids), requested=request.max_new_tokens, limit=self.limit)
        if not self.alive:
            raise NotRunning("the worker has ended")
        if self.waiting is not None:
            raise QueueFull(waiting=self.waiting, retry_after_s=7)
        made = [FakeStream(self, request) for request in requests]
        self.requests += requests
        self.streams += made
        self.live += made
        return made

    def step(self) -> None:
        """One step: an event for every stream that has not ended."""
        self.steps += 1
        for stream in list(self.live):
            stream.permit()

    def state(self) -> WorkerState:
        counts: dict[str, Any] = dict.fromkeys(
            ("steps", "tokens", "prompt_tokens", "cached_tokens", "finished", "failed", "cancelled", "fallback_layers"), 0
        )
        return WorkerState(
            **counts, alive=self.alive, last_error=self.last_error, queued=0, running=len(self.live), slots=4, pages_free=6, pages_total=8,
            tok_s=None, engines=(), model="tiny", backend="torch", dtype="fp32", device="cpu", max_model_len=self.limit, layers=2,
            neurons=64, heads=4, vocab_size=96, sparse=True,
        )  # fmt: skip


def served(tokenizer: Tokenizer, **changes: Any) -> Served:
    """A served model of 2 layers, 64 neurons, 4 heads, 96 tokens of vocabulary."""
    facts: dict[str, Any] = {
        "name": "tiny", "tokenizer": tokenizer, "vocabulary": Vocabulary(tokenizer), "sparse": True, "vocab_size": 96,
        "num_layers": 2, "num_heads": 4, "num_neurons": 64,
        "backend": "torch", "dtype": "fp32", "threads": 1, "limit": 64, "created": 1_700_000_000,
    }  # fmt: skip
    return Served(**(facts | changes))


def summary(prompt: int = 3, completion: int = 2, **changes: Any) -> Summary:
    facts: dict[str, Any] = {
        "prompt_tokens": prompt, "completion_tokens": completion, "cached_tokens": 0, "mlp_density": 0.25, "head_density": 0.5,
        "union_density": 0.75, "time_to_first_token_s": 0.02, "decode_s": 0.1,
    }  # fmt: skip
    return Summary(**(facts | changes))


def spoken(*texts: str, prompt: int = 3, finish: Any = "stop", **changes: Any) -> list[Event]:
    """An event for each text, a token of id 10 and up each, and the end with the last."""
    events = [Event(text=text, tokens=(Token(token_id=10 + place, logprob=-0.5 - place),)) for place, text in enumerate(texts)]
    last = events.pop() if events else Event()
    end = summary(prompt, len(texts), **changes)
    return [*events, Event(text=last.text, tokens=last.tokens, finish_reason=finish, summary=end)]


@contextlib.contextmanager
def serving(app: FastAPI, **options: Any) -> Iterator[str]:
    """The app behind a real socket, in a thread; its address."""
    with bound_socket("127.0.0.1", 0) as bound:
        server = new_server(app, **options)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        eventually(lambda: server.started)
        try:
            yield url_of(bound)
        finally:
            server.should_exit = True
            thread.join(DEADLINE_S)
            assert not thread.is_alive()


def eventually(true: Callable[[], object]) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + DEADLINE_S
    while not true():
        assert time.monotonic() < deadline, "it never came to hold"
        time.sleep(0.005)
