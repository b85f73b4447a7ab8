"""What every way to select answers, so that nobody else has to ask which one it is.

A layer selects in three parts: neurons of its MLP, groups of heads, inputs of its linear maps. A selector is how one part of one layer
does, with its thresholds and tensors; a part that selects nothing has one too (dense.py). Engines lower selectors to what they run.

A method is a class: `mask` is its definition. `key` names its entry in an adapter's config (`entry_type`) and its tensors in the file.

Letters: F neurons  G key/value head groups  I inputs of a linear map  D model
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from dejavu.config import Config, ModelConfig
from dejavu.kernels.quantized import Matrix
from dejavu.model.transformer import Block, LayerInputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """What finding out what to select reads for a token, besides the weights of the layer: matrices, and so many fp32 values."""

    matrices: tuple[Matrix, ...] = ()
    values: int = 0


class Selector(ABC):
    """One part of one layer. method: how it selects; None: it keeps everything. columns: of the table in an adapter's card."""

    __slots__ = ()
    method: ClassVar[str | None] = None
    key: ClassVar[str]
    part: ClassVar[str]
    entry_type: ClassVar[type[Config]]
    about: ClassVar[str]
    columns: ClassVar[tuple[str, ...]] = ("MLP", "heads")

    @property
    def selects(self) -> bool:
        return self.method is not None

    @property
    def by_value(self) -> bool:
        """Whether values of some size are left out: one at its threshold may fall on either side of it, and later ones follow."""
        return False

    @property
    def tensors(self) -> tuple[Matrix, ...]:
        """Everything that it holds, in order."""
        return ()

    def to(self, device: torch.device) -> Self:
        """On that device; itself where it is there already."""
        return self

    def check(self, layer: int, config: ModelConfig) -> None:
        """Raise ValueError where it cannot be one of that layer of the model."""
        return

    def scoring(self, config: ModelConfig) -> Scoring:
        return Scoring()

    # As an adapter stores it: an entry of its config and perhaps tensors, see adapter.py. What selects nothing is not stored.

    def difference(self, entry: Any) -> str | None:
        """What of it the entry tells otherwise; None: nothing."""
        raise NotImplementedError

    def entry(self, *, density: float, recall: float, mass: float) -> Config:
        """What the config says of it, with what was measured: fractions of what is selected, on held-out text."""
        raise NotImplementedError

    def file_tensors(self, name: str) -> dict[str, Tensor]:
        """What the file holds of it, under names that begin with `name`."""
        return {}

    @classmethod
    def read(cls, entry: Any, layer: int, tensors: dict[str, Tensor], model: ModelConfig, path: Path) -> Self:
        """Of an entry and the tensors of the file, which it takes out, checked for presence, type, shape and finite values."""
        raise NotImplementedError

    @classmethod
    def check_entry(cls, layer: int, entry: Any) -> None:
        """Raise ValueError where an entry cannot be one of that layer."""
        return

    @classmethod
    def cells(cls, entry: Any) -> dict[str, str]:
        """Cells of the card's table, by column."""
        raise NotImplementedError

    @classmethod
    def stated(cls, entry: Any, model: ModelConfig) -> dict[str, Any]:
        """What an entry says of its layer, with the keys of what training reports (`STATED_DENSE` where it says nothing)."""
        raise NotImplementedError


class NeuronSelector(Selector):
    """Which neurons of an MLP are computed."""

    __slots__ = ()
    part: ClassVar[str] = "neurons"

    @property
    def lookahead(self) -> int | None:
        """Of its predictor, where it has one."""
        return None

    @abstractmethod
    def mask(self, inputs: LayerInputs) -> Tensor | None:
        """Boolean [.., F], the neurons that are kept; None: all."""

    @abstractmethod
    def at_density(self, inputs: LayerInputs, density: float) -> Self:
        """With the threshold that selects this share on these inputs."""

    @abstractmethod
    def reads(self, config: ModelConfig, density: float, cached_tokens: int) -> float:
        """Weights that a token reads in the MLP at this density, those for finding out included; nothing that is cached."""

    def rows_in(self, config: ModelConfig, neurons: float) -> float:
        """Rows of gate and up that are read where so many neurons are selected."""
        return neurons + config.gated * neurons

    def shifted(self, by: float) -> Self:
        """With the threshold of its predictor moved; itself where it has none."""
        return self


class HeadSelector(Selector):
    """Which heads are computed: whole groups, which share a key/value head."""

    __slots__ = ()
    part: ClassVar[str] = "heads"

    @abstractmethod
    def mask(self, inputs: LayerInputs) -> Tensor | None:
        """Boolean [.., G], at least one; None: all."""

    @abstractmethod
    def at_density(self, inputs: LayerInputs, density: float) -> Self:
        """With the threshold that selects this share on these inputs."""

    @abstractmethod
    def reads(self, config: ModelConfig, density: float, cached_tokens: int) -> float:
        """Weights and cache entries that a token reads for its heads at this density, besides k and v, which are always computed."""


class InputSelector(Selector):
    """Which inputs of the linear maps are read, at each of POINTS (inputs.py). Stands alone: then neurons and heads are not selected."""

    __slots__ = ()
    part: ClassVar[str] = "inputs"

    @abstractmethod
    def norms(self, block: Block) -> dict[str, Tensor]:
        """What `mask` weighs inputs with, by point; none where it selects nothing."""

    @abstractmethod
    def mask(self, point: str, x: Tensor, norms: Mapping[str, Tensor]) -> Tensor | None:
        """Boolean [.., I], the inputs that are kept; None: all."""

    @abstractmethod
    def at_density(self, point: str, x: Tensor, norms: Mapping[str, Tensor], density: float) -> Self:
        """With the threshold that keeps this share of these inputs at the point."""

    @abstractmethod
    def attention_reads(self, config: ModelConfig, heads: HeadSelector, density: float, cached_tokens: int) -> float:
        """Weights and cache entries that a token reads in attention at this density."""

    @abstractmethod
    def rows_down(self, fired: float, kept: float) -> float:
        """Rows of down that are read: of the neurons that fired, or of the inputs kept there."""


STATED_DENSE: dict[str, Any] = {"recall": 1.0, "mass": 1.0, "density": 1.0, "lookahead": None, "heads": None}


def threshold_below(scores: Tensor, count: float) -> float:
    """A threshold that about `count` of the scores exceed."""
    target = round(count)
    if target >= scores.numel():
        return float(scores.min()) - 1.0
    ordered = scores.flatten().sort(descending=True).values
    return float(ordered[target]) if target > 0 else float(ordered[0])
