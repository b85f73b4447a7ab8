"""What every engine over a paged cache shares: its description, its slots, and what it checks before anything is computed.

In: slots and token ids. Out: lengths, free pages, or a ValueError that names the token or the limit.
"""

from __future__ import annotations

from collections.abc import Sequence

from dejavu.config import require
from dejavu.engine.cache import PagedCache
from dejavu.engine.interface import EngineInfo


class PagedEngine:
    """The part of `dejavu.engine.interface.Engine` that does not depend on how a token is computed."""

    def __init__(self, info: EngineInfo, cache: PagedCache) -> None:
        self._info, self._cache = info, cache

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def free_pages(self) -> int:
        return self._cache.free_pages

    def length(self, slot: int) -> int:
        """Tokens that the slot holds."""
        return self._cache.lengths[slot]

    def free(self, slot: int) -> None:
        """Empty the slot and give its pages back."""
        self._cache.free(slot)

    def reuse(self, slot: int, token_ids: Sequence[int]) -> int:
        """Begin an empty slot with what is known of these ids: whole pages, at most all tokens but the last. Tokens reused."""
        return self._cache.reuse(slot, token_ids)

    def publish(self, slot: int, token_ids: Sequence[int]) -> None:
        """Let others reuse the whole pages of the slot's first tokens, which came from these ids by `prefill`."""
        self._cache.publish(slot, token_ids)

    def _admit(self, slot: int, token_ids: Sequence[int]) -> None:
        """Check ids, context and cache, and reserve pages, before anything is computed."""
        require(len(token_ids) > 0, "there are no tokens to prefill; give at least one")
        self._check(slot, token_ids, len(token_ids))
        self._cache.reserve(slot, len(token_ids))

    def _check(self, slot: int, token_ids: Sequence[int], count: int) -> None:
        """Check ids, and that the context holds `count` tokens more."""
        assert 0 <= slot < self._info.num_slots, f"{slot=} {self._info.num_slots=}"
        vocab, context = self._info.vocab_size, self._info.max_positions
        for token_id in (min(token_ids), max(token_ids)):
            require(0 <= token_id < vocab, f"token id {token_id} is outside the model's vocabulary of {vocab}")
        total = self._cache.lengths[slot] + count
        require(total <= context, f"{total} tokens exceed the model's context of {context}; shorten the text")
