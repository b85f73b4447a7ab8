"""Prompts that begin alike share pages: who holds them, what is reused, what goes first, and that no logit changes by it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conftest import Tiny
from dejavu.engine.cache import PagedCache
from dejavu.engine.interface import Engine
from dejavu.engine.options import EngineOptions
from dejavu.engine.prefixes import PagePool
from dejavu.engine.torch_engine import TorchEngine
from helpers.engines import ids_of, random_layers
from helpers.native import engine_of, needs_library

SIZE, SLOTS = 2, 3  # tokens per page


def cache_of(pages: int, page_size: int = SIZE, slots: int = SLOTS) -> PagedCache:
    return PagedCache(
        num_layers=1,
        num_groups=1,
        head_dim=1,
        num_slots=slots,
        num_pages=pages,
        page_size=page_size,
        dtype=torch.float64,
        device=torch.device("cpu"),
    )


def append(cache: PagedCache, slot: int, values: Sequence[float]) -> None:
    """Store these as the keys of new tokens, and their negatives as values."""
    new_TGK = torch.tensor(values, dtype=torch.float64)[:, None, None]
    cache.reserve(slot, len(values))
    cache.write(0, cache.places(slot, cache.lengths[slot], len(new_TGK)), new_TGK, -new_TGK)
    cache.advance(slot, len(values))


def keys_of(ids: Sequence[int], start: int = 0) -> list[float]:
    """What a dense prefill would store of each token from `start` on: a number that all ids up to it determine."""
    return [float(int("1" + "".join(map(str, ids[: end + 1])))) for end in range(start, len(ids))]


def stored(cache: PagedCache, slot: int) -> list[float]:
    length = cache.lengths[slot]
    page_N = cache.pages(slot, length)
    k_T, v_T = (pool[0, page_N].flatten()[:length] for pool in (cache.k_LPGSK, cache.v_LPGSK))
    assert torch.equal(k_T, -v_T)
    return k_T.tolist()


def check_owners(cache: PagedCache) -> None:
    """Every page has as many holders as slots list it, and one that a slot has yet to write to has one."""
    tables = [list(table) for table in cache._tables]
    for slot, table in enumerate(tables):
        assert cache.table[slot, : len(table)].tolist() == table and len(set(table)) == len(table)
        for page in table[cache.lengths[slot] // SIZE :]:
            assert sum(page in other for other in tables) == 1
    held = [page for table in tables for page in table]
    assert [cache._pool.holders(page) for page in range(cache.num_pages)] == [held.count(page) for page in range(cache.num_pages)]
    assert cache.free_pages == cache.num_pages - len(set(held))


SLOT = st.integers(0, SLOTS - 1)
PROMPT = st.tuples(st.integers(0, 7), st.integers(0, 3)).map(lambda counts: [0] * counts[0] + [1] * counts[1] or [1])
ACTIONS = st.one_of(
    st.tuples(st.just("begin"), SLOT, PROMPT),
    st.tuples(st.just("publish"), SLOT, st.just([])),
    st.tuples(st.just("step"), SLOT, st.just([])),
    st.tuples(st.just("free"), SLOT, st.just([])),
)


@pytest.mark.parametrize("pages", [7, 400])
@settings(max_examples=50)
@given(actions=st.lists(ACTIONS, min_size=10, max_size=40))
def test_any_order_of_prefills_steps_frees_and_reuses(actions: list[tuple[str, int, list[int]]], pages: int) -> None:
    """Against lists: each slot holds its own text's keys, whoever shares them; with room for all, all that was published is found."""
    cache = cache_of(pages)
    prompts: list[list[int]] = [[] for _ in range(SLOTS)]
    expected: list[list[float]] = [[] for _ in range(SLOTS)]
    published: set[tuple[int, ...]] = set()
    for number, (action, slot, ids) in enumerate(actions):
        prompt = prompts[slot]
        if action == "begin":
            cache.free(slot)
            prompts[slot], expected[slot] = [], []
            ends = range(SIZE, len(ids), SIZE)
            longest = max((end for end in ends if tuple(ids[:end]) in published), default=0)
            reused = cache.reuse(slot, ids)
            assert reused <= longest and reused % SIZE == 0
            assert reused == longest or pages < 400, "nothing had to go"
            assert stored(cache, slot) == keys_of(ids)[:reused]
            if cache.missing(slot, len(ids) - reused) > cache.free_pages:
                with pytest.raises(ValueError, match="cache is full"):
                    cache.reserve(slot, len(ids) - reused)
                cache.free(slot)
            else:
                append(cache, slot, keys_of(ids, reused))
                prompts[slot], expected[slot] = ids, keys_of(ids)
        elif action == "step" and expected[slot] and cache.missing(slot, 1) <= cache.free_pages:
            append(cache, slot, [-float(number) - 1])  # sparse: no prefill would store it
            expected[slot].append(-float(number) - 1)
        elif action == "free":
            cache.free(slot)
            prompts[slot], expected[slot] = [], []
        elif action == "publish":
            cache.publish(slot, prompt)
            published |= {tuple(prompt[:end]) for end in range(SIZE, len(prompt) + 1, SIZE)}
        check_owners(cache)
        for each in range(SLOTS):
            assert stored(cache, each) == expected[each]
    for slot in range(SLOTS):
        cache.free(slot)
    check_owners(cache)
    assert cache.free_pages == pages
    cache.reserve(0, pages * SIZE)
    assert cache.free_pages == 0, "what was kept can be taken, all of it"


