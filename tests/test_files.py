"""files.py: every way a path, a text, a name or a folder can be wrong, and what is left on disk after a failure."""

from __future__ import annotations

import hashlib
import lzma
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from dejavu.files import (
    MARKER,
    UNPACKED_LEAST,
    expand_paths,
    new_folder,
    read_json,
    read_safetensors,
    read_text,
    safe_member,
    text_hash,
    write_json,
    write_safetensors,
    write_text,
)
from helpers.disks import room_for

TEXT = "Línea one\r\nline two\n"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a", "a [1].txt"])
def test_read_text_keeps_the_text_as_stored(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(TEXT.encode())
    assert read_text(tmp_path / name) == TEXT


def test_read_text_unpacks_xz_and_drops_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(b"\xef\xbb\xbf" + TEXT.encode()))
    assert read_text(str(tmp_path / "a.txt.xz")) == TEXT


def test_read_text_takes_a_path_relative_to_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("home")
    assert read_text("~/a.txt") == "home"
    assert expand_paths(["~/*.txt"]) == [tmp_path / "a.txt"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n\t\n", "holds no text"),
        ("a.txt", b"caf\xe9", r"not UTF-8 \(byte 3\)"),
        ("a.txt", b"a\0b", "binary"),
        ("a.xz", b"plain", r"not a whole \.xz"),
        ("a.xz", lzma.compress(b"some text" * 99)[:-20], r"not a whole \.xz"),
        ("a.xz", b"", "not a whole|holds no text"),
        ("a.xz", lzma.compress(b""), "holds no text"),
        ("a.xz", lzma.compress(b"caf\xe9"), "not UTF-8"),
    ],
)
def test_read_text_refuses_what_is_no_text(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=says) as caught:
        read_text(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_errors_name_the_absolute_path_and_a_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for read in (read_text, read_json, read_safetensors):
        with pytest.raises(ValueError, match=r"does not exist.*; give") as caught:
            read("missing")
        assert str(tmp_path / "missing") in str(caught.value)
        with pytest.raises(ValueError, match=r"folder|no file"):
            read("folder")
    with pytest.raises(ValueError, match="Not a directory"):
        (tmp_path / "file").write_text("x")
        read_text("file/below")


def test_expand_paths_sorts_and_drops_duplicates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    for name in ("b.txt", "a.txt", "c.md", "x[1].txt", "sub/d.txt", "sub/deep/e.txt"):
        (tmp_path / name).write_text("x")
    assert expand_paths(["*.txt", "a.txt", "sub/../b.txt", str(tmp_path / "a.txt")]) == [Path("a.txt"), Path("b.txt"), Path("x[1].txt")]
    assert expand_paths(["x[1].txt"]) == [Path("x[1].txt")]
    assert expand_paths(["sub/**/*.txt"]) == [Path("sub/d.txt"), Path("sub/deep/e.txt")]
    assert expand_paths(["c.m?", "[ab].txt"]) == [Path("a.txt"), Path("b.txt"), Path("c.md")]
    assert expand_paths([]) == []


@pytest.mark.parametrize("pattern", ["missing.txt", "*.jsonl", "no/such/*.txt", "s*", ""])
def test_expand_paths_refuses_what_names_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "sub").mkdir()
    with pytest.raises(ValueError, match="names no file") as caught:
        expand_paths(["a.txt", pattern])
    assert str(tmp_path / pattern) in str(caught.value)


def test_text_hash_is_sha256_of_utf8() -> None:
    assert text_hash("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert text_hash("é") == hashlib.sha256(b"\xc3\xa9").hexdigest()


def test_json_round_trip_leaves_no_other_file(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None, True], "a": "é"}
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    write_json(path, value)
    assert read_json(path) == value
    assert "é" in path.read_text(encoding="utf-8")
    assert names(tmp_path) == ["a.json"]


def test_write_json_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, 1)
    for wrong in (float("nan"), object()):
        with pytest.raises((ValueError, TypeError)):
            write_json(path, wrong)
    assert read_json(path) == 1 and names(tmp_path) == ["a.json"]
    with pytest.raises(ValueError, match="cannot be written"):
        write_json(tmp_path / "missing" / "a.json", 1)


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1,}', b"\xff\xfe{}"])
def test_read_json_names_the_broken_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"not valid JSON|not UTF-8|is empty \(0 bytes\)") as caught:
        read_json(path)
    assert str(path) in str(caught.value)


