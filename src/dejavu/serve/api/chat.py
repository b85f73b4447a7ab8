"""POST /v1/chat/completions: answer messages. In: a ChatBody. Out: what the worker is asked for, and the answer made of its events."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from dejavu.generation.pieces import Token
from dejavu.model.template import rendered, rendered_ids
from dejavu.serve.api import logprobs
from dejavu.serve.api import response_schemas as schemas
from dejavu.serve.api.endpoint import TextEndpoint
from dejavu.serve.api.errors import TOO_LONG, invalid
from dejavu.serve.api.request_schemas import ChatBody, text_of
from dejavu.serve.api.requests import ParsedRequest, Served, check_characters, check_ids, choices_of, read, sequences_of, streaming_of
from dejavu.serve.api.responses import Answer
from dejavu.serve.core.interface import Event

NO_TEMPLATE = "the model has no chat template: start the server with --chat-template FILE, or use /v1/completions"


def parse_chat(body: ChatBody, served: Served) -> ParsedRequest:
    """Raises ApiError."""
    dense = served.is_dense(body.model)
    n = choices_of(body, served, prompts=1)
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid(f"top_logprobs {body.top_logprobs} needs logprobs: set that to true, or leave this out", param="top_logprobs")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    if not served.tokenizer.has_template:
        raise invalid(NO_TEMPLATE, param="messages", code="no_chat_template")
    roles = {"developer": "system"}  # a newer name, which templates do not know
    messages = [
        {"role": roles.get(message.role, message.role), "content": text_of(message.content)}
        | ({} if message.name is None else {"name": message.name})
        for message in body.messages
    ]
    own = {"add_generation_prompt": body.add_generation_prompt, "continue_final_message": body.continue_final_message}
    kwargs = {**served.chat_template_kwargs, **(body.chat_template_kwargs or {})}
    kwargs |= {name: value for name, value in own.items() if value is not None}
    try:
        text = rendered(served.tokenizer, messages, chat_template_kwargs=kwargs, sanitize_control_tokens=served.sanitize_control_tokens)
    except ValueError as error:
        raise invalid(str(error), param="messages") from error
    check_characters(len(text), served, param="messages")
    ids = read(partial(rendered_ids, served.tokenizer, text), param="messages")
    given = body.length
    if given is None and len(ids) >= served.limit:
        raise invalid(f"the messages have {len(ids)} tokens and leave no room for an answer; shorten them", param="messages", code=TOO_LONG)
    max_tokens = served.limit - len(ids) if given is None else given
    check_ids(ids, served, new=max_tokens, param="messages")
    return ParsedRequest(
        model=body.model, dense=dense, n=n, logprobs=logprobs,
        sequences=sequences_of(body, [ids], n, served, dense=dense, max_tokens=max_tokens, logprobs=logprobs, echo=False),
        **streaming_of(body),
    )  # fmt: skip


class ChatAnswer(Answer[schemas.ChatLogprobs]):
    """The answer to POST /v1/chat/completions."""

    prefix = "chatcmpl"

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> schemas.ChatLogprobs:
        return logprobs.of_chat(tokens, self._served.vocabulary)

    def whole(self) -> schemas.Schema:
        choices = [self._choice(index) for index in self.choices]
        return schemas.ChatCompletion(object="chat.completion", choices=choices, usage=self.usage(), dejavu=self.sparsity(), **self._about)

    def first_chunks(self) -> Iterator[schemas.Schema]:
        """The role that speaks."""
        for index in self.choices:
            yield self._said(index, schemas.ChatDelta(role="assistant", content=""))

    def chunks(self, index: int, event: Event) -> Iterator[schemas.Schema]:
        """The text, and in a chunk of its own, without a text, the reason for the end."""
        delta = self.take(index, event)
        told, trace, reason = delta.logprobs, delta.trace, delta.finish_reason
        if not delta.is_empty and (delta.text or reason is None):
            yield self._said(index, schemas.ChatDelta(content=delta.text), told, trace)
            told, trace = None, []
        if reason is not None:
            yield self._said(index, schemas.ChatDelta(), told, trace, reason)

    def _said(
        self,
        index: int,
        delta: schemas.ChatDelta,
        told: schemas.ChatLogprobs | None = None,
        trace: Sequence[schemas.TokenTrace] = (),
        reason: schemas.FinishReason | None = None,
    ) -> schemas.Schema:
        choice = schemas.ChatChunkChoice(index=index, delta=delta, logprobs=told, finish_reason=reason)
        return self._with_extras(choice, list(trace), ends=reason is not None)

    def _choice(self, index: int) -> schemas.ChatChoice:
        deltas = self._deltas[index]
        content = [token for delta in deltas if delta.logprobs is not None for token in delta.logprobs.content]
        reason = deltas[-1].finish_reason
        assert reason is not None, "the choice has not ended"
        return schemas.ChatChoice(
            index=index,
            message=schemas.ChatMessage(role="assistant", content="".join(delta.text for delta in deltas)),
            logprobs=None if self.request.logprobs is None else schemas.ChatLogprobs(content=content),
            finish_reason=reason,
        )

    def _chunk(self, choices: list[Any], **more: Any) -> schemas.Schema:
        return schemas.ChatChunk(object="chat.completion.chunk", choices=choices, **self._about, **more)


CHAT = TextEndpoint(
    name="chat",
    path="/v1/chat/completions",
    operation="create_chat_completion",
    description="Answer messages.",
    body=ChatBody,
    prompt="messages",
    parse=parse_chat,
    answer=ChatAnswer,
    whole=schemas.ChatCompletion,
    chunk=schemas.ChatChunk,
)
