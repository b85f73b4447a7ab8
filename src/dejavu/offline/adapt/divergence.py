"""KL(teacher || student) over a large vocabulary without ever holding its logits: a chunk of tokens at a time, its gradient at once.

In: last hidden states of both [N, D] and the head that they share [V, D], which is not trained. Out: the mean over tokens, differentiable
in the student's hidden states. With p and q the two distributions of a token,

    KL = sum_v p_v (log p_v - log q_v)        dKL / dh = (q - p) head

so a chunk's gradient needs nothing but what its value needs, and backward only scales it.

Letters: N tokens  D model  V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 4096  # tokens: their logits are 0.4 GB in bf16 for 49152 words

Pair = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def divergence_and_gradient(student_ND: Tensor, teacher_ND: Tensor, head_VD: Tensor) -> tuple[Tensor, Tensor]:
    """The sum over tokens of KL(teacher || student), fp32, and its gradient [N, D] in the dtype of the student."""
    student_NV = F.linear(student_ND, head_VD).float().log_softmax(-1)
    teacher_NV = F.linear(teacher_ND, head_VD).float().log_softmax(-1)
    p_NV = teacher_NV.exp()
    total = (p_NV * (teacher_NV - student_NV)).sum()
    return total, (student_NV.exp() - p_NV).to(student_ND.dtype) @ head_VD


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student_ND: Tensor, teacher_ND: Tensor, head_VD: Tensor, pair: Pair) -> Tensor:  # type: ignore[override]
        total = torch.zeros((), device=student_ND.device)
        gradients = []
        for student, teacher in zip(student_ND.split(CHUNK), teacher_ND.split(CHUNK), strict=True):
            value, gradient = pair(student, teacher, head_VD)
            total += value
            gradients.append(gradient)
        ctx.save_for_backward(torch.cat(gradients))
        return total / len(student_ND)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient_ND,) = ctx.saved_tensors
        return gradient_ND * (upstream[0] / len(gradient_ND)).to(gradient_ND.dtype), None, None, None


def mean_divergence(student_ND: Tensor, teacher_ND: Tensor, head_VD: Tensor, pair: Pair = divergence_and_gradient) -> Tensor:
    """Mean KL(teacher || student) per token, fp32. pair: divergence_and_gradient, perhaps compiled."""
    value = _Divergence.apply(student_ND, teacher_ND, head_VD, pair)
    assert isinstance(value, Tensor)
    return value
