"""The attention of one token for each of several rows, over pages on the device: split over the sequence, then put together.

    m_h = softmax(cap(scale q_h k_g^T)) v_g over the cached tokens that it sees and the new one, for the heads h of the selected groups g
    out_D += sum over these h of m_h O_h, + bias

`attend` norms q and the new k where the model does, rotates them where positions are rotary, stores the new k and v of *every* group, and writes for each split
of the sequence a partial sum, its maximum and its denominator. `output` combines them for its head while it multiplies with the
head's rows of O: no kernel in between. Of several rows the split of a head that ends last puts the head together. `attend` may hold the selection of the MLP's neurons as further programs of its grid: the
lookahead, computed in parallel with attention.

Bytes that any implementation moves: keys and values of the selected groups; rows of O of the selected heads.

Letters: B rows  H query heads  G groups  K head_dim  S tokens of a page  T tokens at a time  D model  W = (H + 2G) K
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dejavu.kernels.attention import PLAIN, ScoreConfig, masked_output_heads, plain_attention
from dejavu.kernels.cuda.common import NormWeights, begin, launch, multiprocessors, or_any, soft_cap
from dejavu.kernels.cuda.select import NeuronScores, select_arguments, select_block, select_blocks, select_constants
from dejavu.kernels.cuda.select_rows import UnionScores, select_rows_arguments, select_rows_block

WARPS = 2  # of a program: most of its time is sums, whose barriers cost the less the fewer take part
TILE_BYTES = 4096  # of keys, and as many of values, that a warp holds at a time
SPLIT_TOKENS = 32  # the least work of a split
SHORT = 512  # tokens: of longer sequences there are twice as many splits, which keep more loads under way
MAX_SPLITS = 32
CLEARED = 256
ALL_TOKENS = 1 << 30  # a window that no sequence fills
NO_NORM = NormWeights(weight=None, bias=None, eps=0.0, rms=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where the rows of a step stand: slot_B and position_B int32 [B], table int64 [slots, pages]."""

    slot_B: Tensor
    position_B: Tensor
    table: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreWeights:
    """How one layer makes scores of queries and keys. scores: scale, cap and window. inv_freq fp32 [R/2]: of the first R values of a head,
    which are rotated and then times `factor`; None: none are. q_norm and k_norm: RMSNorms, of weight [K], or None."""

    scores: ScoreConfig = PLAIN
    inv_freq: Tensor | None = None
    factor: float = 1.0
    q_norm: NormWeights | None = None
    k_norm: NormWeights | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Partials:
    """What `attend` leaves for `output`: mixed fp32 [B, H, splits, K], stats fp32 [B, H, splits, 2] (maximum, denominator)."""

    mixed: Tensor
    stats: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeHeads:
    """Where `attend` puts heads together: out [B, H, K] of any float dtype; tickets int32 [B, H], zero before and after."""

    out: Tensor
    tickets: Tensor


