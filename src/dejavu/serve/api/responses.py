"""From the events of a request's streams to what is sent: one object, or chunks whose texts joined are the same.

In: a ParsedRequest and the events of its choices, each with its index. Out: objects of response_schemas.py, and their bytes. Whole or in
chunks, every event goes through `take`, so that the two cannot differ.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from dejavu.generation.pieces import Token
from dejavu.serve.api import logprobs
from dejavu.serve.api import response_schemas as schemas
from dejavu.serve.api.requests import ParsedRequest, Served
from dejavu.serve.api.trace import BINS
from dejavu.serve.core.interface import Event, Summary

L = TypeVar("L")
DONE = b"data: [DONE]\n\n"


def to_bytes(thing: schemas.Schema) -> bytes:
    """JSON. A field that was not set is not there."""
    return thing.model_dump_json(exclude_unset=True).encode()


def server_sent(thing: schemas.Schema) -> bytes:
    """One event of a stream."""
    return b"data: " + to_bytes(thing) + b"\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceDelta(Generic[L]):
    """What an event adds to its choice. logprobs: in the form of the endpoint, None where none were requested; scored: how many they
    are."""

    text: str
    logprobs: L | None
    scored: int
    trace: list[schemas.TokenTrace] = field(default_factory=list)
    finish_reason: schemas.FinishReason | None = None

    @property
    def is_empty(self) -> bool:
        return not (self.text or self.scored or self.trace or self.finish_reason)


class Answer(Generic[L]):
    """The answer to one request, made from its events as they come. Each endpoint has its own; L: its form of log-probabilities."""

    prefix: str

    def __init__(self, request: ParsedRequest, served: Served) -> None:
        self.request, self._served = request, served
        self._about = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": request.model}
        self._deltas: list[list[ChoiceDelta[L]]] = [[] for _ in request.sequences]
        self._begun: set[int] = set()
        self._summaries: dict[int, Summary] = {}
        self._shape_is_sent = False

    @property
    def choices(self) -> range:
        """Their indices: of prompt i, those from i n on."""
        return range(len(self.request.sequences))

    def take(self, index: int, event: Event) -> ChoiceDelta[L]:
        """The next event of a choice."""
        request, text, tokens = self.request, event.text, event.tokens
        if request.echo and index not in self._begun:
            text, tokens = request.texts[index // request.n] + text, (*event.prompt_tokens, *tokens)
        scored = request.logprobs is not None
        delta = ChoiceDelta(
            text=text,
            logprobs=self._logprobs(index, tokens) if scored else None,
            scored=len(tokens) if scored else 0,
            trace=[logprobs.of_trace(token, self._served) for token in event.tokens] if request.trace else [],
            finish_reason=event.finish_reason,
        )
        if event.finish_reason is not None:
            assert event.summary is not None and index not in self._summaries, "a stream ends once, with its summary"
            self._summaries[index] = event.summary
        if not request.stream:  # what is sent is not kept
            self._deltas[index].append(delta)
        self._begun.add(index)
        return delta

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> L:
        """The log-probabilities of a choice's next tokens."""
        raise NotImplementedError

    def whole(self) -> schemas.Schema:
        """The answer in one object, once all choices have ended."""
        raise NotImplementedError

    def first_chunks(self) -> Iterator[schemas.Schema]:
        """The chunks before any event."""
        yield from ()

    def chunks(self, index: int, event: Event) -> Iterator[schemas.Schema]:
        """The chunks of an event."""
        raise NotImplementedError

    def closing(self) -> Iterator[schemas.Schema]:
        """The chunk after all events: the usage, where the request wants it."""
        if self.request.include_usage:
            yield self._chunk([], usage=self.usage(), dejavu=self.sparsity())

    def usage(self) -> schemas.Usage:
        first = [self._summaries[index] for index in self.choices[:: self.request.n]]
        prompt = sum(summary.prompt_tokens for summary in first)
        completion = sum(summary.completion_tokens for summary in self._summaries.values())
        details = schemas.PromptDetails(cached_tokens=sum(summary.cached_tokens for summary in first))
        return schemas.Usage(
            prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion, prompt_tokens_details=details
        )

    def sparsity(self) -> schemas.Sparsity:
        """Over all choices, each weighted by its decode steps."""
        summaries = [self._summaries[index] for index in self.choices]
        steps = [max(0, summary.completion_tokens - 1) for summary in summaries]
        seconds = sum(summary.decode_s for summary in summaries)
        return schemas.Sparsity(
            mode=self.request.mode,
            mlp_density=_mean([summary.mlp_density for summary in summaries], steps),
            head_density=_mean([summary.head_density for summary in summaries], steps),
            union_density=_mean([summary.union_density for summary in summaries], steps),
            tok_s=sum(steps) / seconds if seconds > 0 else None,
        )

    def _chunk(self, choices: list[Any], **more: Any) -> schemas.Schema:
        """A chunk of a stream with these choices."""
        raise NotImplementedError

    def _with_extras(self, choice: Any, trace: list[schemas.TokenTrace], *, ends: bool) -> schemas.Schema:
        """A chunk of one choice. The last one of the stream tells the densities; where a chunk with the usage follows, that one does."""
        more: dict[str, Any] = {"usage": None} if self.request.include_usage else {}
        found: dict[str, Any] = {}
        if ends and len(self._summaries) == len(self._deltas) and not self.request.include_usage:
            found = self.sparsity().model_dump(exclude_unset=True)
        if self.request.trace:
            found["trace"] = trace
            if not self._shape_is_sent:
                served, self._shape_is_sent = self._served, True
                found["shape"] = schemas.TraceShape(layers=served.num_layers, bins=BINS, heads=served.num_heads, neurons=served.num_neurons)
        return self._chunk([choice], **more, **({"dejavu": schemas.Sparsity(**found)} if found else {}))


def _mean(densities: Sequence[float | None], steps: Sequence[int]) -> float | None:
    """The mean weighted by steps; None where there is no density."""
    known = [(density, count) for density, count in zip(densities, steps, strict=True) if density is not None and count]
    total = sum(count for _, count in known)
    return sum(density * count for density, count in known) / total if total else None
