"""locks.py and what files.py makes of it: a second run in a folder is refused by the first one's name; what a killed one left goes."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dejavu.files import MARKER, make_folder, mark, new_folder, working_in

if sys.platform == "win32":
    pytest.skip("folders are not kept on Windows", allow_module_level=True)
import fcntl

LEFT = f".out.{'0' * 32}"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def another_process(folder: Path) -> Generator[None]:
    """The folder as another process keeps it: locks of two descriptors exclude one another, whoever has them."""
    with (folder / MARKER).open("r+") as file:
        file.write("dejavu 1.0\nin use by process 4321 of there since noon\n")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def test_a_second_run_in_a_folder_is_refused_and_names_the_first(tmp_path: Path) -> None:
    make_folder(tmp_path / "run")
    refused = pytest.raises(ValueError, match=r"run is in use by process 4321 of there since noon; wait")
    with another_process(tmp_path / "run"), refused, working_in(tmp_path / "run"):
        raise AssertionError("it must not come in")
    with working_in(tmp_path / "run"):
        (tmp_path / "run" / "kept").touch()
        assert f"in use by process {os.getpid()} of" in (tmp_path / "run" / MARKER).read_text()
        with working_in(tmp_path / "run"):
            pass
    assert "in use" not in (tmp_path / "run" / MARKER).read_text() and names(tmp_path / "run") == [MARKER, "kept"]


def test_where_files_cannot_be_locked_that_is_said_and_nothing_of_another_run_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError(95, "not supported")))
    at_work = tmp_path / f"{LEFT}.partial"
    at_work.mkdir()
    mark(at_work)
    with new_folder(tmp_path / "out") as folder:
        (folder / "whole").touch()
    assert names(tmp_path / "out") == [MARKER, "whole"] and names(at_work) == [MARKER]
    assert caplog.messages == []
    with working_in(tmp_path / "out"):
        assert (tmp_path / "out" / MARKER).read_text().count("\n") == 1
    (said,) = caplog.messages
    assert said.endswith("out: files cannot be locked here, so start no second command that writes into it before this one ends")


def test_a_folder_in_which_nothing_was_done_goes_again(tmp_path: Path) -> None:
    with working_in(tmp_path / "run"):
        pass
    with pytest.raises(KeyboardInterrupt), working_in(tmp_path / "run"):
        raise KeyboardInterrupt
    with working_in(tmp_path / "run"):
        pass
    assert names(tmp_path) == []
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").touch()
    with working_in(tmp_path / "mine"):
        pass
    assert names(tmp_path / "mine") == ["x"], "a folder of somebody else's gets no mark"


def test_two_writers_of_one_folder_are_told_apart_from_what_a_killed_one_left(tmp_path: Path) -> None:
    partial = tmp_path / f"{LEFT}.partial"
    partial.mkdir()
    mark(partial)
    with another_process(partial), pytest.raises(ValueError, match=r"out is in use by process 4321"), new_folder(tmp_path / "out"):
        raise AssertionError("it must not come in")
    with new_folder(tmp_path / "out") as new:
        (new / "a").touch()
    assert names(tmp_path) == ["out"], "nobody had the lock any more"


def test_a_folder_lost_while_it_was_replaced_comes_back(tmp_path: Path) -> None:
    (tmp_path / f"{LEFT}.old").mkdir()
    (tmp_path / f"{LEFT}.old" / "a").touch()
    mark(tmp_path / f"{LEFT}.old")
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out"):
        raise RuntimeError
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == [MARKER, "a"]


def test_others_hidden_folders_stay(tmp_path: Path) -> None:
    for name in (f".other.{'0' * 32}.partial", ".out.partial", ".out.x.old"):
        (tmp_path / name).mkdir()
    with new_folder(tmp_path / "out"):
        pass
    assert len(names(tmp_path)) == 4


def test_files_that_a_killed_run_left_half_written_go(tmp_path: Path) -> None:
    make_folder(tmp_path / "run")
    (tmp_path / "run" / f".state.safetensors.{'0' * 32}.partial").touch()
    (tmp_path / "run" / "state.safetensors").touch()
    with working_in(tmp_path / "run"):
        pass
    assert names(tmp_path / "run") == [MARKER, "state.safetensors"]
