"""Attention of a pass over tokens of prompts: those of one or several sequences, packed row after row.

    place_heads     q = rotated(norm(q));  k, v into the cache, k likewise
    attend_blocks   m_t = softmax(cap(scale q_t . k_s)) v_s        over the s <= t of its sequence that it sees, keys in pages
    attend_whole    the same by torch's own kernel, of sequences that begin in the pass, whose keys then lie side by side

Queries are attended in blocks of rows of one sequence, whose keys, the pass's own too, are in the cache by then. Sums are fp32; what is
stored is rounded to the dtype of the weights or of the cache.

Bytes that any implementation moves: q, k, v in; keys and values of the sequence for a block; the mixed heads out.

Letters: T rows (tokens of the pass)  H query heads  G key/value heads  K head_dim  W = (H + 2G) K  M rows of a block
N keys at a time  S tokens of a page
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dejavu.kernels.cuda.attention import ALL_TOKENS, NO_NORM, Places, ScoreWeights
from dejavu.kernels.cuda.common import launch, or_any, soft_cap

PLACED = 8  # tokens of a program of `place_heads`


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockShape:
    """Rows of a block of queries, keys at a time, warps, stages of the pipeline."""

    queries: int
    keys: int
    warps: int = 4
    stages: int = 2


def block_shape(head_dim: int, element_size: int) -> BlockShape:
    """Within the shared memory of every device: a block of queries, and keys and values for each stage."""
    size = max(16, min(64, 16384 // (padded_head(head_dim) * element_size)))
    return BlockShape(queries=size, keys=size)


def padded_head(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


@triton.jit
def _placed_rows(pointer_T, k, live, position_T, inv_freq, factor, norm, eps, K: tl.constexpr, ROTATED: tl.constexpr, NORM: tl.constexpr):
    """Values [T, KP] at the pointers in fp32, normed and rotated as one row's are (attention.py)."""
    mask = live[:, None] & (k < K)[None, :]
    v = tl.load(pointer_T[:, None] + k[None, :], mask=mask, other=0.0).to(tl.float32)
    if NORM:
        size = 1.0 / tl.sqrt(tl.sum(v * v, 1) / K + eps)[:, None]
        v = v * size * tl.load(norm + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
    if ROTATED > 0:
        HALF: tl.constexpr = ROTATED // 2
        low = k < HALF
        turned = k < ROTATED
        at = tl.where(low, k + HALF, k - HALF)
        other = tl.load(pointer_T[:, None] + at[None, :], mask=live[:, None] & turned[None, :], other=0.0).to(tl.float32)
        if NORM:
            other = other * size * tl.load(norm + at, mask=turned, other=0.0).to(tl.float32)[None, :]
        frequency = tl.load(inv_freq + tl.where(low, k, k - HALF), mask=turned, other=0.0)
        angle = position_T.to(tl.float32)[:, None] * frequency[None, :]
        rotated = v * (tl.cos(angle) * factor) + tl.where(low[None, :], -other, other) * (tl.sin(angle) * factor)
        v = tl.where(turned[None, :], rotated, v)
    return v


@triton.jit
def _place_heads(
    qkv, q_out, k_out, k_pool, v_pool, slots, positions, table, table_stride, inv_freq, factor, q_norm, q_eps, k_norm, k_eps, rows,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, S: tl.constexpr, ROTATED: tl.constexpr, NORM: tl.constexpr,
    OWN: tl.constexpr, PLACED: tl.constexpr, programmatic: tl.constexpr,
):  # fmt: skip
    W: tl.constexpr = (H + 2 * G) * K
    t = tl.program_id(0) * PLACED + tl.arange(0, PLACED)
    live = t < rows
    head = tl.program_id(1)
    k = tl.arange(0, KP)
    mask = live[:, None] & (k < K)[None, :]
    position = tl.load(positions + t, mask=live, other=0)
    given = qkv + t.to(tl.int64) * W + head * K
    if head < H:
        queries = _placed_rows(given, k, live, position, inv_freq, factor, q_norm, q_eps, K, ROTATED, NORM)
        tl.store(q_out + (t.to(tl.int64) * (H * K) + head * K)[:, None] + k[None, :], queries.to(q_out.dtype.element_ty), mask=mask)
    else:
        group = (head - H) % G
        page = tl.load(table + tl.load(slots + t, mask=live, other=0).to(tl.int64) * table_stride + position // S, mask=live, other=0)
        place = (((page * G + group) * S + position % S) * K)[:, None] + k[None, :]
        if head < H + G:
            keys = _placed_rows(given, k, live, position, inv_freq, factor, k_norm, k_eps, K, ROTATED, NORM)
            tl.store(k_pool + place, keys.to(k_pool.dtype.element_ty), mask=mask)
            if OWN:
                own = (t.to(tl.int64) * (G * K) + group * K)[:, None] + k[None, :]
                tl.store(k_out + own, keys.to(k_out.dtype.element_ty), mask=mask)
        else:
            values = tl.load(given[:, None] + k[None, :], mask=mask, other=0.0)
            tl.store(v_pool + place, values.to(v_pool.dtype.element_ty), mask=mask)


@triton.jit
def _attend_blocks(
    q, k_pool, v_pool, blocks, table, table_stride, scale, cap, window, out,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, S: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    STAGES: tl.constexpr, CAPPED: tl.constexpr, programmatic: tl.constexpr,
):  # fmt: skip
    """A block is first row, rows, slot and the position of the first; of no rows it fills a graph's grid."""
    block = blocks + tl.program_id(0) * 4
    first = tl.load(block)
    rows = tl.load(block + 1)
    position = tl.load(block + 3)
    head = tl.program_id(1)
    group = head // (H // G)
    if rows == 0:
        return
    m = tl.arange(0, M)
    k = tl.arange(0, KP)
    n = tl.arange(0, N)
    live = (m < rows)[:, None] & (k < K)[None, :]
    at = ((first + m).to(tl.int64) * (H * K) + head * K)[:, None] + k[None, :]
    query = tl.load(q + at, mask=live, other=0.0)
    pages = table + tl.load(block + 2).to(tl.int64) * table_stride
    end = position + rows
    own = position + m
    top = tl.full([M], -1e30, tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, KP], tl.float32)
    for start in tl.range(tl.maximum(position + 1 - window, 0), end, N, num_stages=STAGES):
        token = start + n
        page = tl.load(pages + token // S, mask=token < end, other=0)
        place = (((page * G + group) * S + token % S) * K)[:, None] + k[None, :]
        there = (token < end)[:, None] & (k < K)[None, :]
        keys = tl.load(k_pool + place, mask=there, other=0.0)
        values = tl.load(v_pool + place, mask=there, other=0.0)
        s = soft_cap(tl.dot(query, tl.trans(keys), input_precision="ieee") * scale, cap, CAPPED)
        sees = (token[None, :] <= own[:, None]) & (token[None, :] > own[:, None] - window)
        s = tl.where(sees, s, -1e30)
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.where(sees, tl.exp(s - new_top[:, None]), 0.0)
        shrink = tl.exp(top - new_top)
        acc = acc * shrink[:, None] + tl.dot(p.to(values.dtype), values, input_precision="ieee")
        total = total * shrink + tl.sum(p, 1)
        top = new_top
    tl.store(out + at, (acc / total[:, None]).to(out.dtype.element_ty), mask=live)


def place_heads(
    qkv_TW: Tensor, q_THK: Tensor, k_PGSK: Tensor, v_PGSK: Tensor, places: Places, how: ScoreWeights, *, k_TGK: Tensor | None = None
) -> None:
    """Fill q_THK and store keys and values of rows, of which `places` has as many as there are of qkv; k_TGK gets the keys, too."""
    rows, heads, head_dim = q_THK.shape
    groups, page_size = k_PGSK.shape[1:3]
    assert qkv_TW.is_contiguous() and qkv_TW.shape == (rows, (heads + 2 * groups) * head_dim)
    norms = tuple(NO_NORM if norm is None else norm for norm in (how.q_norm, how.k_norm))
    launch(
        _place_heads, (triton.cdiv(rows, PLACED), heads + 2 * groups), qkv_TW, q_THK, or_any(k_TGK, q_THK), k_PGSK, v_PGSK, places.slot_B, places.position_B,
        places.table, places.table.stride(0), or_any(how.inv_freq, qkv_TW), how.factor, or_any(norms[0].weight, qkv_TW), norms[0].eps,
        or_any(norms[1].weight, qkv_TW), norms[1].eps, rows, H=heads, G=groups, K=head_dim, KP=padded_head(head_dim), S=page_size,
        ROTATED=0 if how.inv_freq is None else 2 * how.inv_freq.shape[0], NORM=how.q_norm is not None,
        OWN=k_TGK is not None, PLACED=PLACED, num_warps=4,
    )  # fmt: skip


def attend_blocks(
    q_THK: Tensor, k_PGSK: Tensor, v_PGSK: Tensor, blocks: Tensor, table: Tensor, out_THK: Tensor, how: ScoreWeights, *, shape: BlockShape
) -> None:
    """out_THK gets the mixed values of rows whose keys are stored. blocks int32 [blocks, 4]: first row, rows (at most shape.queries),
    slot, position of the first; table int64 [slots, pages]."""
    _, heads, head_dim = q_THK.shape
    groups, page_size = k_PGSK.shape[1:3]
    scores = how.scores
    scale = head_dim**-0.5 if scores.scale is None else scores.scale
    launch(
        _attend_blocks, (blocks.shape[0], heads), q_THK, k_PGSK, v_PGSK, blocks, table, table.stride(0), scale, scores.cap,
        ALL_TOKENS if scores.window is None else scores.window, out_THK, H=heads, G=groups, K=head_dim, KP=padded_head(head_dim),
        S=page_size, M=shape.queries, N=shape.keys, STAGES=shape.stages, CAPPED=scores.cap > 0, num_warps=shape.warps,
    )  # fmt: skip


def attends_whole(how: ScoreWeights, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether torch has a fused kernel for such scores."""
    return how.scores.cap == 0 and how.scores.window is None and head_dim <= 256 and dtype != torch.float32


def attend_whole(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, sequences: Sequence[tuple[int, int]], out_THK: Tensor, how: ScoreWeights
) -> None:
    """out_THK gets the mixed values of sequences whose tokens are all here: the first row of each, and how many it has."""
    for first, count in sequences:
        q, k, v = (x[first : first + count].transpose(0, 1)[None] for x in (q_THK, k_TGK, v_TGK))
        mixed = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=how.scores.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        out_THK[first : first + count] = mixed[0].transpose(0, 1)


def attend_blocks_definition(q_THK: Tensor, k_SGK: Tensor, v_SGK: Tensor, position: int, how: ScoreWeights) -> Tensor:
    """Mixed values [T, H, K] of one sequence's rows from `position` on, over its S keys and values."""
    scores = how.scores
    per = q_THK.shape[1] // k_SGK.shape[1]
    k_HSK, v_HSK = (x.repeat_interleave(per, 1).transpose(0, 1) for x in (k_SGK, v_SGK))
    scale = q_THK.shape[-1] ** -0.5 if scores.scale is None else scores.scale
    s_HTS = q_THK.transpose(0, 1) @ k_HSK.transpose(1, 2) * scale
    if scores.cap > 0:
        s_HTS = scores.cap * torch.tanh(s_HTS / scores.cap)
    own_T = torch.arange(position, position + q_THK.shape[0], device=q_THK.device)[:, None]
    token_S = torch.arange(k_SGK.shape[0], device=q_THK.device)[None]
    sees_TS = (token_S <= own_T) & (token_S > own_T - (ALL_TOKENS if scores.window is None else scores.window))
    return (s_HTS.masked_fill(~sees_TS, -torch.inf).softmax(-1) @ v_HSK).transpose(0, 1)
