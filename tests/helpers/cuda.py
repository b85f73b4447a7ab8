"""The cuda engine: its devices (a GPU's only with -m gpu), a model on one, an engine with prompts, what an engine selected."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dejavu.config import ModelConfig
from dejavu.engine.interface import LayerSelection
from dejavu.engine.options import EngineOptions
from dejavu.model.selectors import LayerAdapter
from dejavu.model.transformer import LayerInputs, Selection, Transformer
from helpers.engines import ids_of

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def slow(*values: Any) -> Any:
    """A case of a parametrised test that takes long under the interpreter, and whose like is among the quick ones."""
    return pytest.param(*values, marks=pytest.mark.slow)


def on(model: Transformer, device: str, dtype: torch.dtype = torch.float32) -> Transformer:
    return copy.deepcopy(model).to(device, dtype)


def cuda_engine_of(model: Transformer, layers: Sequence[LayerAdapter] | None, **values: Any) -> Any:
    """values: of EngineOptions, and the engine's own."""
    from dejavu.engine.cuda.engine import CudaEngine  # needs triton

    own = {name: values.pop(name) for name in ("deterministic", "crossover") if name in values}
    return CudaEngine(model, layers, EngineOptions(**values), **own)


def prefilled(engine: Any) -> Any:
    """The engine with a prompt of 4, 5 and 6 tokens in its slots, as many as it has."""
    for slot in range(engine.info.num_slots):
        engine.prefill(slot, ids_of(30 + slot, 4 + slot))
    return engine


class Recorded(Selection):
    """The selections that an engine recorded for the tokens of one sequence, [T] by layer, applied to a forward pass over it."""

    def __init__(self, tokens: Sequence[Sequence[LayerSelection]], config: ModelConfig, device: torch.device) -> None:
        layers = list(zip(*tokens, strict=True))
        self.neurons_LTF = [_mask([part.neurons_A for part in layer], config.intermediate_size, device) for layer in layers]
        self.heads_LTH = [_mask([part.heads_A for part in layer], config.num_heads, device) for layer in layers]

    def heads(self, layer: int, inputs: LayerInputs, mixed_BTHK: Tensor) -> Tensor:
        return torch.where(self.heads_LTH[layer][None, :, :, None], mixed_BTHK, 0)

    def neurons(self, layer: int, inputs: LayerInputs, act_BTF: Tensor) -> Tensor:
        return torch.where(self.neurons_LTF[layer][None], act_BTF, 0)


def _mask(selected: Sequence[Tensor | None], size: int, device: torch.device) -> Tensor:
    """Bool [T, size]; all where a part ran dense."""
    mask = torch.zeros(len(selected), size, dtype=torch.bool)
    for row, indices in enumerate(selected):
        mask[row, slice(None) if indices is None else indices] = True
    return mask.to(device)
