"""Files, read and written so that a user's mistake is one clear line and a half-written result never looks whole.

In: paths, globs and names as a user or a file gives them. Out: text, JSON objects, tensors and finished folders. What
cannot be read is a ValueError that names the absolute path and the fix.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import logging
import lzma
import os
import re
import shutil
import stat
import uuid
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from typing import Any

import safetensors
import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from dejavu.damage import LFS, damaged, misplaced
from dejavu.locks import UNKNOWN, in_use, kept
from dejavu.version import __version__

LEFT_OVER = re.compile(r"\..+\.[0-9a-f]{32}\.partial")  # of `new_file` and `new_folder`
MARKER = ".dejavu"  # in every folder that new_folder wrote: such a folder may be replaced
UNPACKED_RATIO, UNPACKED_LEAST = 100, 1 << 26  # a .xz file of text unpacks to less than either; plain text to about five times its size
XZ_MEMORY = 1 << 28  # bytes that unpacking may take; `xz -9` asks for 65 MB
log = logging.getLogger("dejavu")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def absolute(path: str | Path) -> Path:
    """The path made absolute, `~` included, symlinks kept: what error messages name."""
    return Path(os.path.expanduser(path)).absolute()


def _read_bytes(path: Path, kind: str) -> bytes:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; give the path of {kind}") from None
    except IsADirectoryError:
        raise ValueError(
            f"{path} is a folder; give the path of {kind}; where there may be several, a quoted glob such as '{path}/*' does"
        ) from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); give the path of {kind}") from None
    if content.startswith(LFS):
        raise ValueError(misplaced(path))
    return content


def _decode(path: Path, content: bytes, kind: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}); give {kind} in UTF-8") from None


def read_text(path: str | Path, *, kind: str = "a text file (.txt, .md or .xz)") -> str:
    """The text of a UTF-8 file (.txt, .md, any other name) or of an .xz file of one; line ends are kept as stored.

    kind: what messages ask for.

    Raises ValueError where the file is missing, broken, not UTF-8, binary or without text.
    """
    path = absolute(path)
    content = _read_bytes(path, kind)
    if path.suffix == ".xz":
        try:
            content = _unpacked(path, content)
        except lzma.LZMAError as error:
            raise ValueError(f"{path} is not a whole .xz file ({error}); compress or copy it again") from None
    text = _decode(path, content, "plain text")
    if "\0" in text:
        raise ValueError(f"{path} holds binary data, not text; give {kind}")
    if not text.strip():
        raise ValueError(f"{path} holds no text; give a file with text in it")
    return text


def _unpacked(path: Path, packed: bytes) -> bytes:
    """What an .xz file holds, of one stream or several. ValueError for one that is no text: it unpacks to far more than text does."""
    most = max(UNPACKED_LEAST, UNPACKED_RATIO * len(packed))
    parts: list[bytes] = []
    left = packed
    while left or not parts:
        decoder = lzma.LZMADecompressor(memlimit=XZ_MEMORY)
        while not decoder.eof:
            parts.append(decoder.decompress(left, max_length=UNPACKED_LEAST))
            left = b""
            if not parts[-1] and decoder.needs_input:
                raise lzma.LZMAError("it ends too early")
            if sum(map(len, parts)) > most:
                raise ValueError(
                    f"{path} has {len(packed):,} bytes and unpacks to more than {most:,}, which no text does; unpack it yourself"
                )
        left = decoder.unused_data.lstrip(b"\0")
    return b"".join(parts)


def expand_paths(patterns: Sequence[str]) -> list[Path]:
    """The files that paths and globs (`*`, `?`, `[..]`, `**`) name, sorted, each once.

    A path that exists is taken as it is, whatever its letters. Raises ValueError where a path or glob names no file.
    """
    found: dict[Path, Path] = {}
    for pattern in patterns:
        expanded = os.path.expanduser(pattern)
        if os.path.lexists(expanded):
            paths = [Path(expanded)]
        else:
            paths = [Path(name) for name in glob.glob(expanded, recursive=True) if os.path.isfile(name)]
        if not paths:
            raise ValueError(f"{absolute(pattern)} names no file; give a path or a quoted glob such as 'texts/*.txt'")
        for path in sorted(paths):
            found.setdefault(path.resolve(), path)
    return sorted(found.values())


def text_hash(text: str) -> str:
    """SHA-256 of the text in UTF-8, as 64 hexadecimal digits. Raises ValueError for half a surrogate pair."""
    require_utf8(text)
    return hashlib.sha256(text.encode()).hexdigest()


def write_json(path: str | Path, obj: Any) -> None:
    """Write obj as indented JSON, whole or not at all. NaN and infinity are refused: they are no JSON."""
    write_text(path, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write a text in UTF-8, whole or not at all."""
    content = text.encode()
    with new_file(path, len(content)) as partial:
        partial.write_bytes(content)


