"""The MLP of one token, dense and over a list of selected neurons. Tensors in, tensors out.

    a_F = activation(up_FD x_D + up_bias_F)                              (plain)
    a_F = activation(gate_FD x_D + gate_bias_F) * (up_FD x_D + up_bias_F)  (gated; some models activate the second factor too)
    y_D = sum over the selected neurons f of a_f down_FD[f], + down_bias_D

`down_FD` holds a row per neuron, so that a neuron left out is one row of each matrix not read. Beside each function: the
bytes that any implementation of it has to move.

Letters: D model  F neurons  A selected neurons
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dejavu.kernels.activation import activate


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpWeights:
    """The matrices of one MLP: up_FD, gate_FD (None where not gated) and down_FD [F, D], biases or None, the activation."""

    up_FD: Tensor
    down_FD: Tensor
    gate_FD: Tensor | None = None
    up_bias_F: Tensor | None = None
    gate_bias_F: Tensor | None = None
    down_bias_D: Tensor | None = None
    activation: str = "relu"
    activation_threshold: float = 0.0
    up_activation: str | None = None


def activated(up: Tensor, gate: Tensor | None, weights: MlpWeights) -> Tensor:
    """Activations from the products with up and gate (None where not gated), of any shape."""
    if gate is None:
        return activate(up, weights.activation, weights.activation_threshold)
    if weights.up_activation is not None:
        up = activate(up, weights.up_activation)
    return activate(gate, weights.activation, weights.activation_threshold) * up


def _rows(weight_FD: Tensor, bias_F: Tensor | None, x_D: Tensor) -> Tensor:
    return torch.mv(weight_FD, x_D) if bias_F is None else torch.addmv(bias_F, weight_FD, x_D)


def _gathered_rows(weight_FD: Tensor, bias_F: Tensor | None, x_D: Tensor, idx_A: Tensor) -> Tensor:
    return _rows(weight_FD.index_select(0, idx_A), None if bias_F is None else bias_F.index_select(0, idx_A), x_D)


def dense_mlp(x_D: Tensor, weights: MlpWeights) -> Tensor:
    """y_D of every neuron."""
    up_F = _rows(weights.up_FD, weights.up_bias_F, x_D)
    gate_F = None if weights.gate_FD is None else _rows(weights.gate_FD, weights.gate_bias_F, x_D)
    act_F = activated(up_F, gate_F, weights)
    return _rows(weights.down_FD.t(), weights.down_bias_D, act_F)


def dense_mlp_bytes(x_D: Tensor, weights: MlpWeights) -> int:
    return _mlp_bytes(weights, weights.up_FD.shape[0]) + 2 * x_D.nbytes


def sparse_mlp(x_D: Tensor, weights: MlpWeights, idx_A: Tensor) -> Tensor:
    """y_D of the neurons idx_A (int64 [A], each at most once, in any order). Reads their rows alone.

    No neuron: exactly the down bias, or zeros.
    """
    assert idx_A.dtype == torch.int64, f"{idx_A.dtype=}"
    up_A = _gathered_rows(weights.up_FD, weights.up_bias_F, x_D, idx_A)
    gate_A = None if weights.gate_FD is None else _gathered_rows(weights.gate_FD, weights.gate_bias_F, x_D, idx_A)
    act_A = activated(up_A, gate_A, weights)
    # A weighted sum of rows is an embedding bag: one pass over them, no gathered copy of down.
    start = torch.zeros(1, dtype=torch.int64, device=idx_A.device)
    y_D = F.embedding_bag(idx_A, weights.down_FD, start, mode="sum", per_sample_weights=act_A)[0]
    return y_D if weights.down_bias_D is None else y_D + weights.down_bias_D


def sparse_mlp_bytes(x_D: Tensor, weights: MlpWeights, idx_A: Tensor) -> int:
    return _mlp_bytes(weights, idx_A.numel()) + 2 * x_D.nbytes + idx_A.nbytes


def masked_mlp(x_D: Tensor, weights: MlpWeights, idx_A: Tensor) -> Tensor:
    """The definition of `sparse_mlp`: the dense MLP with the activations of the other neurons set to zero."""
    up_F = weights.up_FD @ x_D
    if weights.up_bias_F is not None:
        up_F = up_F + weights.up_bias_F
    gate_F = None if weights.gate_FD is None else weights.gate_FD @ x_D
    if gate_F is not None and weights.gate_bias_F is not None:
        gate_F = gate_F + weights.gate_bias_F
    act_F = activated(up_F, gate_F, weights)
    keep_F = torch.zeros_like(act_F).index_fill(0, idx_A, 1)
    y_D = (act_F * keep_F) @ weights.down_FD
    return y_D if weights.down_bias_D is None else y_D + weights.down_bias_D


def _mlp_bytes(weights: MlpWeights, neurons: int) -> int:
    """Bytes of the rows and biases of that many neurons, and of the down bias."""
    up_FD = weights.up_FD
    matrices = 2 if weights.gate_FD is None else 3
    biases = sum(bias is not None for bias in (weights.up_bias_F, weights.gate_bias_F))
    down_bias = 0 if weights.down_bias_D is None else weights.down_bias_D.nbytes
    return neurons * (matrices * up_FD.shape[1] + biases) * up_FD.element_size() + down_bias
