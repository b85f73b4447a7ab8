"""Layers that select inputs, for one token on the GPU: the products of what their points keep. What they read is in weights.py.

Letters: I inputs of a map  O outputs of a map  S shares of a list
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dejavu.engine.cuda.weights import InputLayer
from dejavu.kernels.cuda.inputs import KeptInputs, keep_activated, sum_inputs, sum_shares
from dejavu.kernels.cuda.select import order_list


class InputSums:
    """Products of lists of inputs, with the memory that they take. deterministic: their sums in a fixed order, for more kernels."""

    def __init__(self, widths: Sequence[int], up_width: int, largest: int, device: torch.device, *, deterministic: bool) -> None:
        """widths: outputs of the maps; up_width: those of gate and up together; largest: inputs of a point."""
        self._deterministic = deterministic
        self._up = torch.zeros(sum_shares(up_width, device), up_width, device=device)
        room = max(sum_shares(width, device) * width for width in widths) if deterministic else 0
        self._parts = torch.zeros(room, device=device)
        self._marks, self._ordered = torch.zeros(2, largest if deterministic else 0, dtype=torch.int32, device=device).unbind(0)

    def add(self, kept: KeptInputs, weight_IO: Tensor, bias_O: Tensor | None, out_O: Tensor, *, in_order: bool = False) -> None:
        """out_O, which holds zeros, becomes the product. in_order: the list is."""
        if not self._deterministic:
            sum_inputs(kept, kept.inputs, weight_IO, bias_O, out_O)
            return
        size = weight_IO.shape[1]
        shares = sum_shares(size, weight_IO.device)
        parts_SO = self._parts[: shares * size].view(shares, size)
        listed = kept.inputs
        if not in_order:
            order_list(kept.inputs, kept.count, self._marks[: kept.inputs.shape[0]], self._ordered)
            listed = self._ordered
        sum_inputs(kept, listed, weight_IO, bias_O, parts_SO, partial=True)
        torch.sum(parts_SO, 0, out=out_O)

    def activated(self, layer: InputLayer, activation: str, activation_threshold: float) -> None:
        """From the inputs kept at the MLP to those kept at down: products, by share so that nothing needs to be zero before, then the
        activation of their sums."""
        sum_inputs(layer.points["mlp"], layer.points["mlp"].inputs, layer.up, layer.up_bias, self._up, partial=True)
        gated = layer.up.shape[1] == 2 * layer.points["down"].x.shape[0]
        keep_activated(self._up, layer.points["down"], activation, activation_threshold, gated=gated)
