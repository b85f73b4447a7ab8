"""Activation functions of the MLP. In: pre-activations of any shape. Out: the same shape.

relu(x) = max(x, 0); relu2(x) = relu(x)^2; fatrelu(x) = 0 if x <= t else x (ProSparse); silu(x) = x sigmoid(x). NaN stays NaN.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATION_CODES = {"relu": 0, "relu2": 1, "fatrelu": 2, "silu": 3, "gelu": 4, "gelu_tanh": 5}  # in native/dejavu_native.h and kernels/cuda


def activate(x: Tensor, name: str, threshold: float = 0.0) -> Tensor:
    """Apply the activation called `name` (a value of ModelConfig.activation) elementwise."""
    match name:
        case "relu":
            return F.relu(x)
        case "relu2":
            return F.relu(x).square()
        case "fatrelu":
            return torch.where(x <= threshold, torch.zeros_like(x), x)
        case "silu":
            return F.silu(x)
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
    raise AssertionError(f"{name=} was not checked by ModelConfig")
