"""An adapter inside a whole-sequence forward pass: what decoding would leave out is masked, and what was kept is counted.

Letters: B batch  T tokens  F neurons  G key/value head groups  H query heads  K head_dim
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dejavu.model.counts import DensityCounter
from dejavu.model.selectors import MLP_POINTS, POINTS, InputPoints, LayerAdapter
from dejavu.model.transformer import Block, LayerInputs, Selection


class MaskedSelection(Selection):
    """The selections of an adapter applied as masks, token by token, inside a whole-sequence forward pass.

    sparse_BT marks the tokens that run sparse (all when None); the others run dense and are not counted. Decoding the
    same tokens one by one on an engine selects the same neurons and heads: a test holds the two together.
    """

    def __init__(self, layers: Sequence[LayerAdapter], sparse_BT: Tensor | None = None) -> None:
        self.layers = tuple(layers)
        self.sparse_BT = sparse_BT
        self.counter = DensityCounter(len(self.layers))
        self._norms: dict[int, dict[str, Tensor]] = {}  # by layer and point
        self._shares: dict[str, float] = {}  # by point, of the weights of its part

    def block_of(self, layer: int, own: Block) -> Block:
        block = self.layers[layer].block or own
        if layer not in self._norms:
            self._norms[layer] = self.layers[layer].inputs.norms(block)
            self._shares = dict(zip(POINTS, InputPoints.of(block.config).shares, strict=True))
        return block

    def inputs(self, layer: int, point: str, x: Tensor) -> Tensor:
        selector = self.layers[layer].inputs
        if not selector.selects:
            return x
        mask = selector.mask(point, x, self._norms[layer])
        totals_L = self.counter.mlp_L if point in MLP_POINTS else self.counter.heads_L
        self._count(totals_L, layer, mask, x.shape, self._shares[point])
        return x if mask is None else x * self._kept(mask).to(x.dtype)

    def heads(self, layer: int, inputs: LayerInputs, mixed_BTHK: Tensor) -> Tensor:
        own = self.layers[layer]
        mask_BTG = own.heads.mask(inputs)
        if not own.inputs.selects:
            self._count(self.counter.heads_L, layer, mask_BTG, mixed_BTHK.shape)
        if mask_BTG is None:
            return mixed_BTHK
        keep_BTH = self._kept(mask_BTG).repeat_interleave(mixed_BTHK.shape[-2] // mask_BTG.shape[-1], dim=-1)
        return mixed_BTHK * keep_BTH[..., None].to(mixed_BTHK.dtype)

    def neurons(self, layer: int, inputs: LayerInputs, act_BTF: Tensor) -> Tensor:
        own = self.layers[layer]
        mask_BTF = own.neurons.mask(inputs)
        if not own.inputs.selects:
            self._count(self.counter.mlp_L, layer, mask_BTF, act_BTF.shape)
        if layer == 0:
            self.counter.tokens += self._tokens(act_BTF.shape)
        return act_BTF if mask_BTF is None else act_BTF * self._kept(mask_BTF).to(act_BTF.dtype)

    def _kept(self, mask: Tensor) -> Tensor:
        """The mask, but for the tokens that run dense."""
        return mask if self.sparse_BT is None else mask | ~self.sparse_BT[..., None]

    def _tokens(self, shape: torch.Size) -> int:
        """How many count."""
        return shape[0] * shape[1] if self.sparse_BT is None else int(self.sparse_BT.sum())

    def _count(self, totals_L: list[float], layer: int, mask: Tensor | None, shape: torch.Size, share: float = 1.0) -> None:
        """Add `share` times what the mask keeps."""
        if mask is None:
            totals_L[layer] += share * self._tokens(shape)
        else:
            kept = mask if self.sparse_BT is None else mask & self.sparse_BT[..., None]
            totals_L[layer] += share * int(kept.sum()) / mask.shape[-1]
