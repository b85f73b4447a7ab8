"""The key/value cache: pages of a preallocated pool, handed to sequences as they grow.

In: keys and values of new tokens, for every head (a selection skips reads, never writes, so the cache has no holes).
Out: the pool of a layer and the pages of a sequence in order. A slot holds one sequence; `free` returns its pages. Whole pages of a prompt
may be shared by slots (prefixes.py); none of them writes to such a page, as each goes on behind it.

Letters: L layers  P pages of the pool  G key/value heads  S tokens per page  K head_dim  B slots  N pages  T tokens
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dejavu.engine.options import PAGE_SIZE
from dejavu.engine.prefixes import PagePool


class PagedCache:
    """Keys and values k_LPGSK, v_LPGSK with a block table per slot. Memory is taken at construction, all of it: else MemoryError.

    An int8 cache has a scale fp32 for each vector, k_scale_LPGS and v_scale_LPGS, and is written by who reads it.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_groups: int,
        head_dim: int,
        num_slots: int,
        num_pages: int,
        page_size: int = PAGE_SIZE,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        for name, value in (("slots", num_slots), ("pages", num_pages), ("tokens per page", page_size)):
            if value < 1:
                raise ValueError(f"the key/value cache needs at least 1 of its {name}, not {value}")
        shape, scaled = (num_layers, num_pages, num_groups, page_size, head_dim), dtype == torch.int8
        try:
            self.k_LPGSK, self.v_LPGSK = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
            scales = [torch.empty(shape[:-1], device=device) if scaled else None for _ in range(2)]
            self._table_BN = torch.zeros(num_slots, num_pages, dtype=torch.int64, device=device)
        except RuntimeError as error:  # torch's word for memory that is not there, or for sizes that no memory has
            if "CUDA error" in str(error):  # the device's own trouble
                raise
            raise MemoryError(f"the key/value cache of {num_pages} pages does not fit into memory; give it fewer tokens") from error
        self.k_scale_LPGS, self.v_scale_LPGS = scales
        self.page_size = page_size
        self.num_pages = num_pages
        self.lengths = [0] * num_slots
        self._tables: list[list[int]] = [[] for _ in range(num_slots)]
        self._pool = PagePool(num_pages)

    @property
    def free_pages(self) -> int:
        """Pages that no slot holds. Some may still hold a known prefix; they are taken last."""
        return self._pool.free_pages

    def missing(self, slot: int, tokens: int) -> int:
        """Pages that the slot lacks for that many more tokens."""
        return max(0, -(-(self.lengths[slot] + tokens) // self.page_size) - len(self._tables[slot]))

    def reserve(self, slot: int, tokens: int) -> None:
        """Give the slot the pages for that many more tokens. Raises ValueError, changing nothing, when the pool has too few."""
        if self.missing(slot, tokens) > 0:  # else a step of a small model would wait for nothing
            self.reserve_all((slot,), (tokens,))

    def reserve_all(self, slots: Sequence[int], tokens: Sequence[int]) -> None:
        """As `reserve` for each of different slots, for all of them or none."""
        missing = [self.missing(slot, count) for slot, count in zip(slots, tokens, strict=True)]
        if sum(missing) > self.free_pages:
            raise ValueError(
                f"the key/value cache is full: {sum(tokens)} more tokens need {sum(missing)} pages of {self.page_size} tokens and "
                f"{self.free_pages} of {self.num_pages} are free; shorten the text, free a sequence or give the cache more tokens"
            )
        for slot, needed in zip(slots, missing, strict=True):
            for _ in range(needed):
                self._set(slot, len(self._tables[slot]), self._pool.take())

    def _set(self, slot: int, index: int, page: int) -> None:
        self._tables[slot][index : index + 1] = [page]
        self._table_BN[slot, index].fill_(page)  # an assignment would wait for the device

    def places(self, slot: int, position: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Where so many tokens from `position` on are written in every layer: page and offset in it, int64 [T]. In reserved pages."""
        table, size = self._tables[slot], self.page_size
        assert position + tokens <= len(table) * size, f"{position=} {tokens=} {len(table)=}: reserve first"
        position_T = torch.arange(position, position + tokens, device=self._table_BN.device)
        return self._table_BN[slot, position_T // size], position_T % size

    def write(self, layer: int, places: tuple[Tensor, Tensor], k_TGK: Tensor, v_TGK: Tensor) -> None:
        """Store T tokens of one layer at `places`."""
        assert self.k_scale_LPGS is None, "an int8 cache is written by its engine"
        page_T, offset_T = places
        for pool, new_TGK in ((self.k_LPGSK, k_TGK), (self.v_LPGSK, v_TGK)):
            pool[layer][page_T, :, offset_T] = new_TGK

    def advance(self, slot: int, tokens: int) -> None:
        """Count tokens as stored, once every layer has written them."""
        self.lengths[slot] += tokens
        assert self.lengths[slot] <= len(self._tables[slot]) * self.page_size

    def pages(self, slot: int, length: int) -> Tensor:
        """Page numbers [N] (int64) that hold the first `length` tokens, in order."""
        return self._table_BN[slot, : -(-length // self.page_size)]

    @property
    def table(self) -> Tensor:
        """Page numbers [B, N] (int64) of every slot, in order: memory that stays where it is."""
        return self._table_BN

    def table_address(self, slot: int) -> int:
        """Address of the slot's page numbers (int64, in order), for a library that reads them in place."""
        return self._table_BN.data_ptr() + slot * self._table_BN.stride(0) * self._table_BN.element_size()

    def free(self, slot: int) -> None:
        """Forget the slot's sequence and take its pages back."""
        self._pool.give_back(self._tables[slot])
        self._tables[slot] = []
        self.lengths[slot] = 0

    def reuse(self, slot: int, token_ids: Sequence[int]) -> int:
        """Begin an empty slot with the known pages of these ids, of all but the last at most; the tokens that it then holds."""
        assert self.lengths[slot] == 0, f"slot {slot} holds {self.lengths[slot]} tokens"
        self.free(slot)  # of pages that were reserved and never written
        for index, page in enumerate(self._pool.find(self._parts(token_ids[: max(0, len(token_ids) - 1)]))):
            self._pool.hold(page)
            self._set(slot, index, page)
        self.lengths[slot] = len(self._tables[slot]) * self.page_size
        return self.lengths[slot]

    def publish(self, slot: int, token_ids: Sequence[int]) -> None:
        """Let others reuse the slot's whole pages of these ids, its first. Pages that were known of them before take their place."""
        assert len(token_ids) <= self.lengths[slot], f"slot {slot} holds {self.lengths[slot]} tokens, not {len(token_ids)}"
        parts = list(self._parts(token_ids))
        own = self._tables[slot][: len(parts)]
        for index, (page, before) in enumerate(zip(self._pool.publish(own, parts), own, strict=True)):
            if page != before:
                self._set(slot, index, page)

    def _parts(self, token_ids: Sequence[int]) -> Iterator[tuple[int, ...]]:
        """The ids of each whole page."""
        size = self.page_size
        return (tuple(token_ids[end - size : end]) for end in range(size, len(token_ids) + 1, size))
