"""Predictors: which neurons and heads a token needs, from an input that exists before they are needed.

In: an input x [.., D] of the layer (which one is the predictor's lookahead). Out: scores [.., O] = B (A x) + b and the
selection scores > threshold, O being the neurons F of an MLP or the key/value head groups G of an attention block.
An `Adapter` holds the predictors of every layer; `MaskedSelection` applies one inside a whole-sequence forward pass and
counts what it kept. Source: Deja Vu, section 4 (arXiv 2310.17157).

Letters: B batch  T tokens  D model  R predictor rank  O outputs (neurons F, or head groups G)  H query heads  K head_dim
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from dejavu.model.counts import DensityCounter
from dejavu.model.selectors import POINTS, GateThreshold, InputPoints, InputThresholds, column_norms, input_mask
from dejavu.model.transformer import Block, LayerInputs, Selection

MLP_LOOKAHEADS = (0, 1, 2)
HEAD_LOOKAHEADS = (0, 1)


def mlp_predictor_input(inputs: LayerInputs, lookahead: int) -> Tensor:
    """The input that an MLP predictor reads: 0 the MLP's own, 1 the attention block's, 2 the previous layer's MLP's."""
    chosen = (inputs.mlp, inputs.attention, inputs.previous_mlp)[lookahead]
    assert chosen is not None, f"{lookahead=} reads an input that this layer does not have"
    return chosen


def head_predictor_input(inputs: LayerInputs, lookahead: int) -> Tensor:
    """The input that a head predictor reads: 0 the attention block's own, 1 the previous layer's MLP's."""
    chosen = (inputs.attention, inputs.previous_mlp)[lookahead]
    assert chosen is not None, f"{lookahead=} reads an input that this layer does not have"
    return chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictor:
    """Low-rank scorer. A_RD [R, D], B_OR [O, R], bias_O [O], all fp32 on one device; threshold and lookahead as above."""

    A_RD: Tensor
    B_OR: Tensor
    bias_O: Tensor
    threshold: float
    lookahead: int

    def __repr__(self) -> str:
        (rank, inputs), outputs = self.A_RD.shape, len(self.bias_O)
        return f"Predictor({inputs} -> {rank} -> {outputs}, threshold={self.threshold:.4g}, lookahead={self.lookahead})"

    def to(self, device: torch.device) -> Predictor:
        """The predictor on that device; itself where it is there already."""
        if self.A_RD.device == device:
            return self
        moved = {name: getattr(self, name).to(device) for name in ("A_RD", "B_OR", "bias_O")}
        return dataclasses.replace(self, **moved)

    def scores(self, x: Tensor) -> Tensor:
        """Scores [.., O] in fp32 of inputs x [.., D] in any float dtype."""
        return (x.float() @ self.A_RD.T) @ self.B_OR.T + self.bias_O

    def neuron_mask(self, x: Tensor) -> Tensor:
        """Boolean [.., F]: the neurons whose score exceeds the threshold; may be none."""
        return self.scores(x) > self.threshold

    def group_mask(self, x: Tensor) -> Tensor:
        """Boolean [.., G]: the head groups whose score exceeds the threshold, and always the best one."""
        scores = self.scores(x)
        best = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.argmax(-1, keepdim=True), True)
        return (scores > self.threshold) | best


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerAdapter:
    """How one layer selects: with predictors (None where the part runs dense), by its gate, or by inputs (selectors.py).

    gate stands in the place of mlp; inputs stands alone. block: the layer's weights while it runs with this adapter, where
    the adapter changes them (see lora.py); None: the model's own.
    """

    mlp: Predictor | None = None
    heads: Predictor | None = None
    gate: GateThreshold | None = None
    inputs: InputThresholds | None = None
    block: Block | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        assert self.mlp is None or self.gate is None, "neurons are selected in one way"
        assert self.inputs is None or (self.mlp, self.heads, self.gate) == (None, None, None), "inputs are selected alone"

    @property
    def methods(self) -> tuple[str, ...]:
        """How anything is selected here: predicted, gate (of which "exact" is the one with a threshold of 0), input."""
        predicts = self.mlp is not None or self.heads is not None
        found = (("predicted", predicts), ("gate", self.gate is not None), ("input", self.inputs is not None))
        return tuple(method for method, there in found if there)

    @property
    def sparse(self) -> bool:
        """Whether anything is selected here."""
        return bool(self.methods)

    def to(self, device: torch.device) -> LayerAdapter:
        """Both predictors on that device; a block is where its model is."""
        mlp, heads = (None if predictor is None else predictor.to(device) for predictor in (self.mlp, self.heads))
        return dataclasses.replace(self, mlp=mlp, heads=heads)


