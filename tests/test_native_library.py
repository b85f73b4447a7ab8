"""Finding the native library, and how many threads it is given: control groups, and a machine without the library."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from conftest import Tiny
from dejavu.cli.main import run as cli
from dejavu.engine.backends import make_engine
from dejavu.engine.native.weights import MatrixView, NativeModel
from dejavu.engine.options import EngineOptions
from dejavu.kernels import native
from dejavu.kernels.quantized import QuantizedMatrix
from helpers.native import needs_library


def test_an_absent_library_is_said_and_nothing_else_breaks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: Tiny) -> None:
    monkeypatch.setattr(native, "library_folders", lambda: [tmp_path])
    native._load.cache_clear()
    try:
        assert "was not built" in (native.missing_reason() or "")
        assert make_engine(tiny("opt")).info.backend == "torch"
        with pytest.raises(ValueError, match="'native' is not available: its library was not built"):
            make_engine(tiny("opt"), None, EngineOptions(backend="native"))
        (tmp_path / native.FILE_NAME).write_text("no library", encoding="ascii")
        native._load.cache_clear()
        assert "cannot be loaded" in (native.missing_reason() or "")
    finally:
        native._load.cache_clear()


@pytest.fixture
def loading_again() -> Iterator[None]:
    native._load.cache_clear()
    yield
    native._load.cache_clear()


_OTHER_KINDS = {ctypes.c_float: ctypes.c_int32, ctypes.c_int32: ctypes.c_float, ctypes.c_void_p: ctypes.c_int64}
_CHANGES = {
    "one more, in the padding where there is some": lambda fields: [*fields, ("later", ctypes.c_int32)],
    "one fewer": lambda fields: fields[:-1],
    "swapped": lambda fields: [fields[1], fields[0], *fields[2:]],
    "wider": lambda fields: [*fields[:-1], (fields[-1][0], ctypes.c_double * len(native.OPS))],
    "of another kind": lambda fields: [*fields[:-1], (fields[-1][0], _OTHER_KINDS[fields[-1][1]])],
}


@needs_library
@pytest.mark.parametrize("structure", native.STRUCTURES)
@pytest.mark.parametrize("change", _CHANGES)
def test_a_structure_of_another_layout_is_refused(
    monkeypatch: pytest.MonkeyPatch, loading_again: None, structure: type[ctypes.Structure], change: str
) -> None:
    fields = _CHANGES[change](list(structure._fields_))
    changed = type(structure.__name__, (ctypes.Structure,), {"_fields_": fields})
    monkeypatch.setattr(native, "STRUCTURES", tuple(changed if each is structure else each for each in native.STRUCTURES))
    reason = native.missing_reason() or ""
    assert reason == (
        f"its library dejavu_native.so is of another version of dejavu (another layout of {native.c_name(structure)}): build it again"
    )
    with pytest.raises(ValueError, match=re.escape(f"the native engine is missing: {reason}")):
        native.library()


@needs_library
def test_a_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch, loading_again: None) -> None:
    monkeypatch.setattr(native, "ABI_VERSION", native.ABI_VERSION + 1)
    said = f"another version of dejavu (interface {native.ABI_VERSION - 1}, not {native.ABI_VERSION}): build it again"
    assert said in (native.missing_reason() or "")


def test_structures_have_the_fields_of_the_header() -> None:
    """Also those that would hide in the padding of a structure's end, and without a library."""
    header = (Path(__file__).parent.parent / "native" / "dejavu_native.h").read_text(encoding="utf-8")
    declared = {
        name: [
            re.findall(r"\w+", field)[-1] for field in re.sub(r"/\*.*?\*/|\[.*?\]", "", body).replace(";", ",").split(",") if field.strip()
        ]
        for body, name in re.findall(r"typedef struct \{(.*?)\} (\w+);", header, flags=re.DOTALL)
    }
    assert declared == {native.c_name(each): [field[0] for field in each._fields_] for each in native.STRUCTURES}


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
def test_an_int4_matrix_has_finite_scales(tiny: Tiny) -> None:
    model = NativeModel(tiny("opt"), "int4")
    held = QuantizedMatrix.of(tiny("opt").embed.weight, "int4")
    assert held.scales is not None

    def put() -> None:
        native.check(native.library().dejavu_model_set(model.handle, native.EMBED, -1, MatrixView(held).matrix))

    put()
    held.scales[-1, -1] = torch.inf
    with pytest.raises(ValueError, match="the embedding has values that are not finite"):
        put()
