"""What somebody asks of an engine, whole: backend, formats, room, and what only some engines can do.

In: what a command or a caller says. Out: a frozen EngineOptions, handed from there to the engine, which says itself what it obeys
(capabilities.py) and refuses the rest.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from dejavu.config import Config, require

if TYPE_CHECKING:  # usage errors do not wait for torch
    from dejavu.kernels.screen import Screen

PAGE_SIZE = 16


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions(Config):
    """dtype: of the weights, where the engine packs its own (native: fp32, fp16, bf16, int8, int4, or stored: each as the model holds it);
    auto: the model's. cache_dtype: of keys and values; auto: see `Capabilities.cache_dtype`. screened_head: what a user asks for: the
    threshold of the adapter's screened head in place of its own (0: every token gets its logit; None: as the adapter has it). screen: what
    an engine then runs (None: the full head), see kernels/screen.py. threads: of the native engine (None: every processor that
    this process may use); torch has one number for the whole process. ahead: where the cuda engine selects neurons, see TokenStep.

    num_slots: sequences at a time. cache_tokens: room of the key/value pool over all slots, in tokens; None: the whole context for each.
    record: keep the selections of every step.
    """

    backend: str = "auto"
    dtype: str = "auto"
    cache_dtype: str = "auto"
    screened_head: float | None = None
    screen: Screen | None = None
    threads: int | None = None
    ahead: str | None = None
    num_slots: int = 1
    cache_tokens: int | None = None
    page_size: int = PAGE_SIZE
    record: bool = False

    def __post_init__(self) -> None:
        require(self.page_size >= 1, f"a page of the key/value cache holds at least 1 token, not {self.page_size}")
        for what, value in (("slots", self.num_slots), ("tokens", 1 if self.cache_tokens is None else self.cache_tokens)):
            require(value >= 1, f"the key/value cache needs at least 1 of its {what}, not {value}")