def test_only_whole_pages_before_the_last_token() -> None:
    cache = cache_of(20, page_size=4)
    ids = [*range(9)]
    append(cache, 0, keys_of(ids))
    cache.publish(0, ids)
    for count, reused in ((0, 0), (1, 0), (4, 0), (5, 4), (8, 4), (9, 8)):
        assert cache.reuse(1, ids[:count]) == reused
        cache.free(1)
    assert cache.reuse(1, [*ids, 5, 5, 5, 5]) == 8, "the ninth token does not fill a page"
    cache.free(1)
    assert cache.reuse(1, [0, 1, 2, 9, *ids[4:]]) == 0 and cache.reuse(2, [*ids[:4], 9, *ids[5:]]) == 4


def test_pages_are_counted_once_and_outlive_their_writer() -> None:
    cache = cache_of(10)
    append(cache, 0, keys_of([1, 2, 3, 4, 5]))
    cache.publish(0, [1, 2, 3, 4, 5])
    assert cache.reuse(1, [1, 2, 3, 4, 6]) == 4 and cache.free_pages == 7
    cache.free(0)
    assert cache.free_pages == 8, "two pages are slot 1's, one was slot 0's alone"
    cache.free(1)
    assert cache.free_pages == 10
    assert cache.reuse(2, [1, 2, 3, 4, 7]) == 4 and cache.free_pages == 8


def test_equal_prompts_prefilled_together_end_with_one_copy() -> None:
    cache = cache_of(10)
    for slot in range(2):
        append(cache, slot, keys_of([1, 2, 3, 4, 5]))
    cache.publish(0, [1, 2, 3, 4, 5])
    assert cache.free_pages == 4
    cache.publish(1, [1, 2, 3, 4, 5])
    assert cache.free_pages == 6 and stored(cache, 1) == keys_of([1, 2, 3, 4, 5])
    append(cache, 1, [6.0, 7.0])
    assert stored(cache, 0) == keys_of([1, 2, 3, 4, 5])
    append(cache, 2, keys_of([1, 2, 3, 4, 8, 9]))
    cache.publish(2, [1, 2, 3, 4, 8, 9])
    for slot in range(3):
        cache.free(slot)
    assert cache.reuse(0, [1, 2, 3, 4, 8, 9, 0]) == 6, "behind the shared pages its own is known"


