"""The next token of each row, chosen on the device: greedy or drawn, by settings that lie on the device too.

    token_b = argmax over the kept v of logit_v + T noise_v,    noise_v = -log(E_v),  E_v exponential with mean 1

That is a draw from softmax(logit / T) over the kept v (the Gumbel-max rule, multiplied by T): nothing overflows for a small T, and
T = 0 is the argmax, the smallest index at ties. Kept are the top_k best, and of these the fewest, best first, whose weights reach
the share top_p; the smaller index first at ties. The token is -1 where a row has NaN, an infinity above, or nothing finite.

    logprob_b = logit_token - top - log(sum_v exp(logit_v - top)),    top = max_v logit_v

is the token's log-probability before temperature and cuts; NaN where the token is -1.

E_v comes from word v of Philox 4x32-10 with the row's seed as key and (v, step) as counter: a row's numbers depend on its seed and
on its step alone, which the last kernel increments, so a graph of the kernels draws anew at each replay.

Two kernels. `_partial`: each block's largest logit and sum of exponentials, and its best with noise in a row without a cut.
`_finish`: one program a row, which reduces these, or, for a row with a cut, finds the threshold by bisection over the bits of the
values (32 steps are exact) and draws from what is above.

Bytes that any implementation moves: 4 V of a row. In addition, here: 16 a block of scratch, written and read. A row with a cut is
read 2 times and 33 or 34 times more for each of its cuts, from the L2 cache: `_finish` is the whole cost of such a row.

Letters: B rows  V vocabulary  C values at a time  L layers  M counts of a layer  N tokens of a ring
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from dejavu.kernels.cuda.common import begin, launch

BLOCK = 1024
CHUNK = 4096  # values at a time of a row with a cut
NOWHERE = tl.constexpr(2147483647)  # larger than any index


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSettings:
    """How each row is sampled, and its step, in device memory: other values may be written between the replays of a graph.

    temperature_B fp32, 0 or from 1e-30 to 1e30; top_k_B int32, 0 for none; top_p_B fp32, 1 for none; seed_B int64; step_B int32.
    """

    temperature_B: Tensor
    top_k_B: Tensor
    top_p_B: Tensor
    seed_B: Tensor
    step_B: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleScratch:
    """Of each block of a row, all [B, blocks]: the best, value fp32 and index int32; the largest logit and the sum of
    exponentials below it, fp32."""

    value: Tensor
    index: Tensor
    top: Tensor
    total: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Ring:
    """What the last steps made: tokens int32 and log-probabilities fp32 [N, B], counts int32 [N, M, B, L], as a step
    keeps them."""

    token_NB: Tensor
    logprob_NB: Tensor
    counts_NMBL: Tensor


def sample_scratch(rows: int, vocab: int, device: torch.device) -> SampleScratch:
    shape = (rows, triton.cdiv(vocab, BLOCK))
    value, top, total = torch.zeros(3, *shape, device=device).unbind(0)
    return SampleScratch(value=value, index=torch.zeros(shape, dtype=torch.int32, device=device), top=top, total=total)


@triton.jit
def _noise(seed, step, v):
    """-log(E) for each v. Near 0, where the winners lie, E is exact to a step of 2^-32 by its series; it is finite everywhere."""
    counter = v * 0
    word, _, _, _ = tl.philox(seed, v, counter + step, counter, counter)
    u = tl.minimum((word.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    exponential = tl.where(u < 0.01, u * (1.0 + u * (0.5 + u * 0.33333333)), -tl.log(1.0 - u))
    return -tl.log(exponential)


@triton.jit
def _values(row, v, V):
    """Logits at v, -inf beyond V; NaN becomes inf, which marks a row that cannot be sampled."""
    x = tl.load(row + v, mask=v < V, other=float("-inf"))
    return tl.where(x == x, x, float("inf"))


@triton.jit
def _best(x, v):
    """The largest value and the smallest index that has it."""
    best = tl.max(x, 0)
    return best, tl.min(tl.where(x == best, v, NOWHERE), 0)


@triton.jit
def _is_number(top):
    """Whether a row or a block with this largest value can be sampled."""
    return (top > float("-inf")) & (top < float("inf"))


@triton.jit
def _exp_below(x, top):
    """exp(x - top) where top is a number and the largest x; finite, and of no meaning, elsewhere."""
    return tl.exp(tl.minimum(x - tl.where(_is_number(top), top, 0.0), 0.0))


@triton.jit
def _has_cut(temperature, top_k, top_p, V):
    return (temperature > 0) & (((top_k > 0) & (top_k < V)) | (top_p < 1.0))


@triton.jit
def _partial(
    logits, temperature, top_k, top_p, seed, step, value, index, top, total, V, BLOCK: tl.constexpr, programmatic: tl.constexpr
):  # fmt: skip
    b = tl.program_id(0)
    block = tl.program_id(1)
    where = b * tl.num_programs(1) + block
    begin(programmatic)
    v = block * BLOCK + tl.arange(0, BLOCK)
    x = _values(logits + b.to(tl.int64) * V, v, V)
    highest = tl.max(x, 0)
    tl.store(top + where, highest)
    tl.store(total + where, tl.sum(_exp_below(x, highest), 0))
    heat = tl.load(temperature + b)
    if not _has_cut(heat, tl.load(top_k + b), tl.load(top_p + b), V):
        if heat > 0:
            x = x + heat * _noise(tl.load(seed + b), tl.load(step + b), v)
        best, at = _best(x, v)
        tl.store(value + where, best)
        tl.store(index + where, at)


@triton.jit
def _key(x):
    """int32 in the order of fp32 values. The function is its own inverse on the bits."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _weight(x, top, heat):
    """exp((x - top) / T), without an overflow for a small T: beyond 200 T it is 0 in fp32 anyway."""
    return tl.exp(tl.maximum(x - top, -200.0 * heat) / heat)


