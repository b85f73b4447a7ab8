"""Threads keep to what the process may use: its affinity and the quota of its control groups, whatever lies in their files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dejavu.kernels import processors
from dejavu.kernels.processors import cgroup_quota, default_threads, limit_torch, threads_note

V2, V1 = "0::/a/b\n", "4:memory:/a\n3:cpu,cpuacct:/a\n"


def written(root: Path, files: dict[str, bytes | str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        (V2, {"a/cpu.max": "150000 100000\n"}, 1.5),
        (V2, {"a/cpu.max": "max 100000\n"}, None),
        (V2, {"a/cpu.max": "max 100000\n", "cpu.max": "300000 100000\n"}, 3.0),
        (V2, {"a/b/cpu.max": "50000 100000\n", "a/cpu.max": "200000 100000\n"}, 0.5),
        (V2, {}, None),
        (V1, {"cpu/a/cpu.cfs_quota_us": "200000\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, 2.0),
        (V1, {"cpu,cpuacct/a/cpu.cfs_quota_us": "250000\n", "cpu,cpuacct/a/cpu.cfs_period_us": "100000\n"}, 2.5),
        (V1, {"cpu/a/cpu.cfs_quota_us": "-1\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, None),
    ],
)  # fmt: skip
def test_the_quota_of_control_groups_of_both_versions(
    tmp_path: Path, membership: str, files: dict[str, bytes | str], expected: float | None
) -> None:
    root = written(tmp_path / "root", files)
    assert cgroup_quota(written(tmp_path, {"cgroup": membership}) / "cgroup", root) == expected
    assert cgroup_quota(tmp_path / "nothing", root) is None


@pytest.mark.parametrize("text", ["", "max", "100000 0\n", "many 100000\n", "1 2 3\n", b"\xff\xfe\n"])
def test_odd_files_of_control_groups_are_no_limit_and_no_error(tmp_path: Path, text: str | bytes) -> None:
    root = written(tmp_path / "root", {"a/cpu.max": text, "cpu/a/cpu.cfs_quota_us": "1", "cpu/a/cpu.cfs_period_us": text})
    for membership in (V2, V1, "", "no colons\n", "0:", b"\xff:\xff:\xff\n"):
        assert cgroup_quota(written(tmp_path, {"cgroup": membership}) / "cgroup", root) is None


@pytest.mark.parametrize(("quota", "threads"), [(7.65, 7), (1.5, 1), (0.2, 1), (8.0, 8), (64.0, 8), (None, 8)])
def test_a_part_of_a_processor_is_no_thread(monkeypatch: pytest.MonkeyPatch, quota: float | None, threads: int) -> None:
    monkeypatch.setattr(processors, "affinity", lambda: 8)
    monkeypatch.setattr(processors, "cgroup_quota", lambda membership, root: quota)
    assert default_threads() == threads


def test_torch_has_no_more_threads_than_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processors, "default_threads", lambda: 2)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        limit_torch()
        assert torch.get_num_threads() == 2
        torch.set_num_threads(1)
        limit_torch()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_more_threads_than_processors_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processors, "default_threads", lambda: 1)
    assert threads_note(1) is None and threads_note(None) is None
    assert threads_note(2) == "2 threads share the 1 processor that this process may use, and wait for each other; take 1 or fewer"
