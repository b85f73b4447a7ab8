"""The parts of a layer that select nothing, and what reading all or a share of them costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from dejavu.config import ModelConfig
from dejavu.model.selectors.selector import HeadSelector, InputSelector, NeuronSelector
from dejavu.model.transformer import Block, LayerInputs


@dataclass(frozen=True, slots=True)
class AllNeurons(NeuronSelector):
    """The MLP runs dense."""

    def mask(self, inputs: LayerInputs) -> None:
        return None

    def at_density(self, inputs: LayerInputs, density: float) -> Self:
        return self

    def reads(self, config: ModelConfig, density: float, cached_tokens: int) -> float:
        return mlp_reads(config, density, None)


@dataclass(frozen=True, slots=True)
class AllHeads(HeadSelector):
    """Attention runs with all heads."""

    def mask(self, inputs: LayerInputs) -> None:
        return None

    def at_density(self, inputs: LayerInputs, density: float) -> Self:
        return self

    def reads(self, config: ModelConfig, density: float, cached_tokens: int) -> float:
        return head_reads(config, density, None, cached_tokens)


@dataclass(frozen=True, slots=True)
class AllInputs(InputSelector):
    """Linear maps read all of their inputs."""

    def norms(self, block: Block) -> dict[str, Tensor]:
        return {}

    def mask(self, point: str, x: Tensor, norms: Mapping[str, Tensor]) -> None:
        return None

    def at_density(self, point: str, x: Tensor, norms: Mapping[str, Tensor], density: float) -> Self:
        return self

    def attention_reads(self, config: ModelConfig, heads: HeadSelector, density: float, cached_tokens: int) -> float:
        key_value = 2 * config.num_kv_heads * config.head_dim * config.hidden_size
        return key_value + heads.reads(config, density, cached_tokens)

    def rows_down(self, fired: float, kept: float) -> float:
        return fired


ALL_NEURONS, ALL_HEADS, ALL_INPUTS = AllNeurons(), AllHeads(), AllInputs()


def mlp_reads(config: ModelConfig, density: float, rank: int | None) -> float:
    """Weights that a token reads in an MLP at this density, the predictor's included (none when rank is None)."""
    matrices = 3 if config.gated else 2
    predictor = 0 if rank is None else rank * (config.hidden_size + config.intermediate_size)
    return density * matrices * config.hidden_size * config.intermediate_size + predictor


def head_reads(config: ModelConfig, density: float, rank: int | None, cached_tokens: int) -> float:
    """Weights (rows of q, columns of o) and cache entries that a token reads for its heads; k and v are always computed."""
    weights = 2 * config.num_heads * config.head_dim * config.hidden_size
    cache = 2 * config.num_kv_heads * config.head_dim * cached_tokens
    predictor = 0 if rank is None else rank * (config.hidden_size + config.num_kv_heads)
    return density * (weights + cache) + predictor
