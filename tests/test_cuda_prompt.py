"""Passes over prompts: their kernels against definitions, and packed sequences against each alone; on the CPU under Triton's interpreter,
on a GPU with -m gpu.

As test_cuda_kernels.py. The cache is NaN except where the sequences' own tokens lie.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from conftest import Tiny
from dejavu.engine.cuda import prompts
from dejavu.engine.cuda.engine import CudaEngine
from dejavu.engine.options import EngineOptions
from dejavu.engine.torch_engine import TorchEngine
from dejavu.kernels.attention import PLAIN, ScoreConfig
from dejavu.kernels.cuda.attention import Places, ScoreWeights
from dejavu.kernels.cuda.common import norm_definition
from dejavu.kernels.cuda.mlp_rows import activate_rows, activate_rows_definition
from dejavu.kernels.cuda.prompt import (
    BlockShape,
    attend_blocks,
    attend_blocks_definition,
    attend_whole,
    attends_whole,
    block_shape,
    place_heads,
)
from dejavu.model.layers import rotate
from helpers.cuda import DEVICES, on, slow
from helpers.engines import GEMMA, ids_of
from helpers.kernel_memory import Memory, check_rule
from helpers.kernels import BF16, FP16, FP32, converted, norm_of, placed

INT = torch.int32


@dataclass(frozen=True, kw_only=True)
class PromptCase:
    """pieces: position of the first token and tokens, of each sequence."""

    groups: int
    per: int
    head_dim: int
    page: int
    pieces: tuple[tuple[int, int], ...]
    dtype: torch.dtype
    scores: ScoreConfig = PLAIN
    rotated: int = 0
    factor: float = 1.0
    normed: bool = False
    block: int = 16


CASES = [
    PromptCase(groups=1, per=1, head_dim=16, page=16, pieces=((0, 1),), dtype=FP32),
    PromptCase(groups=2, per=2, head_dim=12, page=3, pieces=((0, 20), (7, 5)), dtype=FP16, rotated=12),
    PromptCase(groups=3, per=1, head_dim=8, page=5, pieces=((18, 33), (0, 17), (40, 1)), dtype=BF16, rotated=4, factor=1.3, normed=True),
    PromptCase(groups=2, per=2, head_dim=20, page=16, pieces=((31, 40),), dtype=FP32, scores=ScoreConfig(scale=0.4, cap=2.0, window=17)),
    PromptCase(groups=1, per=3, head_dim=8, page=4, pieces=((0, 50), (3, 2)), dtype=FP16, scores=ScoreConfig(window=1), rotated=8),
]


def paged(memory: Memory, case: PromptCase) -> tuple[Tensor, list[int], Tensor]:
    """A table int64 [slots, pages] of sequences that need so many pages, each one's slot, and one spare page in the rest of it."""
    lengths = [-(-(position + count) // case.page) for position, count in case.pieces]
    pages, slots = memory.choice(sum(lengths) + 2, sum(lengths) + 1), memory.choice(len(lengths) + 1, len(lengths)).tolist()
    table = torch.full((len(lengths) + 1, max(lengths)), int(pages[-1]))
    for slot, own in zip(slots, pages[:-1].split(lengths), strict=True):
        table[slot, : len(own)] = own
    return table, slots, torch.tensor([sum(lengths) + 2])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_place_heads(case: PromptCase, device: str) -> None:
    memory, dtype = Memory(device, case.dtype), case.dtype
    heads, groups, head_dim = case.groups * case.per, case.groups, case.head_dim
    table, slots, pages = paged(memory, case)
    slot_T = torch.tensor([slot for slot, (_, count) in zip(slots, case.pieces, strict=True) for _ in range(count)])
    position_T = torch.cat([torch.arange(position, position + count) for position, count in case.pieces])
    rows = len(slot_T)
    qkv_TW = memory.normal(rows, (heads + 2 * groups) * head_dim)
    inv_freq = 1 / 10000 ** (torch.arange(0, case.rotated, 2) / case.rotated) if case.rotated else None
    norms = [norm_of(memory, head_dim, rms=True, affine=True) if case.normed else None for _ in range(2)]

    def made(wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv_TW.to(wide).view(rows, -1, head_dim).split([heads, groups, groups], 1)
        parts = []
        for x, norm in ((q, norms[0]), (k, norms[1])):
            x = x if norm is None else norm_definition(x, converted(norm, wide))
            parts.append(
                x if inv_freq is None else rotate(x, position_T, inv_freq.double() if wide == torch.float64 else inv_freq, case.factor)
            )
        return parts[0], parts[1], v

    pool = (int(pages), groups, case.page, head_dim)
    q_THK = memory.room(rows, heads, head_dim, dtype=dtype)
    pools = [memory.room(*pool, dtype=dtype) for _ in range(2)]
    places = Places(slot_B=memory.given(slot_T.int()), position_B=memory.given(position_T.int()), table=memory.given(table))
    how = ScoreWeights(
        inv_freq=None if inv_freq is None else memory.given(inv_freq), factor=case.factor,
        q_norm=None if norms[0] is None else placed(norms[0], memory), k_norm=None if norms[1] is None else placed(norms[1], memory),
    )  # fmt: skip
    k_TGK = memory.room(rows, groups, head_dim, dtype=dtype)
    place_heads(memory.given(qkv_TW), q_THK, pools[0], pools[1], places, how, k_TGK=k_TGK)
    memory.check()
    page_T, at_T = table[slot_T, position_T // case.page], position_T % case.page
    stored = [pool_PGSK.cpu()[page_T, :, at_T] for pool_PGSK in pools]
    assert torch.equal(k_TGK.cpu(), stored[0])
    for found, plain, truth in zip((q_THK, *stored), made(dtype), made(torch.float64), strict=True):
        check_rule(found, plain, truth, dtype)
    for pool_PGSK in pools:
        rest = pool_PGSK.cpu().clone()
        rest[page_T, :, at_T] = torch.nan
        assert rest.isnan().all(), "something was stored where no token is"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attend_blocks(case: PromptCase, device: str) -> None:
    """Blocks in no order, and one of no rows."""
    if device == "cpu" and case.dtype == BF16:
        pytest.skip("Triton's interpreter multiplies the bits of bf16 matrices as integers")
    memory, dtype = Memory(device, case.dtype), case.dtype
    heads, groups, head_dim = case.groups * case.per, case.groups, case.head_dim
    table, slots, pages = paged(memory, case)
    rows = sum(count for _, count in case.pieces)
    q_THK = memory.normal(rows, heads, head_dim)
    pools = [torch.full((int(pages), groups, case.page, head_dim), torch.nan, dtype=dtype) for _ in range(2)]
    blocks, first, plain, truth = [(0, 0, 0, 0)], 0, [], []
    how = ScoreWeights(scores=case.scores)
    for slot, (position, count) in zip(slots, case.pieces, strict=True):
        k_SGK, v_SGK = (memory.normal(position + count, groups, head_dim) for _ in range(2))
        at_S = torch.arange(position + count)
        for pool_PGSK, new_SGK in zip(pools, (k_SGK, v_SGK), strict=True):
            pool_PGSK[table[slot, at_S // case.page], :, at_S % case.page] = new_SGK
        own_THK = q_THK[first : first + count]
        plain.append(attend_blocks_definition(own_THK, k_SGK, v_SGK, position, how))
        truth.append(attend_blocks_definition(own_THK.double(), k_SGK.double(), v_SGK.double(), position, how))
        blocks += [(first + at, min(case.block, count - at), slot, position + at) for at in range(0, count, case.block)]
        first += count
    given = memory.given(torch.tensor(blocks[::-1], dtype=INT))
    out_THK = memory.room(rows, heads, head_dim, dtype=dtype)
    shape = BlockShape(queries=case.block, keys=16)
    attend_blocks(
        memory.given(q_THK), memory.given(pools[0]), memory.given(pools[1]), given, memory.given(table), out_THK, how, shape=shape
    )  # fmt: skip
    memory.check()
    check_rule(out_THK, torch.cat(plain), torch.cat(truth), dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("groups", "per", "head_dim", "scale", "dtype"), [(2, 1, 64, None, FP16), (2, 3, 128, 0.2, BF16)])
def test_attend_whole(groups: int, per: int, head_dim: int, scale: float | None, dtype: torch.dtype, device: str) -> None:
    memory, how = Memory(device, dtype), ScoreWeights(scores=ScoreConfig(scale=scale))
    assert attends_whole(how, head_dim, dtype) and not attends_whole(how, head_dim, FP32)
    assert not any(attends_whole(ScoreWeights(scores=scores), head_dim, dtype) for scores in (ScoreConfig(cap=2.0), ScoreConfig(window=5)))
    q_THK, qkv_TW = memory.normal(70, groups * per, head_dim), memory.normal(70, (per + 2) * groups * head_dim)
    k_TGK, v_TGK = memory.normal(70, groups, head_dim), qkv_TW[:, -groups * head_dim :].unflatten(1, (groups, head_dim))
    sequences, out_THK = [(0, 33), (33, 1), (34, 36)], memory.room(70, groups * per, head_dim, dtype=dtype)
    given_v = memory.given(qkv_TW)[:, -groups * head_dim :].unflatten(1, (groups, head_dim))
    attend_whole(memory.given(q_THK), memory.given(k_TGK), given_v, sequences, out_THK, how)
    memory.check()

    def made(wide: torch.dtype) -> Tensor:
        q, k, v = q_THK.to(wide), k_TGK.to(wide), v_TGK.to(wide)
        own = [slice(first, first + count) for first, count in sequences]
        return torch.cat([attend_blocks_definition(q[at], k[at], v[at], 0, how) for at in own])

    check_rule(out_THK, made(dtype), made(torch.float64), dtype)


def test_blocks_fit_every_device() -> None:
    """Queries, and keys and values for each stage, in 99 KiB."""
    for head_dim in (12, 64, 80, 128, 256):
        for element in (2, 4):
            shape = block_shape(head_dim, element)
            row = max(16, 1 << (head_dim - 1).bit_length()) * element
            assert min(shape.queries, shape.keys) >= 16 and row * (shape.queries + 2 * shape.stages * shape.keys) <= 99 << 10


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("activation", "gated", "dtype"), [("silu", True, FP16), ("relu2", False, BF16), ("fatrelu", True, FP32)])
def test_activate_rows(activation: str, gated: bool, dtype: torch.dtype, device: str) -> None:
    memory = Memory(device, dtype)
    first, up = memory.normal(3, 700), memory.normal(3, 700) if gated else None
    first[0, 5] = torch.nan
    truth = activate_rows_definition(first.double(), None if up is None else up.double(), activation, 0.3)
    plain = activate_rows_definition(first, up, activation, 0.3)
    out = memory.room(3, 700, dtype=dtype, holds=first)
    assert activate_rows(out, None if up is None else memory.given(up), activation, 0.3) is out
    memory.check()
    assert out[0, 5].isnan()
    number = ~truth.isnan()
    check_rule(out.cpu()[number], plain[number], truth[number], dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["llama", slow("opt"), slow("gemma")])
@pytest.mark.parametrize("tokens", [7, slow(2048)])
def test_sequences_in_the_same_passes(tiny: Tiny, name: str, tokens: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each as it is alone on the torch engine, behind tokens that a slot holds, in passes that begin and end anywhere."""
    monkeypatch.setattr(prompts, "PASS", tokens)
    model = tiny("opt") if name == "opt" else tiny("llama", **(GEMMA if name == "gemma" else {}))
    options, slots, given = EngineOptions(num_slots=3, page_size=4), [2, 0, 1], [ids_of(1, 5), ids_of(2, 13), ids_of(3, 1)]
    engine, alone = CudaEngine(on(model, device), None, options), TorchEngine(model, None, options)
    for each in (engine, alone):
        each.prefill(0, [7, 8])
    found_BV = engine.prefill_batch(slots, given)
    for row, (slot, ids) in enumerate(zip(slots, given, strict=True)):
        torch.testing.assert_close(found_BV[row].cpu(), alone.prefill(slot, ids), rtol=0, atol=2e-5)
        assert engine.length(slot) == alone.length(slot)
    every_TV = engine.prefill_logits(0, ids_of(4, 9))
    torch.testing.assert_close(every_TV.cpu(), alone.prefill_logits(0, ids_of(4, 9)), rtol=0, atol=2e-5)
    torch.testing.assert_close(engine.step([3, 4, 5], slots).logits_BV.cpu(), alone.step([3, 4, 5], slots).logits_BV, rtol=0, atol=2e-5)


@pytest.mark.gpu
def test_long_prompts_from_their_start_are_as_in_pieces(tiny: Tiny) -> None:
    """By torch's attention where they are longer than a graph, by that over pages where a slot held a token before."""
    model = on(tiny("llama", max_positions=2048), "cuda", torch.float16)
    engine = CudaEngine(model, None, EngineOptions(num_slots=4, cache_tokens=4096))
    given = [ids_of(1, 700), ids_of(2, 900)]
    together_BV = engine.prefill_batch([0, 1], given)
    for row, ids in enumerate(given):
        engine.prefill(2 + row, ids[:1])
        torch.testing.assert_close(engine.prefill(2 + row, ids[1:]), together_BV[row], rtol=0, atol=1e-2)
    found_BV = engine.step([3, 3, 4, 4], [0, 2, 1, 3]).logits_BV
    torch.testing.assert_close(found_BV[::2], found_BV[1::2], rtol=0, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("count", [3, 16, 45, 512, 600])
def test_a_graph_gives_what_the_first_pass_gave(tiny: Tiny, count: int) -> None:
    """The second pass of a size captures it, later ones replay it; other prompts come between."""
    model = on(tiny("llama", max_positions=1024), "cuda", torch.float16)
    engine = CudaEngine(model, None, EngineOptions(num_slots=2, cache_tokens=2048))
    first_V = engine.prefill(0, ids_of(1, count))
    for _ in range(4):
        engine.free(1)
        assert torch.equal(engine.prefill(1, ids_of(1, count)), first_V)
        engine.free(0)
        engine.prefill(0, ids_of(2, max(1, count - 2)))
    assert (engine._prompts._captured.keys() != set()) == (count <= 512)
