"""Neurons by the gate's own values.

A neuron is kept where its activated gate |act(gate x)| (of an ungated MLP: |act(up x)|) exceeds the layer's threshold. The gate is
computed for every neuron; rows of up and down are read for those kept. Threshold 0 is the method "exact": what it leaves out are
true zeros. Source: CATS (arXiv 2404.08763).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor

from dejavu.config import Config, ModelConfig, require, require_shares
from dejavu.model.selectors.selector import NeuronSelector, threshold_below
from dejavu.model.transformer import LayerInputs


@dataclass(frozen=True, kw_only=True, slots=True)
class GateConfig(Config):
    """The threshold of one layer's gate. density of neurons and mass are fractions measured on held-out text."""

    threshold: float
    density: float
    mass: float

    def __post_init__(self) -> None:
        GateThreshold(threshold=self.threshold)
        require_shares(density=self.density, mass=self.mass)


@dataclass(frozen=True, slots=True, kw_only=True)
class GateThreshold(NeuronSelector):
    """Of one layer. Raises ValueError where the threshold is negative or no number."""

    threshold: float
    method: ClassVar[str | None] = "gate"
    key: ClassVar[str] = "gate"
    entry_type: ClassVar[type[Config]] = GateConfig
    about: ClassVar[str] = (
        "Thresholds on the activated gate of every MLP of `{base}`: rows of up and down are read where it exceeds them\n"
        "(CATS, arXiv 2404.08763)."
    )

    def __post_init__(self) -> None:
        require(0 <= self.threshold < math.inf, f"a gate's threshold must be 0 or more, not {self.threshold}")

    @property
    def by_value(self) -> bool:
        return self.threshold > 0

    def mask(self, inputs: LayerInputs) -> Tensor:
        return ~(gate_of(inputs).abs() <= self.threshold)  # NaN is kept

    def at_density(self, inputs: LayerInputs, density: float) -> Self:
        values = gate_of(inputs).float().abs()
        return dataclasses.replace(self, threshold=max(0.0, threshold_below(values, density * values.numel())))

    def reads(self, config: ModelConfig, density: float, cached_tokens: int) -> float:
        return gate_reads(config, density)

    def rows_in(self, config: ModelConfig, neurons: float) -> float:
        """All of the gate's, or of up's where that is the gate."""
        return config.intermediate_size + config.gated * neurons

    def difference(self, entry: GateConfig) -> str | None:
        return None if entry.threshold == self.threshold else "config and thresholds differ"

    def entry(self, *, density: float, recall: float, mass: float) -> GateConfig:
        return GateConfig(threshold=self.threshold, density=density, mass=mass)

    @classmethod
    def read(cls, entry: GateConfig, layer: int, tensors: dict[str, Tensor], model: ModelConfig, path: Path) -> Self:
        return cls(threshold=entry.threshold)

    @classmethod
    def cells(cls, entry: GateConfig) -> dict[str, str]:
        return {"MLP": f"density {entry.density:.3f}, mass {entry.mass:.3f}, threshold {entry.threshold:.4g}"}

    @classmethod
    def stated(cls, entry: GateConfig, model: ModelConfig) -> dict[str, Any]:
        return {"recall": None, "density": entry.density, "mass": entry.mass}


def gate_of(inputs: LayerInputs) -> Tensor:
    assert inputs.gate is not None, "the activated gate is there once neurons are selected"
    return inputs.gate


def gate_reads(config: ModelConfig, density: float) -> float:
    """Weights that a token reads in an MLP whose gate is computed for every neuron (of an ungated one: up)."""
    size, matrices = config.hidden_size * config.intermediate_size, 3 if config.gated else 2
    return size + density * (matrices - 1) * size
