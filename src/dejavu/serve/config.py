"""How a server runs its model: slots, cache, limits, queue. In: what the command line says. Out: a checked ServeConfig."""

from __future__ import annotations

import dataclasses

from dejavu.config import Config, require

CACHED_PER_SLOT = 2048  # tokens at most that the cache has for each slot, unless told otherwise


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig(Config):
    """Of each engine (dense, and sparse where there is an adapter).

    slots: sequences at a time. cache_tokens: that the keys and values of all of them together hold; None: slots times the longest sequence,
    of at most 2048 tokens. max_model_len: tokens of the longest sequence, prompt and answer; None: the model's context. queue: sequences
    that wait at most, beyond those for which a slot is free. prefill_chunk: tokens of prompts in a step, in addition to its decoding rows;
    None: what suits the engine (Capabilities).
    prefix_reuse: a prompt that begins like an earlier one takes over what is cached of it.
    """

    slots: int = 8
    cache_tokens: int | None = None
    max_model_len: int | None = None
    queue: int = 64
    prefill_chunk: int | None = None
    prefix_reuse: bool = True

    def __post_init__(self) -> None:
        for name in ("slots", "prefill_chunk"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} must be at least 1, not {value}")
        for name in ("cache_tokens", "max_model_len"):
            value = getattr(self, name)
            require(value is None or value >= 2, f"{name} must be at least 2, a token of a prompt and a new one, not {value}")
        require(self.queue >= 0, f"queue must be 0 or more, not {self.queue}")

    def longest(self, context: int) -> int:
        """Tokens of the longest sequence of a model with this context. Raises ValueError for a max_model_len beyond the context."""
        require(
            self.max_model_len is None or self.max_model_len <= context,
            f"max_model_len {self.max_model_len} exceeds the model's context of {context}; leave it out or lower it",
        )
        return context if self.max_model_len is None else self.max_model_len

    def cached(self, context: int) -> int:
        """Tokens that the cache of a model with this context holds."""
        return self.slots * min(self.longest(context), CACHED_PER_SLOT) if self.cache_tokens is None else self.cache_tokens