def test_what_was_given_back_longest_ago_goes_first_and_ends_before_beginnings() -> None:
    cache = cache_of(6)
    for slot, ids in enumerate(([1, 1, 2, 2], [3, 3, 4, 4])):
        append(cache, slot, keys_of(ids))
        cache.publish(slot, ids)
    cache.free(0)
    cache.free(1)
    assert cache.reuse(0, [1, 1, 2, 2, 0]) == 4
    cache.free(0)  # of the two the later one again
    left = []
    for pages in range(1, 6):
        append(cache, 2, [float(pages)] * SIZE)
        found = []
        for ids in ([1, 1, 2, 2], [3, 3, 4, 4]):
            found.append(len(cache._pool.find([tuple(ids[:2]), tuple(ids[2:])])))
        left.append(found)
    assert left == [[2, 2], [2, 2], [2, 1], [2, 0], [1, 0]], "two pages were free, then the ends go, oldest first"


def test_ids_are_compared_and_not_their_hashes() -> None:
    first, other = (0, 5), (2**61 - 1, 5)
    assert hash(first) == hash(other) and first != other
    pool = PagePool(4)
    page = pool.take()
    pool.publish([page], [first])
    assert pool.find([first]) == [page] and pool.find([other]) == []


def test_a_page_that_goes_takes_no_other_meaning_with_it() -> None:
    """A page that is taken anew and known of other ids is not followed by what followed it before."""
    cache = cache_of(2)
    append(cache, 0, keys_of([1, 1, 2, 2]))
    cache.publish(0, [1, 1, 2, 2])
    cache.free(0)
    append(cache, 0, keys_of([7, 7]))  # in the place of 2, 2
    append(cache, 0, keys_of([7, 7, 8, 8], 2))  # and of 1, 1
    cache.publish(0, [7, 7, 8, 8])
    cache.free(0)
    assert cache.reuse(1, [1, 1, 2, 2, 0]) == 0 and cache.reuse(1, [8, 8, 2, 2, 0]) == 0 and cache.reuse(1, [7, 7, 2, 2, 0]) == 2


@pytest.mark.parametrize("wrong", [[1, 1, 2, 3], [1, 1, 2, 2, 3]])
def test_a_slot_cannot_publish_what_it_does_not_hold(wrong: list[int]) -> None:
    cache = cache_of(4)
    append(cache, 0, keys_of([1, 1, 2, 2]))
    cache.publish(0, [1, 1, 2, 2])
    with pytest.raises(AssertionError):
        cache.publish(0, wrong)


# Engines


def continued(engine: Engine, slot: int, ids: Sequence[int], start: int, chunk: int, steps: Sequence[int]) -> Tensor:
    """Logits [N, V] after a prefill of ids[start:] in chunks and after each step."""
    logits = [engine.prefill(slot, ids[first : first + chunk]) for first in range(start, len(ids), chunk)][-1:]
    logits += [engine.step([token_id], [slot]).logits_BV[0] for token_id in steps]
    return torch.stack(logits).cpu()


