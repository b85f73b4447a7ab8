"""The process's side of a server: its socket and uvicorn. In: a host, a port, an app. Out: a listening address, and what runs until ^C."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Generator

import uvicorn
from fastapi import FastAPI

from dejavu.config import require
from dejavu.serve.api.connection import IDLE_S, Connection

if sys.platform != "win32":
    import resource

CONNECTIONS = 512  # at a time, unless told otherwise
OTHER_FILES = 64  # that a server has open besides its connections
GRACE_S = 2  # for what is on its way to clients when the server is told to end


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket of the address, which does not listen yet; port 0: a free one. Raises ValueError where it cannot be had."""
    require(0 <= port < 65536, f"port must lie between 0 (any free one) and 65535, not {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise ValueError(f"host {host!r} is no address of this machine: {error.strerror or error}; try --host 127.0.0.1") from error
    found = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # elsewhere it would share a port that is in use
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        found.close()
        fix = "choose another with --port, or 0 for any free one"
        raise ValueError(f"port {port} of {host} cannot be used: {error.strerror or error}; {fix}") from error
    return found


def allow_connections(count: int) -> None:
    """Let this process have so many connections open, each of which is an open file. Raises ValueError where it may not."""
    require(count >= 1, f"connections must be at least 1, not {count}")
    if sys.platform == "win32":
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + OTHER_FILES
    require(
        hard == resource.RLIM_INFINITY or needed <= hard,
        f"{count} connections need {needed} open files, and a process may have {hard} here; lower --connections, or raise ulimit -Hn",
    )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def url_of(bound: socket.socket) -> str:
    """Where a browser finds it: this machine, where the socket takes every address."""
    host, port = bound.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_local(bound: socket.socket) -> bool:
    """Whether only this machine can reach it."""
    host = bound.getsockname()[0]
    return host.startswith("127.") or host == "::1"


class Server(uvicorn.Server):
    """uvicorn's, which says when it has begun, and ends what is being written when it is told to end: a text may take minutes."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, on_start: Callable[[], None]) -> None:
        super().__init__(config)
        self._app, self._on_start = app, on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.state.ending.set()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """A terminal that is closed (SIGHUP) ends it like SIGTERM, unless that is ignored, as by nohup."""
        hangup = getattr(signal, "SIGHUP", None)
        caught = hangup is not None and threading.current_thread() is threading.main_thread() and signal.getsignal(hangup) != signal.SIG_IGN
        before = signal.signal(hangup, self._hang_up) if caught else None
        try:
            with super().capture_signals():
                yield
        finally:
            if caught:
                signal.signal(hangup, before)

    def _hang_up(self, *_: object) -> None:
        self.should_exit = True


def new_server(app: FastAPI, *, connections: int = CONNECTIONS, on_start: Callable[[], None] = lambda: None) -> Server:
    """What runs an app of `create_app`: `run(sockets=[...])` until it is told to end. connections: at a time, one more is answered with
    503. on_start: called once it listens."""
    config = uvicorn.Config(
        app, http=Connection, lifespan="off", ws="none", log_level="warning", access_log=False, server_header=False,
        timeout_keep_alive=IDLE_S, timeout_graceful_shutdown=GRACE_S, limit_concurrency=connections,
    )  # fmt: skip
    return Server(config, app, on_start)