@triton.jit
def _share(row, least, top, heat, V, C: tl.constexpr, WEIGHED: tl.constexpr):
    """The weight, or the number, of the values whose key is at least `least`. Falls as `least` rises, rounding included."""
    total_C = tl.zeros([C], tl.float32)
    for first in range(0, V, C):
        v = first + tl.arange(0, C)
        x = _values(row, v, V)
        if WEIGHED:
            amount = _weight(x, top, heat)
        else:
            amount = tl.full([C], 1.0, tl.float32)
        total_C += tl.where((_key(x) >= least) & (v < V), amount, 0.0)
    return tl.sum(total_C, 0)


@triton.jit
def _largest_key(row, target, top, heat, V, C: tl.constexpr, WEIGHED: tl.constexpr):
    """The largest key from which on upwards there is the share `target`."""
    low = tl.full([], -2147483648, tl.int64)
    high = tl.full([], 2147483648, tl.int64)
    for _ in range(32):
        middle = (low + high) >> 1
        enough = _share(row, middle.to(tl.int32), top, heat, V, C, WEIGHED) >= target
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return low.to(tl.int32)


@triton.jit
def _cut(row, top, heat, top_k, top_p, V, C: tl.constexpr):
    """Where to cut: a key, and how many of the values at that key are kept in addition to all above it."""
    key = tl.full([], -2147483648, tl.int32)
    ties = V.to(tl.float32)
    if (top_k > 0) & (top_k < V):
        target = top_k.to(tl.float32)
        key = _largest_key(row, target, top, heat, V, C, False)
        ties = target - _share(row, key + 1, top, heat, V, C, False)
    if top_p < 1.0:
        if key == -2147483648:
            total = _share(row, key, top, heat, V, C, True)
        else:
            total = _share(row, key + 1, top, heat, V, C, True) + ties * _weight(_key_value(key), top, heat)
        nucleus = tl.maximum(_largest_key(row, top_p * total, top, heat, V, C, True), key)
        missing = top_p * total - _share(row, nucleus + 1, top, heat, V, C, True)
        needed = tl.ceil(missing / tl.maximum(_weight(_key_value(nucleus), top, heat), 1e-37))
        ties = tl.minimum(tl.maximum(needed, 1.0), tl.where(nucleus == key, ties, V.to(tl.float32)))
        key = nucleus
    return key, ties.to(tl.int32)


