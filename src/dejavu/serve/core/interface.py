"""What goes into the worker and what comes out of it: plain data that the server's side and the worker's side share.

In: a SequenceRequest, one text of what a client asks for, checked by whoever made it. Out: the Events of its stream, in order, of which the
last has the finish_reason and the Summary; or one of the exceptions here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dejavu.config import NO_PENALTIES, Penalties, SamplingConfig
from dejavu.generation.pieces import Piece, Token


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceRequest:
    """One text that a client asks for. index: which choice of its prompt (see Sampler).

    logit_bias: token id -> what is added to its logit before sampling; log-probabilities are those before it. stop: strings that end the
    text before them, stop_ids: tokens that do. ignore_eos: go on behind an EOS. min_tokens: of which none ends the text, if not a stop
    string. penalties: of tokens that the text has already. top_logprobs: None for no log-probabilities, n >= 0 for the token's own and the
    n likeliest; prompt_logprobs: of the prompt too. echo: the prompt's text comes before this one. dense: without the adapter. trace:
    report what fired, per token.
    """

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    sampling: SamplingConfig
    index: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    penalties: Penalties = NO_PENALTIES
    ignore_eos: bool = False
    top_logprobs: int | None = None
    prompt_logprobs: bool = False
    echo: bool = False
    dense: bool = False
    trace: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A whole stream. Tokens are counts; cached_tokens: of the prompt, what a shared prefix saved.

    Densities are means over the stream's decode steps, None without one; union_density: of the neurons that the rows of those
    steps together selected, None where the engine cannot tell. time_to_first_token_s: from `submit` on; decode_s: from the first token
    to the last.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    mlp_density: float | None
    head_density: float | None
    union_density: float | None
    time_to_first_token_s: float
    decode_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Event(Piece):
    """A piece of a stream. prompt_tokens: with prompt_logprobs, once, in the first event. summary: only in the last event of a stream that
    ends well."""

    prompt_tokens: tuple[Token, ...] = ()
    summary: Summary | None = None


class QueueFull(Exception):  # noqa: N818 (a state, not a mistake)
    """As many sequences wait as may. retry_after_s: when there may be room again, in whole seconds, at least 1."""

    def __init__(self, *, waiting: int, retry_after_s: int) -> None:
        super().__init__(f"{waiting} requests are waiting and no more may; try again in {retry_after_s} s")
        self.waiting, self.retry_after_s = waiting, retry_after_s


class TooLong(ValueError):  # noqa: N818
    """A request that cannot fit, however long it waits. prompt, requested (new tokens), limit: in tokens."""

    def __init__(self, *, prompt: int, requested: int, limit: int) -> None:
        super().__init__(
            f"the prompt has {prompt} tokens and {requested} more were requested, {prompt + requested} in all, and the limit is {limit}; "
            f"shorten the prompt or ask for fewer tokens"
        )
        self.prompt, self.requested, self.limit = prompt, requested, limit


class EngineFailed(Exception):  # noqa: N818 (a state, not a mistake)
    """The step of this stream failed, and the stream with it; others go on."""


class NotRunning(EngineFailed):
    """No request is taken: the worker has ended, or is told to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadStats:
    """What there is to do and what was done, in numbers that add up over engines.

    queued, running: sequences; slots, pages_free, pages_total: of the cache, a page that is kept for reuse alone being free. Since the
    start: steps (of decoding, one for all rows that took part), tokens (generated), prompt_tokens (computed), cached_tokens (of prompts,
    saved by shared prefixes), finished, failed and cancelled sequences, fallback_layers (layers whose MLP ran dense for a whole batch,
    added up over the steps).
    """

    queued: int
    running: int
    slots: int
    pages_free: int
    pages_total: int
    steps: int
    tokens: int
    prompt_tokens: int
    cached_tokens: int
    finished: int
    failed: int
    cancelled: int
    fallback_layers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineState(LoadStats):
    """How one engine does. mode: "sparse" or "dense". made: false where it failed and could not be made anew."""

    mode: str
    made: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerState(LoadStats):
    """How the worker does: the sums over its engines, each of which is in `engines`.

    alive: its thread runs, and the engines that it needed could be made. last_error: the last failure in
    words, None before one. tok_s: tokens of prompts and answers a second lately, while anything ran; None before the first. Of the
    model: name, backend, dtype, device, max_model_len (tokens of a sequence), layers, neurons and heads of a layer, vocab_size;
    sparse: whether there is an adapter.
    """

    alive: bool
    last_error: str | None
    tok_s: float | None
    engines: tuple[EngineState, ...]
    model: str
    backend: str
    dtype: str
    device: str
    max_model_len: int
    layers: int
    neurons: int
    heads: int
    vocab_size: int
    sparse: bool
