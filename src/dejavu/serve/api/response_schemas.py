"""What the server answers, as classes: OpenAI's objects, with our own fields under `dejavu`. The OpenAPI document shows them.

A field that is not set is not sent; one that is None is sent as null.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dejavu.serve.api.parsing import Schema

FinishReason = Literal["stop", "length"]
Mode = Literal["sparse", "dense"]
Share = Annotated[float, Field(ge=0, le=1)]


class Error(Schema):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(Schema):
    error: Error


class PromptDetails(Schema):
    cached_tokens: int


class Usage(Schema):
    """Tokens. A prompt with several choices counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class TokenTrace(Schema):
    """What fired for one token: base64 of layers * bins bytes (share of each bin's neurons, 0 to 255) and of layers * heads bytes (0 or 1).

    All null for the first token, which comes from the prompt's dense pass.
    """

    mlp_density: Share | None
    head_density: Share | None
    neurons: str | None
    heads: str | None


class TraceShape(Schema):
    layers: int
    bins: int
    heads: int
    neurons: int


class Sparsity(Schema):
    """How the answer came about: means over its decode steps, null without one. union_density: of what all rows of a step had read.

    tok_s: tokens a second of a choice, from its first to its last. shape and trace are of chunks whose request asked for a trace.
    """

    mode: Mode | None = None
    mlp_density: Share | None = None
    head_density: Share | None = None
    union_density: Share | None = None
    tok_s: float | None = None
    shape: TraceShape | None = None
    trace: list[TokenTrace] | None = None


class CompletionLogprobs(Schema):
    """One entry for each token, those of the prompt first where it is echoed; null for a text's first. text_offset: into `text`."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Schema):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class Completion(Schema):
    """The answer to POST /v1/completions; as a stream, each chunk of it."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    dejavu: Sparsity | None = None


class TopToken(Schema):
    token: str
    logprob: float
    bytes: list[int]


class ChatToken(TopToken):
    top_logprobs: list[TopToken]


class ChatLogprobs(Schema):
    content: list[ChatToken]


class ChatMessage(Schema):
    role: Literal["assistant"]
    content: str


class ChatChoice(Schema):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(Schema):
    """The answer to POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    dejavu: Sparsity


class ChatDelta(Schema):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(Schema):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(Schema):
    """A chunk of a streamed chat completion."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    dejavu: Sparsity | None = None


class ModelFacts(Schema):
    """layers; neurons and heads of each; chat: whether there is a chat template."""

    mode: Mode
    layers: int
    neurons: int
    heads: int
    chat: bool
    backend: str
    dtype: str


class ModelCard(Schema):
    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["dejavu"]
    max_model_len: int
    dejavu: ModelFacts


class ModelList(Schema):
    object: Literal["list"]
    data: list[ModelCard]


class Health(Schema):
    """How a server does that can answer. Texts that wait and run, slots for them and pages of the cache, over all engines."""

    status: Literal["ok"]
    queued: int
    running: int
    slots: int
    pages_free: int
    pages_total: int
    model: str
    sparse: bool
    layers: int
    backend: str
    dtype: str
    threads: int
    version: str
