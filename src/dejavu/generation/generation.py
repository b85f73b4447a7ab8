"""The loop that writes text: prefill the prompt, then draw, decode, draw.

In: an engine, a tokenizer, prompt ids and how to sample and stop. Out: pieces of text while it runs, and at the end the
whole text with counts, speeds and densities. The first token is drawn from the prefill's logits, each later one comes of a
decode step (rows.py): n tokens take n - 1 steps. Where an engine gives a few tokens at a time they are handed out one by one; those behind
the end of a text are dropped and count nowhere, though their time does.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from dejavu.config import SamplingConfig
from dejavu.engine.interface import Engine, EngineInfo, LayerSelection
from dejavu.engine.sampling import Sampler
from dejavu.generation.pieces import Piece, Token
from dejavu.generation.rows import Row, advance, draw, draws, tokens_at_once
from dejavu.generation.text import Detokenizer, FinishReason, Writing, stop_ids_of
from dejavu.model.counts import Counts, DensityCounter


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCounts:
    """Means over the decode steps of a text: counts of what a step selected, fp64 [L], and the tokens that it attended to."""

    mean: Counts
    tokens: float

    @property
    def neurons_L(self) -> tuple[float, ...]:  # noqa: N802
        return tuple(self.mean.neurons.tolist())

    @property
    def heads_L(self) -> tuple[float, ...]:  # noqa: N802
        return tuple(self.mean.heads.tolist())

    @property
    def inputs_LP(self) -> tuple[tuple[float, ...], ...] | None:  # noqa: N802
        return None if self.mean.kept_inputs is None else tuple(map(tuple, self.mean.kept_inputs.tolist()))


class GeneratedText(str):
    """The generated text, with how it came about.

    finish_reason: "stop" (a stop string or stop id) or "length" (max_new_tokens or the context); None where the generation was closed
    before its end. token_ids: every token generated, a stop token included. reused_tokens: of the prompt, those whose keys and values
    were there from a prompt before. tok_s: decode steps per second of decode, the prompt excluded; None without a step. prefill_tok_s: of
    the tokens of the prompt that were not reused. mlp_density, head_density: mean over all layers and decode steps, a dense layer counting
    1; where inputs are selected, of the weights of the MLP and of attention; None without a step. counts: likewise None without a step.
    trace: per token the selections of its layers (None for the first), when the engine records; else None. engine: what wrote it.
    """

    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    finish_reason: FinishReason | None
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    tok_s: float | None
    prefill_tok_s: float | None
    mlp_density: float | None
    head_density: float | None
    counts: StepCounts | None
    engine: EngineInfo
    trace: tuple[tuple[LayerSelection, ...] | None, ...] | None


class Generation(Iterator[Piece]):
    """One running generation: iterate over its pieces, then ask for `result()`. `close()`, or nobody's holding it, ends it early and
    frees the slot."""

    def __init__(
        self,
        engine: Engine,
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int,
        sampler: Sampler,
        writing: Writing,
        slot: int,
        on_end: Callable[[], object] | None = None,
        reuse_prefix: bool = False,
    ) -> None:
        self._engine, self._slot, self._writing = engine, slot, writing
        self._row, self._draws = Row(slot=slot, sampler=sampler, scored=True), draws(engine)
        self._prompt_ids = list(prompt_ids)
        self._max_new_tokens = max_new_tokens
        self._tokens: list[Token] = []
        self._text: list[str] = []
        self._sent = 0  # tokens, in pieces
        self._finished = False  # whether the last piece was given
        self._prefill_s = self._decode_s = 0.0
        self._ready: deque[Token | ValueError] = deque()  # decoded, not yet handed out
        self._on_end = on_end
        self._begun = self._ended = False
        self._reuse_prefix, self._reused = reuse_prefix, 0

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        piece = None
        if not self._ended:
            self._begun = True
            try:
                piece = self._next_piece()
            except BaseException:
                self._ended = True
                self._engine.free(self._slot)
                raise
        if piece is None:
            self.close()
            raise StopIteration
        return piece

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """End the generation early; its slot is freed, or was never taken. Nothing happens when it has ended."""
        if self._ended:
            return
        self._ended = True
        if self._begun:  # else the slot may be another's by now
            self._engine.free(self._slot)
        if self._on_end is not None:
            self._on_end()

    def texts(self) -> Generator[str]:
        """The pieces' texts, without empty ones. The generation ends with this iterator, also where that is closed before the first."""
        texts = self._texts()
        next(texts)  # one that has not begun would end without a word
        return texts

    def _texts(self) -> Generator[str]:
        try:
            yield ""
            for piece in self:
                if piece.text:
                    yield piece.text
        finally:
            self.close()

    def result(self) -> GeneratedText:
        """Run to the end and return the whole text with its counts, speeds and densities."""
        for _ in self:
            pass
        assert self._writing.finish_reason is not None, "the generation was closed before its end"
        return self.written()

    def written(self) -> GeneratedText:
        """As `result`, of what has been written so far: the text of a generation that was closed before its end."""
        text = GeneratedText("".join(self._text))
        text.prompt_tokens = len(self._prompt_ids)
        text.reused_tokens = self._reused
        text.new_tokens = len(self._tokens)
        text.finish_reason = self._writing.finish_reason
        text.token_ids = tuple(token.token_id for token in self._tokens)
        text.logprobs = tuple(token.logprob for token in self._tokens if token.logprob is not None)
        text.tok_s = (len(self._tokens) - 1) / self._decode_s if len(self._tokens) > 1 else None
        text.prefill_tok_s = (len(self._prompt_ids) - self._reused) / self._prefill_s if self._prefill_s else None
        self._add_counts(text)
        text.engine = self._engine.info
        selections = tuple(token.selections for token in self._tokens)
        text.trace = selections if any(layers is not None for layers in selections) else None
        return text

    def _next_piece(self) -> Piece | None:
        """None behind the last one."""
        if self._finished:
            return None
        writing, text = self._writing, ""
        while not text and writing.finish_reason is None:
            token = self._next_token()
            self._tokens.append(token)
            text = writing.push(token.token_id)
        self._text.append(text)
        self._finished = writing.finish_reason is not None
        tokens, self._sent = tuple(self._tokens[self._sent :]), len(self._tokens)
        return Piece(text=text, tokens=tokens, finish_reason=writing.finish_reason)

    def _next_token(self) -> Token:
        """Prefill before the first token, decode before each other. The clocks run here and nowhere else."""
        start = time.perf_counter()
        if not self._tokens:
            assert self._engine.length(self._slot) == 0, f"slot {self._slot} was taken since this generation was made"
            token = draw(self._row, self._prefilled())
            self._prefill_s += time.perf_counter() - start
            return token
        if not self._ready:
            self._ready.extend(step.tokens_B[0] for step in advance(self._engine, [self._row], self._at_once()))
            self._decode_s += time.perf_counter() - start
        token = self._ready.popleft()
        if isinstance(token, ValueError):
            raise token
        return token

    def _prefilled(self) -> Tensor:
        """Logits [V] after the prompt."""
        engine, slot, prompt_ids = self._engine, self._slot, self._prompt_ids
        if not self._reuse_prefix:
            return engine.prefill(slot, prompt_ids)
        self._reused = engine.reuse(slot, prompt_ids)
        logits_V = engine.prefill(slot, prompt_ids[self._reused :])
        engine.publish(slot, prompt_ids)
        return logits_V

    def _at_once(self) -> int:
        """How many tokens to ask the engine for: as many as limit, context and cache have room for, at most."""
        if not self._draws:
            return 1
        info, tokens = self._engine.info, len(self._tokens)
        pages = self._engine.free_pages * info.page_size + -self._engine.length(self._slot) % info.page_size
        return tokens_at_once(tokens - 1, min(self._max_new_tokens - tokens, info.max_tokens - len(self._prompt_ids) - tokens, pages))

    def _add_counts(self, text: GeneratedText) -> None:
        """What the decode steps selected: of every token but the first, which comes from the prefill; None where there is no other."""
        steps = [token.counts for token in self._tokens if token.counts is not None]
        text.mlp_density = text.head_density = text.counts = None
        if not steps:
            return
        info, counts_TL = self._engine.info, Counts.stack(steps)
        counter = DensityCounter(info.num_layers)
        for mlp_L, heads_L in zip(*(density_TL.tolist() for density_TL in counts_TL.densities(info)), strict=True):
            counter.add(mlp_L, heads_L)
        text.mlp_density, text.head_density = counter.mlp_density(), counter.head_density()
        # The n-th step attends to the prompt and n tokens.
        text.counts = StepCounts(mean=counts_TL.mean(), tokens=len(self._prompt_ids) + (len(steps) + 1) / 2)


