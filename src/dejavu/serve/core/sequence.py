"""A sequence under way: its slot and pages, how it draws, its text so far, and its sums.

In: logits of its prompt, and tokens. Out: the Events of its stream.

Letters: V vocabulary  T tokens
"""

from __future__ import annotations

import functools
import time

from torch import Tensor

from dejavu.engine.sampling import Distribution, Sampler
from dejavu.generation.pieces import Token
from dejavu.generation.rows import Row
from dejavu.generation.text import Detokenizer, Writing, stop_ids_of
from dejavu.serve.core.interface import Event, SequenceRequest, Summary
from dejavu.serve.core.scheduler import ScheduledSequence
from dejavu.serve.core.stream import Stream


class TextSequence(ScheduledSequence):
    """One requested sequence, from its submission to its end. Raises ValueError for an empty stop string."""

    def __init__(self, request: SequenceRequest, tokenizer: Detokenizer, stream: Stream, *, share: bool) -> None:
        # Where the prompt's log-probabilities are requested all of it has to be computed.
        super().__init__(prompt_ids=request.prompt_ids, new_tokens=request.max_new_tokens, share=share and not request.prompt_logprobs)
        self.request, self.stream = request, stream
        self._stop_ids = stop_ids_of(tokenizer, request.stop_ids, ignore_eos=request.ignore_eos)
        self.writing = Writing(
            tokenizer, request.prompt_ids, stop=request.stop, max_tokens=request.max_new_tokens,
            stop_ids=self._stop_ids, echoed=request.echo,
        )  # fmt: skip
        self._prompt: list[Token] = []
        self._unsent: list[Token] = []
        self._densities: list[tuple[float, float]] = []
        self._unions: list[float] = []
        self._submitted = time.perf_counter()
        self._first_s = self._last_s = self._submitted

    @property
    def nothing_to_do(self) -> bool:
        """Whether it ends where it begins: no token is requested, and nothing about its prompt."""
        return self.new_tokens == 0 and not self.request.prompt_logprobs

    @functools.cached_property
    def row(self) -> Row:
        """How it decodes, once it has a slot."""
        assert self.slot is not None, "what runs has a slot"
        request = self.request
        sampler = Sampler(request.sampling, index=request.index)
        return Row(
            slot=self.slot,
            sampler=sampler,
            top=request.top_logprobs,
            bias=request.logit_bias,
            trace=request.trace,
            sparse=not request.dense,
            forbidden=self._stop_ids if request.min_tokens > 0 else frozenset(),
            penalties=request.penalties,
            prompt=frozenset(request.prompt_ids if request.penalties.any else ()),
        )

    def score_prompt(self, start: int, logits_TV: Tensor) -> None:
        """Log-probabilities of the prompt's tokens behind those from `start` on. Raises ValueError where logits are not numbers."""
        ids, top = self.request.prompt_ids, self.request.top_logprobs or 0
        if start == 0:
            self._prompt = [Token(token_id=ids[0])]
        for token_id, logits_V in zip(ids[start + 1 : start + 1 + len(logits_TV)], logits_TV, strict=False):
            found = Distribution(logits_V)
            self._prompt.append(Token(token_id=token_id, logprob=found.logprob(token_id), top=found.top(top)))

    def push(self, token: Token, *, union: float | None = None) -> Event | None:
        """What the stream gets after one more token: nothing while its text is not certain. union: density of what its step read."""
        now = time.perf_counter()
        self._first_s = now if self.writing.tokens == 0 else self._first_s
        self._last_s = now
        self._unsent.append(token)
        if token.mlp_density is not None and token.head_density is not None:
            self._densities.append((token.mlp_density, token.head_density))
        if union is not None:
            self._unions.append(union)
        text = self.writing.push(token.token_id)
        if 0 < self.request.min_tokens <= self.writing.tokens:
            self.row.forbidden = frozenset()
        return self.event(text) if text or self.writing.finish_reason is not None else None

    def event(self, text: str = "") -> Event:
        """The text with all tokens that are not sent yet, and the end where this is it."""
        reason = self.writing.finish_reason
        event = Event(
            text=text, tokens=tuple(self._unsent), prompt_tokens=tuple(self._prompt), finish_reason=reason,
            summary=None if reason is None else self._summary(),
        )  # fmt: skip
        self._prompt, self._unsent = [], []
        return event

    def _summary(self) -> Summary:
        mlp, heads = zip(*self._densities, strict=True) if self._densities else ((), ())
        return Summary(
            prompt_tokens=len(self.request.prompt_ids),
            completion_tokens=self.writing.tokens,
            cached_tokens=self.cached,
            mlp_density=_mean(mlp),
            head_density=_mean(heads),
            union_density=_mean(self._unions),
            time_to_first_token_s=self._first_s - self._submitted,
            decode_s=self._last_s - self._first_s,
        )


def _mean(values: tuple[float, ...] | list[float]) -> float | None:
    return sum(values) / len(values) if values else None
