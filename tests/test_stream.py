"""Streams of a request: what has come meanwhile is one event, in order, of each stream; errors come behind what came before them."""

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


async def read(*streams: Stream) -> list[tuple[int, Event]]:
    return [found async for found in Running(streams).events()]


def test_what_has_come_is_one_piece_of_each_stream() -> None:
    first, second = asyncio.run(read(filled("a", "", "b"), filled("c", "d")))
    assert (first[0], first[1].text, [info.token_id for info in first[1].tokens]) == (0, "ab", [0, 1, 2])
    assert (second[0], second[1].text, second[1].finish_reason) == (1, "cd", "stop")


def test_what_comes_later_is_a_piece_of_its_own() -> None:
    async def both() -> list[str]:
        stream = filled("a", "b", end=False)
        asyncio.get_running_loop().call_later(0.05, lambda: stream.put(Event(text="c", finish_reason="length")))
        return [event.text for _, event in await read(stream)]

    assert asyncio.run(both()) == ["ab", "c"]


def test_an_error_comes_behind_what_came_before_it() -> None:
    async def events() -> None:
        stream, found = filled("a", "b", end=False), []
        stream.fail(EngineFailed("of step 3"))
        with pytest.raises(EngineFailed, match="of step 3"):
            async for _, event in Running([stream]).events():
                found.append(event.text)
        assert found == ["ab"]

    asyncio.run(events())


def test_a_reader_that_leaves_cancels_what_has_not_ended() -> None:
    left: list[int] = []

    async def leave() -> None:
        open_stream = Stream(lambda: left.append(1))
        open_stream.put(Event(text="a"))
        running = Running([filled("b"), open_stream])
        async with contextlib.aclosing(running.events()) as events:
            assert {index for index, _ in [await anext(events), await anext(events)]} == {0, 1}
        running.cancel()

    asyncio.run(leave())
    assert left == [1]
