"""A reader that goes away ends its text: at once, whether it was written in chunks or whole, and for every choice."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

import httpx
import pytest

from dejavu.model.tokenizer import Tokenizer
from dejavu.serve.api.app import create_app
from helpers.clients import Caller
from helpers.fake_worker import FakeWorker, eventually, served, serving, spoken

WORDS = ("one ", "two ", "three ", "four ", "five")


@pytest.fixture(scope="module")
def worker() -> FakeWorker:
    """Five words that begin with the request's own; nothing comes without a step."""
    return FakeWorker(lambda request: spoken(str(len(request.prompt_ids)), *WORDS), by_hand=True)


@pytest.fixture(scope="module")
def url(tokenizer: Tokenizer, worker: FakeWorker) -> Iterator[str]:
    with serving(create_app(served(tokenizer), worker)) as url:
        yield url


@pytest.fixture(autouse=True)
def idle(worker: FakeWorker) -> Iterator[None]:
    worker.requests.clear()
    worker.streams.clear()
    worker.steps = 0
    yield
    assert worker.live == []


def ended(url: str, outcome: str) -> float:
    """How many requests ended so."""
    name = f'dejavu_requests_total{{endpoint="completions",outcome="{outcome}"}} '
    (line,) = [line for line in httpx.get(f"{url}/metrics").text.splitlines() if line.startswith(name)]
    return float(line.removeprefix(name))


@pytest.mark.parametrize("rudely", [False, True])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_the_text_ends_with_its_reader(url: str, worker: FakeWorker, stream: bool, n: int, rudely: bool) -> None:
    cancelled = ended(url, "cancelled")
    caller = Caller(url)
    caller.ask(stream=stream, n=n)
    eventually(lambda: len(worker.live) == n)
    worker.step()
    if stream:
        for _ in range(n):
            caller.hear(b'"text":"')
    caller.leave(rudely=rudely)
    eventually(lambda: not worker.live)
    assert worker.steps == 1, "no step is needed to notice"
    assert [stream.cancels for stream in worker.streams] == [1] * n
    eventually(lambda: ended(url, "cancelled") == cancelled + 1)


@pytest.mark.parametrize("stream", [False, True])
def test_one_that_waits_is_cancelled_too(url: str, worker: FakeWorker, stream: bool) -> None:
    caller = Caller(url)
    caller.ask(stream=stream)
    eventually(lambda: worker.live)
    caller.leave()
    eventually(lambda: not worker.live)
    assert worker.steps == 0 and worker.streams[0].cancels == 1


def test_a_reader_that_stays_cancels_nothing(url: str, worker: FakeWorker) -> None:
    callers = [Caller(url) for _ in range(2)]
    for caller, stream in zip(callers, (False, True), strict=True):
        caller.ask(stream=stream)
    eventually(lambda: len(worker.live) == 2)
    for _ in range(1 + len(WORDS)):
        worker.step()
    callers[0].hear(b'"finish_reason":"stop"')
    callers[1].hear(b"[DONE]")
    for caller in callers:
        caller.leave()
    assert [stream.cancels for stream in worker.streams] == [0, 0] and not worker.live


def test_one_who_leaves_while_asking_is_no_error(url: str, worker: FakeWorker, caplog: pytest.LogCaptureFixture) -> None:
    cancelled = ended(url, "cancelled")
    caller = Caller(url)
    caller.send(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
    caller.leave()
    eventually(lambda: ended(url, "cancelled") == cancelled + 1)
    assert worker.requests == [] and caplog.records == []


def test_those_who_stay_do_not_notice(url: str, worker: FakeWorker) -> None:
    """50 leave at random steps, whole or streamed; the texts of 20 others are what they would be alone."""
    rng = random.Random(0)
    lengths = {index: 1 + index % 40 for index in range(70)}
    callers = {index: Caller(url) for index in lengths}
    for index, caller in callers.items():
        caller.ask(prompt=[5] * lengths[index], stream=index % 2 == 0)
    eventually(lambda: len(worker.live) == 70)
    leaving = {index: rng.randrange(len(WORDS)) for index in rng.sample(sorted(lengths), 50)}
    for step in range(1 + len(WORDS)):
        before = len(worker.live)
        gone = [index for index, when in leaving.items() if when == step]
        for index in gone:
            callers[index].leave(rudely=rng.random() < 0.5)
        eventually(lambda before=before, gone=gone: len(worker.live) == before - len(gone))
        worker.step()
    for index in set(lengths) - set(leaving):
        caller = callers[index]
        caller.hear(b"[DONE]" if index % 2 == 0 else b'"usage"')
        body = caller.heard.partition(b"\r\n\r\n")[2].decode()
        bodies = [line.removeprefix("data: ") for line in body.splitlines() if line.startswith("data: {")] if index % 2 == 0 else [body]
        text = "".join(json.loads(body)["choices"][0]["text"] for body in bodies)
        assert text == str(lengths[index]) + "".join(WORDS)
        caller.leave()
    assert sorted(stream.cancels for stream in worker.streams) == [0] * 20 + [1] * 50


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_that_ends_tells_its_readers(tokenizer: Tokenizer, stream: bool, caplog, capsys) -> None:
    worker = FakeWorker(lambda request: spoken(*WORDS), by_hand=True)
    with serving(create_app(served(tokenizer), worker)) as url:
        caller = Caller(url)
        caller.ask(stream=stream)
        eventually(lambda: worker.live)
        worker.step()
        if stream:
            caller.hear(b'"text":"one "')
    caller.hear(b"the server is being stopped")
    assert (b"HTTP/1.1 503" in caller.heard) != stream and b"[DONE]" not in caller.heard and b'"stop"' not in caller.heard
    assert not worker.live and worker.streams[0].cancels == 1
    assert caplog.records == [] and capsys.readouterr() == ("", "")
    caller.leave()
