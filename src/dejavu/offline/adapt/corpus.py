"""Texts as one stream of token ids, cut into windows, of which a few are held out and the rest come in an order fixed by a seed.

In: documents and a tokenizer. Out: ids uint16 or uint32 [N], kept in a file; windows [B, T] by their number, so that a run that goes
on needs no state but the number of its step.

Letters: N tokens  B windows of a batch  T tokens of a window
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dejavu.config import ModelConfig, require
from dejavu.damage import damaged, foreign_reader
from dejavu.files import new_file
from dejavu.model.tokenizer import Tokenizer

PIECE = 20_000  # characters that are tokenised at a time: a long text is cut at the end of a line
PIECES = 512  # tokenised in parallel
HELD_OUT = 64  # windows at most
HELD_OUT_SHARE = 10  # one window of so many at most


def pieces(text: str) -> Iterator[str]:
    """The text in pieces of about PIECE characters that end with a line, where it has lines."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + PIECE)
        stop = len(text) if end < 0 else end + 1
        yield text[start:stop]
        start = stop


def tokenized(tokenizer: Tokenizer, documents: Iterable[str]) -> np.ndarray:
    """Ids [N] of the documents laid end to end, each behind a BOS where the tokenizer adds one to a text."""
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    bos = [] if tokenizer.document_bos is None else [tokenizer.document_bos]
    parts: list[np.ndarray] = []
    pending: list[str] = []
    starts: list[bool] = []

    def flush() -> None:
        for first, ids in zip(starts, tokenizer.encode_batch(pending), strict=True):
            parts.append(np.array([*bos, *ids] if first else ids, dtype=dtype))
        pending.clear()
        starts.clear()

    for document in documents:
        for number, piece in enumerate(pieces(document)):
            pending.append(piece)
            starts.append(number == 0)
            if len(pending) == PIECES:
                flush()
    flush()
    return np.concatenate(parts) if parts else np.zeros(0, dtype=dtype)


def kept_ids(path: Path, make: Callable[[], np.ndarray]) -> None:
    """Make the file of ids where it is not there."""
    if not path.exists():
        made = make()
        with new_file(path, made.nbytes) as fresh, fresh.open("wb") as file:
            np.save(file, made)


def read_ids(path: Path, config: ModelConfig) -> np.ndarray:
    """The ids of a file, mapped. Raises ValueError where it holds anything else, or ids that the model has not."""
    fix = f"remove {path.parent} to begin anew"
    with foreign_reader(path, fix):
        ids = np.load(path, mmap_mode="r")
    if not isinstance(ids, np.ndarray) or ids.ndim != 1 or ids.dtype not in (np.uint16, np.uint32):
        raise damaged(path, "it holds no row of token ids", fix)
    if len(ids) and int(ids.max()) >= config.vocab_size:
        raise damaged(path, f"id {ids.max()} is beyond the {config.vocab_size} of the model", fix)
    return ids


class Windows:
    """The windows of a stream. Every pass over them has an order of its own; held_out [W, T] are in none of them."""

    def __init__(self, ids: np.ndarray, length: int, seed: int, *, held_out: bool = True) -> None:
        count = len(ids) // length
        least = 2 if held_out else 1
        require(count >= least, f"{len(ids)} tokens are too few: {least} windows of {length} are needed; give a longer text")
        self.table = ids[: count * length].reshape(count, length)
        kept = max(1, min(HELD_OUT, count // HELD_OUT_SHARE)) if held_out else 0
        chosen = np.unique(np.linspace(0, count - 1, kept).astype(np.int64))
        self.held_out = torch.from_numpy(self.table[chosen].astype(np.int64))
        self.rest = np.setdiff1d(np.arange(count), chosen)
        self.seed = seed
        self.epoch, self.order = -1, self.rest

    def window(self, sample: int) -> np.ndarray:
        """The window [T] that comes as number `sample`, from 0 on without end."""
        epoch, index = divmod(sample, len(self.rest))
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = np.random.default_rng((self.seed, epoch)).permutation(self.rest)
        return self.table[self.order[index]]


class Mixture:
    """Windows of a text, of which a share is replaced by windows of another: samples 0, 1, ... in one fixed sequence."""

    def __init__(self, text: Windows, chat: Windows | None = None, share: float = 0.0) -> None:
        self.text, self.chat, self.share = text, chat, share if chat is not None else 0.0

    def batch(self, samples: Iterable[int]) -> Tensor:
        """Ids [B, T] int64 of the samples."""
        return torch.from_numpy(np.stack([self._window(sample) for sample in samples]).astype(np.int64))

    def _window(self, sample: int) -> np.ndarray:
        before, after = int(sample * self.share), int((sample + 1) * self.share)
        if after > before and self.chat is not None:
            return self.chat.window(before)
        return self.text.window(sample - before)
