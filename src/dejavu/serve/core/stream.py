"""A stream of events from the worker's thread to whoever asked: an asyncio task or another thread.

In: events, and at last one with a finish_reason or an error. Out: the same, in order, by iterating; the error is raised.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator

from dejavu.serve.core.interface import EngineFailed, Event


class Stream(AsyncIterator[Event]):
    """The events of one sequence. `put` and `fail` are the worker's; the rest is for one reader, in one loop or one thread.

    on_cancel: called once, where the reader leaves before the end. Raises EngineFailed out of its iterator where the sequence failed.
    """

    def __init__(self, on_cancel: Callable[[], None]) -> None:
        self._on_cancel = on_cancel
        self._changed = threading.Condition()
        self._events: deque[Event | EngineFailed] = deque()
        self._over = False  # nothing more will come
        self._wake: Callable[[], None] | None = None  # the task that waits for the next event

    def put(self, event: Event) -> None:
        """Add an event; the last one has a finish_reason. Nothing happens behind the end."""
        self._add(event, last=event.finish_reason is not None)

    def fail(self, error: EngineFailed) -> None:
        """End the stream with an error. Nothing happens behind the end."""
        self._add(error, last=True)

    def cancel(self) -> None:
        """Leave: iterators end, and the sequence's slot and pages are free within a step. From any thread; once over it changes nothing."""
        with self._changed:
            if self._over:
                return
            self._over = True
            self._events.clear()
            wake = self._notify()
        self._on_cancel()
        if wake is not None:
            wake()

    async def __anext__(self) -> Event:
        while True:
            with self._changed:
                if self._events or self._over:
                    found = self._next()
                    break
                loop = asyncio.get_running_loop()
                arrived = asyncio.Event()
                self._wake = lambda loop=loop, arrived=arrived: _set(loop, arrived)
            await arrived.wait()
        if found is None:
            raise StopAsyncIteration
        return found

    def events(self) -> Iterator[Event]:
        """The same for a reader without a loop: waits for each event."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._events or self._over)
                found = self._next()
            if found is None:
                return
            yield found

    def _next(self) -> Event | None:
        """The next event; None behind the last."""
        found = self._events.popleft() if self._events else None
        if isinstance(found, EngineFailed):
            raise found
        return found

    def _add(self, event: Event | EngineFailed, *, last: bool) -> None:
        with self._changed:
            if self._over:
                return
            self._events.append(event)
            self._over = last
            wake = self._notify()
        if wake is not None:
            wake()

    def _notify(self) -> Callable[[], None] | None:
        """Wake a thread that waits; what wakes a task, to be called without the lock."""
        self._changed.notify_all()
        wake, self._wake = self._wake, None
        return wake


def _set(loop: asyncio.AbstractEventLoop, arrived: asyncio.Event) -> None:
    try:
        loop.call_soon_threadsafe(arrived.set)
    except RuntimeError:  # the loop was closed while its task waited: there is nobody to wake
        pass
