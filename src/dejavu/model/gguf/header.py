"""What a GGUF file says of itself: its metadata, and the name, type, shape and place of every tensor.

In: a file. Out: a Header whose tensors are views of the mapped file. The layout is little-endian, version 2 or 3:

    "GGUF"  version uint32  tensors uint64  pairs uint64
    pairs   of a string and a value: type uint32, then a number, a string, or an array (type uint32, count uint64, the elements)
    tensors name string, axes uint32, sizes uint64 (the innermost first), type uint32, place uint64
    ...     from the next multiple of the alignment on: the tensors, each at its place

and a string is its length, uint64, and so many bytes of UTF-8. Every count, length and place is held against the file's size before
anything of that size is made, so that a damaged or hostile file is an error and costs nothing.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dejavu.damage import misplaced
from dejavu.kernels.memory import give_back_pages, mapped_file

MAGIC, VERSIONS = b"GGUF", (2, 3)
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # as struct and numpy spell them
FLOAT32, STRING, ARRAY = 6, 8, 9
SMALLEST_PAIR, SMALLEST_TENSOR = 8 + 4 + 1, 8 + 4 + 4 + 8
MOST_AXES = 4
TORCH_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

CUT = "it was cut off; copy or download it again"


class DamagedError(ValueError):
    """What is wrong with the bytes; the file's name is put before it."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """type: GGUF's name of it, upper case. shape: the outermost axis first. start, size: bytes, from the start of the file."""

    name: str
    type: str
    shape: tuple[int, ...]
    start: int
    size: int

    @property
    def count(self) -> int:
        return math.prod(self.shape)


class Header:
    """An open file. metadata: by key, numbers, strings, Strings, and arrays of numpy. tensors: by name, in the file's order.

    Raises ValueError where the file cannot be read: none there, no GGUF file, another version, big-endian, damaged or truncated.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._bytes = mapped_file(path)
            cursor = _Cursor(self._bytes.numpy().data)
            tensor_count, pair_count = _counts(cursor)
            self.metadata = _metadata(cursor, pair_count)
            self.tensors = _tensors(cursor, tensor_count, self._alignment())
            give_back_pages(self._bytes[: cursor.at])
        except (OSError, ValueError) as error:
            raise ValueError(misplaced(path) or f"{path} is no readable GGUF file: {error}") from error

    def _alignment(self) -> int:
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0 or alignment % 8:
            raise DamagedError(f"general.alignment {alignment!r} is no multiple of 8")
        return alignment

    def view(self, info: TensorInfo) -> Tensor:
        """The tensor without a copy: fp32, fp16 and bf16 in their shape, any other type as the bytes of its rows, uint8 [.., bytes]."""
        held = self._bytes[info.start : info.start + info.size].view(TORCH_TYPES.get(info.type, torch.uint8))
        return held.view(*info.shape[:-1], -1)


class Strings(Sequence[str]):
    """An array of strings, of which there may be hundreds of thousands: each is decoded when it is asked for."""

    def __init__(self, content: memoryview, edges: list[int]) -> None:
        self._content, self._edges = content, edges  # where each one's length lies, and the end of the last

    def __len__(self) -> int:
        return len(self._edges) - 1

    def __getitem__(self, index: Any) -> Any:
        start, end = self._edges[index] + 8, self._edges[index + 1]
        return _text(self._content[start:end], start)

    def __iter__(self) -> Iterator[str]:
        first, last = self._edges[0], self._edges[-1]
        raw = bytes(self._content[first:last])
        try:
            return iter([raw[start + 8 - first : end - first].decode() for start, end in pairwise(self._edges)])
        except UnicodeDecodeError as error:
            raise DamagedError(f"a string among {len(self)} from byte {first} on is not UTF-8") from error


class _Cursor:
    """Reads the bytes one value after the other."""

    def __init__(self, content: memoryview) -> None:
        self.content, self.at, self.size = content, 0, len(content)

    def advance(self, size: int) -> int:
        """Step over so many bytes, and say where they start."""
        start = self.at
        if size > self.size - start:
            raise DamagedError(f"it ends at byte {self.size}, within something of {size} bytes that starts at byte {start}; {CUT}")
        self.at = start + size
        return start

    def number(self, letter: str) -> Any:
        layout = "<" + letter
        return struct.unpack_from(layout, self.content, self.advance(struct.calcsize(layout)))[0]

    def string(self) -> str:
        length = self.number("Q")
        start = self.advance(length)
        return _text(self.content[start : start + length], start)

    def strings(self, count: int) -> Strings:
        """Step over an array of them, whose lengths lie between."""
        length_at, content, at, last = struct.Struct("<Q").unpack_from, self.content, self.at, self.size
        edges = [at]
        for _ in range(count):
            if at + 8 > last:
                raise DamagedError(f"it ends within an array of {count} strings; {CUT}")
            at += 8 + length_at(content, at)[0]
            edges.append(at)
        if at > last:
            raise DamagedError(f"it ends within an array of {count} strings; {CUT}")
        self.at = at
        return Strings(content, edges)


