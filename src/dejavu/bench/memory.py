"""A buffer whose reading says how fast memory is. In: the bytes that a token reads, a device. Out: its size, and the buffer."""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch
from torch import Tensor

MAX_BUFFER = 1 << 30  # on the CPU: no cache holds that
# On a GPU one read must take long compared with its launch and the wait for it, and a graph or two may yet ask for memory.
MIN_GPU_BUFFER, MAX_GPU_BUFFER, GPU_SHARE = 1 << 30, 4 << 30, 0.5


def sequential_buffer(count: int, device: str) -> Tensor:
    """`count` fp32 ones; on the CPU in huge pages where the system has them, as the native engine's weights are."""
    if device != "cpu":
        return torch.ones(count, device=device)
    memory = mmap.mmap(-1, 4 * count)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages: the engine's weights have none either
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32).fill_(1.0)


def buffer_bytes(weights: float, device: str, free: int | None) -> tuple[int, str | None]:
    """Size of the buffer of the read ceiling, for a dense token that reads so many bytes of weights; a note where it is not as meant.

    As large as these weights, at most MAX_BUFFER; on a GPU between MIN_ and MAX_GPU_BUFFER, of what is free at most GPU_SHARE.
    """
    if device == "cpu":
        return max(4, round(min(weights, MAX_BUFFER))), None
    meant = round(min(max(weights, MIN_GPU_BUFFER), MAX_GPU_BUFFER))
    most = meant if free is None else int(free * GPU_SHARE)
    if meant <= most:
        return meant, None
    size = max(4, most)
    return (
        size,
        f"the read ceiling is over {size / 1e9:.2f} GB instead of {meant / 1e9:.2f}: {(free or 0) / 1e9:.2f} GB are free on {device}",
    )
