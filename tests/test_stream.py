"""Streams of a request: what has come meanwhile is handed over together, in order; errors come behind what came before them."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from dejavu.generation.pieces import Token
from dejavu.serve.api.merged_streams import Running
from dejavu.serve.core.interface import EngineFailed, Event
from dejavu.serve.core.stream import Stream


def filled(*texts: str, end: bool = True) -> Stream:
    stream = Stream(lambda: None)
    for at, text in enumerate(texts):
        last = end and at == len(texts) - 1
        stream.put(Event(text=text, tokens=(Token(token_id=at),), finish_reason="stop" if last else None))
    return stream


async def read(*streams: Stream) -> list[list[tuple[int, Event]]]:
    return [found async for found in Running(streams).events()]


def test_what_has_come_is_handed_over_together_and_each_token_stays_an_event() -> None:
    (came,) = asyncio.run(read(filled("a", "", "b"), filled("c", "d")))
    assert [event.text for index, event in came if index == 0] == ["a", "", "b"]
    assert [(event.text, event.finish_reason) for index, event in came if index == 1] == [("c", None), ("d", "stop")]


def test_what_comes_later_is_handed_over_later() -> None:
    async def both() -> list[list[str]]:
        stream = filled("a", "b", end=False)
        asyncio.get_running_loop().call_later(0.05, lambda: stream.put(Event(text="c", finish_reason="length")))
        return [[event.text for _, event in came] for came in await read(stream)]

    assert asyncio.run(both()) == [["a", "b"], ["c"]]


def test_an_error_comes_behind_what_came_before_it() -> None:
    async def events() -> None:
        stream, found = filled("a", "b", end=False), []
        stream.fail(EngineFailed("of step 3"))
        with pytest.raises(EngineFailed, match="of step 3"):
            async for came in Running([stream]).events():
                found += [event.text for _, event in came]
        assert found == ["a", "b"]

    asyncio.run(events())


def test_a_reader_that_leaves_cancels_what_has_not_ended() -> None:
    left: list[int] = []

    async def leave() -> None:
        open_stream = Stream(lambda: left.append(1))
        open_stream.put(Event(text="a"))
        running = Running([filled("b"), open_stream])
        async with contextlib.aclosing(running.events()) as events:
            assert {index for index, _ in await anext(events)} == {0, 1}
        running.cancel()

    asyncio.run(leave())
    assert left == [1]