def write_safetensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors, whole or not at all."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    with new_file(path, size) as partial:
        safetensors.torch.save_file(dict(tensors), partial, metadata=metadata)


@contextmanager
def new_file(path: str | Path, size: int) -> Generator[Path]:
    """Fill a file of about so many bytes and put it in place only when it is complete.

    Yields a temporary path next to `path`. What goes wrong with writing is a ValueError that names the path and the bytes, and leaves what
    was there.
    """
    path = absolute(path)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        yield partial
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise unwritten(path, error, size) from error
    finally:
        partial.unlink(missing_ok=True)


def unwritten(path: Path, error: OSError | SafetensorError, size: int | None = None) -> ValueError:
    """The error for a path that cannot be written. size: the bytes that it takes, where that is known."""
    reason = error.strerror if isinstance(error, OSError) else str(error)
    place = next((folder for folder in path.parents if folder.is_dir()), path.parent)
    takes = "" if size is None else f": it takes {size:,} bytes, and {shutil.disk_usage(place).free:,} are free there"
    return ValueError(f"{path} cannot be written ({reason}){takes}; make room, or choose another path")


def read_json(path: str | Path) -> Any:
    """The object in a JSON file. Raises ValueError where the file is missing or is no JSON, or has half a surrogate pair in it."""
    path = absolute(path)
    text = _decode(path, _read_bytes(path, "a JSON file"), "JSON")
    try:
        return parse_json(text)
    except (ValueError, RecursionError) as error:
        told = misplaced(path)
        raise ValueError(told or f"{path} is not valid JSON ({error}); mend or replace the file") from None


def read_object(path: str | Path) -> dict[str, Any]:
    """As `read_json`, of a file that holds a JSON object."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{absolute(path)} holds no JSON object; mend or replace the file")
    return value


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError for what is no JSON, and where a string has half a surrogate pair."""
    value = json.loads(text)
    if "\\u" in text:
        require_utf8(json.dumps(value, ensure_ascii=False), "a string")
    return value


def require_utf8(text: str, what: str = "the text") -> None:
    """Raises ValueError for half a surrogate pair: what JSON makes of "\\ud800", and Python of an argument's bytes that are no UTF-8."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        shown = text[max(0, error.start - 20) : error.start + 20]
        raise ValueError(f"{what} is not UTF-8 throughout: {shown!r} at character {error.start}; give it in UTF-8") from None


@contextmanager
def new_folder(path: str | Path) -> Generator[Path]:
    """Fill a folder and put it in place only when it is complete.

    Yields a temporary folder next to `path`; when the block ends it takes the place of `path`, and when the block raises
    it is removed and `path` stays as it was. An older folder is replaced, with everything in it, only if it is empty or
    was written by new_folder. Raises ValueError for any other existing path, and where another process is filling one for
    it, before the block runs; and for a full disk. Files get the mode of the process's umask, whatever library wrote them.
    What a process that was killed has left of this is removed.
    """
    path = Path(os.path.realpath(absolute(path)))
    _clear_away(path)
    check_replaceable(path)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        partial.mkdir(parents=True)
        mark(partial)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ValueError(f"{path} cannot be created ({error.strerror}); choose another folder") from None
    try:
        with kept(partial, MARKER):
            yield partial
            _give_default_modes(partial)
            check_replaceable(path)
            _put_in_place(partial, path)
    except OSError as error:
        if error.errno in FULL:
            raise unwritten(path, error) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _clear_away(path: Path) -> None:
    """Remove what `new_folder` left of this folder where it was killed. If that was while it replaced the old one by the new one, the
    old one comes back. ValueError where it is at work in another process."""
    ours = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{32}}\.(partial|old)")
    for other in sorted(path.parent.iterdir()) if path.parent.is_dir() else ():
        match = ours.fullmatch(other.name)
        if match is None or other.is_symlink() or not other.is_dir():
            continue
        holder = in_use(other, MARKER)
        if holder == UNKNOWN:
            continue  # it may be at work: what is left stays
        if holder is not None:
            raise ValueError(f"{path} is {holder}; wait for its end, end it, or choose another folder")
        if match[1] == "old" and not path.exists():
            other.rename(path)
        else:
            shutil.rmtree(other, ignore_errors=True)


@contextmanager
def working_in(folder: Path) -> Generator[None]:
    """Keep a folder, made where it is not there, for what this process writes there piece by piece; one without anything in it goes again.

    Raises ValueError where another process has it.
    """
    make_folder(folder)
    try:
        with kept(folder, MARKER) as locked:
            if not locked:
                log.warning("%s: files cannot be locked here, so start no second command that writes into it before this one ends", folder)
            for left in folder.glob(".*.partial"):  # of a process that was killed, see `new_file`
                if LEFT_OVER.fullmatch(left.name) and left.is_file():
                    left.unlink()
            try:
                yield
            finally:
                if folder.is_dir() and [entry.name for entry in folder.iterdir()] == [MARKER]:
                    shutil.rmtree(folder)
    except OSError as error:
        if error.errno in FULL:
            raise unwritten(absolute(folder), error) from error
        raise


def mark(folder: Path) -> None:
    """Say that dejavu wrote this folder."""
    (folder / MARKER).write_text(f"dejavu {__version__}\n", encoding="utf-8")


def make_folder(folder: Path) -> None:
    """Make the folder where it is not there yet; an empty one gets the mark, so that a later command may go on in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not any(folder.iterdir()):
            mark(folder)
    except OSError as error:
        raise ValueError(f"{absolute(folder)} cannot be created ({error.strerror}); choose another folder") from None


