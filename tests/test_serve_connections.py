"""Connections of a server: limits of time, framing, names of the host, pages elsewhere, signals, and panics of a library."""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Iterator
from typing import Any, cast

import httpx
import pytest

from dejavu.model.tokenizer import Tokenizer
from dejavu.serve.api.app import create_app
from dejavu.serve.api.connection import Connection
from dejavu.serve.api.origins import checked_origins, host_names, host_of
from dejavu.serve.api.server import allow_connections, new_server
from dejavu.serve.core.interface import EngineFailed
from helpers.clients import Caller, error_of
from helpers.fake_worker import FakeWorker, eventually, served, serving, spoken
from helpers.stub_engine import StubModel
from helpers.worker_requests import request, run, text_of
from helpers.worker_requests import serving as working

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
BODY = json.dumps({"model": "tiny", "prompt": "the cat"}).encode()


@pytest.fixture
def worker() -> FakeWorker:
    return FakeWorker(lambda request: spoken("Hel", "lo"))


@pytest.fixture
def url(tokenizer: Tokenizer, worker: FakeWorker, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server that waits a twentieth of a second for a head and for a body."""
    monkeypatch.setattr(Connection, "head_s", 0.05)
    monkeypatch.setattr(Connection, "body_s", 0.05)
    with serving(create_app(served(tokenizer), worker)) as url:
        yield url


def answer_to(url: str, *parts: bytes) -> tuple[bytes, dict[str, Any]]:
    """The status line and the body of the last answer, of a connection that the server closes."""
    caller = Caller(url)
    for part in parts:
        caller.send(part)
    heard = caller.hear_all()
    caller.leave()
    head, _, body = heard.rpartition(b"\r\n\r\n")
    return head.rpartition(b"HTTP/1.1 ")[2].partition(b"\r\n")[0], json.loads(body)["error"]


HALVES = {
    "nothing": (b"", "head"),
    "half a head": (HEAD, "head"),
    "half a body": (HEAD + b"Content-Length: 99\r\n\r\n" + BODY[:20], "body"),
    "half a chunk": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{", "body"),
}


@pytest.mark.parametrize("name", HALVES)
def test_what_does_not_come_in_time_is_not_waited_for(url: str, worker: FakeWorker, name: str) -> None:
    sent, part = HALVES[name]
    status, error = answer_to(url, sent)
    assert status.startswith(b"408") and error["code"] == "timeout" and error["message"].startswith(f"the {part} of the request")
    assert worker.requests == []


def test_half_a_head_behind_an_answer_is_not_waited_for(url: str) -> None:
    caller = Caller(url)
    caller.send(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    caller.hear(b"pages_total")
    caller.send(b"GET /hea")
    assert b"HTTP/1.1 408" in caller.hear_all()
    caller.leave()


def test_a_text_may_take_longer_than_its_request(url: str, worker: FakeWorker) -> None:
    worker.by_hand = True
    caller = Caller(url)
    caller.ask(stream=True)
    eventually(lambda: worker.live)
    other = Caller(url)
    assert b"408" in other.hear_all(), "by now the limits have passed"
    other.leave()
    for _ in range(2):
        worker.step()
    caller.hear(b"[DONE]")
    caller.leave()


def test_a_connection_too_many_is_told_to_come_back(tokenizer: Tokenizer, worker: FakeWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dejavu.serve.api.connection.SURPLUS_S", 0.05)
    health = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    with serving(create_app(served(tokenizer), worker), connections=2) as url:
        held = [Caller(url) for _ in range(2)]
        for caller in held:
            caller.send(health)
            caller.hear(b"pages_total")
        for said in (b"", health):
            status, error = answer_to(url, said)
            assert status.startswith(b"503") and error["code"] == "too_many_connections" and "(2)" in error["message"]
        held[0].send(health)
        held[0].heard = b""
        held[0].hear(b"pages_total")
        held[1].leave()
        eventually(lambda: httpx.get(f"{url}/health").status_code == 200)
        held[0].leave()


def test_more_connections_than_open_files_are_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    limits = [(256, 1024)]
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda kind, pair: limits.append(pair))
    allow_connections(100)
    assert limits == [(256, 1024)]
    allow_connections(512)
    assert limits[-1] == (576, 1024)
    with pytest.raises(ValueError, match="1000 connections need 1064 open files, and a process may have 1024 here; lower --connections"):
        allow_connections(1000)
    with pytest.raises(ValueError, match="connections must be at least 1, not 0"):
        allow_connections(0)


def test_a_body_with_two_lengths_is_refused(url: str, worker: FakeWorker) -> None:
    both = b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\nConnection: keep-alive\r\n\r\n"
    status, error = answer_to(url, HEAD + both + b"0\r\n\r\n")
    assert status.startswith(b"400") and "not both" in error["message"] and worker.requests == []


def test_what_is_no_http_is_told_so_in_the_shape_of_every_error(url: str) -> None:
    status, error = answer_to(url, b"\x16\x03\x01 hello\r\n\r\n")
    assert status.startswith(b"400") and set(error) == {"message", "type", "param", "code"}


def test_without_a_key_a_local_server_answers_to_local_names_alone() -> None:
    def names(*given: str, local: bool = True, key: bool = False, host: str = "127.0.0.1") -> frozenset[str] | None:
        return host_names(given, local=local, key=key, host=host)

    local = {"localhost", "127.0.0.1", "::1"}
    assert names() == local and names(host="127.0.0.5") == local | {"127.0.0.5"}
    assert names(key=True) is names(local=False) is names("*") is None
    assert names("Box.lan") == local | {"box.lan"} and names("box", local=False, host="0.0.0.0") == local | {"box", "0.0.0.0"}
    for wrong in ("http://box", "box:80", "", "a b"):
        with pytest.raises(ValueError, match="--allowed-host .* is no name of a host"):
            names(wrong)


def test_a_host_is_known_by_its_name() -> None:
    hosts = ("localhost:8000", "LOCALHOST", "localhost.", "[::1]:80", "127.0.0.1", "evil.example:8000")
    assert [host_of(host) for host in hosts] == ["localhost", "localhost", "localhost", "::1", "127.0.0.1", "evil.example"]


def test_a_foreign_name_gets_nothing(tokenizer: Tokenizer, worker: FakeWorker) -> None:
    """A page whose own name was pointed to this machine: not an answer, not the page, not the metrics."""
    app = create_app(served(tokenizer), worker, hosts=host_names(["box.lan"], local=True, key=False, host="127.0.0.1"))
    with serving(app) as url, httpx.Client(base_url=url) as client:
        for path in ("/v1/models", "/", "/metrics", "/health"):
            response = client.get(path, headers={"Host": "evil.example:8000"})
            error = error_of(response)
            assert (response.status_code, error["code"], error["type"]) == (403, "host_not_allowed", "permission_error")
            assert "--allowed-host evil.example" in error["message"]
            assert client.get(path, headers={"Host": "box.lan:8000"}).status_code == client.get(path).status_code == 200
        assert client.post("/v1/completions", content=BODY, headers={"Host": "evil.example"}).status_code == 403
    assert worker.requests == []


def test_pages_elsewhere_may_ask_where_the_server_says_so(tokenizer: Tokenizer, worker: FakeWorker) -> None:
    asks = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    with serving(create_app(served(tokenizer), worker)) as url, httpx.Client(base_url=url) as client:
        assert client.options("/v1/completions", headers=asks).status_code == 405
        assert "access-control-allow-origin" not in client.get("/v1/models", headers={"Origin": "https://page.example"}).headers
    app = create_app(served(tokenizer), worker, api_key="k", origins=checked_origins(["https://page.example"]))
    with serving(app) as url, httpx.Client(base_url=url) as client:
        allowed = client.options("/v1/completions", headers=asks)
        assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == "https://page.example"
        assert client.options("/v1/completions", headers=asks | {"Origin": "https://other.example"}).status_code == 400
        said = client.post(
            "/v1/completions", json=json.loads(BODY), headers={"Origin": "https://page.example", "Authorization": "Bearer k"}
        )
        assert said.status_code == 200 and said.headers["access-control-allow-origin"] == "https://page.example"
    for wrong in ("page.example", "https://page.example/x", ""):
        with pytest.raises(ValueError, match="--cors-origin .* is no origin"):
            checked_origins([wrong])


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no such signal")
def test_a_terminal_that_is_closed_ends_the_server_cleanly(tokenizer: Tokenizer, worker: FakeWorker) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may ignore it
    try:
        server = new_server(create_app(served(tokenizer), worker))
        with server.capture_signals():
            signal.raise_signal(signal.SIGHUP)
        assert server.should_exit and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
        server = new_server(create_app(served(tokenizer), worker))
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with server.capture_signals():
            signal.raise_signal(signal.SIGHUP)
        assert not server.should_exit, "nohup asks for that"
    finally:
        signal.signal(signal.SIGHUP, before)


class Panic(BaseException):
    """What a library written in Rust raises: no Exception."""


class Panicking:
    """A tokenizer that panics on what has a "!"."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def encode(self, text: str, **options: Any) -> list[int]:
        if "!" in text:
            raise Panic("called `Option::unwrap()` on a `None` value")
        return self._inner.encode(text, **options)

    def decode(self, ids: Any, **options: Any) -> str:
        found = self._inner.decode(ids, **options)
        if "!" in found:
            raise Panic("index out of bounds")
        return found


def test_a_panic_is_an_error_of_its_request_alone_and_is_counted(tokenizer: Tokenizer, worker: FakeWorker) -> None:
    facts = dataclasses.replace(served(tokenizer), tokenizer=cast(Tokenizer, Panicking(tokenizer)))
    with serving(create_app(facts, worker)) as url, httpx.Client(base_url=url) as client:
        response = client.post("/v1/completions", json={"model": "tiny", "prompt": "help!"})
        assert response.status_code == 500 and error_of(response)["code"] == "internal_error"
        assert client.post("/v1/completions", json=json.loads(BODY)).status_code == 200
        assert 'dejavu_requests_total{endpoint="completions",outcome="failed"} 1.0' in client.get("/metrics").text


def test_a_panic_while_a_text_is_written_ends_that_text_alone() -> None:
    model = StubModel(lambda prompt: b"ab!c" if bytes(prompt) == b"bad" else b"abcd")
    model.tokenizer = cast(Tokenizer, Panicking(model.tokenizer))
    with working(model, slots=2) as worker:
        bad, good = worker.submit_all([request("bad"), request("good")])
        assert text_of(list(good.events())) == "abcd"
        with pytest.raises(EngineFailed, match="Panic"):
            list(bad.events())
        assert text_of(run(worker, request("again"))[0]) == "abcd"
        state = worker.state()
        assert (state.alive, state.failed, state.finished, len(model.engines)) == (True, 1, 2, 2), "and no engine is made anew"
