"""The requests of OpenAI's API that are answered here, as classes: what they check a body for is what the OpenAPI document promises.

In: the bytes of a body (parsing.py). Out: a CompletionBody or a ChatBody. What depends on the model (its name, the context, the
vocabulary, a chat template) is checked where a body is read, in requests.py. Options of OpenAI's that would change a text and are not
computed here are refused, unless they ask for nothing; null always means "not given".
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from dejavu.serve.api.parsing import WHOLE, Schema, explained

MAX_CHOICES = 64
MAX_LOGPROBS = 20
MAX_STOPS = 16
DEFAULT_MAX_TOKENS = 16  # of /v1/completions; a chat may fill the context

TokenIds = Annotated[list[Annotated[int, Field(ge=0), WHOLE]], Field(min_length=1)]
Prompt = Annotated[
    str | Annotated[list[str], Field(min_length=1)] | TokenIds | Annotated[list[TokenIds], Field(min_length=1)],
    explained("must be a text, token ids, or a list of texts or of lists of token ids, and no list may be empty"),
]
StopString = Annotated[str, Field(min_length=1)]
Stop = Annotated[
    StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None,
    explained(f"must be a text or a list of at most {MAX_STOPS} texts, none of them empty"),
]
Tokens = Annotated[int, Field(ge=0), WHOLE] | None
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1), WHOLE] | None
TokenKey = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
Biases = Annotated[dict[TokenKey, Bias], Field(json_schema_extra={"additionalProperties": False})] | None
Nothing = Annotated[float, Field(ge=0, le=0)] | None
NoList = Annotated[list[Any], Field(max_length=0)] | None


class StreamOptions(Schema):
    include_usage: bool | None = None


class Extra(Schema):
    """Options of this server's own."""

    trace: bool | None = Field(default=None, description="Report, with every chunk of a stream, what fired for each token.")


class ResponseFormat(Schema):
    type: Literal["text"]


class Sampled(Schema):
    """What both kinds of request share. What neither computes is refused in both, whichever it belongs to."""

    unsupported: ClassVar[frozenset[str]] = frozenset(
        {"best_of", "suffix", "presence_penalty", "frequency_penalty", "tools", "functions", "response_format"}
    )

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), WHOLE] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0), WHOLE] | None = Field(
        default=None, description="Not of OpenAI: draw from the likeliest so many; 0 from all."
    )
    seed: Seed = None
    stop: Stop = None
    logit_bias: Biases = None
    ignore_eos: bool | None = Field(default=None, description="Not of OpenAI: go on behind the end-of-text token.")
    user: str | None = None
    dejavu: Extra | None = None
    presence_penalty: Nothing = None
    frequency_penalty: Nothing = None
    best_of: Annotated[int, Field(ge=1, le=1), WHOLE] | None = None
    suffix: None = None
    response_format: ResponseFormat | None = None
    tools: NoList = None
    functions: NoList = None


class CompletionBody(Sampled):
    """POST /v1/completions."""

    prompt: Prompt
    max_tokens: Tokens = Field(default=None, description=f"{DEFAULT_MAX_TOKENS} where it is not given.")
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), WHOLE] | None = None
    echo: bool | None = None


class TextPart(Schema):
    type: Literal["text"]
    text: str


Content = Annotated[
    str | list[TextPart],
    explained(
        'must be a text or a list of {"type": "text", "text": "..."}, without other parts; an assistant may have said null, others may not'
    ),
]


class Message(Schema):
    role: Literal["system", "developer", "user"]
    content: Content


class AssistantMessage(Schema):
    role: Literal["assistant"]
    content: Content | None = None


AnyMessage = Annotated[Message | AssistantMessage, Field(discriminator="role")]


class ChatBody(Sampled):
    """POST /v1/chat/completions."""

    messages: Annotated[list[AnyMessage], Field(min_length=1)]
    max_tokens: Tokens = Field(default=None, description="The older name of max_completion_tokens, which counts where both are given.")
    max_completion_tokens: Tokens = Field(default=None, description="What the context has room for, where it is not given.")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), WHOLE] | None = None


def text_of(content: str | list[TextPart] | None) -> str:
    """The text of a message, its parts joined."""
    if content is None:
        return ""
    return content if isinstance(content, str) else "".join(part.text for part in content)
