"""What the endpoints share on the way from a checked body to what the worker is asked for: the model, how to sample, how many choices.

In: a body and what is served. Out: a ParsedRequest, whose sequences are those of prompt 0, then of prompt 1 and so
on, n of each. What the model cannot do is an ApiError: no such model (404), no chat template, a token outside the vocabulary, a text too
long (400).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from dejavu.config import Penalties, SamplingConfig
from dejavu.model.tokenizer import Tokenizer
from dejavu.serve.api.errors import TOO_LONG, ApiError, from_worker, invalid
from dejavu.serve.api.request_schemas import MAX_CHOICES, Sampled
from dejavu.serve.api.vocabulary import Vocabulary
from dejavu.serve.core.interface import SequenceRequest, TooLong, WorkerState

DENSE = ":dense"
OPENAI = SamplingConfig(temperature=1.0)  # where neither a request nor the model says how to draw


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A model that is served, as far as requests are concerned.

    sparse: whether `name` runs sparse, as a model with an adapter does. limit: the longest prompt and answer together, in tokens.
    max_choices: of one request, prompts times n; max_traced: of one with a trace. max_characters: of a prompt that may
    fit, None where that cannot be told. sampling, dense_sampling: of a request that names no temperature, top_p, top_k or min_p, sparse
    and dense; OpenAI's own unless the model comes with another. chat_template_kwargs: of a request that does not set them itself.
    sanitize_control_tokens: see template.py. created: when it began to be served, in seconds since 1970.
    """

    name: str
    tokenizer: Tokenizer
    vocabulary: Vocabulary
    sparse: bool
    vocab_size: int
    num_layers: int
    num_heads: int
    num_neurons: int
    backend: str
    dtype: str
    threads: int
    limit: int
    max_choices: int = MAX_CHOICES
    max_traced: int = MAX_CHOICES
    max_characters: int | None = None
    sampling: SamplingConfig = OPENAI
    dense_sampling: SamplingConfig = OPENAI
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    sanitize_control_tokens: bool = True
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def models(self) -> tuple[str, ...]:
        """The names that a request may give: as the server runs it and, where that is with an adapter, without it."""
        return (self.name, self.name + DENSE) if self.sparse else (self.name,)

    def is_dense(self, model: str) -> bool:
        """Whether a request for this model runs dense. Raises ApiError (404) for a name that is not served."""
        if model not in self.models:
            raise ApiError(
                404, f"the model {model[:80]!r} is not served; there is {' and '.join(self.models)}", param="model", code="model_not_found"
            )
        return model != self.name or not self.sparse


