"""Memory that this process need not keep: what the C library holds of freed blocks, and pages of mapped files that were read.

In: a path, or a tensor. Out: the file's bytes as a tensor whose pages come from the disk when they are touched; or memory that goes back
to the system. What is given back of a mapped file is read again the next time that it is touched.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import weakref
from pathlib import Path

import torch
from torch import Tensor

_mapped: dict[int, tuple[int, weakref.ref[mmap.mmap]]] = {}  # by its first address: how many bytes, and the mapping


def give_back_freed() -> None:
    """Give it to the system, where that can be asked for (glibc): milliseconds, so after much was freed, not after each matrix."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


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


def give_back_pages(tensor: Tensor) -> None:
    """Let the pages go that a view of a mapped file was read into; nothing happens to any other tensor."""
    first, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
    for start, (length, found) in tuple(_mapped.items()):
        mapping = found()
        if mapping is not None and start <= first and first + size <= start + length and tensor.is_contiguous():
            advice = getattr(mmap, "MADV_DONTNEED", None)  # not everywhere
            begin = -(-(first - start) // mmap.PAGESIZE) * mmap.PAGESIZE
            end = (first - start + size) // mmap.PAGESIZE * mmap.PAGESIZE
            if advice is not None and begin < end:
                mapping.madvise(advice, begin, end - begin)
