"""Memory that this process may still take, and a buffer whose reading says how fast memory is."""

from __future__ import annotations

import mmap
from contextlib import suppress
from pathlib import Path

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


def free_gpu_bytes(device: str) -> int | None:
    """Memory of the GPU that this process may still take; None for the CPU."""
    if not device.startswith("cuda"):
        return None
    torch.cuda.empty_cache()  # what this process has taken and does not use, in pieces that may be too small
    return torch.cuda.mem_get_info(device)[0]


def available_bytes(root: Path) -> int | None:
    """Free bytes by /proc/meminfo and by the limits of this process's control groups, the least; None where nothing says.

    root: where proc and sys/fs/cgroup lie, "/" but in tests.
    """
    found = []
    try:
        for line in (root / "proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
        groups = [line.split(":", 2)[2].lstrip("/") for line in (root / "proc/self/cgroup").read_text(encoding="ascii").splitlines()]
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
    except (OSError, ValueError):
        return []
    if most == "max":
        return []
    return [max(0, int(most) - taken + int(stat.get("inactive_file", 0)))]
