"""A connection of HTTP/1.1 with limits of time (for a head, for a body, between requests), and one of so many.

In: uvicorn's protocol for h11. Out: the same, which ends connections that keep it waiting with 408, and says what is wrong with bytes that
are no HTTP in the envelope of every error. A limit counts from the beginning of the head or body, however many bytes come meanwhile.
A connection beyond the limit_concurrency of uvicorn's Config is answered with 503 as soon as it says something, and ended.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from dejavu.serve.api.errors import ApiError

HEAD_S = 20.0  # from a connection or the first byte of a request to the end of its head
BODY_S = 120.0  # of a body, from the end of the head
IDLE_S = 10  # between an answer and the next request
RETRY_S = 1  # after which one that was too many may be taken
SURPLUS_S = 1.0  # for a first byte of a connection that is one too many: an end before it would be heard as a reset


class Connection(H11Protocol):
    """head_s, body_s: limits in seconds."""

    head_s, body_s = HEAD_S, BODY_S
    limit_concurrency: int | None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._most = self.limit_concurrency
        self.limit_concurrency = None  # uvicorn's own counts waiting requests, and answers without our envelope
        self._surplus = False
        self._limit: asyncio.TimerHandle | None = None
        self._awaited: object = None  # h11.IDLE: a head, h11.SEND_BODY: a body, None: nothing

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyrefly: ignore[bad-override]
        super().connection_made(transport)
        self._surplus = self._most is not None and len(self.connections) > self._most
        self._await(h11.IDLE)

    def connection_lost(self, exc: Exception | None) -> None:
        self._await(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._surplus:
            self._turn_away()
            return
        answered = self.server_state.total_requests
        super().data_received(data)
        state = self.conn.their_state
        if state is not self._awaited or self.server_state.total_requests != answered:
            self._await(state if state in (h11.IDLE, h11.SEND_BODY) else None)

    def on_response_complete(self) -> None:
        self._await(None)  # until the next request begins, for which uvicorn waits IDLE_S
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY:  # a next request came with the last one
            self._await(h11.SEND_BODY)

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, msg))

    def _await(self, what: Any) -> None:
        """Begin to wait for that; None: for nothing."""
        if self._limit is not None:
            self._limit.cancel()
        self._awaited, seconds = what, {h11.IDLE: self.head_s, h11.SEND_BODY: self.body_s}.get(what)
        if self._surplus and seconds is not None:
            self._limit = self.loop.call_later(SURPLUS_S, self._turn_away)
        else:
            self._limit = None if seconds is None else self.loop.call_later(seconds, self._late, seconds)

    def _turn_away(self) -> None:
        if not self.transport.is_closing():
            message = f"the server has as many connections as it takes ({self._most}); close some, or try again in {RETRY_S} s"
            self._refuse(ApiError(503, message, code="too_many_connections", retry_after_s=RETRY_S))

    def _late(self, seconds: float) -> None:
        part = "body" if self._awaited is h11.SEND_BODY else "head"
        if not self.transport.is_closing():
            self._refuse(
                ApiError(408, f"the {part} of the request did not come within {seconds:g} s; send all of it at once", code="timeout")
            )

    def _refuse(self, error: ApiError) -> None:
        """Say so where no answer has begun, and close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(error.body).encode()
            headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), ("Connection", "close")]
            headers += list(error.headers.items())
            for event in (h11.Response(status_code=error.status, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
