"""The step of every decode loop: sequences that decode get their next tokens from an engine.

In: an engine and its rows, each a slot with the token that it goes on from and how it draws. Out: the next tokens of each row. An engine
that draws by itself is asked for a few tokens at a time; with any other, and for rows that want more of the logits than a token, each
token is a step and a draw on the host. All that writes text goes through here: `generate`, the server, and `attach`.

Letters: N steps  B rows  V vocabulary  L layers
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeGuard

from torch import Tensor

from dejavu.config import NO_PENALTIES, Penalties
from dejavu.engine.interface import DecodesTokens, Engine, EngineInfo
from dejavu.engine.sampling import NOT_NUMBERS, Distribution, Sampler
from dejavu.generation.pieces import Token

CHUNK = 8  # tokens of a text that a device is asked for at a time: each wait for it costs a part of a token


@dataclass(slots=True, kw_only=True, eq=False)
class Row:
    """A sequence that decodes. last: the token that its next step appends; -1 before the first is drawn.

    scored: return log-probabilities of its tokens. top: None, or how many of the likeliest tokens to return with each. bias: token id ->
    what is added to its logit before sampling. trace: return what its steps select. sparse: False runs its steps dense. forbidden: tokens
    that are not drawn now. penalties: by what was drawn (`drawn`, token id -> how often) and what the prompt has (`prompt`).
    """

    slot: int
    sampler: Sampler
    last: int = -1
    scored: bool = False
    top: int | None = None
    bias: Mapping[int, float] = field(default_factory=dict)
    trace: bool = False
    sparse: bool = True
    forbidden: frozenset[int] = frozenset()
    penalties: Penalties = NO_PENALTIES
    prompt: frozenset[int] = frozenset()
    drawn: Counter[int] = field(default_factory=Counter)

    @property
    def plain(self) -> bool:
        """Whether an engine may draw its tokens: it wants nothing but them, by what every engine does."""
        return self.top is None and not self.trace and not self.adds and self.sampler.config.min_p is None

    @property
    def adds(self) -> bool:
        """Whether it adds to logits: a token that a screened head left out has none, and one that is forbidden may be all that it kept."""
        return bool(self.bias or self.forbidden or self.penalties.any)

    def added(self, found: Distribution) -> Mapping[int, float]:
        """What is added to logits: the bias, then penalties on what comes of it, and minus infinity for what is forbidden."""
        added = dict(self.bias)
        if self.penalties.any:
            for token_id in self.prompt | self.drawn.keys() if self.penalties.repetition != 1 else self.drawn.keys():
                own = found.logit(token_id)
                value, count = own + added.get(token_id, 0.0), self.drawn[token_id]
                if math.isfinite(value):
                    scaled = value / self.penalties.repetition if value > 0 else value * self.penalties.repetition
                    added[token_id] = scaled - self.penalties.presence * (count > 0) - self.penalties.frequency * count - own
        return added | dict.fromkeys(self.forbidden, -math.inf)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeStep:
    """The next token of each row, or the ValueError of a row whose logits are not numbers. union_L, fallback_layers: see StepResult."""

    tokens_B: tuple[Token | ValueError, ...]
    union_L: Tensor | None
    fallback_layers: int


def draws(engine: object) -> TypeGuard[DecodesTokens]:
    """Whether an engine draws tokens by itself. One that records does not: what it decodes that way has no selections."""
    return hasattr(engine, "decode") and not getattr(engine, "records", True)  # isinstance of a protocol takes longer than all else here


def tokens_at_once(decoded: int, left: int, *, most: int = CHUNK) -> int:
    """How many tokens to ask for: 1, 2, 4 and so on up to `most`, so that the first come early; never more than are `left`, and at least
    one, as an engine whose cache is full says so itself. decoded: tokens that steps have given so far."""
    return max(1, min(most, decoded + 1, left))


def draw(row: Row, logits_V: Tensor) -> Token:
    """The row's next token by these logits, drawn here. Raises ValueError where they are not numbers."""
    token_id, logprob, top = _draw(row, logits_V)
    return Token(token_id=token_id, logprob=logprob, top=top)


