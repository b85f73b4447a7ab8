"""The paged key/value cache: pages on demand, no holes, exhaustion, and sequences that never see each other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dejavu.engine.cache import PagedCache

GROUPS, HEAD = 3, 5


def make(*, slots: int = 2, pages: int = 7, page_size: int = 4) -> PagedCache:
    cache = PagedCache(
        num_layers=2,
        num_groups=GROUPS,
        head_dim=HEAD,
        num_slots=slots,
        num_pages=pages,
        page_size=page_size,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    cache.k_LPGSK.fill_(torch.nan)
    cache.v_LPGSK.fill_(torch.nan)
    return cache


def append(cache: PagedCache, slot: int, new_LTGK: Tensor) -> None:
    count = new_LTGK.shape[1]
    cache.reserve(slot, count)
    for layer in range(2):
        cache.write(layer, cache.places(slot, cache.lengths[slot], new_LTGK.shape[1]), new_LTGK[layer], -new_LTGK[layer])
    cache.advance(slot, count)


def stored(cache: PagedCache, slot: int, layer: int) -> tuple[Tensor, Tensor]:
    length = cache.lengths[slot]
    page_N = cache.pages(slot, length)
    k, v = (pool[layer, page_N].transpose(1, 2).flatten(0, 1)[:length] for pool in (cache.k_LPGSK, cache.v_LPGSK))
    return k, v


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(-1, 11)), max_size=15))
def test_sequences_keep_their_tokens_whatever_comes_and_goes(actions: list[tuple[int, int]]) -> None:
    """Random appends (a count) and frees (-1) on three slots, against plain lists."""
    cache = make(slots=3, pages=9)
    expected = [torch.empty(2, 0, GROUPS, HEAD) for _ in range(3)]
    for number, (slot, count) in enumerate(actions):
        if count < 0:
            cache.free(slot)
            expected[slot] = expected[slot][:, :0]
            continue
        new = torch.randn(2, count, GROUPS, HEAD, generator=torch.Generator().manual_seed(number))
        needed = -(-(cache.lengths[slot] + count) // 4) - -(-cache.lengths[slot] // 4)
        if needed > cache.free_pages:
            with pytest.raises(ValueError, match="cache is full"):
                append(cache, slot, new)
        else:
            append(cache, slot, new)
            expected[slot] = torch.cat([expected[slot], new], dim=1)
        for other in range(3):
            for layer in range(2):
                k, v = stored(cache, other, layer)
                assert torch.equal(k, expected[other][layer]) and torch.equal(v, -expected[other][layer])
    held = sum(-(-length // 4) for length in cache.lengths)
    assert cache.free_pages == 9 - held


def test_a_page_is_taken_only_when_the_last_is_full() -> None:
    cache = make()
    free = []
    for _ in range(9):
        append(cache, 0, torch.zeros(2, 1, GROUPS, HEAD))
        free.append(cache.free_pages)
    assert free == [6, 6, 6, 6, 5, 5, 5, 5, 4]


def test_exhaustion_names_the_numbers_and_changes_nothing() -> None:
    cache = make(pages=3)
    append(cache, 0, torch.zeros(2, 5, GROUPS, HEAD))
    with pytest.raises(ValueError, match="5 more tokens need 2 pages of 4 tokens and 1 of 3 are free"):
        cache.reserve(1, 5)
    assert cache.free_pages == 1 and cache.lengths == [5, 0]
    cache.free(0)
    cache.reserve(1, 12)
    assert cache.free_pages == 0
    cache.free(1)
    cache.free(1)
    assert cache.free_pages == 3


def test_reserving_twice_takes_the_pages_once() -> None:
    cache = make()
    cache.reserve(0, 6)
    cache.reserve(0, 6)
    assert cache.free_pages == 5


@pytest.mark.parametrize("sizes", [{"slots": 0}, {"pages": 0}, {"page_size": -1}])
def test_impossible_sizes(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        make(**sizes)
