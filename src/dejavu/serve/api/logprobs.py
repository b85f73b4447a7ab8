"""Log-probabilities and traces of tokens as they are sent. In: Tokens and a vocabulary. Out: objects of response_schemas.py."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from typing import Any

from dejavu.generation.pieces import Token
from dejavu.serve.api import response_schemas as schemas
from dejavu.serve.api.requests import Served
from dejavu.serve.api.trace import step_trace
from dejavu.serve.api.vocabulary import Offsets, Vocabulary

LOWEST = -9999.0  # for minus infinity, which JSON has no word for; OpenAI's number


def finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LOWEST


def of_completion(tokens: Sequence[Token], vocabulary: Vocabulary, offsets: Offsets) -> schemas.CompletionLogprobs:
    """Of a text completion. offsets counts on from the tokens before these."""

    def top(token: Token) -> dict[str, float] | None:
        """The likeliest tokens and the token itself, by their strings; of two with one string the likelier."""
        if token.logprob is None:
            return None
        found: dict[str, float] = {}
        for token_id, logprob in (*token.top, (token.token_id, token.logprob)):
            found.setdefault(vocabulary.text(token_id), finite(logprob))
        return found

    return schemas.CompletionLogprobs(
        tokens=[vocabulary.text(token.token_id) for token in tokens],
        token_logprobs=[None if token.logprob is None else finite(token.logprob) for token in tokens],
        top_logprobs=[top(token) for token in tokens],
        text_offset=[offsets.begin(token.token_id) for token in tokens],
    )


def of_chat(tokens: Sequence[Token], vocabulary: Vocabulary) -> schemas.ChatLogprobs:
    """Of a chat completion."""

    def told(token_id: int, logprob: float | None) -> dict[str, Any]:
        assert logprob is not None, "log-probabilities were asked for"
        return {"token": vocabulary.text(token_id), "logprob": finite(logprob), "bytes": list(vocabulary.written(token_id))}

    return schemas.ChatLogprobs(
        content=[
            schemas.ChatToken(**told(token.token_id, token.logprob), top_logprobs=[schemas.TopToken(**told(*other)) for other in token.top])
            for token in tokens
        ]
    )


def of_trace(token: Token, served: Served) -> schemas.TokenTrace:
    """What fired for a token; nothing is told of the first, which no step led to. One that nothing recorded ran dense."""
    found = None if token.mlp_density is None else step_trace(served, token.selections)
    return schemas.TokenTrace(
        mlp_density=token.mlp_density,
        head_density=token.head_density,
        neurons=None if found is None else base64.b64encode(b"".join(found.neurons)).decode(),
        heads=None if found is None else base64.b64encode(b"".join(found.heads)).decode(),
    )
