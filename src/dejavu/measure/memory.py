"""Memory that this process may still take."""

from __future__ import annotations

from pathlib import Path


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
