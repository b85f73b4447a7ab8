"""`dejavu serve` as a process of its own, for as long as a benchmark takes.

In: a command line without address. Out: a `ServerProcess` with the URL, once the server takes requests; it is ended on the way out.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx

from dejavu.config import require

HOST = "127.0.0.1"
SERVE = (sys.executable, "-m", "dejavu", "serve")
START_S, END_S, POLL_S = 600.0, 30.0, 0.1


@dataclass(frozen=True, slots=True)
class ServerProcess:
    """A running server: its URL, its process, and the file that has what it printed."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def last_words(self) -> str:
        """The last line that it printed."""
        lines = self.log.read_text(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


@contextmanager
def served(arguments: Sequence[str], *, command: Sequence[str] = SERVE, start_s: float = START_S) -> Generator[ServerProcess]:
    """Start a server on a free port and wait until it is healthy. Raises ValueError with its last words where it ends or takes too long."""
    port = free_port()
    with TemporaryDirectory(prefix="dejavu-serve-") as folder:
        log = Path(folder) / "log"
        with log.open("wb") as file:
            process = subprocess.Popen([*command, *arguments, "--host", HOST, "--port", str(port)], stdout=file, stderr=subprocess.STDOUT)
        server = ServerProcess(f"http://{HOST}:{port}", process, log)
        try:
            _wait(server, start_s)
            yield server
        finally:
            _end(process)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def _wait(server: ServerProcess, start_s: float) -> None:
    deadline = time.monotonic() + start_s
    while True:
        require(
            not server.ended, f"the server ended with status {server.process.returncode}: {server.last_words().removeprefix('dejavu: ')}"
        )
        require(time.monotonic() < deadline, f"the server took no requests within {start_s:g} s; its last words: {server.last_words()}")
        try:
            if httpx.get(f"{server.url}/health", timeout=5, trust_env=False).status_code == httpx.codes.OK:
                return
        except httpx.HTTPError:
            pass  # not yet
        time.sleep(POLL_S)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