def generate_tokens(
    engine: Engine,
    tokenizer: Detokenizer,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: SamplingConfig = SamplingConfig(),
    stop: Sequence[str] = (),
    stop_ids: Sequence[int] = (),
    ignore_eos: bool = False,
    slot: int = 0,
    index: int = 0,
    on_end: Callable[[], object] | None = None,
    reuse_prefix: bool = False,
) -> Generation:
    """Start a generation in an empty slot: an iterator over Pieces; `.result()` is the GeneratedText.

    stop: strings that end the text before them; the prompt is not searched. stop_ids: tokens that end it, in addition to the
    tokenizer's EOS (which ignore_eos passes over); they are counted but give no text. At the end of the context the
    generation ends with "length". index: which of several choices of one request (see Sampler).
    on_end: called once the text has ended or is closed and its slot is free; not after an error. reuse_prefix: begin with what the
    engine still has of a prompt before that began alike, and offer this one to the next.

    Raises ValueError, here and not at the first piece, for an empty prompt, a prompt that leaves no room in the context,
    a negative count and an empty stop string.
    """
    prompt, limit = len(prompt_ids), engine.info.max_tokens
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be 0 or more, not {max_new_tokens}")
    if prompt == 0:
        raise ValueError("the prompt has no tokens; give at least one word")
    if prompt > limit:
        raise ValueError(f"the prompt has {prompt} tokens and the context holds {limit}; shorten the prompt")
    if prompt == limit and max_new_tokens > 0:
        raise ValueError(f"the prompt has {prompt} tokens and fills the context of {limit}: no room for a new one; shorten the prompt")
    if engine.length(slot) > 0:
        raise ValueError(f"slot {slot} of the engine is in use by another text; run that generation to its end or close it first")
    ends = stop_ids_of(tokenizer, stop_ids, ignore_eos=ignore_eos)
    return Generation(
        engine,
        prompt_ids,
        max_new_tokens=max_new_tokens,
        sampler=Sampler(sampling, index=index),
        writing=Writing(tokenizer, prompt_ids, stop=stop, stop_ids=ends, max_tokens=min(max_new_tokens, limit - prompt)),
        slot=slot,
        on_end=on_end,
        reuse_prefix=reuse_prefix,
    )