def _text(raw: memoryview, start: int) -> str:
    try:
        return str(raw, "utf-8")
    except UnicodeDecodeError as error:
        raise DamagedError(f"the string at byte {start} is not UTF-8") from error


def _counts(cursor: _Cursor) -> tuple[int, int]:
    start = cursor.advance(len(MAGIC))
    if cursor.content[start : cursor.at] != MAGIC:
        raise DamagedError(f"it begins with {bytes(cursor.content[start : cursor.at])!r} and not with {MAGIC!r}")
    version = cursor.number("I")
    if version & 0xFFFF == 0 and version:
        raise DamagedError("it is big-endian; convert it to little-endian")
    if version not in VERSIONS:
        raise DamagedError(f"its version is {version}; versions {VERSIONS[0]} and {VERSIONS[1]} are read")
    tensors, pairs = cursor.number("Q"), cursor.number("Q")
    if tensors * SMALLEST_TENSOR + pairs * SMALLEST_PAIR > cursor.size - cursor.at:
        raise DamagedError(f"{tensors} tensors and {pairs} pairs of metadata do not fit into {cursor.size} bytes; {CUT}")
    return tensors, pairs


def _metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.string()
        if key in found:
            raise DamagedError(f"it has the key {key!r} twice")
        found[key] = _value(cursor, cursor.number("I"), key)
    return found


def _value(cursor: _Cursor, kind: int, key: str) -> Any:
    if kind == STRING:
        return cursor.string()
    if kind == FLOAT32:  # the shortest decimal is the number that the original config spelled out
        return float(str(np.float32(cursor.number("f"))))
    if kind in NUMBERS:
        return cursor.number(NUMBERS[kind])
    if kind != ARRAY:
        raise DamagedError(f"{key!r} has a value of type {kind}, which there is not")
    kind, count = cursor.number("I"), cursor.number("Q")
    if kind == STRING:
        return cursor.strings(count)
    if kind not in NUMBERS:
        raise DamagedError(f"{key!r} is an array of type {kind}, which is not read")
    dtype = np.dtype("<" + NUMBERS[kind])
    start = cursor.advance(count * dtype.itemsize)
    return np.frombuffer(cursor.content, dtype, count, start) if count else np.empty(0, dtype)


def _tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, TensorInfo]:
    import gguf  # not needed for other files, and not everywhere

    told: dict[str, tuple[tuple[int, ...], Any, int]] = {}
    for _ in range(count):
        name, axes = cursor.string(), cursor.number("I")
        if name in told or not 1 <= axes <= MOST_AXES:
            raise DamagedError(f"tensor {name!r} is there twice" if name in told else f"tensor {name!r} has {axes} axes")
        shape = tuple(cursor.number("Q") for _ in range(axes))[::-1]
        kind, place = cursor.number("I"), cursor.number("Q")
        try:
            told[name] = shape, gguf.GGMLQuantizationType(kind), place
        except ValueError as error:
            raise DamagedError(f"tensor {name!r} has type {kind}, which is not known") from error
    data = -(-cursor.at // alignment) * alignment
    found: dict[str, TensorInfo] = {}
    for name, (shape, kind, place) in told.items():
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if shape[-1] % block or place % alignment or 0 in shape:
            raise DamagedError(f"tensor {name!r} is {list(shape)} in blocks of {block} of a row, at byte {place}")
        info = TensorInfo(name, kind.name, shape, data + place, 0)
        size = info.count // block * block_bytes
        if info.start + size > cursor.size:
            raise DamagedError(f"it ends at byte {cursor.size}, within tensor {name!r} of {size} bytes; {CUT}")
        found[name] = TensorInfo(name, kind.name, shape, info.start, size)
    return found


def require_readable(path: Path, info: TensorInfo) -> None:
    """Raise ValueError for a type that `gguf` does not turn into numbers."""
    import gguf

    kind = gguf.GGMLQuantizationType[info.type]
    block = np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
    try:
        gguf.quants.dequantize(block, kind) if info.type not in TORCH_TYPES else block
    except NotImplementedError as error:
        raise ValueError(f"{path}: tensor {info.name!r} is of type {info.type}, which is not read; use a file in another") from error
