"""The screened head: low-rank scores choose a shortlist of the vocabulary, which alone gets exact logits. The plain definition.

In: the matrix of the head, hidden states. Out: A [R, E] and B [V, R] of the best approximation of rank R, and logits with

    shortlist = the N largest of B (A x), of equal ones the first        logits_v = head_v x for v in the shortlist, else -inf

A's rows are the R right singular vectors of the head with the largest singular values, B = head A^T. Rows of the shortlist are
what top-k sampling over it would leave: an estimate among exact logits would let a token be drawn for the estimate's error.

Letters: V vocabulary  E width of the head  R rank  N tokens of the shortlist
"""

from __future__ import annotations

import torch
from torch import Tensor

RANK_SHARE, RANK_STEP = 3, 64


def screen_rank(width: int) -> int:
    """A third of the head's width, in whole steps, at most all of it."""
    return min(width, -(-width // (RANK_SHARE * RANK_STEP)) * RANK_STEP)


def low_rank(head_VE: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [R, E] and B [V, R] fp32: B A is the best approximation of the head of that rank."""
    gram_EE = torch.zeros(2 * (head_VE.shape[1],), dtype=torch.float64)
    for part_PE in head_VE.split(1 << 14):
        wide_PE = part_PE.double()
        gram_EE += wide_PE.T @ wide_PE
    A_RE = torch.linalg.eigh(gram_EE).eigenvectors[:, -rank:].flip(1).T.float().contiguous()
    return A_RE, head_VE.float() @ A_RE.T


def screened_logits(x_E: Tensor, head_VE: Tensor, A_RE: Tensor, B_VR: Tensor, count: int) -> Tensor:
    """Logits [V] of one hidden state with a shortlist of `count` tokens."""
    logits_V = head_VE @ x_E
    chosen_N = (B_VR @ (A_RE @ x_E)).sort(descending=True, stable=True).indices[:count]
    return torch.full_like(logits_V, -torch.inf).index_copy(0, chosen_N, logits_V[chosen_N])
