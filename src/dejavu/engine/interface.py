"""What every decoding engine answers, whatever computes it.

A slot holds one sequence. `prefill` runs tokens through the model densely and fills the slot's cache; `step` decodes one
token for each of several slots, sparse where the engine has predictors, unless the call says otherwise; `free` empties a slot. A row's
result depends on that row alone, never on the other rows of the step.

Letters: B rows of a step  V vocabulary  L layers  A selected  N tokens decoded  T tokens
P points that read inputs (selectors.POINTS)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from dejavu.config import ModelConfig, SamplingConfig
from dejavu.engine.capabilities import Capabilities
from dejavu.engine.options import EngineOptions
from dejavu.kernels.screen import Screen
from dejavu.model.counts import Counts
from dejavu.model.grids import Grids
from dejavu.model.selectors import InputPoints, LayerAdapter


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSelection:
    """What one layer computed for one token: indices int64 [A] of neurons and query heads; None where the part ran dense.

    inputs_P: likewise of the inputs kept at each point; None in a layer that does not select inputs.
    """

    neurons_A: Tensor | None
    heads_A: Tensor | None
    inputs_P: tuple[Tensor | None, ...] | None = None

    def cpu(self) -> LayerSelection:
        neurons_A, heads_A, *inputs_P = (
            None if indices is None else indices.cpu() for indices in (self.neurons_A, self.heads_A, *(self.inputs_P or ()))
        )
        return LayerSelection(neurons_A=neurons_A, heads_A=heads_A, inputs_P=None if self.inputs_P is None else tuple(inputs_P))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """One decoded step: logits fp32 [B, V] on the model's device; counts of what each row selected, int64 [B, L].

    A dense layer counts all of its neurons or heads. `selections` (by row, by layer, on the CPU) is kept when the engine records.

    union_L: neurons that some row selected, int64 [L], all of them where a layer ran dense: what had to be read for rows that compute
    with their own alone. None where the engine took the rows in several parts. fallback_layers: how many layers that select neurons
    read all of them, as so many were selected that this is faster. On the native engine that changes no selection; on the cuda engine the
    rows count as dense there.
    """

    logits_BV: Tensor
    counts: Counts
    selections: tuple[tuple[LayerSelection, ...], ...] | None = None
    union_L: Tensor | None = None
    fallback_layers: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """Several tokens of each row, sampled where the model is, on its device.

    Tokens int64 [N, B], -1 where the logits were not numbers; their log-probabilities fp32, as `Sampler` defines them; and what
    the step that led to each computed, counts int64 [N, B, L], as in StepResult. union_NL int64: of each step, what StepResult
    calls union_L. fallback_layers: as there, in every one of these steps.
    """

    token_NB: Tensor
    logprob_NB: Tensor
    counts: Counts
    union_NL: Tensor | None = None
    fallback_layers: int | None = None

    def cpu(self) -> Decoded:
        """A copy on the CPU; the device is waited for once."""
        fields = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        copies: dict[str, Any] = {name: part.to("cpu", non_blocking=True) for name, part in fields if isinstance(part, Tensor)}
        copies["counts"] = self.counts.cpu(non_blocking=True)
        if self.token_NB.is_cuda:
            torch.cuda.current_stream(self.token_NB.device).synchronize()
        return dataclasses.replace(self, **copies)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepProfile:
    """What one step took and what all of its rows together made it read.

    seconds: by op (predictor, attention, mlp, head, other). counts int64 [L]: neurons and query heads that some row selected, inputs
    that some row kept, or all where an engine reads them whole for several rows. fired_L int64 [L]: neurons whose row of down some row
    needed (an activation of exactly zero does not).
    """

    seconds: dict[str, float]
    counts: Counts
    fired_L: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What an engine is and what it can hold. Fixed at construction.

    cache_dtype is of keys and values. screen: of the vocabulary, whose unlikely tokens have -inf; None: all get
    logits. max_positions is the model's context, cache_tokens what the key/value pool holds over all slots, both in tokens.
    input_points: of the model, where some layer selects inputs; else None. grids: of its matrices, where the engine computes with them as
    they are stored and `dtype` is but a word for them; else None. prompts_together, prefill_chunk: see
    Capabilities.
    """

    backend: str
    dtype: str
    cache_dtype: str
    device: str
    threads: int
    sparse: bool
    vocab_size: int
    num_layers: int
    num_neurons: int
    num_heads: int
    max_positions: int
    num_slots: int
    page_size: int
    num_pages: int
    screen: Screen | None = None
    input_points: InputPoints | None = None
    grids: Grids | None = None
    prompts_together: bool = False
    prefill_chunk: int = 128

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        layers: Sequence[LayerAdapter],
        options: EngineOptions,
        *,
        dtype: str,
        cache_dtype: str,
        device: str,
        threads: int,
        capabilities: Capabilities,
    ) -> Self:
        """What an engine of this model is, with the formats that it settled on and the pages that the options ask for."""
        size = options.page_size
        pages_per_slot = -(-config.max_positions // size)
        return cls(
            backend=capabilities.backend,
            dtype=dtype,
            cache_dtype=cache_dtype,
            device=device,
            threads=threads,
            sparse=any(layer.sparse for layer in layers),
            vocab_size=config.vocab_size,
            num_layers=config.num_layers,
            num_neurons=config.intermediate_size,
            num_heads=config.num_heads,
            max_positions=config.max_positions,
            num_slots=options.num_slots,
            page_size=size,
            num_pages=options.num_slots * pages_per_slot if options.cache_tokens is None else -(-options.cache_tokens // size),
            screen=options.screen,
            prompts_together=capabilities.prompts_together,
            prefill_chunk=capabilities.prefill_chunk,
            input_points=InputPoints.of(config) if any(layer.inputs.selects for layer in layers) else None,
        )

    @property
    def cache_tokens(self) -> int:
        return self.num_pages * self.page_size

    @property
    def max_tokens(self) -> int:
        """The longest sequence that a slot can hold, prompt and answer together."""
        return min(self.max_positions, self.cache_tokens)


class Engine(Protocol):
    """The interface of `torch`, `native` and `cuda` engines."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def free_pages(self) -> int:
        """Pages of the key/value pool that no slot holds. Some may hold a prefix for `reuse`; they are taken where no other is left."""
        ...

    def length(self, slot: int) -> int:
        """Tokens that the slot holds."""
        ...

    def prefill(self, slot: int, token_ids: Sequence[int]) -> Tensor:
        """Append tokens to the slot densely; logits fp32 [V] after the last one.

        Raises ValueError for no tokens, an id outside the vocabulary, a sequence longer than the model's context, or a
        cache without room. The slot is then as it was before.
        """
        ...

    def prefill_batch(self, slots_B: Sequence[int], token_ids_B: Sequence[Sequence[int]]) -> Tensor:
        """As `prefill` for each of B different slots, logits fp32 [B, V]. A ValueError leaves every slot as it was."""
        ...

    def prefill_logits(self, slot: int, token_ids: Sequence[int]) -> Tensor:
        """As `prefill`; logits fp32 [T, V] after each of the T tokens, so give it few at a time."""
        ...

    def step(
        self,
        token_ids_B: Sequence[int],
        slots_B: Sequence[int],
        *,
        sparse: bool = True,
        record: bool | None = None,
        full_head: bool = False,
    ) -> StepResult:
        """Append one token to each of B different slots. Raises ValueError as `prefill` does, before any row is computed.

        sparse: False computes as an engine without predictors does, with the weights that this one has. record: keep the selections;
        None: as the engine was made. full_head: every token has its logit, though the engine has a screened head.
        """
        ...

    def free(self, slot: int) -> None:
        """Empty the slot and give its pages back; an empty slot is left as it is."""
        ...

    def reuse(self, slot: int, token_ids: Sequence[int]) -> int:
        """Begin an empty slot with the longest beginning of these ids that was published; how many tokens it then holds.

        Whole pages, and at most all tokens but the last, so that a prefill of the rest gives logits. Pages that another slot
        holds are shared; of the others `free_pages` counts that many fewer.
        """
        ...

    def publish(self, slot: int, token_ids: Sequence[int]) -> None:
        """Offer the whole pages of the slot's first tokens to `reuse`: these ids, which `prefill` and `reuse` put there, no step.

        They stay on offer after `free`, until the pool needs the pages: those given back longest ago go first. Where others have
        published the same ids the slot takes their pages in place of its own, and keeps no copy.
        """
        ...


@runtime_checkable
class DecodesTokens(Protocol):
    """An engine that samples where the model is and feeds the tokens back by itself."""

    @property
    def records(self) -> bool:
        """Whether steps keep their selections; what is decoded has none."""
        ...

    def decode(
        self,
        token_ids_B: Sequence[int],
        slots_B: Sequence[int],
        count: int,
        sampling: Sequence[SamplingConfig] | None = None,
        choices: Sequence[int] | None = None,
        /,
        *,
        sparse: bool = True,
    ) -> Decoded:
        """Append `count` tokens to each of B different slots: the given ones first, then what is sampled; all sampled ones are returned.

        sampling: one for each row; greedy without. choices: which choice of a request each row is, see `Sampler`; 0 without. sparse: see
        `Engine.step`. The last tokens sampled are not yet appended: they begin the next call. Raises ValueError as `step` does, before
        any row is computed.
        """
        ...


@runtime_checkable
class ProfilesSteps(Protocol):
    """An engine that tells what a step read without recording it, and perhaps what its parts took."""

    def profiled_step(self, token_ids_B: Sequence[int], slots_B: Sequence[int], /) -> tuple[StepResult, StepProfile]:
        """A step as `Engine.step`, and its profile. seconds is empty where the parts of a step have no times of their own."""
        ...


@runtime_checkable
class ReadsBuffers(Protocol):
    """An engine that can read memory as fast as it knows how: what a benchmark calls the ceiling."""

    def read(self, buffer: Tensor, /) -> object:
        """Read a buffer on the engine's device once, in order."""
        ...


@runtime_checkable
class CapturesSteps(Protocol):
    """An engine that replays a captured graph."""

    def graph(self, rows: int, /) -> torch.cuda.CUDAGraph | None:
        """Of a step of so many rows; None before the first one."""
        ...
