"""What an engine computes, as it says itself: formats, architectures, options. In: a model's config and EngineOptions. Out: what is
lacking, in words, or a ValueError that says what there is."""

from __future__ import annotations

from dataclasses import dataclass

from dejavu.config import ModelConfig, require
from dejavu.engine.options import EngineOptions
from dejavu.kernels.screen import check_threshold


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """Of one engine, by its backend's name.

    dtypes: of weights. packs: it makes its own of a model in fp32 on the CPU, in any of these; else it computes in the dtype that the model
    is loaded in. cache_dtypes: of keys and values, where there is a choice; else they have the weights' dtype. parts: of those that
    `ModelConfig.special` names, the ones that it computes; None: all. ahead: ways of looking ahead.
    prompts_together: those of one call share its passes. prefill_chunk: tokens of prompts that a server reads in a step.
    """

    backend: str
    dtypes: tuple[str, ...]
    packs: bool = False
    cache_dtypes: tuple[str, ...] = ()
    parts: frozenset[str] | None = frozenset()
    screened_head: bool = False
    ahead: tuple[str, ...] = ()
    prompts_together: bool = False
    prefill_chunk: int = 128

    def beyond(self, config: ModelConfig) -> tuple[str, ...]:
        """What the architecture has that the engine does not compute, in words."""
        return () if self.parts is None else tuple(words for part, words in config.special.items() if part not in self.parts)

    def check_architecture(self, config: ModelConfig) -> None:
        """Raise ValueError for an architecture that the engine does not compute."""
        lacking = self.beyond(config)
        require(not lacking, f"backend {self.backend!r} does not compute {', '.join(lacking)}; use --backend torch")

    def cache_dtype(self, name: str = "auto", *, dtype: str) -> str:
        """The dtype of the key/value cache for a value of --cache-dtype, with weights of `dtype`.

        auto, where there is a choice: fp32 with fp32 weights, else fp16, whose rounding is small compared with theirs. Raises ValueError
        naming what is offered.
        """
        offered = self.cache_dtypes or (dtype,)
        if name == "auto":
            return "fp16" if self.cache_dtypes and dtype != "fp32" else dtype
        require(
            name in offered,
            f"cache dtype {name!r} is not available on backend {self.backend!r} in {dtype}; choose one of auto, {', '.join(offered)}",
        )
        return name

    def full_head_note(self) -> str:
        """What is said where an adapter has a screened head and the engine has none."""
        return f"backend {self.backend} has no screened head: the full one runs in place of the adapter's"

    def check_screened_head(self, threshold: float | None) -> None:
        """Raise ValueError for a value of --screened-head that the engine cannot have."""
        if not threshold:
            return
        check_threshold(threshold)
        require(
            self.screened_head,
            f"a screened head is not available on backend {self.backend!r}; leave --screened-head {threshold:g} out",
        )

    def check(self, options: EngineOptions, config: ModelConfig, *, stored: str) -> None:
        """Raise ValueError for an option that the engine does not obey. stored: the dtype that the model is loaded in."""
        dtype = stored if options.dtype in ("auto", "stored") else options.dtype
        require(
            options.ahead is None or bool(self.ahead),
            f"a way of looking ahead is of backend 'cuda', not {self.backend!r}; leave --ahead out",
        )
        require(
            self.packs or dtype == stored,
            f"dtype {dtype!r} is not available on backend {self.backend!r} for a model loaded as {stored}; load it as {dtype}",
        )
        self.cache_dtype(options.cache_dtype, dtype=dtype)
        if options.screen is not None:
            self.check_screened_head(options.screen.threshold)
            clusters, size = options.screen.centroids.shape
            fits = (len(options.screen.members_V), size) == (config.vocab_size, config.embed_width)
            require(fits, f"the screened head of {clusters} clusters is of another model; train one for this one")
