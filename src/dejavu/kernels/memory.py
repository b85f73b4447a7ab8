"""Memory that was freed and that the C library keeps: matrices of a few MB come from its heap, which does not shrink by itself."""

from __future__ import annotations

import ctypes
import sys


def give_back_freed() -> None:
    """Give it to the system, where that can be asked for (glibc): milliseconds, so after much was freed, not after each matrix."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
