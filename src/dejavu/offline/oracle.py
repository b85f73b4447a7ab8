"""Selections that know the answer: the neurons or heads that carry most of a token's contribution, found after computing all.

They bound what any predictor can reach. A neuron's contribution is |activation| x |down row|, a head's the norm of what it
adds to the residual stream.

Letters: B batch  T tokens  F neurons  H query heads  K head_dim  O candidates (neurons or heads)
"""

from __future__ import annotations

import torch
from torch import Tensor

from dejavu.model.counts import DensityCounter
from dejavu.model.transformer import LayerInputs, Selection, Transformer
from dejavu.offline.collect import down_norms, group_norms


def mass_mask(contribution_O: Tensor, mass: float) -> Tensor:
    """Boolean [.., O]: the fewest candidates whose contributions add up to at least `mass` of the total."""
    values, order = contribution_O.sort(-1, descending=True)
    before = values.cumsum(-1) - values
    keep = (before < mass * values.sum(-1, keepdim=True)) & (values > 0)
    return torch.zeros_like(keep).scatter(-1, order, keep)


class OracleNeurons(Selection):
    """Keeps, per token, the neurons that carry `mass` of the contribution of their layer."""

    def __init__(self, model: Transformer, mass: float) -> None:
        self.norms_LF = [down_norms(block) for block in model.blocks]
        self.mass = mass
        self.counter = DensityCounter(model.config.num_layers)

    def neurons(self, layer: int, inputs: LayerInputs, act_BTF: Tensor) -> Tensor:
        keep = mass_mask(act_BTF.abs().float() * self.norms_LF[layer], self.mass)
        self.counter.mlp_L[layer] += float(keep.sum()) / keep.shape[-1]
        self.counter.tokens += keep.shape[0] * keep.shape[1] if layer == 0 else 0
        return act_BTF * keep.to(act_BTF.dtype)


class OracleHeads(Selection):
    """Keeps, per token, the `count` heads of each layer that contribute most."""

    def __init__(self, model: Transformer, count: int) -> None:
        self.model, self.count = model, count

    def heads(self, layer: int, inputs: LayerInputs, mixed_BTHK: Tensor) -> Tensor:
        norms_BTH = group_norms(self.model.blocks[layer], mixed_BTHK, self.model.config.num_heads)
        keep = torch.zeros_like(norms_BTH).scatter(-1, norms_BTH.topk(self.count, -1).indices, 1.0)
        return mixed_BTHK * keep[..., None].to(mixed_BTHK.dtype)
