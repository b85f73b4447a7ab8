"""Events of several streams in one row, and work that ends when its reader goes away.

In: the streams of a request; ASGI's `receive`. Out: (index, event) in the order of arrival, those that came meanwhile together: where texts
come faster than they can be sent, more is sent at a time; what the work returned, or None where the client went first.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, MutableMapping, Sequence
from typing import Any, Protocol, TypeVar

from dejavu.serve.core.interface import Event

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
T = TypeVar("T")


class EventStream(Protocol):
    """What the worker gives for a sequence. Iterating raises EngineFailed where its step failed."""

    def __aiter__(self) -> AsyncIterator[Event]: ...

    def cancel(self) -> None:
        """End it early, from any thread; nothing happens where it has ended."""
        ...


class Running:
    """The streams of one request."""

    def __init__(self, streams: Sequence[EventStream]) -> None:
        self._streams = dict(enumerate(streams))  # those that have not ended

    async def events(self) -> AsyncGenerator[list[tuple[int, Event]]]:
        """The events of all streams, each with the index of its stream; those that came meanwhile in one list. What a stream raises is
        raised here, behind what came before it."""
        arrived: asyncio.Queue[tuple[int, Event | Exception | None]] = asyncio.Queue()

        async def forward(index: int, stream: EventStream) -> None:
            try:
                async for event in stream:
                    arrived.put_nowait((index, event))
            except Exception as error:  # whatever it is, the request has to know
                arrived.put_nowait((index, error))
            else:
                arrived.put_nowait((index, None))

        tasks = [asyncio.create_task(forward(index, stream)) for index, stream in self._streams.items()]
        try:
            while self._streams:
                came = [await arrived.get()]
                while not arrived.empty():
                    came.append(arrived.get_nowait())
                if events := [(index, what) for index, what in came if isinstance(what, Event)]:
                    yield events
                for index, what in came:
                    if not isinstance(what, Event):
                        del self._streams[index]
                        if what is not None:
                            raise what
        finally:
            await _end(tasks)

    def cancel(self) -> None:
        """Cancel the streams that have not ended. Those that have are left alone: a request that ended well cancels nothing."""
        for stream in self._streams.values():
            stream.cancel()
        self._streams.clear()


class ServerEnds(Exception):  # noqa: N818 (a state, not a mistake)
    """The server is told to end before the work is done."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T], *, ending: asyncio.Event) -> T | None:
    """The result of the work; None, and the work cancelled, where the client goes before it is done. The request's body must be read.

    Raises ServerEnds, the work cancelled, where `ending` is set first.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.create_task(work), asyncio.create_task(gone())
    tasks = [working, leaving, asyncio.create_task(ending.wait())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        if leaving.done():
            return None
        raise ServerEnds
    finally:
        await _end(tasks)


async def _end(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancel tasks, and wait until they have cleaned up."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
