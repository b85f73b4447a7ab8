"""What comes of a text while it is written: tokens, and pieces of text with the tokens that they are of."""

from __future__ import annotations

from dataclasses import dataclass, field

from dejavu.engine.interface import LayerSelection
from dejavu.generation.text import FinishReason
from dejavu.model.counts import Counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """A token, generated or of a prompt.

    logprob: natural logarithm, of the full softmax before bias, temperature, top_k and top_p; None for the first token of a prompt, and
    where none was requested. top: the likeliest (id, logprob), likeliest first, where they were requested. mlp_density, head_density: of
    the step that led to it, mean over the layers; None for the first generated token, which comes from the prefill, and for those of a
    prompt. selections: by layer, what that step selected, kept when the engine records.

    counts_BL, row: what the step selected for each of its rows, and which of them this token is of.
    """

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    mlp_density: float | None = None
    head_density: float | None = None
    selections: tuple[LayerSelection, ...] | None = field(default=None, compare=False)
    counts_BL: Counts | None = field(default=None, compare=False, repr=False)
    row: int = field(default=0, compare=False, repr=False)

    @property
    def counts(self) -> Counts | None:
        """What the step selected, [L], on the CPU; None for a token without a step."""
        return None if self.counts_BL is None else self.counts_BL[self.row]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """New text, never taken back, and the tokens since the last piece. Only the last piece of a text has a finish_reason; its text may be
    empty."""

    text: str = ""
    tokens: tuple[Token, ...] = ()
    finish_reason: FinishReason | None = None

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(token.token_id for token in self.tokens)
