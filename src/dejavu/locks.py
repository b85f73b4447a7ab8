"""One process at a time in a folder that dejavu writes.

In: a folder, with its marker file or without. Out: the folder kept for this process, by a lock that ends with the process, however it
ends. A second process is refused with a ValueError that names the first. Where files cannot be locked (Windows, some network file systems)
nothing is kept, and who asks is told so.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl

_held: dict[Path, int] = {}  # by resolved folder: how often this process keeps it
HOLDER = "in use by "
UNKNOWN = "perhaps in use"  # where files cannot be locked


@contextmanager
def kept(folder: Path, marker: str) -> Generator[bool]:
    """Keep the folder within; again by the same process is no conflict. marker: the name of its marker file, which tells who keeps it.

    Gives whether it is kept: False where files cannot be locked.
    """
    folder = folder.resolve()
    if sys.platform == "win32":
        yield False
        return
    if folder in _held:
        _held[folder] += 1
        try:
            yield True
        finally:
            _held[folder] -= 1
        return
    descriptor = _opened(folder, marker)
    try:
        locked = _lock(descriptor)
        if locked is None:
            yield False
            return
        if not locked:
            raise ValueError(f"{folder} is {_holder(folder / marker)}; wait for its end, end it, or choose another folder")
        first = sum(len(line.encode()) + 1 for line in _lines(folder / marker)[:1])
        name = f"{HOLDER}process {os.getpid()} of {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
        with suppress(OSError):  # without a marker, or on a full disk, it has no name
            os.truncate(descriptor, first)
            os.pwrite(descriptor, name.encode(), first)
        _held[folder] = 1
        try:
            yield True
        finally:
            del _held[folder]
            with suppress(OSError):
                os.truncate(descriptor, first)
    finally:
        os.close(descriptor)


def in_use(folder: Path, marker: str) -> str | None:
    """Who keeps the folder, in words; None where nobody does, UNKNOWN where that cannot be told."""
    if folder.resolve() in _held:
        return f"{HOLDER}this process"
    if sys.platform == "win32":
        return UNKNOWN
    descriptor = _opened(folder, marker)
    try:
        locked = _lock(descriptor)
        if locked is None:
            return UNKNOWN
        return None if locked else _holder(folder / marker)
    finally:
        os.close(descriptor)


def _opened(folder: Path, marker: str) -> int:
    """The marker, or the folder itself where it has none."""
    try:
        return os.open(folder / marker, os.O_RDWR)
    except FileNotFoundError:
        return os.open(folder, os.O_RDONLY)


def _lock(descriptor: int) -> bool | None:
    """Whether nobody else has it; None on a file system without locks. The lock goes with the descriptor."""
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []


def _holder(path: Path) -> str:
    named = [line for line in _lines(path) if line.startswith(HOLDER)]
    return named[0] if named else f"{HOLDER}another process"
