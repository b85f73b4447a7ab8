"""Finding the native library, and how many threads it is given: control groups, and a machine without the library."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from conftest import Tiny
from dejavu.cli.main import run as cli
from dejavu.engine.backends import make_engine
from dejavu.engine.native.weights import MatrixView, NativeModel
from dejavu.kernels import native
from dejavu.kernels.quantize import GROUP
from helpers.native import needs_library


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"a/cpu.max": "150000 100000"}, 1.5),
        ({"a/cpu.max": "max 100000"}, None),
        ({"a/cpu.max": "max 100000", "cpu.max": "300000 100000"}, 3.0),
        ({"a/b/cpu.max": "50000 100000", "a/cpu.max": "200000 100000"}, 0.5),
        ({}, None),
    ],
)
def test_the_quota_of_control_groups(tmp_path: Path, files: dict[str, str], expected: float | None) -> None:
    for name, text in files.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(text + "\n", encoding="ascii")
    (tmp_path / "cgroup").write_text("0::/a/b\n", encoding="ascii")
    assert native.cgroup_quota(tmp_path / "cgroup", tmp_path / "root") == expected
    assert native.cgroup_quota(tmp_path / "nothing", tmp_path / "root") is None


def test_the_older_control_groups(tmp_path: Path) -> None:
    folder = tmp_path / "root" / "cpu" / "a"
    folder.mkdir(parents=True)
    (folder / "cpu.cfs_quota_us").write_text("200000\n", encoding="ascii")
    (folder / "cpu.cfs_period_us").write_text("100000\n", encoding="ascii")
    (tmp_path / "cgroup").write_text("4:memory:/a\n3:cpu,cpuacct:/a\n", encoding="ascii")
    assert native.cgroup_quota(tmp_path / "cgroup", tmp_path / "root") == 2.0


def test_default_threads_is_at_least_one() -> None:
    assert native.default_threads() >= 1


def test_an_absent_library_is_said_and_nothing_else_breaks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: Tiny) -> None:
    monkeypatch.setattr(native, "library_folders", lambda: [tmp_path])
    native._load.cache_clear()
    try:
        assert "was not built" in (native.missing_reason() or "")
        assert make_engine(tiny("opt")).info.backend == "torch"
        with pytest.raises(ValueError, match="'native' is not available: its library was not built"):
            make_engine(tiny("opt"), backend="native")
        (tmp_path / native.FILE_NAME).write_text("no library", encoding="ascii")
        native._load.cache_clear()
        assert "cannot be loaded" in (native.missing_reason() or "")
    finally:
        native._load.cache_clear()


def test_without_a_compiler_nothing_is_built_and_the_installation_succeeds(tmp_path: Path) -> None:
    root, tools, build = Path(__file__).parent.parent, tmp_path / "bin", tmp_path / "build"
    cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
    if cmake is None or ninja is None:
        pytest.skip("takes cmake and ninja")
    tools.mkdir()
    (tools / "ninja").symlink_to(ninja)
    environment = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX")} | {"PATH": str(tools)}

    def run(*arguments: str | Path) -> str:
        return subprocess.run([str(cmake), *arguments], env=environment, check=True, capture_output=True, text=True).stderr

    said = run("-S", root, "-B", build, "-G", "Ninja", f"-DCMAKE_INSTALL_PREFIX={tmp_path / 'installed'}")
    assert "no C++ compiler found: dejavu is installed without its native engine" in said
    run("--build", build)
    run("--install", build)
    assert not list(tmp_path.rglob("*.so")) and not list(tmp_path.rglob("*.o"))


def test_info_shows_the_whole_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(native, "library_folders", lambda: [tmp_path])
    native._load.cache_clear()
    try:
        assert cli(["info"]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert "native not available its library was not built" in shown and "make native`" in shown
    finally:
        native._load.cache_clear()


@needs_library
@pytest.mark.parametrize("value", [-9, 8])
def test_an_int4_matrix_holds_nibbles_and_finite_scales(tiny: Tiny, value: int) -> None:
    model = NativeModel(tiny("opt"), "int4")
    shape = tiny("opt").embed.weight.shape
    q, scale = torch.zeros(shape, dtype=torch.int8), torch.ones(shape[0], -(-shape[1] // GROUP), dtype=torch.float16)

    def put() -> None:
        view = MatrixView(q, dtype="int4", scale=scale)
        native.check(native.library().dejavu_model_set(model.handle, native.EMBED, -1, view.matrix))

    q[-1, -1] = -8 if value < 0 else 7
    put()
    q[-1, -1] = value
    with pytest.raises(ValueError, match=r"the embedding has an int4 value outside -8 \.\. 7"):
        put()
    q[-1, -1], scale[-1, -1] = 0, torch.inf
    with pytest.raises(ValueError, match="the embedding has values that are not finite"):
        put()
