"""How a layer selects: a selector for each of its parts. In: an adapter's layers. Out: what engines lower and evaluation masks with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dejavu.config import ModelConfig, require
from dejavu.model.selectors.dense import ALL_HEADS, ALL_INPUTS, ALL_NEURONS
from dejavu.model.selectors.selector import HeadSelector, InputSelector, NeuronSelector, Selector
from dejavu.model.transformer import Block


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerAdapter:
    """One layer. Where inputs are selected, neither neurons nor heads are.

    block: the layer's weights while it runs with this adapter, where the adapter changes them (see lora.py); None: the model's own.
    """

    neurons: NeuronSelector = ALL_NEURONS
    heads: HeadSelector = ALL_HEADS
    inputs: InputSelector = ALL_INPUTS
    block: Block | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        assert not (self.inputs.selects and (self.neurons.selects or self.heads.selects)), "inputs are selected alone"

    @classmethod
    def of(cls, selectors: Iterable[Selector]) -> LayerAdapter:
        """A layer with these; the other parts are dense."""
        parts: dict[str, Any] = {selector.part: selector for selector in selectors}
        return cls(**parts)

    @property
    def selectors(self) -> tuple[Selector, ...]:
        return self.neurons, self.heads, self.inputs

    @property
    def stored(self) -> dict[str, Selector]:
        """Those that select, by the key that an adapter's config has for them."""
        return {selector.key: selector for selector in self.selectors if selector.selects}

    @property
    def methods(self) -> tuple[str, ...]:
        """How anything is selected here: predicted, gate (of which "exact" is the one with a threshold of 0), input."""
        return tuple(dict.fromkeys(selector.method for selector in self.selectors if selector.method is not None))

    @property
    def sparse(self) -> bool:
        """Whether anything is selected here."""
        return bool(self.methods)

    def to(self, device: torch.device) -> LayerAdapter:
        """Its selectors on that device; a block is where its model is."""
        return dataclasses.replace(self, neurons=self.neurons.to(device), heads=self.heads.to(device), inputs=self.inputs.to(device))


def check_layers(layers: Sequence[LayerAdapter], config: ModelConfig) -> None:
    """Raise ValueError where the layers cannot be those of an adapter for this model."""
    require(len(layers) == config.num_layers, f"the adapter has {len(layers)} layers and the model {config.num_layers}")
    for index, layer in enumerate(layers):
        for selector in layer.selectors:
            selector.check(index, config)
