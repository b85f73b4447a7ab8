"""What the server answers, as classes: OpenAI's objects, with our own fields under `dejavu`. The OpenAPI document shows them.

A field that is not set is not sent; one that is None is sent as null.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dejavu.serve.fields import Wire

FinishReason = Literal["stop", "length"]
Mode = Literal["sparse", "dense"]
Share = Annotated[float, Field(ge=0, le=1)]


class Error(Wire):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(Wire):
    error: Error


class PromptDetails(Wire):
    cached_tokens: int


class Usage(Wire):
    """Tokens. A prompt with several choices counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class TokenTrace(Wire):
    """What fired for one token: base64 of layers * bins bytes (share of each bin's neurons, 0 to 255) and of layers * heads bytes (0 or 1).

    All null for the first token, which comes from the prompt's dense pass.
    """

    mlp_density: Share | None
    head_density: Share | None
    neurons: str | None
    heads: str | None


class TraceShape(Wire):
    layers: int
    bins: int
    heads: int
    neurons: int


class Sparsity(Wire):
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


class CompletionLogprobs(Wire):
    """One entry for each token, those of the prompt first where it is echoed; null for a text's first. text_offset: into `text`."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Wire):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class Completion(Wire):
    """The answer to POST /v1/completions; as a stream, each chunk of it."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    dejavu: Sparsity | None = None


class TopToken(Wire):
    token: str
    logprob: float
    bytes: list[int]


class ChatToken(TopToken):
    top_logprobs: list[TopToken]


class ChatLogprobs(Wire):
    content: list[ChatToken]


class ChatMessage(Wire):
    role: Literal["assistant"]
    content: str


class ChatChoice(Wire):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(Wire):
    """The answer to POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    dejavu: Sparsity


class ChatDelta(Wire):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(Wire):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(Wire):
    """A chunk of a streamed chat completion."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    dejavu: Sparsity | None = None


class ModelFacts(Wire):
    """layers; neurons and heads of each; chat: whether there is a chat template."""

    mode: Mode
    layers: int
    neurons: int
    heads: int
    chat: bool
    backend: str
    dtype: str


class ModelCard(Wire):
    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["dejavu"]
    max_model_len: int
    dejavu: ModelFacts


class ModelList(Wire):
    object: Literal["list"]
    data: list[ModelCard]


class Health(Wire):
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
