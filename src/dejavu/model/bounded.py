"""What a model brings along and what may not end: its chat template, its tokenizer's patterns. Both run in a process that can be ended.

In: the name of a function here and its arguments. Out: what it returns, or a ValueError where it refuses, or takes more time or memory
than a text of that length needs. Processes start when first needed (a tenth of a second) and serve one call after the other, which costs
some 0.1 ms; several calls at a time have one each, at most MOST.

What goes there and back is JSON. Memory is bounded where the
system can (Linux), processor time on POSIX, time everywhere.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import IO, Any

SECONDS = 2  # of processor time, for a call whose text is short
MORE_SECONDS = 1 / 100_000  # for each character
PATIENCE = 5  # as much in time, and a little more: a machine may be busy
MEMORY = 2 << 30  # bytes of addresses
CHARACTERS = 1 << 24  # of a rendered text
ANSWER = 1 << 30  # bytes
MOST = 4
FAILED, OUT_OF_MEMORY = 1, 3  # exit statuses
SIZE = struct.Struct("<Q")
ONE_THREAD = {"RAYON_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "RUST_BACKTRACE": "0"}  # each thread would take addresses of its own


class EndedError(Exception):
    """The process is gone, or was ended."""


def call(name: str, *arguments: Any, characters: int = 0, what: str) -> Any:
    """The result of a function of FUNCTIONS. characters: of the texts at hand. what: runs there, for messages, such as "the chat template".

    Raises ValueError for what the function refuses, with its reason, and for a call that had to be ended.
    """
    seconds = SECONDS + int(characters * MORE_SECONDS)
    try:
        message = json.dumps([name, arguments, seconds]).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{what} takes texts, numbers, lists and objects, nested a few hundred times at most: {error}") from error
    with _room:
        process = _taken()
        try:
            answer = process.answer(message, seconds=(seconds + 1) * PATIENCE)
        except BaseException as error:  # ^C too: what is on its way is no answer to the next call
            status = process.end()
            if not isinstance(error, EndedError):
                raise
            assert process.expired or status != FAILED, "python -m dejavu.model.bounded does not run"
            most = f"{seconds} s or {MEMORY >> 30} GiB"
            raise ValueError(f"{what} took more than {most} for {characters:,} characters and was ended") from None
        _idle.append(process)
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer["value"]


class _Process:
    """A Python of its own, which answers one message after the other."""

    def __init__(self) -> None:
        path = os.pathsep.join(filter(None, sys.path))
        self._popen = subprocess.Popen(
            [sys.executable, "-P", "-m", "dejavu.model.bounded"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path, **ONE_THREAD},
        )  # fmt: skip
        assert self._popen.stdin is not None and self._popen.stdout is not None, "both are pipes"
        self._in, self._out = self._popen.stdin, self._popen.stdout
        self.expired = False  # ended for the time that it took

    @property
    def lives(self) -> bool:
        return self._popen.poll() is None

    def answer(self, message: bytes, *, seconds: float) -> dict[str, Any]:
        """Raises EndedError."""
        alarm = threading.Timer(seconds, self._expire)
        alarm.daemon = True
        alarm.start()
        try:
            self._in.write(SIZE.pack(len(message)) + message)
            self._in.flush()
            held = _read(self._out)
            if held is None:
                raise EndedError
            return json.loads(held)
        except (OSError, ValueError) as error:
            raise EndedError from error
        finally:
            alarm.cancel()

    def _expire(self) -> None:
        self.expired = True
        self._popen.kill()

    def end(self) -> int:
        """The exit status, or minus the signal that ended it."""
        self._popen.kill()
        for pipe in (self._in, self._out):
            try:
                pipe.close()
            except OSError:  # what was never read of the message
                pass
        return self._popen.wait()


_idle: list[_Process] = []
_room = threading.BoundedSemaphore(MOST)


def _taken() -> _Process:
    while _idle:
        try:
            process = _idle.pop()
        except IndexError:  # another thread took the last one
            break
        if process.lives:
            return process
        process.end()
    return _Process()


@atexit.register
def end_all() -> None:
    """End the processes that wait for calls."""
    while _idle:
        _idle.pop().end()


def _forget() -> None:
    """A fork would share the pipes."""
    global _room
    _idle.clear()
    _room = threading.BoundedSemaphore(MOST)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _read(pipe: IO[bytes]) -> bytes | None:
    """A message; None at the end of all. ValueError for one that is longer than any may be."""
    head = pipe.read(SIZE.size)
    if len(head) < SIZE.size:
        return None
    size = SIZE.unpack(head)[0]
    if size > ANSWER:
        raise ValueError(f"a message of {size} bytes")
    held = pipe.read(size)
    return held if len(held) == size else None


# What follows runs in the process.


def _render(template: str, variables: dict[str, Any]) -> str:
    from dejavu.model.rendering import render

    text = render(template, variables)
    if len(text) > CHARACTERS:
        raise ValueError(f"it makes a text of {len(text):,} characters, and no prompt has more than {CHARACTERS:,}")
    return text


def _literals(template: str) -> list[str]:
    from dejavu.model.rendering import literals

    return literals(template)


_known: dict[str, Any] = {}  # the tokenizer given last, by its digest


def _encode(digest: str, content: str | None, text: str, as_text: bool) -> tuple[list[int], list[tuple[int, int]]] | None:
    """Ids and spans; None where the tokenizer is not known and not given."""
    from dejavu.model import encoding

    if content is not None:
        _known.clear()
        _known[digest] = encoding.backend_of(content)
    if digest not in _known:
        return None
    backend = _known[digest]
    return (encoding.encode_as_text(backend, text), []) if as_text else encoding.encode(backend, text)


def _check(content: str) -> None:
    """Raises ValueError for what is no tokenizer."""
    from dejavu.model import encoding

    encoding.encode(encoding.backend_of(content), "A first text.")


FUNCTIONS: dict[str, Callable[..., Any]] = {"render": _render, "literals": _literals, "encode": _encode, "check": _check}


def serve(source: IO[bytes], target: IO[bytes]) -> None:
    """Answer messages until there are no more."""
    while (message := _read(source)) is not None:
        try:
            name, arguments, seconds = json.loads(message)
            _limit_time(seconds)
            answer = json.dumps({"value": FUNCTIONS[name](*arguments)}).encode()
        except MemoryError:
            os._exit(OUT_OF_MEMORY)  # what is left of it may be in any state
        except Exception as error:  # foreign code raises whatever it likes
            answer = json.dumps({"error": str(error)[:1000]}).encode()
        target.write(SIZE.pack(len(answer)) + answer)
        target.flush()


def _limit_time(seconds: int) -> None:
    """End this process once it has used so much more processor time, whoever waits for it."""
    try:
        import resource
    except ImportError:  # Windows
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + 1 + seconds, hard))


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:
        return
    if sys.platform == "linux":
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard), hard))


def main() -> None:
    source, target = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing but answers goes there
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ^C is for who waits
    _limit_memory()
    serve(source, target)


if __name__ == "__main__":
    main()
