"""One request to write text, from its bytes to its answer: read, checked, submitted, and sent whole or in chunks.

In: a request of HTTP, what is served, the worker. Out: a response, or an ApiError before anything is sent. Whatever happens, the streams of
the request end with it: a client that goes away, a failure, a server that stops.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any, Protocol

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from dejavu.serve.api.endpoint import TextEndpoint
from dejavu.serve.api.errors import ApiError, from_worker, internal, stopping
from dejavu.serve.api.merged_streams import EventStream, Receive, Running, ServerEnds, while_connected
from dejavu.serve.api.metrics import Metrics, Outcome
from dejavu.serve.api.parsing import parse
from dejavu.serve.api.requests import ParsedRequest, Served
from dejavu.serve.api.response_schemas import ErrorEnvelope
from dejavu.serve.api.responses import DONE, Answer, server_sent, to_bytes
from dejavu.serve.core.interface import EngineFailed, QueueFull, SequenceRequest, TooLong, WorkerState

MAX_BODY = 4 << 20  # bytes of a request: a prompt of some 500,000 tokens
ENDINGS = (asyncio.CancelledError, GeneratorExit, KeyboardInterrupt, SystemExit)  # of BaseException what is no failure of a request
NO_READER = 400  # the status of what nobody reads any more
Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
log = logging.getLogger("dejavu.serve")


class SequenceRunner(Protocol):
    """What the server needs of a worker."""

    def submit_all(self, requests: Sequence[SequenceRequest], /) -> Sequence[EventStream]:
        """Streams of the sequences, all or none. Raises QueueFull, TooLong, NotRunning."""
        ...

    def state(self) -> WorkerState: ...


class TextHandler:
    """Answers the requests of an endpoint. ending: once it is set, what is being written ends."""

    def __init__(self, endpoint: TextEndpoint, served: Served, worker: SequenceRunner, metrics: Metrics, ending: asyncio.Event) -> None:
        self._endpoint, self._served, self._worker, self._metrics, self._ending = endpoint, served, worker, metrics, ending

    async def __call__(self, request: Request) -> Response:
        """Raises ApiError."""
        try:
            return await self._respond(request)
        except ApiError as error:
            self._ended("busy" if error.status == 429 else "failed" if error.status >= 500 else "refused")
            raise
        except ClientDisconnect:
            self._ended("cancelled")
            return Response(status_code=NO_READER)
        except ENDINGS:
            raise
        except BaseException as error:  # answered here, a panic of a library too: else the server closes the connection
            log.error("a request failed", exc_info=error)
            self._ended("failed")
            raise internal() from error

    async def _respond(self, request: Request) -> Response:
        body = await read_body(request)
        parsed = await asyncio.to_thread(self._parsed, body)  # a long prompt takes a while to read
        answer = self._endpoint.answer(parsed, self._served)
        try:
            running = Running(self._worker.submit_all(parsed.sequences))
        except (QueueFull, TooLong, EngineFailed) as error:
            raise from_worker(error, param=self._endpoint.prompt) from error
        if parsed.stream:
            return Chunked(lambda start, receive, send: self._stream(answer, running, start, receive, send))
        try:
            whole = await while_connected(request.receive, self._whole(answer, running), ending=self._ending)
        except ServerEnds:
            raise stopping() from None
        except EngineFailed as error:
            log.error("a request failed: %s", error)
            raise from_worker(error, param=self._endpoint.prompt) from error
        finally:
            running.cancel()
        self._ended("cancelled" if whole is None else "completed")
        return Response(status_code=NO_READER) if whole is None else Response(whole, media_type="application/json")

    def _parsed(self, body: bytes) -> ParsedRequest:
        return self._endpoint.parse(parse(body, self._endpoint.body), self._served)

    async def _whole(self, answer: Answer[Any], running: Running) -> bytes:
        """The answer in one object."""
        mode = answer.request.mode
        async with contextlib.aclosing(running.events()) as events:
            async for came in events:
                for index, event in came:
                    self._metrics.event(event, mode=mode)
                    answer.take(index, event)
        return to_bytes(answer.whole())

    async def _stream(self, answer: Answer[Any], running: Running, start: Message, receive: Receive, send: Send) -> None:
        """Send the answer in chunks, until it or the connection ends."""
        outcome: Outcome = "cancelled"
        try:
            outcome = await while_connected(receive, self._send(answer, running, start, send), ending=self._ending) or outcome
        except ServerEnds:
            await send(_last(stopping()))
            outcome = "failed"
        finally:
            running.cancel()
            self._ended(outcome)

    async def _send(self, answer: Answer[Any], running: Running, start: Message, send: Send) -> Outcome:
        """Send the chunks; where the answer fails on the way, an error in place of its end."""

        mode = answer.request.mode
        await send(start)
        await send(_body(b"".join(server_sent(chunk) for chunk in answer.first_chunks())))
        try:
            async with contextlib.aclosing(running.events()) as events:
                async for came in events:
                    chunks = []
                    for index, event in came:
                        self._metrics.event(event, mode=mode)
                        chunks += answer.chunks(index, event)
                    if chunks:
                        await send(_body(b"".join(map(server_sent, chunks))))
            await send(_body(b"".join(server_sent(chunk) for chunk in answer.closing()) + DONE, more=False))
        except OSError:  # how some servers say that the client has gone
            return "cancelled"
        except ENDINGS:
            raise
        except BaseException as error:  # the status has been sent, so that no handler can tell the client
            running.cancel()
            log.error("a stream failed", exc_info=error)
            await send(_last(from_worker(error, param=self._endpoint.prompt) if isinstance(error, EngineFailed) else internal()))
            return "failed"
        return "completed"

    def _ended(self, outcome: Outcome) -> None:
        self._metrics.request(self._endpoint.name, outcome)


def _body(part: bytes, *, more: bool = True) -> Message:
    """ASGI's message with a part of a body."""
    return {"type": "http.response.body", "body": part, "more_body": more}


def _last(error: ApiError) -> Message:
    """What ends a stream that does not end well."""
    return _body(server_sent(ErrorEnvelope.model_validate(error.body)), more=False)


class Chunked(Response):
    """A stream of server-sent events, sent by a coroutine that is given ASGI's first message, `receive` and `send`."""

    media_type = "text/event-stream"

    def __init__(self, write: Callable[[Message, Receive, Send], Awaitable[None]]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._write = write

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        await self._write({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}, receive, send)


async def read_body(request: Request) -> bytes:
    """The body of a request. Raises ApiError for one that is not said to be JSON (a page elsewhere could send that) or is too large."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "the body must be JSON; send the header Content-Type: application/json", code="unsupported_media_type")
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY:
            raise ApiError(413, f"the body is larger than {MAX_BODY} bytes; send a shorter prompt", code="body_too_large")
        parts.append(part)
    return b"".join(parts)
