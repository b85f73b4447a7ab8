"""How far the student is from the teacher over a large vocabulary, without ever holding its logits: a chunk of tokens at a time, its
gradient at once.

In: last hidden states of both [N, D] and the head that they share [V, D], which is not trained. Out: the mean over tokens, differentiable
in the student's hidden states. With p and q the distributions of teacher and student, and m their mean, a token's divergence and its
gradient in the student's logits are

    forward   KL(p || q) = sum p (log p - log q)                  q - p
    reverse   KL(q || p) = sum q (log q - log p)                  q (log q - log p - KL(q || p))
    js        2 KL(p || m) + 2 KL(q || m)                         2 q (log q - log m - KL(q || m))

so a chunk's gradient needs nothing but what its value needs, and backward only scales it. js is four times Jensen-Shannon's: where p and q
are close, all three are then alike. Text is learned by the forward one, whatever is taken for what the student wrote itself: the
forward one makes it give weight to all that the teacher may say, the reverse one keeps it from saying what the teacher would not.

Letters: N tokens  D model  V vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 2**26  # logits that are held at a time: 0.27 GB in fp32, those of 512 tokens of 128k words
KINDS = ("forward", "reverse", "js")

Pair = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def chunk_tokens(tokens: int, vocabulary: int) -> int:
    """How many tokens a chunk has: all chunks alike, so that one shape is compiled, but for the last where they don't divide the tokens."""
    count = -(-tokens // max(1, CHUNK // vocabulary))
    return -(-tokens // count)


def divergence_and_gradient(
    student_ND: Tensor, teacher_ND: Tensor, head_VD: Tensor, own_N: Tensor, *, kind: str = "forward"
) -> tuple[Tensor, Tensor]:
    """The sums over tokens of text and over those that the student wrote [2], fp32, and the gradient of both [N, D] in its dtype.

    own_N: 1 for a token that the student wrote, whose divergence is of that kind; 0 for others, for which it is the forward one.
    """
    q_log_NV = F.linear(student_ND, head_VD).float().log_softmax(-1)
    p_log_NV = F.linear(teacher_ND, head_VD).float().log_softmax(-1)
    p_NV, q_NV = p_log_NV.exp(), q_log_NV.exp()
    value_N = (p_NV * (p_log_NV - q_log_NV)).sum(-1)
    gradient_NV = q_NV - p_NV
    if kind != "forward":
        m_log_NV = p_log_NV if kind == "reverse" else torch.logaddexp(p_log_NV, q_log_NV) - math.log(2)
        factor = 1.0 if kind == "reverse" else 2.0
        away_NV = q_log_NV - m_log_NV
        from_m_N = (q_NV * away_NV).sum(-1)
        own_value_N = from_m_N if kind == "reverse" else 2 * from_m_N + 2 * (p_NV * (p_log_NV - m_log_NV)).sum(-1)
        value_N = torch.where(own_N > 0, own_value_N, value_N)
        gradient_NV = torch.where(own_N[:, None] > 0, factor * q_NV * (away_NV - from_m_N[:, None]), gradient_NV)
    own = (value_N * own_N).sum()
    return torch.stack([value_N.sum() - own, own]), gradient_NV.to(student_ND.dtype) @ head_VD


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, student_ND: Tensor, teacher_ND: Tensor, head_VD: Tensor, own_N: Tensor, pair: Pair
    ) -> tuple[Tensor, Tensor]:
        total_2 = torch.zeros(2, device=student_ND.device)
        gradients = []
        parts = (each.split(chunk_tokens(len(student_ND), len(head_VD))) for each in (student_ND, teacher_ND, own_N))
        for student, teacher, own in zip(*parts, strict=True):
            value_2, gradient = pair(student, teacher, head_VD, own)
            total_2 += value_2
            gradients.append(gradient)
        ctx.save_for_backward(torch.cat(gradients))
        ctx.mark_non_differentiable(total_2)
        return total_2.sum() / len(student_ND), total_2

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient_ND,) = ctx.saved_tensors
        return gradient_ND * (upstream[0] / len(gradient_ND)).to(gradient_ND.dtype), None, None, None, None


def pair_of(kind: str) -> Pair:
    """divergence_and_gradient of a kind."""
    return partial(divergence_and_gradient, kind=kind)


def mean_divergence(
    student_ND: Tensor, teacher_ND: Tensor, head_VD: Tensor, own_N: Tensor | None = None, pair: Pair = divergence_and_gradient
) -> tuple[Tensor, Tensor]:
    """Mean divergence per token, fp32, and its sums over tokens of text and over the student's own [2]. own_N: see
    divergence_and_gradient (default: none is). pair: that function, perhaps compiled."""
    own_N = torch.zeros(len(student_ND), device=student_ND.device) if own_N is None else own_N
    value, sums_2 = _Divergence.apply(student_ND, teacher_ND, head_VD, own_N, pair)  # pyrefly: ignore[not-iterable]
    return value, sums_2
