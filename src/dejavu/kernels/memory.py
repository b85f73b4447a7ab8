"""Memory of this process: what it may still take, what it need not keep, and files that take memory only where they are read.

In: a path, or a tensor. Out: free bytes; the file's bytes as a tensor whose pages come from the disk when they are touched; or memory that
goes back to the system. What is given back of a mapped file is read again the next time that it is touched.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import re
import sys
import weakref
from collections.abc import Generator
from pathlib import Path

import torch
from torch import Tensor

POPULATE_READ = 22  # of Linux 5.14, which Python has no name for
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # of mallopt, in glibc
USUAL = {MMAP_MAX: 65536, MMAP_THRESHOLD: 32 << 20, TRIM_THRESHOLD: 64 << 20}  # the last two are what glibc comes to by itself
_mapped: dict[int, tuple[int, weakref.ref[mmap.mmap]]] = {}  # by its first address: how many bytes, and the mapping


def give_back_freed() -> None:
    """Give it to the system, where that can be asked for (glibc): milliseconds, so after much was freed, not after each matrix."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


@contextlib.contextmanager
def keeping_freed() -> Generator[None]:
    """Meanwhile large blocks that are freed stay with the process, which takes them again (glibc): pages of new ones would each be mapped
    and zeroed, an eighth of the time of a pass over a text. Who has set glibc's allocator up by its variables keeps that."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None or any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        yield
        return
    mallopt(MMAP_MAX, 0)
    mallopt(TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        for name, value in USUAL.items():
            mallopt(name, value)
        give_back_freed()


def mapped_file(path: Path) -> Tensor:
    """The bytes of a file, uint8, which take memory only where they are read; nobody writes into them. Raises OSError where it cannot be
    opened, ValueError where it is empty."""
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # a tensor of read-only memory would warn
    bytes_ = torch.frombuffer(mapping, dtype=torch.uint8)
    start = bytes_.data_ptr()
    _mapped[start] = len(mapping), weakref.ref(mapping, lambda gone: _forget(start, gone))
    return bytes_


def _forget(start: int, gone: weakref.ref[mmap.mmap]) -> None:
    if start in _mapped and _mapped[start][1] is gone:  # another file may lie there by now
        del _mapped[start]


def take_pages(tensor: Tensor) -> None:
    """Map all pages of a view of a mapped file at once, which takes less time than one by one; nothing happens to any other tensor."""
    _advise(tensor, POPULATE_READ if sys.platform == "linux" else None)


def give_back_pages(tensor: Tensor) -> None:
    """Let the pages go that a view of a mapped file was read into; nothing happens to any other tensor."""
    _advise(tensor, getattr(mmap, "MADV_DONTNEED", None))  # not everywhere


def _advise(tensor: Tensor, advice: int | None) -> None:
    """For the whole pages of the view."""
    first, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
    for start, (length, found) in tuple(_mapped.items()):
        mapping = found()
        if mapping is not None and start <= first and first + size <= start + length and tensor.is_contiguous():
            begin = -(-(first - start) // mmap.PAGESIZE) * mmap.PAGESIZE
            end = (first - start + size) // mmap.PAGESIZE * mmap.PAGESIZE
            if advice is not None and begin < end:
                with contextlib.suppress(OSError):  # a kernel that does not know it
                    mapping.madvise(advice, begin, end - begin)


def free_gpu_bytes(device: str) -> int | None:
    """Memory of the GPU that this process may still take; None for the CPU."""
    if not device.startswith("cuda"):
        return None
    torch.cuda.empty_cache()  # what this process has taken and does not use, in pieces that may be too small
    return torch.cuda.mem_get_info(device)[0]


@contextlib.contextmanager
def within_gpu_memory(fix: str) -> Generator[None]:
    """Raise MemoryError, one line that ends with what to lower, where a GPU's memory is not enough for what is done meanwhile."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        wanted = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
        more = "" if wanted is None else f" ({wanted[1]} more were needed)"
        raise MemoryError(f"the GPU's memory is not enough{more}: {fix}") from error


def available_bytes(root: Path) -> int | None:
    """Free bytes by /proc/meminfo and by the limits of this process's control groups, the least; None where nothing says.

    root: where proc and sys/fs/cgroup lie, "/" but in tests.
    """
    found = []
    try:
        for line in (root / "proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8", errors="replace").splitlines()
        groups = [line.split(":", 2)[2].lstrip("/") for line in lines if line.count(":") >= 2]
    except OSError:
        groups = []
    top = root / "sys/fs/cgroup"
    for group in groups:
        for base, limit, used in (
            (top, "memory.max", "memory.current"),
            (top / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            for folder in (base / group, *(base / group).parents):
                if not folder.is_relative_to(base):
                    break
                found += _left(folder, limit, used)
    return min(found, default=None)


def _left(folder: Path, limit: str, used: str) -> list[int]:
    """What one control group has left; the page cache counts as used in it, and as free here where its own numbers say how much."""
    try:
        most = (folder / limit).read_text(encoding="ascii").strip()
        taken = int((folder / used).read_text(encoding="ascii"))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
        return [] if most == "max" else [max(0, int(most) - taken + int(stat.get("inactive_file", 0)))]
    except (OSError, ValueError):
        return []
