"""Where offline work lies: on the model's device while it fits, else in page-locked memory of the host; and how much runs at once.

In: bytes that are to be kept, or a model. Out: the device that they are kept on, or how many tokens a pass takes. On the CPU nothing
depends on free memory, so that results do not either.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dejavu.kernels.memory import available_bytes, free_gpu_bytes
from dejavu.model.transformer import Transformer

CPU = torch.device("cpu")
LEAST_TOKENS = 256  # fewer are no text to train on
KEPT = 10_000_000_000  # bytes of activations that a GPU holds at most
SPARE = 4_000_000_000  # bytes that it needs beside them: a layer's temporaries, decompositions, logits


@dataclass(slots=True)
class Room:
    """Bytes that the device may still hold of what is kept; None: all that comes."""

    device: torch.device
    left: int | None

    @classmethod
    def on(cls, device: torch.device) -> Room:
        free = free_gpu_bytes(str(device))
        return cls(device, None if free is None else max(0, min(KEPT, free - SPARE)))

    def place(self, size: int) -> torch.device:
        """The device, whose room so many bytes then take, or the CPU where it has not so much."""
        if self.left is None:
            return self.device
        if size > self.left:
            return CPU
        self.left -= size
        return self.device


def empty_at(place: torch.device, of: torch.device, *shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor at a place; what is of a GPU and placed on the CPU is page-locked, from where copies are fast."""
    return torch.empty(shape, dtype=dtype, device=place, pin_memory=of.type == "cuda" and place == CPU)


def check_host(needed: int, tokens: int) -> None:
    """Raise MemoryError where so many bytes, kept of so many tokens, are more than the host has free."""
    free = available_bytes(Path("/"))
    if free is not None and needed > free:
        fits = tokens * free // needed
        fix = f"take at most --max-tokens {fits}" if fits >= LEAST_TOKENS else "free some of it, or take a smaller model"
        raise MemoryError(
            f"what is kept of {tokens:,} tokens takes about {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free; {fix}"
        )


def tokens_at_once(model: Transformer, most: int, *, logits: bool = False) -> int:
    """Tokens that a pass takes: `most`, or those whose activations a GPU has memory for, at least 1. logits: of all of them."""
    free, config = free_gpu_bytes(str(model.device)), model.config
    if free is None:
        return most
    per_token = 24 * config.intermediate_size + 48 * config.hidden_size + (16 * config.vocab_size if logits else 0)
    return max(1, min(most, free // per_token))