@triton.jit
def _key_value(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _draw_of_cut(row, top, heat, top_k, top_p, seed, step, V, C: tl.constexpr):
    """The token of a row with a cut, whose largest logit is `top`, by one program."""
    token = tl.full([], -1, tl.int32)
    if _is_number(top):
        least, ties = _cut(row, top, heat, top_k, top_p, V, C)
        best = tl.full([], float("-inf"), tl.float32)
        seen = tl.full([], 0, tl.int32)
        for first in range(0, V, C):
            v = first + tl.arange(0, C)
            x = _values(row, v, V)
            key = _key(x)
            tie = ((key == least) & (v < V)).to(tl.int32)
            keep = (key > least) | ((tie == 1) & (seen + tl.cumsum(tie, 0) <= ties))
            seen += tl.sum(tie, 0)
            if tl.max(keep.to(tl.int32), 0) > 0:  # most chunks hold nothing that is kept: no noise for them
                highest, at = _best(tl.where(keep, x + heat * _noise(seed, step, v), float("-inf")), v)
                token = tl.where(highest > best, at, token)
                best = tl.maximum(highest, best)
    return token


@triton.jit
def _finish(
    logits, temperature, top_k, top_p, seed, step, value, index, top, total, token, logprob, V, blocks,
    BP: tl.constexpr, C: tl.constexpr, programmatic: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    begin(programmatic)
    row = logits + b.to(tl.int64) * V
    heat = tl.load(temperature + b)
    k = tl.load(top_k + b)
    p = tl.load(top_p + b)
    now = tl.load(step + b)
    c = tl.arange(0, BP)
    top_c = tl.load(top + b * blocks + c, mask=c < blocks, other=float("-inf"))
    highest = tl.max(top_c, 0)
    weight = tl.sum(tl.load(total + b * blocks + c, mask=c < blocks, other=0.0) * _exp_below(top_c, highest), 0)
    sane = _is_number(highest)
    if _has_cut(heat, k, p, V):
        found = _draw_of_cut(row, highest, heat, k, p, tl.load(seed + b), now, V, C)
    else:
        x = tl.load(value + b * blocks + c, mask=c < blocks, other=float("-inf"))
        _, found = _best(x, tl.load(index + b * blocks + c, mask=c < blocks, other=NOWHERE))
        found = tl.where(sane, found, -1)
    below = tl.load(row + tl.maximum(found, 0)) - tl.where(sane, highest, 0.0)
    tl.store(logprob + b, tl.where(sane, below - tl.log(tl.where(sane, weight, 1.0)), float("nan")))
    tl.store(token + b, found)
    tl.store(step + b, now + 1)


@triton.jit
def _advance(
    token, logprob, counts, tokens, slots, positions, padding, ring_token, ring_logprob, ring_counts, made, B, size,
    BP: tl.constexpr, C: tl.constexpr, programmatic: tl.constexpr,
):  # fmt: skip
    b = tl.arange(0, BP)
    live = b < B
    begin(programmatic)
    found = tl.load(token + b, mask=live, other=0)
    moves = live & (tl.load(slots + b, mask=live, other=0) != padding)
    place = tl.load(made)
    tl.store(ring_token + place * B + b, found, mask=live)
    tl.store(ring_logprob + place * B + b, tl.load(logprob + b, mask=live, other=0.0), mask=live)
    for first in range(0, size, C):
        i = first + tl.arange(0, C)
        tl.store(ring_counts + place * size + i, tl.load(counts + i, mask=i < size, other=0), mask=i < size)
    tl.store(tokens + b, tl.maximum(found, 0), mask=moves)
    tl.store(positions + b, tl.load(positions + b, mask=moves, other=0) + 1, mask=moves)
    tl.store(made, place + 1)


def sample_rows(
    logits_BV: Tensor, settings: SampleSettings, scratch: SampleScratch, token_B: Tensor, logprob_B: Tensor, *, programmatic: bool = False
) -> None:
    """Fill token_B int32 and logprob_B fp32 from logits fp32 [B, V], contiguous, and add 1 to each row's step. Decides nothing on
    the host."""
    rows, vocab = logits_BV.shape
    blocks = scratch.value.shape[1]
    assert logits_BV.dtype == torch.float32 and logits_BV.is_contiguous() and blocks == triton.cdiv(vocab, BLOCK)
    given = (logits_BV, settings.temperature_B, settings.top_k_B, settings.top_p_B, settings.seed_B, settings.step_B)
    found = (scratch.value, scratch.index, scratch.top, scratch.total)
    launch(_partial, (rows, blocks), *given, *found, vocab, BLOCK=BLOCK, num_warps=4, programmatic=programmatic)
    launch(
        _finish, (rows,), *given, *found, token_B, logprob_B, vocab, blocks, BP=triton.next_power_of_2(blocks),
        C=min(CHUNK, max(16, triton.next_power_of_2(vocab))), num_warps=16, programmatic=programmatic,
    )  # fmt: skip


def advance_rows(
    token_B: Tensor, logprob_B: Tensor, counts_MBL: Tensor, inputs_3B: Tensor, ring: Ring, made: Tensor, *, padding: int,
    programmatic: bool = False,
) -> None:  # fmt: skip
    """Make the sampled tokens the next step's input: inputs int32 [3, B] are tokens, slots and positions, which rise by 1.

    Rows of the slot `padding` stay as they are. The tokens, their log-probabilities and the step's counts int32 [M, B, L] are also
    kept in row made[0] of the ring, and made int32 [1] rises by 1; the caller sets it back before it reaches N. A token of -1 (see
    above) is kept as it is and fed back as 0.
    """
    rows, size = token_B.shape[0], counts_MBL.numel()
    assert counts_MBL.dtype == torch.int32 and counts_MBL.is_contiguous() and ring.counts_NMBL.shape[1:] == counts_MBL.shape
    launch(
        _advance, (1,), token_B, logprob_B, counts_MBL, *inputs_3B.unbind(0), padding, ring.token_NB, ring.logprob_NB, ring.counts_NMBL,
        made, rows, size, BP=triton.next_power_of_2(rows), C=min(1024, triton.next_power_of_2(size)),
        num_warps=1,  # of several, one could read `made` after another has raised it
        programmatic=programmatic,
    )  # fmt: skip


def random_words(seed_B: Tensor, step_B: Tensor, vocab: int) -> Tensor:
    """The numbers that `sample_rows` draws with, int64 [B, V] in [0, 2^32): the first of four words of Philox 4x32-10."""
    low = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    key = seed_B.cpu().numpy().astype(np.int64).view(np.uint64)[:, None]
    key0, key1 = key & low, key >> shift
    c0 = np.broadcast_to(np.arange(vocab, dtype=np.uint64), (len(key), vocab))
    c1 = np.broadcast_to(step_B.cpu().numpy().astype(np.uint64)[:, None], c0.shape)
    c2 = c3 = np.zeros_like(c0)
    for _ in range(10):
        first, second = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (second >> shift) ^ c1 ^ key0, second & low, (first >> shift) ^ c3 ^ key1, first & low
        key0, key1 = (key0 + np.uint64(0x9E3779B9)) & low, (key1 + np.uint64(0xBB67AE85)) & low
    return torch.from_numpy(c0.astype(np.int64))


def sample_definition(logits_BV: Tensor, settings: SampleSettings, word_BV: Tensor) -> Tensor:
    """The tokens int64 [B] in fp64, with words as of `random_words`."""
    found = []
    for b, (x_V, word_V) in enumerate(zip(logits_BV.double().cpu(), word_BV.double(), strict=True)):
        heat, top_k, top_p = float(settings.temperature_B[b]), int(settings.top_k_B[b]), float(settings.top_p_B[b])
        best, at = x_V.max(0)
        if not math.isfinite(best):
            found.append(-1)
            continue
        if heat == 0:
            found.append(int(at))
            continue
        id_C = x_V.sort(descending=True, stable=True).indices[: top_k or None]
        if top_p < 1:
            reached_C = ((x_V[id_C] - best) / heat).exp().cumsum(0)
            id_C = id_C[: int(torch.searchsorted(reached_C, top_p * reached_C[-1])) + 1]
        noise_V = -(-torch.log1p(-(word_V + 0.5) * 2.0**-32)).log()
        found.append(int(id_C[(x_V + heat * noise_V)[id_C].argmax()]))
    return torch.tensor(found)


def logprob_definition(logits_BV: Tensor, token_B: Tensor) -> Tensor:
    """The log-probabilities fp64 [B] of tokens int [B], NaN for a token of -1."""
    token_B1 = token_B.long().cpu()[:, None]
    found_B1 = logits_BV.double().cpu().log_softmax(-1).gather(1, token_B1.clamp(min=0))
    return found_B1.masked_fill(token_B1 < 0, torch.nan)[:, 0]
