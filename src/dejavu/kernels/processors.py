"""How many processors this process may use, and threads that keep to it. In: its affinity, the files of its control groups. Out: counts.

A quota is time: 1.5 processors are 150 ms in each 100 ms. Threads beyond it are all stopped together once it is used up, so it is
rounded down. A file that is not as the kernel writes it counts as no limit.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch


def affinity() -> int:
    """Processors that this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # no such call on this system
        return os.cpu_count() or 1


def default_threads() -> int:
    """Processors that this process may use: its affinity, and the quota of its control groups, rounded down; at least 1."""
    quota = cgroup_quota(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return affinity() if quota is None else max(1, min(affinity(), int(quota)))


def limit_torch() -> None:
    """Lower torch's threads, of which it makes one for each core, to those that this process may use. Fewer stay as they are."""
    allowed = default_threads()
    if torch.get_num_threads() > allowed:
        torch.set_num_threads(allowed)


def threads_note(threads: int | None) -> str | None:
    """A sentence where these are more threads than the process has processors."""
    allowed = default_threads()
    if threads is None or threads <= allowed:
        return None
    processors = "1 processor" if allowed == 1 else f"{allowed} processors"
    return f"{threads} threads share the {processors} that this process may use, and wait for each other; take {allowed} or fewer"


def cgroup_quota(membership: Path, root: Path) -> float | None:
    """Processors that the control groups of this process grant it (the least of all levels); None without a limit."""
    try:
        lines = membership.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    quotas: list[float] = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        # Version 2 has one tree, version 1 one for each set of controllers, by their names or a link named "cpu".
        for top in (root / controllers, root / "cpu") if controllers else (root, root / "unified"):
            group = top / path.lstrip("/")
            for folder in (group, *group.parents):
                if not folder.is_relative_to(top):
                    break
                quotas += _quota_of(folder)
    return min(quotas, default=None)


def _quota_of(folder: Path) -> list[float]:
    """The quota of one control group, version 2 (cpu.max) or 1 (cpu.cfs_quota_us)."""
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text(encoding="ascii").strip() for name in ("quota", "period"))
        return [int(quota) / int(period)] if quota != "max" and int(quota) > 0 and int(period) > 0 else []
    except (OSError, ValueError):
        return []
