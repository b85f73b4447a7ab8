"""The attention of one token, over all head groups or selected ones. Tensors in, tensors out.

A group is one key/value head with the R query heads that share it. For a group g and its query heads h
    q_h = Q_h x;   m_h = softmax(cap(scale q_h k_g^T)) v_g;   y_D = sum over the selected h of m_h O_h, + bias
scale is 1 / sqrt(K) unless a model has another, cap(s) = c tanh(s / c) where it has one; a window leaves the last tokens alone.
Keys and values lie in pages of S tokens; a sequence is a list of page numbers. A group left out costs no row of Q, no
read of the cache and no row of O. With each function: the bytes that any implementation of it has to move.

Letters: D model  G groups  R query heads per group  K head_dim  A selected groups  P pages of the pool  N pages of the
sequence  S tokens per page  T tokens of the sequence
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreConfig:
    """How scores are made of queries and keys; see above. scale None: 1 / sqrt(K); cap 0: none; window None: all tokens."""

    scale: float | None = None
    cap: float = 0.0
    window: int | None = None

    def first(self, length: int) -> int:
        """The first of so many tokens that the last one sees."""
        return 0 if self.window is None else max(0, length - self.window)

    def seen(self, position_T: Tensor, count: int) -> Tensor:
        """bool [T, S]: which of the first `count` tokens those at these positions see."""
        token_S = torch.arange(count, device=position_T.device)[None, :]
        seen_TS = token_S <= position_T[:, None]
        return seen_TS if self.window is None else seen_TS & (token_S > position_T[:, None] - self.window)


PLAIN = ScoreConfig()
# Not cuDNN's, which plans for every new length of a prompt: 40 to 80 ms, in each thread anew.
CUDA_ATTENTION = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
CUDA_ATTENTION_LOCK = threading.Lock()  # the choice is the process's: of two threads the second would put back what the first had chosen


def attend_tokens(q: Tensor, k: Tensor, v: Tensor, seen_TS: Tensor | None, scores: ScoreConfig) -> Tensor:
    """Mixed values [.., H, T, K] of queries [.., H, T, K] over keys and values [.., G, S, K]; seen: None for all."""
    per = q.shape[-3] // max(1, k.shape[-3])  # no group may be selected
    if scores.cap == 0 and not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen_TS, scale=scores.scale, enable_gqa=per > 1)
    k, v = (x.repeat_interleave(per, -3) if per > 1 else x for x in (k, v))
    if scores.cap == 0:
        with CUDA_ATTENTION_LOCK, sdpa_kernel(CUDA_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=seen_TS, scale=scores.scale)
    score = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scores.scale is None else scores.scale)
    score = scores.cap * torch.tanh(score / scores.cap)
    if seen_TS is not None:
        score = score.masked_fill(~seen_TS, -torch.inf)
    wide = torch.promote_types(score.dtype, torch.float32)
    return score.softmax(-1, dtype=wide).to(v.dtype) @ v


def query_heads(x_D: Tensor, weight_QD: Tensor, bias_Q: Tensor | None, idx_A: Tensor | None, num_groups: int) -> Tensor:
    """Queries [A*R*K] of the groups idx_A (all when None). weight_QD is [G*R*K, D]."""
    if idx_A is not None:
        weight_QD = _group_rows(weight_QD, idx_A, num_groups).view(-1, x_D.shape[0])
        bias_Q = None if bias_Q is None else bias_Q.view(num_groups, -1).index_select(0, idx_A).flatten()
    return torch.mv(weight_QD, x_D) if bias_Q is None else torch.addmv(bias_Q, weight_QD, x_D)


def query_heads_bytes(x_D: Tensor, weight_QD: Tensor, bias_Q: Tensor | None, idx_A: Tensor | None, num_groups: int) -> int:
    rows = weight_QD.shape[0] * _selected(idx_A, num_groups) // num_groups
    row_bytes = (x_D.shape[0] + 1 + (bias_Q is not None)) * weight_QD.element_size()
    return rows * row_bytes + x_D.nbytes


def attend_pages(
    q_ARK: Tensor, k_PGSK: Tensor, v_PGSK: Tensor, page_N: Tensor, length: int, idx_A: Tensor | None, scores: ScoreConfig = PLAIN
) -> Tensor:
    """Mixed values [A, R, K] of queries [A, R, K] over the first `length` tokens in pages page_N (int64 [N]).

    Reads the keys and values of the groups idx_A alone (int64; all groups when None). Softmax accumulates in fp32.
    """
    groups, page_size, head_dim = k_PGSK.shape[1:]
    assert 0 < length <= page_N.shape[0] * page_size, f"{length=} {page_N.shape=} {page_size=}"
    if idx_A is None:
        idx_A = torch.arange(groups, device=page_N.device)
    first = scores.first(length)
    before = first // page_size  # pages that the window has left behind are not read
    page_N = page_N[before : -(-length // page_size)]
    row_AN = (page_N * groups)[None, :] + idx_A[:, None]
    shape = (idx_A.shape[0], page_N.shape[0] * page_size, head_dim)
    seen = slice(first - before * page_size, length - before * page_size)
    k_ATK, v_ATK = (pool.view(-1, page_size * head_dim).index_select(0, row_AN.flatten()).view(shape)[:, seen] for pool in (k_PGSK, v_PGSK))
    return attend_tokens(q_ARK[None], k_ATK[None], v_ATK[None], None, scores)[0]


def attend_pages_bytes(
    q_ARK: Tensor, k_PGSK: Tensor, v_PGSK: Tensor, page_N: Tensor, length: int, idx_A: Tensor | None, scores: ScoreConfig = PLAIN
) -> int:
    groups = _selected(idx_A, k_PGSK.shape[1])
    return 2 * groups * (length - scores.first(length)) * k_PGSK.shape[3] * k_PGSK.element_size() + 2 * q_ARK.nbytes + page_N.nbytes


def output_heads(mixed_ARK: Tensor, weight_QD: Tensor, bias_D: Tensor | None, idx_A: Tensor | None, num_groups: int) -> Tensor:
    """y_D from the mixed values of the groups idx_A (all when None). weight_QD is [G*R*K, D]: a row per head dimension."""
    if idx_A is not None:
        weight_QD = _group_rows(weight_QD, idx_A, num_groups).view(-1, weight_QD.shape[1])
    mixed_Q = mixed_ARK.flatten()
    return torch.mv(weight_QD.t(), mixed_Q) if bias_D is None else torch.addmv(bias_D, weight_QD.t(), mixed_Q)


def output_heads_bytes(mixed_ARK: Tensor, weight_QD: Tensor, bias_D: Tensor | None, idx_A: Tensor | None, num_groups: int) -> int:
    rows = weight_QD.shape[0] * _selected(idx_A, num_groups) // num_groups
    vectors = 1 if bias_D is None else 2
    return (rows * weight_QD.shape[1] + vectors * weight_QD.shape[1]) * weight_QD.element_size() + mixed_ARK.nbytes


def masked_query_heads(x_D: Tensor, weight_QD: Tensor, bias_Q: Tensor | None, idx_A: Tensor | None, num_groups: int) -> Tensor:
    """The definition of `query_heads`: every query, then those of the groups."""
    q_Q = weight_QD @ x_D if bias_Q is None else weight_QD @ x_D + bias_Q
    return q_Q if idx_A is None else q_Q.view(num_groups, -1)[idx_A].flatten()


def plain_attention(
    q_ARK: Tensor, k_PGSK: Tensor, v_PGSK: Tensor, page_N: Tensor, length: int, idx_A: Tensor | None, scores: ScoreConfig = PLAIN
) -> Tensor:
    """The definition of `attend_pages`: the sequence laid out token by token, softmax(cap(scale q k^T)) v over the window."""
    k_GTK, v_GTK = (pool[page_N].transpose(0, 1).flatten(1, 2)[:, scores.first(length) : length] for pool in (k_PGSK, v_PGSK))
    if idx_A is not None:
        k_GTK, v_GTK = k_GTK[idx_A], v_GTK[idx_A]
    scores_ART = q_ARK @ k_GTK.transpose(1, 2) * (q_ARK.shape[-1] ** -0.5 if scores.scale is None else scores.scale)
    if scores.cap > 0:
        scores_ART = scores.cap * torch.tanh(scores_ART / scores.cap)
    return scores_ART.softmax(-1) @ v_GTK


def masked_output_heads(mixed_ARK: Tensor, weight_QD: Tensor, bias_D: Tensor | None, idx_A: Tensor | None, num_groups: int) -> Tensor:
    """The definition of `output_heads`: every row, the mixed values of the other groups being zero."""
    mixed_GP = mixed_ARK.flatten(1)
    if idx_A is not None:
        mixed_GP = mixed_GP.new_zeros(num_groups, mixed_GP.shape[1]).index_copy(0, idx_A, mixed_GP)
    y_D = mixed_GP.flatten() @ weight_QD
    return y_D if bias_D is None else y_D + bias_D


def _group_rows(weight_QD: Tensor, idx_A: Tensor, num_groups: int) -> Tensor:
    return weight_QD.view(num_groups, -1).index_select(0, idx_A)


def _selected(idx_A: Tensor | None, num_groups: int) -> int:
    return num_groups if idx_A is None else idx_A.numel()
