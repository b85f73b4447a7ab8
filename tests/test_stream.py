"""A stream of events: one by one for a thread, what has come meanwhile together for a task."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from dejavu.serve.jobs import EngineFailed, Event, TokenInfo
from dejavu.serve.stream import Stream
from dejavu.serve.streaming import Running


def filled(*texts: str, end: bool = True) -> Stream:
    stream = Stream(lambda: None)
    for at, text in enumerate(texts):
        last = end and at == len(texts) - 1
        stream.put(Event(text=text, tokens=(TokenInfo(token_id=at),), finish_reason="stop" if last else None))
    return stream


async def read(stream: Stream) -> list[Event]:
    return [event async for _, event in Running([stream]).events()]


def test_a_task_gets_what_has_come_in_one_piece() -> None:
    (event,) = asyncio.run(read(filled("a", "", "b")))
    assert (event.text, [info.token_id for info in event.tokens], event.finish_reason) == ("ab", [0, 1, 2], "stop")


def test_what_comes_later_is_a_piece_of_its_own() -> None:
    async def both() -> list[str]:
        stream = filled("a", "b", end=False)
        found = [(await anext(stream)).text]
        asyncio.get_running_loop().call_later(0.01, lambda: stream.put(Event(text="c", finish_reason="length")))
        return found + [event.text async for event in stream]

    assert asyncio.run(both()) == ["ab", "c"]


def test_a_thread_gets_them_one_by_one() -> None:
    assert [event.text for event in filled("a", "b").events()] == ["a", "b"]


def test_an_error_comes_behind_what_came_before_it() -> None:
    async def events() -> None:
        stream, found = filled("a", "b", end=False), []
        stream.fail(EngineFailed("of step 3"))
        running = Running([stream])
        with pytest.raises(EngineFailed, match="of step 3"):
            async for _, event in running.events():
                found.append(event.text)
        assert found == ["ab"]

    asyncio.run(events())


def test_a_reader_that_leaves_one_stream_cancels_it() -> None:
    left: list[int] = []

    async def leave() -> None:
        stream = Stream(lambda: left.append(1))
        stream.put(Event(text="a"))
        running = Running([stream])
        async with contextlib.aclosing(running.events()) as events:
            await anext(events)
        running.cancel()

    asyncio.run(leave())
    assert left == [1]
