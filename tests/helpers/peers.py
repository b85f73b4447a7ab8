"""A peer of the benchmark that answers with a model's forward pass, a clock that it moves, and what peers are held to."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dejavu.bench.variants import Peer
from dejavu.model.transformer import Transformer


class FakePeer:
    """A peer that answers with the forward pass of a model; `tick` is called by each step, and what it was asked is kept."""

    def __init__(
        self, model: Transformer, *, name: str = "tiny", mode: str = "transformers", dtype: str = "fp32", error: float = 0.0
    ) -> None:
        self.mode, self.dtype, self.model, self.version, self.threads, self.device = mode, dtype, name, "1.2.3", 1, "cpu"
        self.error, self.silent, self.closed = error, False, False
        self.reference, self.ids = model, list[int]()
        self.requested: list[list[int]] = []
        self.clock: FakeClock | None = None

    def prefill(self, ids: Sequence[int]) -> None:
        self.ids = list(ids)
        if self.clock is not None:
            self.clock.now += 0.5

    def step(self, token_id: int) -> Tensor | None:
        self.ids.append(token_id)
        self.requested.append(list(self.ids))
        if self.clock is not None:
            self.clock.now += 0.25
        logits_V = self.reference(torch.tensor([self.ids]))[0, -1]
        return None if self.silent else logits_V + self.error * torch.randn(logits_V.shape, generator=torch.Generator().manual_seed(1))

    def logits(self, ids: Sequence[int]) -> Tensor | None:
        return None if self.silent else self.reference(torch.tensor([list(ids)]))[0]

    def close(self) -> None:
        self.closed = True


class FakeClock:
    """Moves by a microsecond whenever it is asked, and by what a peer says it took."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1e-6
        return self.now


@contextmanager
def closing(peer: Peer) -> Generator[Any]:
    try:
        yield peer
    finally:
        peer.close()


def forward(model: Transformer, ids: Sequence[int]) -> Tensor:
    with torch.inference_mode():
        return model(torch.tensor([list(ids)]))[0]