def test_new_folder_appears_only_when_complete(tmp_path: Path) -> None:
    path = tmp_path / "parent" / "out"
    with new_folder(path) as partial:
        (partial / "a").write_text("1")
        assert partial.parent == path.parent and not path.exists()
    assert names(path) == [MARKER, "a"]
    assert names(tmp_path / "parent") == ["out"]
    assert path.stat().st_mode == (tmp_path / "parent").stat().st_mode


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
def test_new_folder_gives_every_file_the_mode_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with new_folder(tmp_path / "out") as partial:
            (partial / "inner").mkdir()
            for path in (partial / "a.safetensors", partial / "inner" / "b.safetensors"):
                path.touch(mode=0o600)  # as safetensors does
            (partial / "c.json").write_text("{}")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*")}
    assert modes == {MARKER: 0o640, "a.safetensors": 0o640, "b.safetensors": 0o640, "c.json": 0o640, "inner": 0o750}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_new_folder_that_fails_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "out"
    for before in ([], ["out"]):
        with pytest.raises(error), new_folder(path) as partial:
            (partial / "half").write_text("1")
            raise error
        assert names(tmp_path) == before
        with new_folder(path) as partial:
            (partial / "good").write_text("1")
    assert names(path) == [MARKER, "good"]


def test_new_folder_replaces_its_own_and_empty_folders(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.mkdir()
    for name in ("first", "second"):
        with new_folder(path) as partial:
            (partial / name).write_text("1")
    assert names(path) == [MARKER, "second"]
    assert names(tmp_path) == ["out"]


def test_new_folder_never_replaces_what_it_did_not_write(tmp_path: Path) -> None:
    foreign, file = tmp_path / "foreign", tmp_path / "file"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("only copy")
    file.write_text("x")
    for path, says in ((foreign, "did not write"), (file, "is a file"), (file / "out", "cannot be created")):
        ran = False
        with pytest.raises(ValueError, match=says) as caught, new_folder(path):
            ran = True
        assert str(path) in str(caught.value) and not ran
    with pytest.raises(ValueError, match="did not write"), new_folder(tmp_path / "out"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "filled meanwhile").write_text("x")
    assert names(tmp_path) == ["file", "foreign", "out"]
    assert names(foreign) == ["thesis.txt"] and names(tmp_path / "out") == ["filled meanwhile"]


def test_new_folder_restores_the_old_one_if_it_cannot_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out"
    with new_folder(path) as partial:
        (partial / "old").write_text("1")
    rename = Path.rename

    def full_disk(self: Path, target: Path) -> Path:
        if self.suffix == ".partial":
            raise OSError("disk full")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full_disk)
    with pytest.raises(OSError, match="disk full"), new_folder(path) as partial:
        (partial / "new").write_text("1")
    assert names(path) == [MARKER, "old"] and names(tmp_path) == ["out"]


def test_new_folder_through_a_symlink_keeps_the_symlink(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with new_folder(tmp_path / "link") as partial:
        (partial / "a").write_text("1")
    assert (tmp_path / "link").is_symlink() and names(tmp_path / "real") == [MARKER, "a"]
    assert names(tmp_path) == ["link", "real"]


@pytest.mark.parametrize("name", ["model.safetensors", "sub/model-1.safetensors", "./a", "a..b", "..a/b", "ab:c", "not there yet"])
def test_safe_member_takes_plain_relative_names(tmp_path: Path, name: str) -> None:
    assert safe_member(tmp_path, name) == tmp_path / name


@pytest.mark.parametrize(
    "name",
    [
        *("../x.safetensors", "/tmp/x.safetensors", "a/../../x", "a/../x", "..", "//host/x"),
        *("C:\\x", "C:x", "c:/x", "a:b", "a\\x", "..\\x", "\\\\host\\x"),
        *("", ".", "./", "a\0b"),
    ],
)
def test_safe_member_refuses_other_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="plain relative path") as caught:
        safe_member(tmp_path, name)
    assert repr(name) in str(caught.value)


