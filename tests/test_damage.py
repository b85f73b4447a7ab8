"""damage.py: what a file is instead of what its name says is told apart, with its size, cause and fix."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dejavu.damage import LFS, content_of, foreign_reader
from dejavu.files import read_json, read_object, read_safetensors, read_text
from dejavu.model.gguf.header import Header
from dejavu.model.mapped import mapped_safetensors
from dejavu.model.tokenizer import load_tokenizer

POINTER = LFS + b"v1\noid sha256:0123\nsize 269060552\n"
READERS: dict[str, Callable[[Path], object]] = {"a.json": read_json, "a.safetensors": read_safetensors, "b.safetensors": mapped_safetensors}
READERS |= {"a.gguf": Header, "tokenizer.json": lambda path: load_tokenizer(path.parent)}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", r"is empty \(0 bytes\): the download or copy did not get through"),
        (POINTER, r"pointer of git-lfs \(\d+ bytes, for a file of 269060552 bytes\), not the file; run `git lfs pull`"),
        (b"<!DOCTYPE html><html>not found</html>", r"is a web page \(37 bytes\)"),
    ],
)
def test_what_a_file_is_instead_is_told(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=says) as caught:
        READERS[name](path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_a_pointer_is_no_text_either(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(POINTER)
    with pytest.raises(ValueError, match="git lfs pull"):
        read_text(tmp_path / "a.txt")


def test_a_file_that_was_cut_says_how_much_of_it_is_there(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.arange(50.0), "b": torch.ones(3)}, path)
    whole = path.read_bytes()
    for cut in (whole[:-1], whole[:-200], whole[:30]):
        path.write_bytes(cut)
        with pytest.raises(ValueError, match=rf"is truncated: it has {len(cut)} bytes of \d+; .* download it again"):
            read_safetensors(path)
    path.write_bytes(whole + b"more")
    with pytest.raises(ValueError, match=rf"has {len(whole) + 4} bytes, and its header tells of {len(whole)}"):
        read_safetensors(path)
    path.write_bytes(whole[:8] + b"[" + whole[9:])
    with pytest.raises(ValueError, match=r"is damaged: it is no safetensors file"):
        read_safetensors(path)


@pytest.mark.parametrize("content", ["[1]", '"{}"', "null", "[" * 10_000, '{"a": ' * 10_000])
def test_json_of_another_shape_names_the_file(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} (holds no JSON object|is not valid JSON)"):
        read_object(path)


def test_what_a_library_raises_is_the_files_fault_and_what_ends_the_process_is_not(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"x")
    panic = type("PanicException", (BaseException,), {})
    for error in (RuntimeError("odd\nlines"), panic("odd lines"), ZeroDivisionError("odd lines")):
        with pytest.raises(ValueError, match=r"a\.bin is damaged: odd lines; mend it"), foreign_reader(path, "mend it"):
            raise error
    for ending in (KeyboardInterrupt, SystemExit):
        with pytest.raises(ending), foreign_reader(path):
            raise ending
    with pytest.raises(ValueError, match="there is no 'step'"), content_of(path):
        raise KeyError("step")
    with pytest.raises(AssertionError), content_of(path):
        raise AssertionError("a mistake of ours stays one")
