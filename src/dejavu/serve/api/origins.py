"""Who may reach the server through a browser: names that it answers to, and pages elsewhere that may read its answers.

In: names of hosts, origins. Out: middleware of ASGI. A page of another site can have its own name point to this machine (DNS rebinding);
its requests then carry that name in their Host. So where the address alone guards a server (one of this machine, without a key), requests
under other names than the machine's own are refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from dejavu.config import require
from dejavu.serve.api.errors import ApiError

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
NAME = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]+")
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s?#]+")


def host_names(given: Sequence[str], *, local: bool, key: bool, host: str) -> frozenset[str] | None:
    """The names that a server answers to; None: any. given: by --allowed-host, "*" being any. local: whether its address, which was asked
    for as `host`, is of this machine alone. key: whether requests need one. Raises ValueError for what is no name."""
    for name in given:
        good = name == "*" or NAME.fullmatch(name.lower()) is not None
        require(
            good, f"--allowed-host {name!r} is no name of a host; give it as in http://NAME:8000, without scheme and port, or '*' for any"
        )
    if "*" in given or not (given or (local and not key)):
        return None
    return frozenset((*LOCAL_NAMES, host.lower(), *(name.lower() for name in given)))


def checked_origins(given: Sequence[str]) -> tuple[str, ...]:
    """The origins of --cors-origin. Raises ValueError for what is none."""
    for origin in given:
        good = origin == "*" or ORIGIN.fullmatch(origin) is not None
        require(good, f"--cors-origin {origin!r} is no origin; give scheme and host, and a port where there is one: https://example.org")
    return tuple(given)


def host_of(header: str) -> str:
    """The name in a Host header: without port, brackets and a last dot."""
    name = header.strip().lower()
    name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
    return name.removesuffix(".")


class Gate:
    """Refuses what must not get to the app: foreign names of the host, and a body with two lengths, which a proxy may cut elsewhere."""

    def __init__(self, app: ASGIApp, *, hosts: frozenset[str] | None) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._mistake(Headers(scope=scope)) if scope["type"] == "http" else None
        app = self._app if error is None else JSONResponse(error.body, status_code=error.status, headers=error.headers)
        await app(scope, receive, send)

    def _mistake(self, headers: Headers) -> ApiError | None:
        if "content-length" in headers and "transfer-encoding" in headers:
            return ApiError(
                400, "a request has Content-Length or Transfer-Encoding, not both; send one of them", headers={"Connection": "close"}
            )
        name = host_of(headers.get("host", ""))
        if self._hosts is None or name in self._hosts or not name:
            return None
        fix = f"start it with --allowed-host {name} if it is to be reached so, or with an --api-key"
        return ApiError(403, f"this server does not answer to the name {name[:80]!r}; {fix}", code="host_not_allowed")
