"""A screened head of a tiny model, for tests that need one and no text."""

from __future__ import annotations

import dataclasses

import torch

from dejavu.kernels.screen import Screen, fit_screen
from dejavu.model.adapter import Adapter
from dejavu.model.adapter_config import ScreenConfig
from dejavu.model.transformer import Transformer


def screen_of(model: Transformer, *, threshold: float, clusters: int = 24) -> Screen:
    """Of random states."""
    width = model.config.embed_width
    state_NE = torch.randn(64, width, generator=torch.Generator().manual_seed(1))
    return fit_screen(model.head_matrix, (state_NE.T @ state_NE / 64).double(), threshold=threshold, clusters=clusters)


def with_screen(adapter: Adapter, screen: Screen) -> Adapter:
    """The adapter with a screened head of which these things were measured."""
    entry = ScreenConfig(
        threshold=screen.threshold, clusters=len(screen.sizes_C), tokens=12.5, agreement=0.99, missed=0.004, missed_stderr=0.001
    )
    config = dataclasses.replace(adapter.config, screened_head=entry)
    return dataclasses.replace(adapter, config=config, screen=screen.at(screen.threshold, entry.tokens))