def check_replaceable(path: Path) -> None:
    """Raises ValueError for a file, and for a folder with things in it that dejavu did not write."""
    if not path.exists():
        return
    if not path.is_dir():
        raise ValueError(f"{path} is a file; choose another folder to write")
    if not (path / MARKER).is_file() and any(path.iterdir()):
        raise ValueError(f"{path} holds files that dejavu did not write; choose a new or an empty folder")


def _give_default_modes(folder: Path) -> None:
    """safetensors writes files that only their owner can read; the marker has the mode that any new file has."""
    mode = stat.S_IMODE((folder / MARKER).stat().st_mode)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def _put_in_place(partial: Path, path: Path) -> None:
    if not path.exists():
        partial.rename(path)
        return
    old = partial.with_suffix(".old")
    with kept(path, MARKER):  # so that nobody takes the old one for a left-over
        path.rename(old)
        try:
            partial.rename(path)
        except OSError:
            old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)


def safe_member(folder: Path, name: str) -> Path:
    """The path of the file that a file in `folder` calls `name`, e.g. a shard in an index.

    The name must be relative, without `..`, backslash or drive, and must lead, after symlinks, into the folder; in a
    snapshot of the Hugging Face cache also into the `blobs` of the same repository. Else ValueError naming it; nothing
    is opened. Whether the file exists is not checked.
    """
    parts = name.split("/")
    plain = "\\" not in name and "\0" not in name and not PureWindowsPath(name).drive and not name.startswith("/")
    if not plain or ".." in parts or all(part in ("", ".") for part in parts):
        raise ValueError(f"file name {name!r} in {absolute(folder)} is not a plain relative path; mend the file that lists it")
    target = folder / name
    try:
        root, resolved = folder.resolve(), target.resolve()
    except (OSError, RuntimeError):  # a loop of symlinks
        raise ValueError(f"file name {name!r} in {absolute(folder)} is a symlink without an end; replace it by the file") from None
    allowed = [root, *_cache_blobs(root)]
    if not any(resolved.is_relative_to(place) for place in allowed):
        raise ValueError(f"file name {name!r} leads out of {absolute(folder)}, to {resolved}; put the file itself into the folder")
    return target


def _cache_blobs(folder: Path) -> list[Path]:
    """`blobs` of the cached repository that a folder at or below `models--.../snapshots/REVISION` belongs to."""
    revisions = [place for place in (folder, *folder.parents) if place.parent.name == "snapshots"]
    return [place.parent.parent / "blobs" for place in revisions if place.parent.parent.name.startswith("models--")]


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, by name, on the CPU. Raises ValueError where it is missing or not whole."""
    with whole_safetensors(path) as path:
        return safetensors.torch.load_file(path)


def read_metadata(path: str | Path) -> dict[str, str]:
    """The texts that a safetensors file holds beside its tensors."""
    with whole_safetensors(path) as path, safetensors.safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


@contextmanager
def whole_safetensors(path: str | Path) -> Generator[Path]:
    """What goes wrong with a safetensors file meanwhile, as a ValueError."""
    path = absolute(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist or is no file; give the path of a safetensors file")
    try:
        yield path
    except SafetensorError as error:
        raise damaged(path, f"it is no safetensors file ({error})") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
