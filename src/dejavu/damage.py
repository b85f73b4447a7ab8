"""What is the matter with a file that cannot be read as what its name says.

In: a path. Out: a ValueError whose line has the file, its size, the likely cause and the fix. A pointer of git-lfs, a file of 0 bytes, a
web page, and a file cut off or with bytes behind its end are told apart from one whose content is wrong.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

LFS = b"version https://git-lfs.github.com/spec/"
ZIP = b"PK\x03\x04"  # of a file of PyTorch
PAGES = (b"<!doctype html", b"<html")
HEAD = 256  # bytes that tell what a file is
MOST_HEADER = 100_000_000  # bytes of a safetensors header, the format's own limit
AGAIN = "copy or download it again"


def damaged(path: Path, what: object, fix: str = AGAIN) -> ValueError:
    """The error for a file whose content is wrong. what: where, and how; what is the matter with the file as a whole goes before it."""
    told = misplaced(path)
    return ValueError(told or f"{path} is damaged: {what}; {fix}")


@contextmanager
def foreign_reader(path: Path, fix: str = AGAIN) -> Generator[None]:
    """What a library raises within while it reads the file, whatever it is, as a ValueError. A panic of a library in Rust is no Exception.

    For the one call of the library alone: our own mistakes must not be taken for the file's.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; {fix}") from None
    except BaseException as error:
        ours = isinstance(error, ValueError) and str(error).startswith(str(path))
        if ours or not (isinstance(error, Exception) or is_panic(error)):
            raise
        raise damaged(path, " ".join(str(error).split()) or type(error).__name__, fix) from error


def is_panic(error: BaseException) -> bool:
    """Whether a library in Rust panicked: no Exception, and of a class that nobody can import."""
    return type(error).__name__ == "PanicException"


@contextmanager
def content_of(path: Path, fix: str = AGAIN) -> Generator[None]:
    """A file whose content, of whatever shape, is not what it should be, as a ValueError. For the lines that take the content up alone."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        told = f"there is no {error}" if isinstance(error, KeyError) else str(error)
        raise damaged(path, told, fix) from error


def misplaced(path: Path) -> str | None:
    """What the file is instead: nothing, a pointer, a web page, a part of itself. None where it may be what it should be."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(HEAD)
    except OSError:
        return None
    if size == 0:
        return f"{path} is empty (0 bytes): the download or copy did not get through; {AGAIN}"
    if head.startswith(LFS):
        fields = dict(line.split(" ", 1) for line in path.read_text(encoding="utf-8", errors="replace").splitlines()[:9] if " " in line)
        stands = f", for a file of {fields['size']} bytes" if fields.get("size", "").isdigit() else ""
        return f"{path} is a pointer of git-lfs ({size} bytes{stands}), not the file; run `git lfs pull` in its folder"
    if head.lstrip().lower().startswith(PAGES):
        return f"{path} is a web page ({size} bytes), not the file: the address that it came from was of a page; {AGAIN}"
    if head.startswith(ZIP) and not zipfile.is_zipfile(path):
        return f"{path} is truncated: it has {size:,} bytes and no end; the download or copy was cut off; {AGAIN}"
    return _cut(path, size, head) if path.suffix == ".safetensors" else None


def _cut(path: Path, size: int, head: bytes) -> str | None:
    """A safetensors file that is shorter or longer than its header says."""
    header = int.from_bytes(head[:8], "little")
    if size < 8 or header > MOST_HEADER or head[8:9] not in (b"{", b""):
        return None
    expected = 8 + header
    if size >= expected:
        with path.open("rb") as file:
            file.seek(8)
            try:
                entries = json.loads(file.read(header))
                expected += max((entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"), default=0)
            except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):  # the header itself is wrong
                return None
    if size < expected:
        return f"{path} is truncated: it has {size:,} bytes of {expected:,}; the download or copy was cut off; {AGAIN}"
    return None if size == expected else f"{path} has {size:,} bytes, and its header tells of {expected:,}; {AGAIN}"
