"""Random predictors for a tiny model, and decoding against the definition: one masked forward pass, without a cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dejavu.config import RopeConfig
from dejavu.engine.interface import Engine, StepResult
from dejavu.engine.torch_engine import TorchEngine
from dejavu.model.masked import MaskedSelection
from dejavu.model.predictor import Predictor
from dejavu.model.selectors import LayerAdapter
from dejavu.model.transformer import Transformer
from helpers.adapters import predicted

TOKENS = 20
# Every part of an architecture that scales, norms, caps or narrows.
GEMMA: dict[str, Any] = {
    "activation": "gelu_tanh", "tied_head": True, "num_layers": 3, "head_dim": 12, "qk_norm": True, "block_norms": True, "window": 8,
    "windowed": (0, 2), "rope": RopeConfig(theta=1e6, type="linear", factor=8.0), "local_rope": RopeConfig(), "attention_scale": 0.4,
    "attention_cap": 2.0, "logit_cap": 3.0, "embed_scale": 5.0, "residual_scale": 0.7, "logit_scale": 1.3,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("opt", {}),
    "opt-post-norm": ("opt", {"pre_norm": False, "final_norm": False, "embed_size": 16}),
    "llama": ("llama", {}),
    "llama-relu-wide-heads": ("llama", {"activation": "relu", "head_dim": 12, "num_heads": 6, "num_kv_heads": 2, "num_layers": 3}),
}


def ids_of(seed: int, count: int = TOKENS) -> list[int]:
    return torch.randint(0, 96, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def predictor(seed: int, model: Transformer, outputs: int, lookahead: int, threshold: float = 0.0) -> Predictor:
    generator = torch.Generator().manual_seed(seed)
    size, rank = model.config.hidden_size, 7
    return Predictor(
        A_RD=torch.randn(rank, size, generator=generator) * size**-0.5,
        B_OR=torch.randn(outputs, rank, generator=generator),
        bias_O=torch.randn(outputs, generator=generator) * 0.3,
        threshold=threshold,
        lookahead=lookahead,
    )


def random_layers(model: Transformer, *, mlp: int | None, heads: int | None, threshold: float = 0.0) -> tuple[LayerAdapter, ...]:
    """Random predictors of a lookahead (None: dense), as far as a layer has the input for it."""
    config = model.config
    layers = []
    for index in range(config.num_layers):
        mlp_look = None if mlp is None else min(mlp, 1) if index == 0 else mlp
        head_look = None if heads is None else 0 if index == 0 else heads
        layers.append(
            predicted(
                mlp=None if mlp_look is None else predictor(10 + index, model, config.intermediate_size, mlp_look, threshold),
                heads=None if head_look is None else predictor(20 + index, model, config.num_kv_heads, head_look, threshold),
            )
        )
    return tuple(layers)


def decode(engine: Engine, ids: Sequence[int], slot: int = 0) -> tuple[Tensor, list[StepResult]]:
    """Logits [T, V] and results of decoding the ids one by one."""
    steps = [engine.step([token_id], [slot]) for token_id in ids]
    return torch.cat([step.logits_BV for step in steps]), steps


@torch.inference_mode()
def masked_forward(model: Transformer, layers: tuple[LayerAdapter, ...], ids: Sequence[int]) -> tuple[Tensor, MaskedSelection]:
    selection = MaskedSelection(layers)
    return model(torch.tensor([list(ids)]), selection)[0], selection


def reselect(engine: TorchEngine, layers: Sequence[LayerAdapter]) -> None:
    """From now on the engine selects so, over the cache that it has."""
    other = TorchEngine(engine.model, layers)
    engine.layers, engine._norms = other.layers, other._norms
