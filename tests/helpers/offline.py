"""What predictors are trained on: random token ids, and a model that they can learn."""

from __future__ import annotations

import random
from typing import Any

import torch

from conftest import Tiny
from dejavu.model.transformer import Transformer


def random_ids(count: int, seed: int = 0) -> list[int]:
    return [random.Random(seed * 7919 + i).randrange(3, 96) for i in range(count)]


def skewed(tiny: Tiny, **overrides: Any) -> Transformer:
    """A tiny OPT whose first MLP matrix is nearly low-rank and whose biases make it sparse: something a predictor can learn."""
    model = tiny("opt", num_layers=3, intermediate_size=128, **overrides)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for block in model.blocks:
            low = torch.randn(128, 4, generator=generator) @ torch.randn(4, 32, generator=generator)
            block.up.weight.copy_(low / 4 + 0.02 * block.up.weight)
            block.up.bias.fill_(-1.5)
    return model
