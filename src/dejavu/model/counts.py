"""How much was selected: counts by layer as engines tell them, the densities that they are, and sums of densities over tokens.

In: numbers of neurons, query heads and kept inputs. Out: shares of the neurons and of the heads; where inputs are selected, of the
weights of the MLP and of attention. A part that selects nothing counts all of its own: density 1.

Letters: L layers  P points that read inputs (selectors.POINTS)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from dejavu.model.selectors import InputPoints


class Sizes(Protocol):
    """What there is to select from: EngineInfo is one."""

    @property
    def num_layers(self) -> int: ...
    @property
    def num_neurons(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def input_points(self) -> InputPoints | None: ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Counts:
    """What was selected, by layer: neurons and query heads [.., L], and inputs kept at each point [.., L, P].

    The leading axes are those of what was counted: rows, tokens, both or none. Counts are int64, means fp64. kept_inputs: all of them where
    a layer does not select there; None where no layer selects inputs.
    """

    neurons: Tensor
    heads: Tensor
    kept_inputs: Tensor | None = None

    def __getitem__(self, index: Any) -> Self:
        """Of some rows or tokens: an index of the leading axes."""
        return self._each(lambda part: part[index])

    def __eq__(self, other: object) -> bool:
        """The same numbers, on whatever devices they are."""
        if not isinstance(other, Counts) or (self.kept_inputs is None) != (other.kept_inputs is None):
            return False
        return all(torch.equal(mine, theirs) for mine, theirs in zip(self.cpu()._parts(), other.cpu()._parts(), strict=True))

    __hash__ = None  # pyrefly: ignore[bad-override]

    def cpu(self, *, non_blocking: bool = False) -> Self:
        return self._each(lambda part: part.to("cpu", non_blocking=non_blocking))

    def mean(self, dim: int = 0) -> Self:
        """Over one of the leading axes, fp64."""
        return self._each(lambda part: part.double().mean(dim))

    @classmethod
    def cat(cls, parts: Sequence[Counts], dim: int = 0) -> Self:
        """One after the other along one of the leading axes."""
        return cls._merged(parts, lambda tensors: torch.cat(tensors, dim))

    @classmethod
    def stack(cls, parts: Sequence[Counts]) -> Self:
        """With a new first axis."""
        return cls._merged(parts, torch.stack)

    def densities(self, sizes: Sizes) -> tuple[Tensor, Tensor]:
        """Of the MLP and of attention, fp64 [.., L].

        Of neurons and of heads, times the share of the weights that the kept inputs have them read.
        """
        mlp, attention = self.neurons.double() / sizes.num_neurons, self.heads.double() / sizes.num_heads
        if self.kept_inputs is None:
            return mlp, attention
        points = sizes.input_points
        assert points is not None, "inputs are counted where layers select them"
        size_P, share_P = (
            torch.tensor(values, dtype=torch.float64, device=self.kept_inputs.device) for values in (points.sizes, points.shares)
        )
        read = self.kept_inputs / size_P * share_P
        return mlp * read[..., 2:].sum(-1), attention * read[..., :2].sum(-1)

    def mean_densities(self, sizes: Sizes) -> list[tuple[float, float]]:
        """Of each row of counts [B, L], the densities of MLP and attention, means over the layers.

        A few numbers, so they are added up here: every tensor operation lets another thread take over, and waits for its turn again.
        """
        if self.kept_inputs is None:
            neurons, heads = sizes.num_layers * sizes.num_neurons, sizes.num_layers * sizes.num_heads
            counts = zip(self.neurons.tolist(), self.heads.tolist(), strict=True)
            return [(sum(neurons_L) / neurons, sum(heads_L) / heads) for neurons_L, heads_L in counts]
        mlp_B, heads_B = (density_BL.mean(-1).tolist() for density_BL in self.cpu().densities(sizes))
        return list(zip(mlp_B, heads_B, strict=True))

    def _parts(self) -> list[Tensor]:
        return [part for part in (self.neurons, self.heads, self.kept_inputs) if part is not None]

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        kept = None if self.kept_inputs is None else change(self.kept_inputs)
        return type(self)(neurons=change(self.neurons), heads=change(self.heads), kept_inputs=kept)

    @classmethod
    def _merged(cls, parts: Sequence[Counts], merge: Callable[[list[Tensor]], Tensor]) -> Self:
        inputs = [part.kept_inputs for part in parts if part.kept_inputs is not None]
        assert len(inputs) in (0, len(parts)), "inputs are counted in all parts or in none"
        return cls(
            neurons=merge([part.neurons for part in parts]),
            heads=merge([part.heads for part in parts]),
            kept_inputs=merge(inputs) if inputs else None,
        )


@dataclass(slots=True)
class DensityCounter:
    """Adds up what was selected, per layer, over the tokens that ran sparse or masked, as densities: see Counts.densities."""

    num_layers: int
    mlp_L: list[float] = field(init=False)
    heads_L: list[float] = field(init=False)
    tokens: int = 0

    def __post_init__(self) -> None:
        self.mlp_L = [0.0] * self.num_layers
        self.heads_L = [0.0] * self.num_layers

    def add(self, mlp_L: Sequence[float], heads_L: Sequence[float], tokens: int = 1) -> None:
        """The densities of a token, or their sums over so many tokens."""
        self.tokens += tokens
        self.mlp_L = [total + density for total, density in zip(self.mlp_L, mlp_L, strict=True)]
        self.heads_L = [total + density for total, density in zip(self.heads_L, heads_L, strict=True)]

    def mlp_density(self) -> float | None:
        """Selected / total neurons, averaged over all layers and counted tokens; None before the first token."""
        return sum(self.mlp_L) / (self.num_layers * self.tokens) if self.tokens else None

    def head_density(self) -> float | None:
        return sum(self.heads_L) / (self.num_layers * self.tokens) if self.tokens else None

    def mlp_per_layer(self) -> list[float]:
        return [value / max(self.tokens, 1) for value in self.mlp_L]

    def heads_per_layer(self) -> list[float]:
        return [value / max(self.tokens, 1) for value in self.heads_L]