def check_reuse(alone: Engine, sharing: Engine, *, chunks: tuple[int, ...], atol: float) -> None:
    """Slot 0 writes a prompt and goes on; others begin with its pages, next to it and after it has gone, and differ behind them."""
    size, prompt, steps = sharing.info.page_size, ids_of(1, 14), ids_of(2, 3)
    pages = sharing.free_pages
    continued(sharing, 0, prompt, 0, 14, steps[:1])
    sharing.publish(0, prompt)
    for index, chunk in enumerate(chunks):
        other = [*prompt[:11], *ids_of(3 + index, 5)]
        expected = continued(alone, 0, other, 0, len(other), steps)
        alone.free(0)
        reused = sharing.reuse(1, other)
        assert reused == 11 // size * size and sharing.length(1) == reused
        before = sharing.free_pages
        found = continued(sharing, 1, other, reused, chunk, steps)
        assert before - sharing.free_pages == -(-(len(other) + 3) // size) - reused // size
        torch.testing.assert_close(found, expected, rtol=0, atol=atol)
        sharing.free(1)
        if index == 0:
            sharing.free(0)
    assert sharing.free_pages == pages


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_torch_goes_on_behind_a_reused_prefix(tiny: Tiny, family: str) -> None:
    model = tiny(family)
    layers = random_layers(model, mlp=1, heads=1)
    engines = [TorchEngine(model, layers, EngineOptions(num_slots=2, page_size=4)) for _ in range(2)]
    check_reuse(*engines, chunks=(16, 3), atol=1e-5)


@needs_library
@pytest.mark.parametrize("options", [{}, {"dtype": "int8"}, {"dtype": "int8", "cache_dtype": "int8"}, {"dtype": "int4"}], ids=str)
@pytest.mark.parametrize("family", ["opt", "llama"])
def test_native_gives_the_same_bits_behind_a_reused_prefix(tiny: Tiny, family: str, options: dict[str, Any]) -> None:
    """Whatever the chunks of the prefill before and behind the pages that are reused."""
    model = tiny(family)
    layers = random_layers(model, mlp=1, heads=1)
    engines = [engine_of(model, layers, num_slots=2, page_size=4, **options) for _ in range(2)]
    check_reuse(*engines, chunks=(16, 1, 3), atol=0)


@needs_library
def test_rows_that_share_pages_step_together(tiny: Tiny) -> None:
    """Three slots on one prefix, each with its own last page, against three alone, over several new pages."""
    model = tiny("opt")
    layers = random_layers(model, mlp=1, heads=1)
    alone, sharing = (engine_of(model, layers, num_slots=3, page_size=4) for _ in range(2))
    prompts = [[*ids_of(1, 9), *ids_of(slot + 2, 2)] for slot in range(3)]
    for slot, prompt in enumerate(prompts):
        alone.prefill(slot, prompt)
        sharing.prefill(slot, prompt[sharing.reuse(slot, prompt) :])
        sharing.publish(slot, prompt)
    assert alone.free_pages - sharing.free_pages == -2 * 2, "two pages of the prompt, for two slots that did not write them"
    for token_id in ids_of(9, 10):
        tokens = [token_id, token_id + 1 & 63, token_id + 2 & 63]
        assert torch.equal(alone.step(tokens, range(3)).logits_BV, sharing.step(tokens, range(3)).logits_BV)


@needs_library
def test_a_prefix_goes_when_its_pages_are_needed(tiny: Tiny) -> None:
    engine = engine_of(tiny("opt"), num_slots=2, page_size=4, cache_tokens=24)
    prompt = ids_of(1, 12)
    engine.prefill(0, prompt)
    engine.publish(0, prompt)
    engine.free(0)
    engine.prefill(0, ids_of(2, 16))
    assert engine.free_pages == 2 and engine.reuse(1, prompt) == 8 and engine.free_pages == 0
    with pytest.raises(ValueError, match="1 pages of 4 tokens and 0 of 6 are free"):
        engine.prefill(1, prompt[8:])
    assert engine.length(1) == 8
    engine.free(1)
    engine.prefill(0, [1])
    assert engine.reuse(1, prompt) == 4


@pytest.mark.slow
def test_cuda_goes_on_behind_a_reused_prefix(tiny: Tiny) -> None:
    check_cuda(tiny, "cpu")


@pytest.mark.gpu
def test_a_graph_goes_on_behind_a_reused_prefix(tiny: Tiny) -> None:
    check_cuda(tiny, "cuda")


def check_cuda(tiny: Tiny, device: str) -> None:
    pytest.importorskip("triton")
    from dejavu.engine.cuda.engine import CudaEngine

    model = tiny("opt", num_layers=1)
    layers = random_layers(model, mlp=1, heads=None)
    sharing = CudaEngine(tiny("opt", num_layers=1).to(device), layers, EngineOptions(num_slots=2, page_size=4))
    check_reuse(TorchEngine(model, layers, EngineOptions(num_slots=2, page_size=4)), sharing, chunks=(16, 3), atol=2e-5)
