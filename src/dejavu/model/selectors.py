"""Selection without a predictor: by the gate's own values, or by the inputs of every linear map.

gate    a neuron is kept where its activated gate |act(gate x)| (of an ungated MLP: |act(up x)|) exceeds the layer's threshold. The
        gate is computed for every neuron; rows of up and down are read for those kept. Threshold 0 is the method "exact": what it
        leaves out are true zeros. Source: CATS (arXiv 2404.08763).
input   an input x_i is kept where |x_i| n_i exceeds the threshold of its point, n_i being the norm of column i over all maps
        that read x there; only columns of kept inputs are read. Sources: TEAL (arXiv 2408.14690), WINA (arXiv 2505.19427).

In: values of a layer. Out: boolean masks. Both look at the token itself and at nothing that is trained.

Letters: D model  F neurons  N = query heads x head_dim  I inputs of a map
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dejavu.config import ModelConfig, require
from dejavu.model.transformer import Block

POINTS = ("attention", "output", "mlp", "down")  # inputs of q, k, v; of o; of gate and up; of down


@dataclass(frozen=True, slots=True, kw_only=True)
class GateThreshold:
    """Of one layer. Raises ValueError where the threshold is negative or no number."""

    threshold: float

    def __post_init__(self) -> None:
        require(0 <= self.threshold < math.inf, f"a gate's threshold must be 0 or more, not {self.threshold}")

    def mask(self, gate: Tensor) -> Tensor:
        """Boolean, of activated gates of any shape."""
        return gate.abs() > self.threshold


@dataclass(frozen=True, slots=True, kw_only=True)
class InputThresholds:
    """Of one layer, by point; None keeps every input there."""

    attention: float | None = None
    output: float | None = None
    mlp: float | None = None
    down: float | None = None

    def __post_init__(self) -> None:
        for point, threshold in dataclasses.asdict(self).items():
            ok = threshold is None or 0 <= threshold < math.inf
            require(ok, f"the threshold of the {point} inputs must be 0 or more, not {threshold}")

    def of(self, point: str) -> float | None:
        return getattr(self, point)


@torch.no_grad()
def column_norms(block: Block) -> dict[str, Tensor]:
    """n_I of every point, fp32 on the block's device: attention [D], output [N], mlp [D], down [F]."""

    def of(*weights_OI: Tensor) -> Tensor:
        return torch.stack([weight.float().square().sum(0) for weight in weights_OI]).sum(0).sqrt()

    mlp = [block.up.weight] if block.gate is None else [block.gate.weight, block.up.weight]
    return {
        "attention": of(block.q.weight, block.k.weight, block.v.weight),
        "output": of(block.o.weight.T),  # o and down hold a row per input
        "mlp": of(*mlp),
        "down": of(block.down.weight.T),
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
    """Boolean [.., I]: the inputs that are kept."""
    return x.float().abs() * norm_I > threshold