def splits_for(rows: int, heads: int, device: torch.device, *, tokens: int) -> int:
    """Parts that a sequence of at most so many tokens is cut into: enough programs to fill the device, and work for each of them."""
    programs = multiprocessors(device) * (4 if tokens <= SHORT else 8)
    splits = max(1, min(MAX_SPLITS, programs // (rows * heads), tokens // SPLIT_TOKENS))
    return 1 << (splits.bit_length() - 1)


@triton.jit
def _placed(pointer, k, position, inv_freq, factor, norm, eps, K: tl.constexpr, ROTATED: tl.constexpr, NORM: tl.constexpr):
    """Values k < K at the pointer in fp32, normed, and the first ROTATED rotated to the position (half-split layout), times the factor."""
    v = tl.load(pointer + k, mask=k < K, other=0.0).to(tl.float32)
    size = 1.0
    if NORM:
        size = 1.0 / tl.sqrt(tl.sum(v * v, 0) / K + eps)
        v = v * size * tl.load(norm + k, mask=k < K, other=0.0).to(tl.float32)
    if ROTATED > 0:
        HALF: tl.constexpr = ROTATED // 2
        low = k < HALF
        turned = k < ROTATED
        at = tl.where(low, k + HALF, k - HALF)
        other = tl.load(pointer + at, mask=turned, other=0.0).to(tl.float32)
        if NORM:
            other = other * size * tl.load(norm + at, mask=turned, other=0.0).to(tl.float32)
        angle = position.to(tl.float32) * tl.load(inv_freq + tl.where(low, k, k - HALF), mask=turned, other=0.0)
        rotated = v * (tl.cos(angle) * factor) + tl.where(low, -other, other) * (tl.sin(angle) * factor)
        v = tl.where(turned, rotated, v)
    return v


@triton.jit
def _pages(pages, first, last, S: tl.constexpr, T: tl.constexpr):
    """Pages [T] of the tokens from `first` on."""
    t = first + tl.arange(0, T)
    return tl.load(pages + t // S, mask=t < last, other=0)


@triton.jit
def _cached(k_pool, v_pool, page_T, first, last, group, k, G: tl.constexpr, K: tl.constexpr, S: tl.constexpr, T: tl.constexpr):
    """Keys and values [T, KP] of a group from token `first` on, as stored; zeros from `last` on."""
    t = first + tl.arange(0, T)
    place_T = ((page_T * G + group) * S + t % S) * K
    mask = (t < last)[:, None] & (k < K)[None, :]
    keys = tl.load(k_pool + place_T[:, None] + k[None, :], mask=mask, other=0.0)
    values = tl.load(v_pool + place_T[:, None] + k[None, :], mask=mask, other=0.0)
    return keys, values


@triton.jit
def combined(mixed, stats, where, k, K: tl.constexpr, SPLITS: tl.constexpr):
    """m_h [KP] of one row and head from its splits."""
    s = tl.arange(0, SPLITS)
    top = tl.load(stats + (where * SPLITS + s) * 2)
    total = tl.load(stats + (where * SPLITS + s) * 2 + 1)
    weight = tl.exp(top - tl.max(top, 0))
    part = tl.load(mixed + (where * SPLITS + s)[:, None] * K + k[None, :], mask=(k < K)[None, :], other=0.0)
    return tl.sum(part * weight[:, None], 0) / tl.sum(total * weight, 0)


@triton.jit
def _attend(
    qkv, k_pool, v_pool, slots, positions, table, table_stride, inv_freq, factor, q_norm, q_eps, k_norm, k_eps, cap, window, groups, group_count, count_stride, mixed, stats, scale, programs,
    matrix, row_scale, row_bias, threshold, h, h_stride, select_slots, padding, row_mask_F, neurons, count, row_count, row_stride, B, F,
    cleared, cleared_size, whole, tickets,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, S: tl.constexpr, T: tl.constexpr, SPLITS: tl.constexpr,
    ROTATED: tl.constexpr, NORM: tl.constexpr, CAPPED: tl.constexpr, HEADS: tl.constexpr, SELECT: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr,
    PP: tl.constexpr, BLOCK: tl.constexpr, CLEAR: tl.constexpr, CLEARED: tl.constexpr, WHOLE: tl.constexpr, programmatic: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if SELECT:
        if pid >= programs:
            if ROWS:
                select_rows_block(
                    pid - programs, matrix, row_scale, row_bias, threshold, h, h_stride, select_slots, padding, row_mask_F, neurons, count,
                    row_count, row_stride, B, F, P, PP, BLOCK, programmatic,
                )  # fmt: skip
            else:
                select_block(pid - programs, matrix, row_scale, row_bias, threshold, h, neurons, count, F, P, PP, BLOCK, programmatic)
            return
    W: tl.constexpr = (H + 2 * G) * K
    PER: tl.constexpr = H // G
    split = pid % SPLITS
    at = (pid // SPLITS) % H
    b = pid // (SPLITS * H)
    slot = tl.load(slots + b)
    position = tl.load(positions + b)
    k = tl.arange(0, KP)
    row = qkv + b * W
    pages = table + slot.to(tl.int64) * table_stride
    seen = tl.maximum(position + 1 - window, 0)  # the first token that the new one sees
    chunk = tl.cdiv(tl.cdiv(position - seen, T), SPLITS) * T
    start = seen + split * chunk
    last = tl.minimum(position, start + chunk)
    page_T = _pages(pages, start, last, S, T)
    next_page_T = _pages(pages, start + T, last, S, T)
    own_page = tl.load(pages + position // S)
    group = at // PER
    live = True
    if HEADS:
        begin(programmatic)  # the list is of the kernel before
        listed = tl.load(groups + b * G + group)  # beyond the count: an index all the same, and not used
        live = group < tl.load(group_count + b * count_stride)
        group = listed
        last = tl.where(live, last, start)
    keys, values = _cached(k_pool, v_pool, page_T, start, last, group, k, G, K, S, T)
    if not HEADS:
        begin(programmatic)
    # The last split, which is never the longest, has the new token's key and value; they come from this step's products.
    is_last = split == SPLITS - 1
    if live:
        head = group * PER + at % PER
        q = _placed(row + head * K, k, position, inv_freq, factor, q_norm, q_eps, K, ROTATED, NORM) * scale
        # Rounded as they are in the cache, where another program writes them.
        own_k = _placed(row + H * K + group * K, k, position, inv_freq, factor, k_norm, k_eps, K, ROTATED, NORM)
        own_k = own_k.to(k_pool.dtype.element_ty).to(tl.float32)
        own_v = tl.load(row + (H + G) * K + group * K + k, mask=k < K, other=0.0).to(v_pool.dtype.element_ty).to(tl.float32)
        own_share = tl.where(is_last, 1.0, 0.0)
        top = tl.where(is_last, soft_cap(tl.sum(q * own_k, 0), cap, CAPPED), -1e30)
        total = own_share
        acc = own_v * own_share
        for first in tl.range(start, last, T, num_stages=1):
            next_keys, next_values = _cached(k_pool, v_pool, next_page_T, first + T, last, group, k, G, K, S, T)
            next_page_T = _pages(pages, first + 2 * T, last, S, T)
            there = first + tl.arange(0, T) < last
            s = tl.where(there, soft_cap(tl.sum(keys.to(tl.float32) * q[None, :], 1), cap, CAPPED), -1e30)
            new_top = tl.maximum(top, tl.max(s, 0))
            p = tl.where(there, tl.exp(s - new_top), 0.0)
            shrink = tl.exp(top - new_top)
            acc = acc * shrink + tl.sum(p[:, None] * values.to(tl.float32), 0)
            total = total * shrink + tl.sum(p, 0)
            top = new_top
            keys = next_keys
            values = next_values
        where = (b * H + head) * SPLITS + split
        tl.store(mixed + where * K + k, acc, mask=k < K)
        tl.store(stats + where * 2, top)
        tl.store(stats + where * 2 + 1, total)
        if WHOLE:
            own_head = b * H + head
            tl.debug_barrier()  # what other threads of the program wrote
            if tl.atomic_add(tickets + own_head, 1, sem="acq_rel") == SPLITS - 1:
                m = combined(mixed, stats, own_head, k, K, SPLITS)
                tl.store(whole + own_head * K + k, m.to(whole.dtype.element_ty), mask=k < K)
                tl.store(tickets + own_head, 0)
    if is_last & (at % PER == 0):
        # Every group's new key and value, whatever is selected: the cache has no holes.
        own = at // PER
        place = ((own_page * G + own) * S + position % S) * K
        new_k = _placed(row + H * K + own * K, k, position, inv_freq, factor, k_norm, k_eps, K, ROTATED, NORM)
        tl.store(k_pool + place + k, new_k.to(k_pool.dtype.element_ty), mask=k < K)
        new_v = tl.load(row + (H + G) * K + own * K + k, mask=k < K, other=0.0)
        tl.store(v_pool + place + k, new_v.to(v_pool.dtype.element_ty), mask=k < K)
    if CLEAR:
        for first in range(pid * CLEARED, cleared_size, programs * CLEARED):
            c = first + tl.arange(0, CLEARED)
            tl.store(cleared + c, 0.0, mask=c < cleared_size)


@triton.jit
def combined_at(mixed, stats, head_N, k_N, live_N, K: tl.constexpr, SPLITS: tl.constexpr):
    """Single values [N] of one row's heads, likewise."""
    where = head_N[:, None] * SPLITS + tl.arange(0, SPLITS)[None, :]
    live = live_N[:, None]
    top = tl.load(stats + where * 2, mask=live, other=0.0)
    total = tl.load(stats + where * 2 + 1, mask=live, other=1.0)
    weight = tl.exp(top - tl.max(top, 1, keep_dims=True))
    part = tl.load(mixed + where * K + k_N[:, None], mask=live, other=0.0)
    return tl.sum(part * weight, 1) / tl.sum(total * weight, 1)


@triton.jit
def _output(
    mixed, stats, weight, bias, groups, group_count, out, D: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr,
    KP: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr, HEADS: tl.constexpr, BIAS: tl.constexpr, PARTIAL: tl.constexpr,
    programmatic: tl.constexpr,
):  # fmt: skip
    PER: tl.constexpr = H // G
    at = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, KP)
    group = at // PER
    live = True
    rows = K
    if HEADS:
        listed = tl.load(groups + group, cache_modifier=".cg")  # beyond the count: an index all the same, and not used
        live = group < tl.load(group_count, cache_modifier=".cg")
        group = listed
        rows = tl.where(live, K, 0)
    head = group * PER + at % PER
    row = head.to(tl.int64) * K + k
    # The list was there before the kernel before this one (see common.py): its rows of O can be loaded at once.
    w = tl.load(
        weight + row[:, None] * D + column[None, :], mask=(k < rows)[:, None] & (column < D)[None, :], other=0.0,
        eviction_policy="evict_first",
    )  # fmt: skip
    begin(programmatic)
    if live:
        m = combined(mixed, stats, head, k, K, SPLITS).to(weight.dtype.element_ty).to(tl.float32)
        y = tl.sum(w.to(tl.float32) * m[:, None], 0)
        if BIAS:
            if at == 0:
                y += tl.load(bias + column, mask=column < D, other=0.0).to(tl.float32)
        if PARTIAL:
            tl.store(out + at * D + column, y, mask=column < D)
        else:
            tl.atomic_add(out + column, y, mask=column < D, sem="relaxed")
    elif PARTIAL:
        tl.store(out + at * D + column, tl.zeros([COLUMNS], tl.float32), mask=column < D)


def attend(
    qkv_BW: Tensor,
    k_PGSK: Tensor,
    v_PGSK: Tensor,
    places: Places,
    partials: Partials,
    *,
    heads: int,
    how: ScoreWeights = ScoreWeights(),
    groups_BG: Tensor | None = None,
    count_B: Tensor | None = None,
    select: NeuronScores | UnionScores | None = None,
    whole: WholeHeads | None = None,
    cleared: Tensor | None = None,
    programmatic: bool = False,
) -> None:
    """Store the rows' new keys and values, and fill `partials` for the heads of the selected groups (all when None).

    qkv_BW: q, k, v of each row, in any float dtype. how: what the layer makes of them. select: neurons selected in the same
    launch. whole: where all heads are put together, too. cleared: fp32 memory that is set to zero.
    """
    groups, page_size, head_dim = k_PGSK.shape[1:]
    rows, splits = qkv_BW.shape[0], partials.mixed.shape[2]
    assert qkv_BW.shape[1] == (heads + 2 * groups) * head_dim and (whole is None or groups_BG is None)
    programs = rows * heads * splits
    scores, norms = how.scores, tuple(NO_NORM if norm is None else norm for norm in (how.q_norm, how.k_norm))
    scale = head_dim**-0.5 if scores.scale is None else scores.scale
    padded = max(16, triton.next_power_of_2(head_dim))
    tokens = max(2, WARPS * TILE_BYTES // (padded * k_PGSK.element_size()))
    extra = 0 if select is None else select_blocks(select, WARPS)
    chosen = _selection(select, qkv_BW)
    sizes = {"P": 16, "PP": 16, "BLOCK": 16} if select is None else select_constants(select, WARPS)
    launch(
        _attend,
        (programs + extra,),
        qkv_BW, k_PGSK, v_PGSK, places.slot_B, places.position_B, places.table, places.table.stride(0),
        or_any(how.inv_freq, qkv_BW), how.factor, or_any(norms[0].weight, qkv_BW), norms[0].eps, or_any(norms[1].weight, qkv_BW),
        norms[1].eps, scores.cap, ALL_TOKENS if scores.window is None else scores.window,
        or_any(groups_BG, qkv_BW), or_any(count_B, qkv_BW), 1 if count_B is None else count_B.stride(0),
        partials.mixed, partials.stats,
        scale, programs, *chosen, or_any(cleared, qkv_BW), 0 if cleared is None else cleared.numel(),
        qkv_BW if whole is None else whole.out, qkv_BW if whole is None else whole.tickets,
        H=heads, G=groups, K=head_dim, KP=padded, S=page_size, T=tokens, SPLITS=splits,
        ROTATED=0 if how.inv_freq is None else 2 * how.inv_freq.shape[0], NORM=how.q_norm is not None, CAPPED=scores.cap > 0, HEADS=groups_BG is not None, SELECT=select is not None, ROWS=isinstance(select, UnionScores), CLEAR=cleared is not None,
        CLEARED=CLEARED, WHOLE=whole is not None, **sizes, num_warps=WARPS, programmatic=programmatic,
    )  # fmt: skip


def _selection(select: NeuronScores | UnionScores | None, other: Tensor) -> tuple[Tensor | int, ...]:
    """What `_attend` takes of it, of one row or of several; any tensor in the place of one that is not read."""
    if isinstance(select, UnionScores):
        return select_rows_arguments(select)
    if select is None:
        return (other,) * 5 + (0, other, 0) + (other,) * 4 + (0, 0, 0)
    matrix, scale, bias, threshold, h, neurons, count, size = select_arguments(select)
    return matrix, scale, bias, threshold, h, 0, other, 0, other, neurons, count, other, 0, 1, size


def output_token(
    partials: Partials,
    weight_QD: Tensor,
    bias_D: Tensor | None,
    out: Tensor,
    *,
    num_groups: int,
    groups_G: Tensor | None = None,
    count: Tensor | None = None,
    columns: int = 128,
    partial: bool = False,
    programmatic: bool = False,
) -> None:
    """Add one row's heads times their rows of O to out fp32 [D]; partial: out is [H, D], one sum for each place in the list."""
    heads, splits, head_dim = partials.mixed.shape[1:]
    size = weight_QD.shape[1]
    assert weight_QD.is_contiguous() and weight_QD.shape[0] == heads * head_dim
    launch(
        _output,
        (heads, triton.cdiv(size, columns)),
        partials.mixed, partials.stats, weight_QD, or_any(bias_D, partials.stats), or_any(groups_G, partials.stats),
        or_any(count, partials.stats), out,
        D=size, H=heads, G=num_groups, K=head_dim, KP=max(16, triton.next_power_of_2(head_dim)), COLUMNS=columns, SPLITS=splits,
        HEADS=groups_G is not None, BIAS=bias_D is not None, PARTIAL=partial, num_warps=4, programmatic=programmatic,
    )  # fmt: skip


def attention_definition(
    q_HK: Tensor,
    k_PGSK: Tensor,
    v_PGSK: Tensor,
    page_N: Tensor,
    length: int,
    weight_QD: Tensor,
    bias_D: Tensor | None,
    idx_A: Tensor | None,
) -> Tensor:
    """What `attend` and `output_token` add to out for one row whose `length` tokens, the new one too, are in the cache.

    q_HK: queries of all heads, rotated; idx_A int64: the selected groups, or None.
    """
    groups = k_PGSK.shape[1]
    q_GRK = q_HK.view(groups, -1, q_HK.shape[-1])
    mixed_ARK = plain_attention(q_GRK if idx_A is None else q_GRK[idx_A], k_PGSK, v_PGSK, page_N, length, idx_A)
    return masked_output_heads(mixed_ARK, weight_QD, bias_D, idx_A, groups)
