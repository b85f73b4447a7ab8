"""What every engine over a paged cache shares: its description, its slots and pages, what it checks before anything is computed.

In: a model, its layers, options; then slots and token ids. Out: lengths, free pages, what a subclass computes, or a ValueError that names
the token or the limit. A subclass has `_prefill` and `_step`, which get slots that have the pages.

Letters: B rows  T tokens  V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from dejavu.config import require
from dejavu.engine.cache import PagedCache
from dejavu.engine.capabilities import Capabilities
from dejavu.engine.footprint import cache_bytes, check_cache_fits, free_bytes
from dejavu.engine.interface import EngineInfo, StepResult
from dejavu.engine.options import EngineOptions
from dejavu.kernels.dtypes import DTYPE_NAMES, TORCH_DTYPES
from dejavu.model.selectors import LayerAdapter, check_layers
from dejavu.model.transformer import Transformer


class PagedEngine:
    """The part of `dejavu.engine.interface.Engine` that does not depend on how a token is computed.

    layers: the predictors of each layer, or None for a dense engine. threads: of the engine, torch's by default. head_dim: values of a head
    in the cache, the model's by default. spare: slots, and pages as many, that the cache has beyond those that the options ask for.
    Raises ValueError for layers of another model and for options that the engine does not obey, MemoryError where the cache does not fit.
    """

    capabilities: ClassVar[Capabilities]

    def __init__(
        self,
        model: Transformer,
        layers: Sequence[LayerAdapter] | None,
        options: EngineOptions,
        *,
        threads: int | None = None,
        head_dim: int | None = None,
        spare: int = 0,
    ) -> None:
        config = model.config
        stored = model.stored_as if self.capabilities.packs else DTYPE_NAMES[model.dtype]
        self.config = config
        self.layers = tuple(layers) if layers is not None else (LayerAdapter(),) * config.num_layers
        check_layers(self.layers, config)
        self.capabilities.check(options, config, stored=stored)
        dtype = stored if options.dtype in ("auto", "stored") else options.dtype
        self._record = options.record
        self._info = EngineInfo.of(
            config,
            self.layers,
            options,
            dtype=dtype,
            cache_dtype=self.capabilities.cache_dtype(options.cache_dtype, dtype=dtype),
            device=str(model.device),
            threads=torch.get_num_threads() if threads is None else threads,
            capabilities=self.capabilities,
        )
        if model.device.type == "cpu":  # where memory that is not there is promised all the same
            per_token = cache_bytes(config, backend=self.capabilities.backend, cache_dtype=self._info.cache_dtype)
            check_cache_fits(self._info.cache_tokens, per_token, free_bytes(self.capabilities.backend))
        self._cache = PagedCache(
            num_layers=config.num_layers,
            num_groups=config.num_kv_heads,
            head_dim=config.head_dim if head_dim is None else head_dim,
            num_slots=self._info.num_slots + spare,
            num_pages=self._info.num_pages + spare,
            page_size=self._info.page_size,
            dtype=TORCH_DTYPES[self._info.cache_dtype],
            device=model.device,
        )

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

    def prefill(self, slot: int, token_ids: Sequence[int]) -> Tensor:
        """Append tokens to the slot densely, in chunks; logits fp32 [V] after the last one."""
        self._admit(slot, token_ids)
        return self._prefill(slot, token_ids, every=False)

    def prefill_batch(self, slots_B: Sequence[int], token_ids_B: Sequence[Sequence[int]]) -> Tensor:
        """As `prefill` for each of B different slots; logits fp32 [B, V]."""
        assert len(slots_B) == len(token_ids_B) == len(set(slots_B)) > 0, f"{slots_B=}"
        before = [self._cache.lengths[slot] for slot in slots_B]
        for slot, token_ids in zip(slots_B, token_ids_B, strict=True):
            require(len(token_ids) > 0, "there are no tokens to prefill; give at least one")
            self._check(slot, token_ids, len(token_ids))
        self._cache.reserve_all(slots_B, [len(token_ids) for token_ids in token_ids_B])
        try:
            return self._prefill_batch(slots_B, token_ids_B)
        except ValueError:  # of one of them: what the others have stored does not count
            for slot, length in zip(slots_B, before, strict=True):
                self._cache.lengths[slot] = length
            raise

    def prefill_logits(self, slot: int, token_ids: Sequence[int]) -> Tensor:
        """As `prefill`; logits fp32 [T, V] after each of the tokens."""
        self._admit(slot, token_ids)
        return self._prefill(slot, token_ids, every=True)

    def step(
        self,
        token_ids_B: Sequence[int],
        slots_B: Sequence[int],
        *,
        sparse: bool = True,
        record: bool | None = None,
        full_head: bool = False,
    ) -> StepResult:
        """Append one token to each of B different slots."""
        self._admit_rows(token_ids_B, slots_B)
        unscreened = {"full_head": True} if full_head and self.info.screen is not None else {}  # of engines that have a screen
        return self._step(token_ids_B, slots_B, sparse=sparse, record=self._record if record is None else record, **unscreened)

    def _prefill(self, slot: int, token_ids: Sequence[int], *, every: bool) -> Tensor:
        """Compute the tokens, for which there are pages, and count them: logits [V] after the last one, or [T, V] after every one."""
        raise NotImplementedError

    def _prefill_batch(self, slots_B: Sequence[int], token_ids_B: Sequence[Sequence[int]]) -> Tensor:
        """`_prefill` of each slot, one after the other; logits [B, V]."""
        return torch.stack([self._prefill(slot, token_ids, every=False) for slot, token_ids in zip(slots_B, token_ids_B, strict=True)])

    def _step(self, token_ids_B: Sequence[int], slots_B: Sequence[int], *, sparse: bool, record: bool) -> StepResult:
        """Compute a token of each slot, for which there is a page, and count it."""
        raise NotImplementedError

    def _layers_for(self, sparse: bool) -> tuple[LayerAdapter, ...]:
        """How the layers select in a call."""
        return self.layers if sparse else (LayerAdapter(),) * self.config.num_layers

    def _admit_rows(self, token_ids_B: Sequence[int], slots_B: Sequence[int]) -> None:
        """`_admit` for a token of each row of a step."""
        assert len(token_ids_B) == len(slots_B) == len(set(slots_B)) > 0, f"{token_ids_B=} {slots_B=}"
        for token_id, slot in zip(token_ids_B, slots_B, strict=True):
            self._admit(slot, (token_id,))

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

    def _count_rows(self, slots_B: Sequence[int], count: int = 1) -> None:
        """So many tokens more are in each slot, once every layer has stored them."""
        for slot in slots_B:
            self._cache.advance(slot, count)
