"""The kernels of attention, for one row and several, against their definition: on the CPU under Triton's interpreter, on a GPU with -m gpu.

As test_cuda_kernels.py. The cache is NaN except where the row's own tokens of its selected groups lie.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dejavu.kernels.attention import PLAIN, ScoreConfig, masked_output_heads, plain_attention
from dejavu.kernels.cuda.attention import Partials, Places, ScoreWeights, WholeHeads, attend, output_token
from dejavu.kernels.cuda.common import norm_definition
from dejavu.kernels.cuda.rows import combine_rows
from dejavu.kernels.cuda.select import select_definition
from dejavu.model.layers import rotate
from helpers.cuda import DEVICES, slow
from helpers.kernel_memory import Memory, check_rule, poisoned_rows
from helpers.kernels import BF16, FP16, FP32, check_list, converted, neuron_scores, norm_of, placed, with_room


@dataclass(frozen=True, kw_only=True)
class AttentionCase:
    """A row for each position; counts: selected groups of each row, None without predictors. partial, select: for one row.
    rotated: values of a head that are, None: all."""

    groups: int
    per: int
    head_dim: int
    page: int
    splits: int
    positions: tuple[int, ...]
    dtype: torch.dtype
    counts: tuple[int, ...] | None = None
    rope: bool = False
    partial: bool = False
    selected: int | None = None
    size: int = 33
    rotated: int | None = None
    scores: ScoreConfig = PLAIN
    factor: float = 1.0
    normed: bool = False


ATTENTION_CASES = [
    AttentionCase(groups=3, per=1, head_dim=8, page=4, splits=1, positions=(0,), dtype=FP32),
    AttentionCase(groups=5, per=1, head_dim=6, page=3, splits=2, positions=(31,), dtype=FP16, counts=(0,), selected=1),
    AttentionCase(groups=2, per=2, head_dim=16, page=16, splits=1, positions=(33,), dtype=BF16, counts=(1,), rope=True, partial=True),
    AttentionCase(groups=3, per=2, head_dim=10, page=5, splits=4, positions=(129,), dtype=FP32, counts=(2,), rope=True, selected=70),
    AttentionCase(groups=4, per=1, head_dim=20, page=16, splits=2, positions=(64,), dtype=FP16, counts=(4,), partial=True, size=250),
    AttentionCase(groups=2, per=3, head_dim=8, page=7, splits=8, positions=(6,), dtype=BF16, rope=True),
    AttentionCase(groups=1, per=1, head_dim=16, page=256, splits=4, positions=(3001,), dtype=FP32, rope=True),
    AttentionCase(groups=3, per=1, head_dim=8, page=4, splits=1, positions=(7, 40), dtype=BF16, counts=(1, 3)),
    AttentionCase(groups=2, per=2, head_dim=12, page=5, splits=2, positions=(0, 66, 5), dtype=FP16, rope=True),
    AttentionCase(groups=3, per=2, head_dim=4, page=3, splits=2, positions=(1, 0, 32, 8, 3), dtype=FP32, rope=True, counts=(0, 3, 1, 2, 1)),
    AttentionCase(groups=2, per=2, head_dim=12, page=4, splits=2, positions=(38,), dtype=FP32, rope=True, normed=True, counts=(1,),
                  scores=ScoreConfig(scale=0.4, cap=2.0, window=17)),
    AttentionCase(groups=2, per=1, head_dim=8, page=5, splits=4, positions=(0, 7, 66), dtype=FP16, rope=True, normed=True, rotated=4,
                  factor=1.3, scores=ScoreConfig(window=1)),
    AttentionCase(groups=3, per=1, head_dim=16, page=16, splits=1, positions=(30, 3), dtype=BF16, rope=True, rotated=6,
                  scores=ScoreConfig(cap=1.5, window=9)),
]  # fmt: skip


def stored(k_GK: Tensor, v_GK: Tensor, pools: tuple[Tensor, Tensor], page: int, at: int) -> None:
    for pool_PGSK, new_GK in zip(pools, (k_GK, v_GK), strict=True):
        pool_PGSK[page, :, at] = new_GK


def rotated(x_HK: Tensor, position: int, inv_freq: Tensor | None, factor: float = 1.0) -> Tensor:
    """In fp64 from the same frequencies; as the model does in other dtypes."""
    if inv_freq is None:
        return x_HK
    if x_HK.dtype != torch.float64:
        return rotate(x_HK[None], torch.tensor([position]), inv_freq, factor)[0]
    size = 2 * len(inv_freq)
    angle_K, turned, rest = (position * inv_freq.double()).repeat(2), x_HK[:, :size], x_HK[:, size:]
    first, second = turned.chunk(2, dim=-1)
    turned = factor * (turned * angle_K.cos() + torch.cat([-second, first], dim=-1) * angle_K.sin())
    return torch.cat([turned, rest], dim=-1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "case",
    [slow(case) if max(case.positions) > 100 or case.splits > 4 else case for case in ATTENTION_CASES if len(case.positions) < 5],
    ids=str,
)
def test_attend_and_what_follows(case: AttentionCase, device: str) -> None:
    """attend, then output_token for one row and combine_rows for any number."""
    memory, dtype = Memory(device, case.dtype), case.dtype
    groups, per, head_dim, size, page = case.groups, case.per, case.head_dim, case.size, case.page
    rows, heads = len(case.positions), groups * per
    lengths = [-(-(position + 1) // page) for position in case.positions]
    slots = memory.choice(rows + 2, rows).int()
    pages = memory.choice(sum(lengths) + 3, sum(lengths)).split(lengths)
    width = max(lengths) + 2
    spare = next(p for p in range(sum(lengths) + 3) if p not in torch.cat(pages).tolist())
    table = torch.full((rows + 2, width), spare)
    for row, own in enumerate(pages):
        table[slots[row], : len(own)] = own
    pool_shape = (sum(lengths) + 3, groups, page, head_dim)
    clean = torch.zeros(pool_shape, dtype=dtype), torch.zeros(pool_shape, dtype=dtype)
    poisoned = torch.full(pool_shape, torch.nan, dtype=dtype), torch.full(pool_shape, torch.nan, dtype=dtype)
    turned = case.rotated or head_dim
    inv_freq = 1 / 10000 ** (torch.arange(0, turned, 2) / turned) if case.rope else None
    norms = [norm_of(memory, head_dim, rms=True, affine=True) if case.normed else None for _ in range(2)]
    selected = [memory.choice(groups, groups if case.counts is None else max(1, case.counts[row])).sort().values for row in range(rows)]
    if case.counts is not None and 0 in case.counts:  # a group is always selected by the engine; the kernels do not need one
        selected = [chosen[: case.counts[row]] for row, chosen in enumerate(selected)]
    for row, position in enumerate(case.positions):
        for t in range(position):
            k_GK, v_GK = memory.normal(groups, head_dim), memory.normal(groups, head_dim)
            stored(k_GK, v_GK, clean, int(pages[row][t // page]), t % page)
            where = (int(pages[row][t // page]), selected[row], t % page)
            if t < case.scores.first(position + 1):
                continue  # behind the window: nobody reads it
            poisoned[0][where], poisoned[1][where] = k_GK[selected[row]], v_GK[selected[row]]
    qkv_dtype = FP32 if rows == 1 else dtype  # as the engine's two kinds of steps give it
    qkv_BW = memory.normal(rows, (heads + 2 * groups) * head_dim, dtype=qkv_dtype)

    def definition(row: int, kind: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Mixed values [G, R, K] of all groups, and the new key and value, computed in that dtype."""
        position = case.positions[row]
        vectors = qkv_BW[row].to(kind).view(-1, head_dim)
        parts = zip((vectors[:heads], vectors[heads : heads + groups]), norms, strict=True)
        normed = (part if norm is None else norm_definition(part, converted(norm, kind)) for part, norm in parts)
        q_HK, k_GK = (rotated(part, position, inv_freq, case.factor) for part in normed)
        pools = (clean[0].to(kind, copy=True), clean[1].to(kind, copy=True))
        stored(k_GK, vectors[heads + groups :], pools, int(pages[row][position // page]), position % page)
        mixed_GRK = plain_attention(q_HK.view(groups, per, head_dim), *pools, pages[row], position + 1, None, case.scores)
        return mixed_GRK, k_GK, vectors[heads + groups :]

    k_pool, v_pool = (memory.room(*pool_shape, dtype=dtype, holds=pool) for pool in poisoned)
    mixed, stats = memory.room(rows, heads, case.splits, head_dim), memory.room(rows, heads, case.splits, 2)
    partials = Partials(mixed=mixed, stats=stats)
    groups_BG, counts_BL = None, None
    if case.counts is not None:  # behind each list: a group that was not selected
        lists = [chosen.tolist() for chosen in selected]
        others = [next((g for g in range(groups) if g not in chosen), 0) for chosen in lists]
        full = [chosen + [other] * (groups - len(chosen)) for chosen, other in zip(lists, others, strict=True)]
        groups_BG = memory.given(torch.tensor(full, dtype=torch.int32))
        counts_BL = memory.given(torch.tensor([[9, len(chosen), 9] for chosen in lists], dtype=torch.int32))
    count_B = None if counts_BL is None else counts_BL[:, 1]
    scores = None if case.selected is None else neuron_scores(memory, 70, 5, case.selected, int8=True)
    select = None if scores is None else with_room(scores, memory)
    cleared = memory.room(2500) if rows == 1 else None
    places = Places(
        slot_B=memory.given(slots), position_B=memory.given(torch.tensor(case.positions, dtype=torch.int32)), table=memory.given(table),
    )  # fmt: skip
    q_norm, k_norm = (None if norm is None else placed(norm, memory) for norm in norms)
    how = ScoreWeights(
        scores=case.scores, inv_freq=None if inv_freq is None else memory.given(inv_freq), factor=case.factor, q_norm=q_norm, k_norm=k_norm
    )
    whole = None
    if case.counts is None:
        tickets = memory.room(rows, heads, dtype=torch.int32, holds=0.0)
        whole = WholeHeads(out=memory.room(rows, heads, head_dim, dtype=dtype), tickets=tickets)
    attend(
        memory.given(qkv_BW), k_pool, v_pool, places, partials, heads=heads, how=how, groups_BG=groups_BG, count_B=count_B, select=select,
        whole=whole, cleared=cleared,
    )  # fmt: skip
    memory.check()
    assert cleared is None or not cleared.any()
    if select is not None and scores is not None:
        check_list(select, select_definition(scores).tolist())

    for row, position in enumerate(case.positions):  # every group's key and value is in its place ..
        _, truth_k, truth_v = definition(row, torch.float64)
        _, plain_k, plain_v = definition(row, dtype)
        where = (int(pages[row][position // page]), slice(None), position % page)
        check_rule(k_pool[where], plain_k, truth_k, dtype)
        check_rule(v_pool[where], plain_v, truth_v, dtype)
        for pool, before in zip((k_pool, v_pool), poisoned, strict=True):
            before[where] = pool[where].cpu()
    for pool, expected in zip((k_pool, v_pool), poisoned, strict=True):  # .. and nothing else of the cache has changed
        assert torch.equal(pool.cpu().nan_to_num(nan=1e4), expected.nan_to_num(nan=1e4))
    for row, chosen in enumerate(selected):
        idle = torch.ones(groups, dtype=torch.bool).index_fill(0, chosen, False)
        assert mixed[row].cpu().view(groups, -1)[idle].isnan().all(), "a head was computed that was not selected"

    out_BHK = memory.room(rows, heads, head_dim, dtype=dtype)
    combine_rows(partials, groups_BG, count_B, out_BHK)
    memory.check()
    assert whole is None or (torch.equal(whole.out, out_BHK) and not whole.tickets.any())
    for row, chosen in enumerate(selected):
        truth_GRK, plain_GRK = definition(row, torch.float64)[0], definition(row, dtype)[0]
        found_GRK = out_BHK[row].cpu().view(groups, per, head_dim)
        check_rule(found_GRK[chosen], plain_GRK[chosen], truth_GRK[chosen], dtype)
        idle = torch.ones(groups, dtype=torch.bool).index_fill(0, chosen, False)
        assert not found_GRK[idle].any()
    if rows > 1:
        return

    chosen = selected[0]
    weight_QD, bias_D = memory.normal(heads * head_dim, size, scale=heads**-0.5), memory.normal(size) if size == 33 else None
    rows_of_O = torch.arange(heads * head_dim).view(groups, -1)[chosen].flatten()
    start_D = memory.normal(size, dtype=FP32)
    out = memory.room(heads, size) if case.partial else memory.room(size, holds=start_D)
    output_token(
        partials, memory.given(poisoned_rows(weight_QD, rows_of_O)), None if bias_D is None else memory.given(bias_D), out,
        num_groups=groups, groups_G=None if groups_BG is None else groups_BG[0], count=count_B, columns=32, partial=case.partial,
    )  # fmt: skip
    memory.check()
    idx_A = None if case.counts is None else chosen
    mixed_ARK = [definition(0, kind)[0][chosen] for kind in (torch.float64, dtype)]
    truth_D = masked_output_heads(mixed_ARK[0], weight_QD.double(), None if bias_D is None else bias_D.double(), idx_A, groups)
    plain_D = masked_output_heads(mixed_ARK[1], weight_QD, bias_D, idx_A, groups)
    found_D = out.double().sum(0) if case.partial else out.double().cpu() - start_D.double()
    if len(chosen):  # with no head at all nobody adds the bias: the engine always selects one
        check_rule(found_D, plain_D, truth_D, dtype)
