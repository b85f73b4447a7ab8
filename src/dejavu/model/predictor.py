"""Predictors: which neurons and heads a token needs, from an input that exists before they are needed.

In: an input x [.., D] of the layer (which one is the predictor's lookahead). Out: scores [.., O] = B (A x) + b and the
selection not (scores <= threshold), so that NaN is kept and seen in the output, O being the neurons F of an MLP or the key/value head
groups G of an attention block. selectors/predicted.py selects with them. Source: Deja Vu, section 4 (arXiv 2310.17157).

Letters: D model  R predictor rank  O outputs (neurons F, or head groups G)
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from dejavu.kernels.quantized import Matrix, wide
from dejavu.model.transformer import LayerInputs

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
    """Low-rank scorer. A_RD [R, D], B_OR [O, R] fp32 or, as adapters store them, int8; bias_O [O] fp32, on one device; threshold and
    lookahead as above."""

    A_RD: Matrix
    B_OR: Matrix
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
        return (x.float() @ wide(self.A_RD).T) @ wide(self.B_OR).T + self.bias_O

    def neuron_mask(self, x: Tensor) -> Tensor:
        """Boolean [.., F]: the neurons whose score exceeds the threshold; may be none. A score that is NaN selects."""
        return ~(self.scores(x) <= self.threshold)

    def group_mask(self, x: Tensor) -> Tensor:
        """Boolean [.., G]: the head groups whose score exceeds the threshold, and always the best one."""
        scores = self.scores(x)
        best = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.argmax(-1, keepdim=True), True)
        return ~(scores <= self.threshold) | best