def served_by(
    tokenizer: Tokenizer, state: WorkerState, *, queue: int, threads: int, name: str | None = None,
    sampling: SamplingConfig = OPENAI, dense_sampling: SamplingConfig = OPENAI, chat_template_kwargs: Mapping[str, Any] | None = None,
    sanitize_control_tokens: bool = True,
) -> Served:  # fmt: skip
    """What a worker serves. name: for requests, where it is not the model's own. tokenizer: with the chat template to use. queue: sequences
    that may wait; no request may ask for more than that and the slots of its engine when that is free. sampling, dense_sampling: those
    that the model comes with; a greedy one is none, and leaves OpenAI's."""
    plain, traced = (min(MAX_CHOICES, queue + engine.slots) for engine in (state.engines[0], state.engines[-1]))  # the last one records
    return Served(
        name=state.model if name is None else name,
        tokenizer=tokenizer,
        vocabulary=Vocabulary(tokenizer),
        sparse=state.sparse,
        vocab_size=state.vocab_size,
        num_layers=state.layers,
        num_heads=state.heads,
        num_neurons=state.neurons,
        backend=state.backend,
        dtype=state.dtype,
        threads=threads,
        limit=state.max_model_len,
        max_choices=plain,
        max_traced=traced,
        sampling=sampling if sampling.temperature > 0 else OPENAI,
        dense_sampling=dense_sampling if dense_sampling.temperature > 0 else OPENAI,
        chat_template_kwargs=chat_template_kwargs or {},
        sanitize_control_tokens=sanitize_control_tokens,
        max_characters=None if (longest := tokenizer.longest_token) is None else longest * state.max_model_len,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedRequest:
    """A request as the server carries it out. texts: of each prompt, for echo. n: choices of each prompt."""

    model: str
    dense: bool
    sequences: tuple[SequenceRequest, ...]
    n: int
    stream: bool
    include_usage: bool
    trace: bool
    logprobs: int | None
    echo: bool = False
    texts: tuple[str, ...] = ()

    @property
    def mode(self) -> Literal["sparse", "dense"]:
        return "dense" if self.dense else "sparse"


def choices_of(body: Sampled, served: Served, *, prompts: int) -> int:
    """How many texts each prompt gets (n)."""
    n, traced = body.n or 1, body.dejavu is not None and bool(body.dejavu.trace)
    traced = traced and not served.is_dense(body.model)  # a dense one is recorded where it runs
    most = served.max_traced if traced else served.max_choices
    if prompts * n > most:
        requested = f"{prompts} prompts with n = {n}" if prompts > 1 else f"n = {n}"
        raise invalid(
            f"{requested} are {prompts * n} texts, and a request {'with a trace ' if traced else ''}may ask for {most}; "
            f"{'send fewer prompts, or lower n' if prompts > 1 else 'lower n'}",
            param="prompt" if prompts > 1 else "n",
        )
    return n


def streaming_of(body: Sampled) -> Mapping[str, Any]:
    """Fields of the ParsedRequest: whether the answer is a stream, and what comes with it."""
    stream, options = bool(body.stream), body.stream_options
    if options is not None and not stream:
        raise invalid("stream_options is for streams alone; set stream, or leave it out", param="stream_options")
    trace = body.dejavu is not None and bool(body.dejavu.trace)
    if trace and not stream:
        raise invalid("a trace comes with the chunks of a stream; set stream, or leave it out", param="dejavu.trace")
    return {"stream": stream, "include_usage": options is not None and bool(options.include_usage), "trace": trace}


def sequences_of(
    body: Sampled, prompts: list[list[int]], n: int, served: Served, *, dense: bool, max_tokens: int, logprobs: int | None, echo: bool
) -> tuple[SequenceRequest, ...]:
    """What the worker is asked for: of each prompt n sequences."""
    biases = {int(token_id): bias for token_id, bias in (body.logit_bias or {}).items()}
    for token_id in biases:
        if token_id >= served.vocab_size:
            raise invalid(f"logit_bias names token {token_id}{_beyond(served)}", param="logit_bias")
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    stop_ids = tuple(body.stop_token_ids or ())
    if stop_ids and max(stop_ids) >= served.vocab_size:
        raise invalid(f"stop_token_ids names token {max(stop_ids)}{_beyond(served)}", param="stop_token_ids")
    least = body.min_tokens or 0
    if least > max_tokens:
        raise invalid(
            f"min_tokens {least} exceeds the {max_tokens} tokens that the text may have; lower it, or raise max_tokens", param="min_tokens"
        )
    if least and stop:
        raise invalid("min_tokens is not supported together with stop: a stop string may come before; leave one out", param="min_tokens")
    own = served.dense_sampling if dense else served.sampling
    top_k = 0 if body.top_k == -1 else body.top_k
    sampling = own.overridden(temperature=body.temperature, top_k=top_k, top_p=body.top_p, min_p=body.min_p, seed=body.seed)
    penalties = Penalties(
        presence=body.presence_penalty or 0.0,
        frequency=body.frequency_penalty or 0.0,
        repetition=1.0 if body.repetition_penalty is None else body.repetition_penalty,
    )
    return tuple(
        SequenceRequest(
            prompt_ids=tuple(ids),
            max_new_tokens=max_tokens,
            sampling=sampling,
            index=index,
            logit_bias=biases,
            stop=stop,
            stop_ids=stop_ids,
            min_tokens=least,
            penalties=penalties,
            ignore_eos=bool(body.ignore_eos),
            top_logprobs=logprobs,
            prompt_logprobs=echo and logprobs is not None,
            echo=echo,
            dense=dense,
            trace=body.dejavu is not None and bool(body.dejavu.trace),
        )
        for ids in prompts
        for index in range(n)
    )


def _beyond(served: Served) -> str:
    return f", and the model's vocabulary is of {served.vocab_size} tokens; give ids from 0 to {served.vocab_size - 1}"


def read(encode: Callable[[], list[int]], *, param: str) -> list[int]:
    """The ids of a text. Raises ApiError for one that the tokenizer does not take."""
    try:
        return encode()
    except ValueError as error:
        raise invalid(str(error), param=param) from error


def check_characters(count: int, served: Served, *, param: str) -> None:
    """Refuse a text that cannot fit before it is tokenised, which takes a while and much memory."""
    if served.max_characters is not None and count > served.max_characters:
        raise invalid(
            f"a text of {count:,} characters has more tokens than the {served.limit} that the model takes; shorten the prompt",
            param=param, code=TOO_LONG,
        )  # fmt: skip


def check_ids(ids: Sequence[int], served: Served, *, new: int, param: str) -> None:
    """new: tokens of the answer that are asked for."""
    if not ids:
        raise invalid("the prompt has no tokens; give at least one word", param=param)
    if max(ids) >= served.vocab_size:
        raise invalid(f"the prompt has token {max(ids)}{_beyond(served)}", param=param)
    if len(ids) + new > served.limit:
        raise from_worker(TooLong(prompt=len(ids), requested=new, limit=served.limit), param=param)