def test_safe_member_follows_symlinks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, outside = tmp_path / "model", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (outside / "x").write_text("secret")
    (tmp_path / "model-other").mkdir()
    (folder / "inwards").symlink_to("real")
    (folder / "outwards").symlink_to(outside / "x")
    (folder / "folder").symlink_to(outside)
    (folder / "sibling").symlink_to("../model-other")
    (folder / "loop").symlink_to("loop")
    assert safe_member(folder, "inwards") == folder / "inwards"
    for name in ("outwards", "folder/x", "sibling", "loop/x"):
        with pytest.raises(ValueError, match=r"leads out of|symlink without an end") as caught:
            safe_member(folder, name)
        assert repr(name) in str(caught.value)
    (tmp_path / "alias").symlink_to(folder)
    assert safe_member(tmp_path / "alias", "a") == tmp_path / "alias" / "a"
    monkeypatch.chdir(tmp_path)
    assert safe_member(Path("model"), "a") == Path("model/a")


def test_safe_member_in_the_hugging_face_cache(tmp_path: Path) -> None:
    repo, other = tmp_path / "models--org--name", tmp_path / "models--org--other"
    snapshot = repo / "snapshots" / "abc"
    (snapshot / "adapter").mkdir(parents=True)
    for place in (repo, other):
        (place / "blobs").mkdir(parents=True)
        (place / "blobs" / "0123").write_text("x")
    (snapshot / "good").symlink_to("../../blobs/0123")
    (snapshot / "adapter" / "good").symlink_to("../../../blobs/0123")
    (snapshot / "other").symlink_to(other / "blobs" / "0123")
    (snapshot / "refs").symlink_to("../../refs")
    assert safe_member(snapshot, "good") == snapshot / "good"
    assert safe_member(snapshot, "adapter/good") == snapshot / "adapter" / "good"
    assert safe_member(snapshot / "adapter", "good") == snapshot / "adapter" / "good"
    for name in ("other", "refs"):
        with pytest.raises(ValueError, match="leads out of"):
            safe_member(snapshot, name)
    plain = tmp_path / "plain" / "snapshots" / "abc"
    (tmp_path / "plain" / "blobs").mkdir(parents=True)
    plain.mkdir(parents=True)
    (plain / "a").symlink_to("../../blobs/0123")
    with pytest.raises(ValueError, match="leads out of"):
        safe_member(plain, "a")


def test_read_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, -2], dtype=torch.int8), "c": torch.ones(3, dtype=torch.bfloat16)}
    safetensors.torch.save_file(tensors, path)
    read = read_safetensors(path)
    assert set(read) == set(tensors)
    assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in tensors)
    whole = path.read_bytes()
    for broken in (whole[:-1], whole[:20], whole[:4], b"", b"x" * 100, whole[:8] + b"!" * (len(whole) - 8)):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"is (truncated|empty|damaged).*again") as caught:
            read_safetensors(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("before", [b"", lzma.compress(b"a" * 99)])
def test_a_text_that_unpacks_to_far_more_than_text_does_is_refused(tmp_path: Path, before: bytes) -> None:
    (tmp_path / "bomb.xz").write_bytes(before + lzma.compress(bytes(UNPACKED_LEAST + 1)))
    with pytest.raises(ValueError, match=r"bomb\.xz has [\d,]+ bytes and unpacks to more than 67,108,864"):
        read_text(tmp_path / "bomb.xz")


def test_an_xz_file_of_several_streams_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "a.xz").write_bytes(lzma.compress(b"one ") + lzma.compress(b"two") + b"\0" * 4)
    assert read_text(tmp_path / "a.xz") == "one two"


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_safetensors(path, {"a": torch.zeros(10_000)}),
        lambda path: write_json(path, "a" * 40_000),
        lambda path: write_text(path, "a" * 40_000),
    ],
)
def test_a_full_disk_names_path_and_bytes_and_leaves_what_was_there(tmp_path: Path, write: Callable[[Path], None]) -> None:
    path = tmp_path / "a"
    path.write_text("before")
    says = r"/a cannot be written \(.*too large.*\): it takes 40,0\d\d bytes, and [\d,]+ are free"
    with room_for(1000), pytest.raises(ValueError, match=says):
        write(path)
    assert names(tmp_path) == ["a"] and path.read_text() == "before"


def test_a_folder_on_a_full_disk_is_not_begun(tmp_path: Path) -> None:
    refused = pytest.raises(ValueError, match=r"/out cannot be written \(File too large\); make room")
    with room_for(1000), refused, new_folder(tmp_path / "out") as folder:
        (folder / "a").write_bytes(bytes(2000))
    assert names(tmp_path) == []


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions do not bind the superuser")
def test_unreadable_files_are_a_users_mistake(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"x")
    path.chmod(0)
    for read in (read_text, read_json, read_safetensors):
        with pytest.raises(ValueError, match="cannot be read"):
            read(path)
