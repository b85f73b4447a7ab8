"""The MLP of one token, dense and over a list of selected neurons. Tensors in, tensors out.

    a_F = activation(up_FD x_D + up_bias_F)                              (plain)
    a_F = activation(gate_FD x_D + gate_bias_F) * (up_FD x_D + up_bias_F)  (gated; some models activate the second factor too)
    y_D = sum over the selected neurons f of a_f down_FD[f], + down_bias_D

What selects may need the activated gate of every neuron, g_F = activation(gate_FD x_D + gate_bias_F) (of a plain MLP a_F itself): then
`gate_mlp` goes on from there.

`down_FD` holds a row per neuron, so that a neuron left out is one row of each matrix not read. With each function: the
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


def activated(up: Tensor, gate_product: Tensor | None, weights: MlpWeights) -> Tensor:
    """Activations from the products with up and gate (None where not gated), of any shape."""
    if gate_product is None:
        return activate(up, weights.activation, weights.activation_threshold)
    if weights.up_activation is not None:
        up = activate(up, weights.up_activation)
    return activate(gate_product, weights.activation, weights.activation_threshold) * up


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
    return weighted_rows(activated(up_A, gate_A, weights), weights.down_FD, weights.down_bias_D, idx_A)


def weighted_rows(value_A: Tensor, weight_IO: Tensor, bias_O: Tensor | None, idx_A: Tensor) -> Tensor:
    """The sum of the rows idx_A times their values, + bias: an embedding bag, one pass over the rows and no gathered copy of them."""
    start = torch.zeros(1, dtype=torch.int64, device=idx_A.device)
    y_O = F.embedding_bag(idx_A, weight_IO, start, mode="sum", per_sample_weights=value_A)[0]
    return y_O if bias_O is None else y_O + bias_O


def sparse_mlp_bytes(x_D: Tensor, weights: MlpWeights, idx_A: Tensor) -> int:
    return _mlp_bytes(weights, idx_A.numel()) + 2 * x_D.nbytes + idx_A.nbytes


def activated_gate(x_D: Tensor, weights: MlpWeights) -> Tensor:
    """g_F of every neuron."""
    gated = weights.gate_FD is not None
    weight_FD, bias_F = (weights.gate_FD, weights.gate_bias_F) if gated else (weights.up_FD, weights.up_bias_F)
    assert weight_FD is not None
    return activate(_rows(weight_FD, bias_F, x_D), weights.activation, weights.activation_threshold)


def activated_gate_bytes(x_D: Tensor, weights: MlpWeights) -> int:
    bias_F = weights.up_bias_F if weights.gate_FD is None else weights.gate_bias_F
    return weights.up_FD.nbytes + (0 if bias_F is None else bias_F.nbytes) + x_D.nbytes + weights.up_FD.shape[0] * x_D.element_size()


def gate_mlp(x_D: Tensor, gate_F: Tensor, weights: MlpWeights, idx_A: Tensor) -> Tensor:
    """y_D of the neurons idx_A, as `sparse_mlp`, from the activated gate. Reads rows of up and down alone; of a plain MLP of down."""
    assert idx_A.dtype == torch.int64, f"{idx_A.dtype=}"
    act_A = gate_F.index_select(0, idx_A)
    if weights.gate_FD is not None:
        up_A = _gathered_rows(weights.up_FD, weights.up_bias_F, x_D, idx_A)
        act_A = act_A * (up_A if weights.up_activation is None else activate(up_A, weights.up_activation))
    return weighted_rows(act_A, weights.down_FD, weights.down_bias_D, idx_A)


def gate_mlp_bytes(x_D: Tensor, gate_F: Tensor, weights: MlpWeights, idx_A: Tensor) -> int:
    of_gate = weights.up_FD.shape[1] + ((weights.up_bias_F if weights.gate_FD is None else weights.gate_bias_F) is not None)
    rows = _mlp_bytes(weights, idx_A.numel()) - idx_A.numel() * of_gate * weights.up_FD.element_size()
    return rows + 2 * x_D.nbytes + idx_A.nbytes + idx_A.numel() * gate_F.element_size()


def masked_gate_mlp(x_D: Tensor, gate_F: Tensor, weights: MlpWeights, idx_A: Tensor) -> Tensor:
    """The definition of `gate_mlp`: every neuron's activation, those of the other neurons set to zero."""
    act_F = gate_F
    if weights.gate_FD is not None:
        up_F = weights.up_FD @ x_D if weights.up_bias_F is None else weights.up_FD @ x_D + weights.up_bias_F
        act_F = gate_F * (up_F if weights.up_activation is None else activate(up_F, weights.up_activation))
    keep_F = torch.zeros_like(act_F).index_fill(0, idx_A, 1)
    y_D = (act_F * keep_F) @ weights.down_FD
    return y_D if weights.down_bias_D is None else y_D + weights.down_bias_D


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
