"""The requests of OpenAI's API that are answered here, as classes: what they check a body for is what the OpenAPI document promises.

In: the bytes of a body (parsing.py). Out: a CompletionBody or a ChatBody. What depends on the model (its name, the context, the
vocabulary, a chat template) is checked where a body is read, in requests.py. Options that would change a text and are not computed here
are refused, unless they ask for nothing, and so are fields that are not named here; null always means "not given".
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from dejavu.serve.api.parsing import WHOLE, Received, explained

MAX_CHOICES = 64
MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_IDS = 128
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
Penalty = Annotated[float, Field(ge=-2, le=2)] | None
# What asks for nothing.
Zero = Annotated[float, Field(ge=0, le=0)] | None
One = Annotated[float, Field(ge=1, le=1)] | None
No = Literal[False] | None
Yes = Literal[True] | None
NoList = Annotated[list[Any], Field(max_length=0)] | None
NoText = Annotated[str, Field(max_length=0)] | None


class StreamOptions(Received):
    include_usage: bool | None = None
    include_obfuscation: Any = Field(default=None, description="Not used.")


class Extra(Received):
    """Options of this server's own."""

    trace: bool | None = Field(default=None, description="Report, with every chunk of a stream, what fired for each token.")


class ResponseFormat(Received):
    type: Literal["text"]


class Neutral(Received):
    """Options of OpenAI and of other servers that are not computed here, each with the value that asks for nothing."""

    best_of: Annotated[int, Field(ge=1, le=1), WHOLE] | None = None
    suffix: NoText = None
    response_format: ResponseFormat | None = None
    tools: NoList = None
    tool_choice: Literal["none", "auto"] | None = None
    functions: NoList = None
    function_call: Literal["none", "auto"] | None = None
    modalities: list[Literal["text"]] | None = None
    bad_words: NoList = None
    length_penalty: One = None
    typical_p: One = None
    use_beam_search: No = None
    early_stopping: No = None
    skip_special_tokens: Yes = None
    include_stop_str_in_output: No = None
    return_tokens_as_token_ids: No = None
    return_token_ids: No = None


class Unused(Received):
    """Options that change no text: taken, and not used."""

    metadata: Any = None
    parallel_tool_calls: Any = None
    prediction: Any = None
    priority: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    request_id: Any = None
    safety_identifier: Any = None
    service_tier: Any = None
    spaces_between_special_tokens: Any = None
    store: Any = None
    user: Any = None


class Sampled(Neutral, Unused):
    """What both kinds of request share. What neither computes is refused in both, whichever it belongs to."""

    neutral: ClassVar[frozenset[str]] = frozenset(Neutral.model_fields) - {"response_format"}

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), WHOLE] | None = None
    max_tokens: Tokens = None
    max_completion_tokens: Tokens = Field(default=None, description="The newer name of max_tokens, which counts where both are given.")
    min_tokens: Tokens = Field(default=None, description="Not of OpenAI: so many tokens come before one that ends the text. Not with stop.")
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1), WHOLE] | None = Field(
        default=None, description="Not of OpenAI: draw from the likeliest so many; 0 and -1 from all."
    )
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=None, description="Not of OpenAI: draw from what is at least so likely as the likeliest times it."
    )
    presence_penalty: Penalty = None
    frequency_penalty: Penalty = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = Field(
        default=None, description="Not of OpenAI: logits of tokens that the prompt or the text has are divided, or multiplied below 0."
    )
    seed: Seed = None
    stop: Stop = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=MAX_STOP_IDS)] | NoList = Field(
        default=None, description="Not of OpenAI: tokens that end the text, without being written."
    )
    logit_bias: Biases = None
    ignore_eos: bool | None = Field(default=None, description="Not of OpenAI: go on behind the end-of-text token.")
    dejavu: Extra | None = None

    @property
    def length(self) -> int | None:
        """Tokens of the answer that are asked for."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionBody(Sampled):
    """POST /v1/completions. Where no length is given it is DEFAULT_MAX_TOKENS."""

    neutral: ClassVar[frozenset[str]] = Sampled.neutral | {"add_special_tokens"}
    prompt: Prompt
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), WHOLE] | None = None
    echo: bool | None = None
    add_special_tokens: Yes = None


class TextPart(Received):
    type: Literal["text"]
    text: str


Content = Annotated[
    str | list[TextPart],
    explained(
        'must be a text or a list of {"type": "text", "text": "..."}, without other parts; an assistant may have said null, others may not'
    ),
]


class Message(Received):
    role: Literal["system", "developer", "user"]
    content: Content
    name: str | None = None


class AssistantMessage(Received):
    """What an answer has besides its text has to be empty."""

    role: Literal["assistant"]
    content: Content | None = None
    name: str | None = None
    refusal: NoText = None
    annotations: NoList = None
    tool_calls: NoList = None
    reasoning_content: NoText = None


AnyMessage = Annotated[Message | AssistantMessage, Field(discriminator="role")]


class ChatBody(Sampled):
    """POST /v1/chat/completions. Where no length is given it is what the context has room for."""

    neutral: ClassVar[frozenset[str]] = Sampled.neutral | {"echo", "add_special_tokens"}
    messages: Annotated[list[AnyMessage], Field(min_length=1)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), WHOLE] | None = None
    echo: No = None
    add_special_tokens: No = None
    add_generation_prompt: bool | None = Field(
        default=None, description="Not of OpenAI: false ends the prompt behind the last message, without the beginning of an answer."
    )
    continue_final_message: bool | None = Field(
        default=None, description="Not of OpenAI: true goes on with the last message. Not with add_generation_prompt true."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None, description="Not of OpenAI: variables of the chat template, such as enable_thinking, tools or documents."
    )


def text_of(content: str | list[TextPart] | None) -> str:
    """The text of a message, its parts joined."""
    if content is None:
        return ""
    return content if isinstance(content, str) else "".join(part.text for part in content)
