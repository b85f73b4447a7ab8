"""Memory that this process may still take, and a buffer whose reading says how fast memory is."""

from __future__ import annotations

import mmap
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor


def sequential_buffer(count: int, device: str) -> Tensor:
    """`count` fp32 ones; on the CPU in huge pages where the system has them, as the native engine's weights are."""
    if device != "cpu":
        return torch.ones(count, device=device)
    memory = mmap.mmap(-1, 4 * count)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages: the engine's weights have none either
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32).fill_(1.0)


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
