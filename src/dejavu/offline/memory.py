"""Where offline work lies: on the model's device while it fits, else in memory of the host, page-locked beside a GPU, else in a file; and
how much runs at once.

In: bytes that are to be kept, or a model. Out: the place that they are kept at, or how many tokens a pass takes. On the CPU nothing that is
computed depends on free memory, so that results do not either.
"""

from __future__ import annotations

import math
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dejavu.kernels.memory import available_bytes, free_gpu_bytes
from dejavu.model.transformer import Transformer

CPU = torch.device("cpu")
LEAST_TOKENS = 256  # fewer are no text to train on
KEPT = 10_000_000_000  # bytes of activations that a GPU holds at most, unless told otherwise
SPARE = 4_000_000_000  # bytes that it needs beside them: a layer's temporaries, decompositions, logits

UNKNOWN = 1 << 62  # bytes of a host that does not tell

Place = Literal["device", "host", "disk"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkMemory:
    """What activations may take. limit: bytes on the device, at most; None: KEPT on a GPU, all that is free on the CPU. folder: for files
    of what neither it nor the host has room for; None: there are none."""

    limit: int | None = None
    folder: Path | None = None

    @classmethod
    def of(cls, gigabytes: float | None, folder: Path | None) -> WorkMemory:
        """gigabytes: of 1e9 bytes."""
        return cls(limit=None if gigabytes is None else round(gigabytes * 1e9), folder=folder)


ALL_FREE = WorkMemory()


@dataclass(slots=True)
class Room:
    """Bytes that the device, the host beside it and the disk of the folder may still hold of what is kept; left None: all that comes."""

    device: torch.device
    left: int | None
    host: int
    disk: int
    folder: Path | None

    @classmethod
    def on(cls, device: torch.device, work: WorkMemory) -> Room:
        free, memory = free_gpu_bytes(str(device)), available_bytes(Path("/"))
        disk = 0 if work.folder is None else shutil.disk_usage(work.folder).free
        if free is None:  # the host is the device
            limits = [limit for limit in (work.limit, memory) if limit is not None]
            return cls(device, min(limits, default=None), 0, disk, work.folder)
        most = KEPT if work.limit is None else work.limit
        return cls(device, max(0, min(most, free - SPARE)), UNKNOWN if memory is None else memory, disk, work.folder)

    def places(self, *groups: Sequence[int], tokens: int) -> tuple[Place, ...]:
        """Where tensors of so many bytes are kept, those of a group at one place; their room is taken then.

        Raises MemoryError, with how many of the tokens there is room for, where no place has it.
        """
        free = 0 if self.left is None else self.left + self.host + self.disk
        found = tuple(map(self._place, groups))
        if None not in found:
            return tuple(place for place in found if place is not None)
        size = sum(map(sum, groups))
        fits = tokens * free // size
        fix = f"take at most --max-tokens {fits}" if fits >= LEAST_TOKENS else "free some of it, or take a smaller model"
        raise MemoryError(
            f"what is kept of {tokens:,} tokens takes about {size / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free; {fix}"
        )

    def _place(self, sizes: Sequence[int]) -> Place | None:
        size, locked = sum(sizes), sum(map(self._locked, sizes))
        if self.left is None:
            return "device"
        if size <= self.left:
            self.left -= size
            return "device"
        if locked <= self.host:
            self.host -= locked
            return "host"
        if size <= self.disk:
            self.disk -= size
            return "disk"
        return None

    def moved(self, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """Two tensors where they are, if there is room, which they then take; else on the host."""
        size = one.nbytes + other.nbytes
        if self.left is None or self.device == CPU:
            return one, other
        if size > self.left:
            return one.to(CPU), other.to(CPU)
        self.left -= size
        return one, other

    def empty(self, place: Place, *shape: int, dtype: torch.dtype) -> Tensor:
        """A tensor at a place; beside a GPU memory of the host is page-locked, from where copies are fast."""
        if place == "disk":
            assert self.folder is not None
            return in_file(self.folder, *shape, dtype=dtype)
        beside = place == "host"
        return torch.empty(shape, dtype=dtype, device=CPU if beside else self.device, pin_memory=beside and self.device.type == "cuda")

    def _locked(self, size: int) -> int:
        """Bytes of the host that a tensor takes: torch locks pages in powers of two."""
        return 1 << (size - 1).bit_length() if self.device.type == "cuda" and size > 0 else size


def in_file(folder: Path, *shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor in a file of the folder that nobody else sees and that goes with the tensor, or with a later run (see files.working_in)."""
    path = folder / f".activations.{uuid.uuid4().hex}.partial"
    made = torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype).view(shape)
    try:
        path.unlink()
    except PermissionError:  # Windows, while it is in use
        return made
    return made


def tokens_at_once(model: Transformer, most: int, *, logits: bool = False) -> int:
    """Tokens that a pass takes: `most`, or those whose activations a GPU has memory for, at least 1. logits: of all of them."""
    free, config = free_gpu_bytes(str(model.device)), model.config
    if free is None:
        return most
    per_token = 24 * config.intermediate_size + 48 * config.hidden_size + (16 * config.vocab_size if logits else 0)
    return max(1, min(most, free // per_token))
