"""Inputs of every linear map, by their own values.

An input x_i is kept where |x_i| n_i exceeds the threshold of its point, n_i being the norm of column i over all maps that read x
there; only columns of kept inputs are read. Sources: TEAL (arXiv 2408.14690), WINA (arXiv 2505.19427).

Letters: D model  F neurons  N = query heads x head_dim  I inputs of a map
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from dejavu.config import Config, ModelConfig, require, require_shares, shown
from dejavu.kernels.quantized import Matrix, wide
from dejavu.model.selectors.selector import HeadSelector, InputSelector, Scoring, threshold_below
from dejavu.model.transformer import Block

POINTS = ("attention", "output", "mlp", "down")  # inputs of q, k, v; of o; of gate and up; of down
MLP_POINTS = POINTS[2:]


@dataclass(frozen=True, kw_only=True, slots=True)
class InputConfig(Config):
    """The threshold of the inputs at one point, and the fraction of them that it keeps on held-out text."""

    threshold: float
    density: float

    def __post_init__(self) -> None:
        require_shares(density=self.density)


@dataclass(frozen=True, kw_only=True, slots=True)
class InputsConfig(Config):
    """The points of one layer; None where all inputs are kept."""

    attention: InputConfig | None = None
    output: InputConfig | None = None
    mlp: InputConfig | None = None
    down: InputConfig | None = None

    def __post_init__(self) -> None:
        require(any(self.of(point) is not None for point in POINTS), f"inputs without a threshold; name one of {', '.join(POINTS)}")
        self.thresholds()

    def of(self, point: str) -> InputConfig | None:
        return getattr(self, point)

    def thresholds(self) -> InputThresholds:
        return InputThresholds(**{point: config.threshold for point in POINTS if (config := self.of(point)) is not None})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        require(isinstance(values, Mapping), f"inputs must be an object, not {shown(values)}")
        points = {point: InputConfig.from_dict(values[point]) for point in POINTS if isinstance(values.get(point), Mapping)}
        return super(InputsConfig, cls).from_dict({**values, **points})


@dataclass(frozen=True, slots=True, kw_only=True)
class InputThresholds(InputSelector):
    """Of one layer, by point; None keeps every input there."""

    attention: float | None = None
    output: float | None = None
    mlp: float | None = None
    down: float | None = None
    method: ClassVar[str | None] = "input"
    key: ClassVar[str] = "inputs"
    entry_type: ClassVar[type[Config]] = InputsConfig
    columns: ClassVar[tuple[str, ...]] = POINTS
    about: ClassVar[str] = (
        "Thresholds on the inputs of every linear map of `{base}`, times the norms of their columns: columns of the others are\n"
        "not read (TEAL, arXiv 2408.14690; WINA, arXiv 2505.19427). Densities are of weights."
    )

    def __post_init__(self) -> None:
        for point in POINTS:
            threshold = self.of(point)
            ok = threshold is None or 0 <= threshold < math.inf
            require(ok, f"the threshold of the {point} inputs must be 0 or more, not {threshold}")

    def of(self, point: str) -> float | None:
        return getattr(self, point)

    @property
    def by_value(self) -> bool:
        return True

    def check(self, layer: int, config: ModelConfig) -> None:
        chosen = any(self.of(point) is not None for point in POINTS)
        require(chosen, f"layer {layer} selects inputs and has a threshold at none of its points; leave its inputs out, it is dense")

    def norms(self, block: Block) -> dict[str, Tensor]:
        return column_norms(block)

    def mask(self, point: str, x: Tensor, norms: Mapping[str, Tensor]) -> Tensor | None:
        threshold = self.of(point)
        return None if threshold is None else input_mask(x, norms[point], threshold)

    def at_density(self, point: str, x: Tensor, norms: Mapping[str, Tensor], density: float) -> Self:
        weighed = x.float().abs() * norms[point]
        return dataclasses.replace(self, **{point: max(0.0, threshold_below(weighed, density * weighed.numel()))})

    def attention_reads(self, config: ModelConfig, heads: HeadSelector, density: float, cached_tokens: int) -> float:
        """density: of the weights of q, k, v and o. The norms of all points count here."""
        weights = sum(input_reads(config, point, None) for point in ("attention", "output"))
        return density * weights + 2 * config.num_kv_heads * config.head_dim * cached_tokens + self.scoring(config).values

    def rows_down(self, fired: float, kept: float) -> float:
        return kept

    def scoring(self, config: ModelConfig) -> Scoring:
        sizes = zip(POINTS, InputPoints.of(config).sizes, strict=True)
        return Scoring(values=sum(size for point, size in sizes if self.of(point) is not None))

    def difference(self, entry: InputsConfig) -> str | None:
        return None if entry.thresholds() == self else "config and thresholds differ"

    @classmethod
    def read(cls, entry: InputsConfig, layer: int, tensors: dict[str, Tensor], model: ModelConfig, path: Path) -> Self:
        return cls(**dataclasses.asdict(entry.thresholds()))

    @classmethod
    def cells(cls, entry: InputsConfig) -> dict[str, str]:
        kept = {point: at for point in POINTS if (at := entry.of(point)) is not None}
        return {point: f"density {at.density:.3f}, threshold {at.threshold:.4g}" for point, at in kept.items()}

    @classmethod
    def stated(cls, entry: InputsConfig, model: ModelConfig) -> dict[str, Any]:
        points = {point: 1.0 if (at := entry.of(point)) is None else at.density for point in POINTS}
        shares = dict(zip(POINTS, InputPoints.of(model).shares, strict=True))
        attention, mlp = (sum(shares[point] * points[point] for point in half) for half in (POINTS[:2], MLP_POINTS))
        return {"recall": None, "density": mlp, "mass": None, "attention": attention, "inputs": points}


@torch.no_grad()
def column_norms(block: Block) -> dict[str, Tensor]:
    """n_I of every point, fp32 on the block's device: attention [D], output [N], mlp [D], down [F]."""

    def of(*matrices_OI: Matrix) -> Tensor:
        return torch.stack([wide(matrix).float().square().sum(0) for matrix in matrices_OI]).sum(0).sqrt()

    mlp = [block.up.matrix] if block.gate is None else [block.gate.matrix, block.up.matrix]
    return {
        "attention": of(block.q.matrix, block.k.matrix, block.v.matrix),
        "output": of(wide(block.o.matrix).T),  # o and down hold a row per input
        "mlp": of(*mlp),
        "down": of(wide(block.down.matrix).T),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class InputPoints:
    """What every layer of a model has at the points, in the order of POINTS.

    sizes: inputs. shares: of the weights of the point's part (attention, MLP), those of the maps that read there.
    """

    sizes: tuple[int, ...]
    shares: tuple[float, ...]

    @classmethod
    def of(cls, config: ModelConfig) -> InputPoints:
        heads, neurons, size = config.num_heads * config.head_dim, config.intermediate_size, config.hidden_size
        read_in, matrices = config.num_heads + 2 * config.num_kv_heads, 3 if config.gated else 2
        attention = read_in / (read_in + config.num_heads)
        shares = (attention, 1 - attention, 1 - 1 / matrices, 1 / matrices)
        return cls(sizes=(size, heads, size, neurons), shares=shares)


def input_mask(x: Tensor, norm_I: Tensor, threshold: float) -> Tensor:
    """Boolean [.., I]: the inputs that are kept, NaN among them."""
    return ~(x.float().abs() * norm_I <= threshold)


def input_reads(config: ModelConfig, point: str, density: float | None) -> float:
    """Weights that a token reads at a point, and the norms of its columns; None: all, without norms."""
    heads, groups, size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim, config.hidden_size
    inputs, outputs = {
        "attention": (size, heads + 2 * groups),
        "output": (heads, size),
        "mlp": (size, config.intermediate_size * (2 if config.gated else 1)),
        "down": (config.intermediate_size, size),
    }[point]
    return inputs * outputs if density is None else density * inputs * outputs + inputs