def runs_together(info: EngineInfo, row: Row) -> tuple[bool, bool]:
    """What rows of one step have alike: whether it is sparse, and whether it needs the full head in the place of a screened one. A step has
    one head for all of its rows, and no text may depend on who else runs."""
    return row.sparse, row.sparse and info.screen is not None and row.adds


def advance(engine: Engine, rows: Sequence[Row], count: int = 1) -> list[DecodeStep]:
    """The next steps of all rows, which run together (see `runs_together`): `count` where the engine draws and no row wants more than
    tokens, else one.

    Raises what the engine's step does; no row has changed then.
    """
    info = engine.info
    assert len({runs_together(info, row) for row in rows}) == 1, f"{rows=}"
    if draws(engine) and all(row.plain for row in rows):
        return _drawn(engine, info, rows, count)
    return [_stepped(engine, info, rows)]


def _draw(row: Row, logits_V: Tensor) -> tuple[int, float | None, tuple[tuple[int, float], ...]]:
    """The next token, its log-probability and the likeliest tokens, as far as they were requested."""
    found = Distribution(logits_V)
    row.last = token_id = row.sampler.choose(found, row.added(found))
    if row.penalties.any:
        row.drawn[token_id] += 1
    if row.top is not None:
        return token_id, found.logprob(token_id), found.top(row.top)
    return token_id, found.logprob(token_id) if row.scored else None, ()


def _stepped(engine: Engine, info: EngineInfo, rows: Sequence[Row]) -> DecodeStep:
    """A step of the engine, and a draw on the host for each row."""
    record = True if any(row.trace for row in rows) else None
    sparse, full_head = runs_together(info, rows[0])
    step = engine.step([row.last for row in rows], [row.slot for row in rows], sparse=sparse, record=record, full_head=full_head)
    logits_BV, counts_BL, selections = step.logits_BV.cpu(), step.counts.cpu(), step.selections
    tokens: list[Token | ValueError] = []
    for at, (row, (mlp, heads)) in enumerate(zip(rows, counts_BL.mean_densities(info), strict=True)):
        try:
            token_id, logprob, top = _draw(row, logits_BV[at])
        except ValueError as error:
            tokens.append(error)
            continue
        token = Token(
            token_id=token_id, logprob=logprob, top=top, mlp_density=mlp, head_density=heads,
            selections=None if selections is None else selections[at], counts_BL=counts_BL, row=at,
        )  # fmt: skip
        tokens.append(token)
    return DecodeStep(tokens_B=tuple(tokens), union_L=step.union_L, fallback_layers=step.fallback_layers or 0)


def _drawn(engine: DecodesTokens, info: EngineInfo, rows: Sequence[Row], count: int) -> list[DecodeStep]:
    """So many tokens of each row, drawn by the engine; the device is waited for once."""
    sampling, choices = [row.sampler.config for row in rows], [row.sampler.index for row in rows]
    last_B, slots_B = [row.last for row in rows], [row.slot for row in rows]
    found = engine.decode(last_B, slots_B, count, sampling, choices, sparse=rows[0].sparse).cpu()
    token_NB, logprob_NB = found.token_NB.tolist(), found.logprob_NB.tolist()
    steps = []
    for n, (token_B, logprob_B) in enumerate(zip(token_NB, logprob_NB, strict=True)):
        counts_BL = found.counts[n]
        tokens: list[Token | ValueError] = []
        for at, (row, (mlp, heads)) in enumerate(zip(rows, counts_BL.mean_densities(info), strict=True)):
            if token_B[at] < 0:
                tokens.append(ValueError(NOT_NUMBERS))
                continue
            token = Token(
                token_id=token_B[at], logprob=logprob_B[at] if row.scored else None, mlp_density=mlp, head_density=heads,
                counts_BL=counts_BL, row=at,
            )  # fmt: skip
            tokens.append(token)
        union_L = None if found.union_NL is None else found.union_NL[n]
        steps.append(DecodeStep(tokens_B=tuple(tokens), union_L=union_L, fallback_layers=found.fallback_layers or 0))
    for row, token_id in zip(rows, token_NB[-1], strict=True):
        row.last = token_id
    return steps
