"""Memory that is freed: kept for what comes next during offline work, given to the system after it."""

from __future__ import annotations

import ctypes
import mmap
import resource
import sys
from pathlib import Path

import pytest

from dejavu.kernels.memory import keeping_freed

LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
pytestmark = pytest.mark.skipif(not hasattr(LIBC, "mallopt"), reason="glibc alone can be asked to keep what is freed")
BYTES = 128 << 20  # above what glibc takes from its heap


def faults() -> int:
    """Pages that are mapped for a block that is written and freed."""
    assert LIBC is not None
    LIBC.malloc.restype, LIBC.malloc.argtypes, LIBC.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = LIBC.malloc(BYTES)
    ctypes.memset(block, 1, BYTES)
    LIBC.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_blocks_are_taken_again_meanwhile_and_given_back_after_it() -> None:
    pages = BYTES // mmap.PAGESIZE
    assert faults() > pages // 2, "a block of its own each time"
    before = resident()
    with keeping_freed():
        faults()
        assert faults() < pages // 10 and resident() > before + BYTES // 2
    assert resident() < before + BYTES // 2 and faults() > pages // 2


def test_an_error_ends_it() -> None:
    with pytest.raises(KeyError), keeping_freed():
        raise KeyError
    assert faults() > BYTES // mmap.PAGESIZE // 2


def test_an_allocator_that_somebody_has_set_up_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "65536")
    with keeping_freed():
        faults()
        assert faults() > BYTES // mmap.PAGESIZE // 2, "a block of its own each time"
