"""The key/value cache: pages of a preallocated pool, handed to sequences as they grow.

In: keys and values of new tokens, for every head (a selection skips reads, never writes, so the cache has no holes).
Out: the pool of a layer and the pages of a sequence in order. A slot holds one sequence; `free` returns its pages.

Letters: L layers  P pages of the pool  G key/value heads  S tokens per page  K head_dim  B slots  N pages  T tokens
"""

from __future__ import annotations

import torch
from torch import Tensor

PAGE_SIZE = 16


class PagedCache:
    """Keys and values k_LPGSK, v_LPGSK with a block table per slot. Memory is taken at construction, all of it.

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
        shape = (num_layers, num_pages, num_groups, page_size, head_dim)
        self.k_LPGSK = torch.empty(shape, dtype=dtype, device=device)
        self.v_LPGSK = torch.empty(shape, dtype=dtype, device=device)
        scaled = dtype == torch.int8
        self.k_scale_LPGS = torch.empty(shape[:-1], device=device) if scaled else None
        self.v_scale_LPGS = torch.empty(shape[:-1], device=device) if scaled else None
        self.page_size = page_size
        self.num_pages = num_pages
        self.lengths = [0] * num_slots
        self._tables: list[list[int]] = [[] for _ in range(num_slots)]
        self._table_BN = torch.zeros(num_slots, num_pages, dtype=torch.int64, device=device)
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def free_pages(self) -> int:
        return len(self._free)

    def missing(self, slot: int, tokens: int) -> int:
        """Pages that the slot lacks for that many more tokens."""
        return max(0, -(-(self.lengths[slot] + tokens) // self.page_size) - len(self._tables[slot]))

    def reserve(self, slot: int, tokens: int) -> None:
        """Give the slot the pages for that many more tokens. Raises ValueError, changing nothing, when the pool has too few."""
        table, needed = self._tables[slot], self.missing(slot, tokens)
        if needed > len(self._free):
            raise ValueError(
                f"the key/value cache is full: {tokens} more tokens need {needed} pages of {self.page_size} tokens and "
                f"{len(self._free)} of {self.num_pages} are free; shorten the text, free a sequence or give the cache more tokens"
            )
        for _ in range(needed):
            page = self._free.pop()
            self._table_BN[slot, len(table)].fill_(page)  # an assignment would wait for the device
            table.append(page)

    def write(self, layer: int, slot: int, position: int, k_TGK: Tensor, v_TGK: Tensor) -> None:
        """Store T tokens of one layer from `position` on, in pages reserved before."""
        assert self.k_scale_LPGS is None, "an int8 cache is written by its engine"
        table, size, total = self._tables[slot], self.page_size, k_TGK.shape[0]
        assert position + total <= len(table) * size, f"{position=} {total=} {len(table)=}: reserve first"
        place_T = position + torch.arange(total, device=k_TGK.device)
        page_T, offset_T = self._table_BN[slot, place_T // size], place_T % size
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
        self._free.extend(reversed(self._tables[slot]))
        self._tables[slot] = []
        self.lengths[slot] = 0