class MaskedSelection(Selection):
    """The selections of an adapter applied as masks, token by token, inside a whole-sequence forward pass.

    sparse_BT marks the tokens that run sparse (all when None); the others run dense and are not counted. Decoding the
    same tokens one by one on an engine selects the same neurons and heads: a test holds the two together.
    """

    def __init__(self, layers: tuple[LayerAdapter, ...], sparse_BT: Tensor | None = None) -> None:
        self.layers = layers
        self.sparse_BT = sparse_BT
        self.counter = DensityCounter(len(layers))
        self._norms: dict[int, dict[str, Tensor]] = {}  # of layers that select inputs, by point
        self._shares: dict[int, dict[str, float]] = {}

    def _count(self, totals_L: list[float], layer: int, mask: Tensor | None, shape: torch.Size, share: float = 1.0) -> int:
        """Add `share` times what the mask keeps; the number of tokens that count."""
        sparse = self.sparse_BT
        tokens = shape[0] * shape[1] if sparse is None else int(sparse.sum())
        if mask is None:
            totals_L[layer] += share * tokens
        else:
            kept = mask if sparse is None else mask & sparse[..., None]
            totals_L[layer] += share * int(kept.sum()) / mask.shape[-1]
        return tokens

    def block_of(self, layer: int, own: Block) -> Block:
        block = self.layers[layer].block or own
        if self.layers[layer].inputs is not None and layer not in self._norms:
            self._norms[layer] = column_norms(block)
            self._shares[layer] = dict(zip(POINTS, InputPoints.of(block.config).shares, strict=True))
        return block

    def inputs(self, layer: int, point: str, x: Tensor) -> Tensor:
        thresholds = self.layers[layer].inputs
        if thresholds is None:
            return x
        threshold = thresholds.of(point)
        mask = None if threshold is None else input_mask(x, self._norms[layer][point], threshold)
        totals_L = self.counter.mlp_L if point in ("mlp", "down") else self.counter.heads_L
        self._count(totals_L, layer, mask, x.shape, self._shares[layer][point])
        if mask is None:
            return x
        keep = mask if self.sparse_BT is None else mask | ~self.sparse_BT[..., None]
        return x * keep.to(x.dtype)

    def heads(self, layer: int, inputs: LayerInputs, mixed_BTHK: Tensor) -> Tensor:
        predictor = self.layers[layer].heads
        if predictor is None:
            if self.layers[layer].inputs is None:
                self._count(self.counter.heads_L, layer, None, mixed_BTHK.shape)
            return mixed_BTHK
        mask_BTG = predictor.group_mask(head_predictor_input(inputs, predictor.lookahead))
        self._count(self.counter.heads_L, layer, mask_BTG, mixed_BTHK.shape)
        keep_BTG = mask_BTG if self.sparse_BT is None else mask_BTG | ~self.sparse_BT[..., None]
        heads_per_group = mixed_BTHK.shape[-2] // keep_BTG.shape[-1]
        keep_BTH = keep_BTG.repeat_interleave(heads_per_group, dim=-1)
        return mixed_BTHK * keep_BTH[..., None].to(mixed_BTHK.dtype)

    def neurons(self, layer: int, inputs: LayerInputs, act_BTF: Tensor) -> Tensor:
        selector = self.layers[layer]
        mask_BTF = self.neuron_mask(layer, inputs)
        tokens = self._count(self.counter.mlp_L, layer, mask_BTF, act_BTF.shape, 0.0 if selector.inputs is not None else 1.0)
        if layer == 0:
            self.counter.tokens += tokens
        if mask_BTF is None:
            return act_BTF
        keep_BTF = mask_BTF if self.sparse_BT is None else mask_BTF | ~self.sparse_BT[..., None]
        return act_BTF * keep_BTF.to(act_BTF.dtype)

    def neuron_mask(self, layer: int, inputs: LayerInputs) -> Tensor | None:
        """Boolean [B, T, F]: the neurons that a layer keeps; None: all."""
        selector = self.layers[layer]
        if selector.gate is not None:
            assert inputs.gate is not None
            return selector.gate.mask(inputs.gate)
        return None if selector.mlp is None else selector.mlp.neuron_mask(mlp_predictor_input(inputs, selector.mlp.lookahead))
