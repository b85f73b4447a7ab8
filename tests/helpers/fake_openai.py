"""A server that answers as OpenAI's API does, from a script: what tests of a client talk to.

    server = FakeServer(answers=[Answer(tokens=5), Answer(fails="http")])
    with running(server) as url: ...

It counts a token for every `characters` characters of a prompt and one for each piece of text. Answers are given in turn, over and over;
the probes of a benchmark (max_tokens 1) always get a plain one. What was asked is in `server.requested`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """tokens: pieces of text, None for as many as asked for. fails: how, see `FakeServer.completion`."""

    tokens: int | None = None
    first_s: float = 0.0
    each_s: float = 0.0
    text: str = " word"
    fails: str | None = None
    retry_after: str | None = None
    dejavu: dict[str, Any] | None = None
    usage: bool = True


@dataclass(slots=True, kw_only=True)
class FakeServer:
    """models: ids listed. pages_lost, memory_grows: what each answered request keeps, of 100 pages and in bytes."""

    answers: Sequence[Answer] = (Answer(),)
    models: Sequence[str] = ("tiny", "tiny:dense")
    characters: int = 4
    extra_tokens: int = 1
    owned_by: str = "dejavu"
    runs_dense: bool = False
    facts: dict[str, Any] = field(
        default_factory=lambda: {"version": "9.9", "backend": "native", "dtype": "int8", "threads": 2, "layers": 6}
    )
    tells: Sequence[str] = ("health", "memory")  # where its pages: health, metrics; and its memory
    pages_lost: int = 0
    memory_grows: int = 0
    requested: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    turns: int = 0

    def app(self) -> FastAPI:
        app = FastAPI()
        app.post("/v1/completions")(self.completion)
        app.post("/v1/chat/completions")(self.completion)
        app.get("/v1/models")(self.list_models)
        app.get("/health")(self.health)
        app.get("/metrics")(self.metrics)
        return app

    async def list_models(self) -> dict[str, Any]:
        about = {"object": "model", "created": 0, "owned_by": self.owned_by}
        return {
            "object": "list",
            "data": [{"id": id, **about, **({"dejavu": {"mode": "dense"}} if self.runs_dense else {})} for id in self.models],
        }

    async def health(self) -> dict[str, Any]:
        pages = {"pages_free": 100 - self.turns * self.pages_lost, "pages_total": 100} if "health" in self.tells else {}
        return {"status": "ok", "queued": 0, "running": 0, **pages, **self.facts}

    async def metrics(self) -> PlainTextResponse:
        lines = ["# HELP x of {labels} 3", 'x{label="} 2"} 1', "y NaN"]
        if "memory" in self.tells:
            lines.append(f"process_resident_memory_bytes {3e8 + self.turns * self.memory_grows}")
        if "metrics" in self.tells:
            free = {"sparse": 60 - self.turns * self.pages_lost, "dense": 40}
            lines += [f'dejavu_kv_pages_free{{engine="{mode}"}} {pages:.1f}' for mode, pages in free.items()]
            lines += [f'dejavu_kv_pages{{engine="{mode}"}} 50.0' for mode in free]
        return PlainTextResponse("\n".join(lines) + "\n")

    async def completion(self, request: Request) -> Response:
        body = await request.json()
        self.requested.append(body)
        self.headers.append(dict(request.headers))
        answer = Answer()
        if body["max_tokens"] > 1:
            answer, self.turns = self.answers[self.turns % len(self.answers)], self.turns + 1
        if answer.fails in ("http", "busy"):
            status = 500 if answer.fails == "http" else 429
            error = {"message": f"went {answer.fails}", "type": "server_error", "param": None, "code": None}
            return JSONResponse({"error": error}, status, None if answer.retry_after is None else {"Retry-After": answer.retry_after})
        if answer.fails == "no stream":
            return JSONResponse({"choices": [{"text": "all at once", "finish_reason": "stop"}]})
        return StreamingResponse(self.stream(body, answer), media_type="text/event-stream")

    async def stream(self, body: dict[str, Any], answer: Answer) -> AsyncIterator[str]:
        """The events of an answer, as far as `fails` lets them come."""
        chat, model = "messages" in body, body["model"]
        tokens = body["max_tokens"] if answer.tokens is None else answer.tokens
        about = {"id": "cmpl-1", "object": "chat.completion.chunk" if chat else "text_completion", "created": 0, "model": model}

        def event(text: str, finish: str | None = None, **more: Any) -> str:
            choice = {"index": 0, "finish_reason": finish, "logprobs": None} | ({"delta": {"content": text}} if chat else {"text": text})
            return f"data: {json.dumps(about | {'choices': [choice]} | more, ensure_ascii=False)}\n\n"

        yield ": a comment\n\n"
        await asyncio.sleep(answer.first_s)
        for number in range(tokens):
            if number > 0:
                await asyncio.sleep(answer.each_s)
            yield event(answer.text)
            if answer.fails == "event" and number == 1:
                yield 'event: error\ndata: {"error": {"message": "the step failed", "type": "server_error"}}\n\n'
                return
            if answer.fails == "malformed":
                yield 'data: {"choices": [\n\n'
            if answer.fails == "other form":
                yield 'data: [{"choices": 1}]\n\n'
            if answer.fails == "reset":
                raise RuntimeError("the connection is reset")  # in the middle of a body: the client sees it cut
            if answer.fails == "hangs":
                await asyncio.sleep(60)
        if answer.fails == "no finish":
            return
        yield event("", "length", **({} if answer.dejavu is None else {"dejavu": answer.dejavu}))
        if answer.fails == "not done":
            return
        prompt = body["messages"][0]["content"] if chat else body["prompt"]
        counted = self.extra_tokens + len(prompt) // self.characters
        if answer.usage and body["stream_options"]["include_usage"]:
            usage = {"prompt_tokens": counted, "completion_tokens": tokens, "total_tokens": counted + tokens}
            yield f"data: {json.dumps(about | {'choices': [], 'usage': usage | {'prompt_tokens_details': {'cached_tokens': 1}}})}\n\n"
        yield "data: [DONE]\n\n"


@contextmanager
def running(server: FakeServer) -> Generator[str]:
    """Serve from a thread on a free port; gives the URL."""
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(server.app(), log_level="critical", ws="none", lifespan="off", timeout_graceful_shutdown=1)
    served = uvicorn.Server(config)
    thread = threading.Thread(target=served.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not served.started:
        assert time.monotonic() < deadline and thread.is_alive(), "the fake server does not start"
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    served.should_exit = True
    thread.join(20)
    listening.close()
    assert not thread.is_alive()


def main() -> None:
    """As `dejavu serve MODEL --host H --port P` would: the model `refuses` ends with a user's mistake, `hangs` is never healthy."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    arguments = parser.parse_args()
    if arguments.model == "refuses":
        print("loading\ndejavu: no such model: 'refuses'", file=sys.stderr)
        sys.exit(2)
    if arguments.model == "hangs":
        print("loading", flush=True)
        time.sleep(60)
    server = FakeServer(models=(arguments.model, f"{arguments.model}:dense"))
    uvicorn.run(server.app(), host=arguments.host, port=arguments.port, log_level="critical", ws="none", lifespan="off")


if __name__ == "__main__":
    main()
