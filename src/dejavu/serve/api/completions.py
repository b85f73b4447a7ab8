"""POST /v1/completions: continue a text. In: a CompletionBody. Out: what the worker is asked for, and the answer made of its events."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from dejavu.generation.pieces import Token
from dejavu.generation.text import TextStream
from dejavu.serve.api import logprobs
from dejavu.serve.api import response_schemas as schemas
from dejavu.serve.api.endpoint import TextEndpoint
from dejavu.serve.api.request_schemas import DEFAULT_MAX_TOKENS, CompletionBody
from dejavu.serve.api.requests import ParsedRequest, Served, check_characters, check_ids, choices_of, read, sequences_of, streaming_of
from dejavu.serve.api.responses import Answer
from dejavu.serve.core.interface import Event


def parse_completion(body: CompletionBody, served: Served) -> ParsedRequest:
    """Raises ApiError."""
    dense = served.is_dense(body.model)
    prompts = _prompts(body.prompt)
    n = choices_of(body, served, prompts=len(prompts))
    max_tokens = DEFAULT_MAX_TOKENS if body.length is None else body.length
    ids = []
    for place, prompt in enumerate(prompts):
        param = f"prompt[{place}]" if len(prompts) > 1 else "prompt"
        if isinstance(prompt, str):
            check_characters(len(prompt), served, param=param)
            ids.append(read(partial(served.tokenizer.encode, prompt), param=param))
        else:
            ids.append(list(prompt))
        check_ids(ids[-1], served, new=max_tokens, param=param)
    echo = bool(body.echo)
    texts = tuple(_echoed(prompt, served, ends=max_tokens == 0) for prompt in prompts) if echo else ()
    return ParsedRequest(
        model=body.model, dense=dense, n=n, logprobs=body.logprobs, echo=echo, texts=texts,
        sequences=sequences_of(body, ids, n, served, dense=dense, max_tokens=max_tokens, logprobs=body.logprobs, echo=echo),
        **streaming_of(body),
    )  # fmt: skip


def _echoed(prompt: str | list[int], served: Served, *, ends: bool) -> str:
    """The text of a prompt; unless the whole text ends with it, without a character that it begins and the answer may finish."""
    if isinstance(prompt, str):
        return prompt
    text = served.tokenizer.decode(prompt)
    return text if ends else text.removesuffix(TextStream(served.tokenizer, prompt).begun)


def _prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> Sequence[str | list[int]]:
    """The prompts of a request: one, or as many as the list holds."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [[token_id for token_id in prompt if isinstance(token_id, int)]]
    return [part for part in prompt if not isinstance(part, int)]


class CompletionAnswer(Answer[schemas.CompletionLogprobs]):
    """The answer to POST /v1/completions."""

    prefix = "cmpl"

    def __init__(self, request: ParsedRequest, served: Served) -> None:
        super().__init__(request, served)
        self._offsets = [served.vocabulary.offsets(first=request.echo) for _ in request.sequences]

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> schemas.CompletionLogprobs:
        return logprobs.of_completion(tokens, self._served.vocabulary, self._offsets[index])

    def whole(self) -> schemas.Schema:
        return self._chunk([self._choice(index) for index in self.choices], usage=self.usage(), dejavu=self.sparsity())

    def chunks(self, index: int, event: Event) -> Iterator[schemas.Schema]:
        delta = self.take(index, event)
        if not delta.is_empty:
            reason = delta.finish_reason
            choice = schemas.CompletionChoice(index=index, text=delta.text, logprobs=delta.logprobs, finish_reason=reason)
            yield self._with_extras(choice, delta.trace, ends=reason is not None)

    def _choice(self, index: int) -> schemas.CompletionChoice:
        deltas = self._deltas[index]
        found = [delta.logprobs for delta in deltas if delta.logprobs is not None]
        together = schemas.CompletionLogprobs(
            tokens=[token for part in found for token in part.tokens],
            token_logprobs=[logprob for part in found for logprob in part.token_logprobs],
            top_logprobs=[top for part in found for top in part.top_logprobs],
            text_offset=[offset for part in found for offset in part.text_offset],
        )
        return schemas.CompletionChoice(
            index=index,
            text="".join(delta.text for delta in deltas),
            logprobs=None if self.request.logprobs is None else together,
            finish_reason=deltas[-1].finish_reason,
        )

    def _chunk(self, choices: list[Any], **more: Any) -> schemas.Schema:
        return schemas.Completion(object="text_completion", choices=choices, **self._about, **more)


COMPLETIONS = TextEndpoint(
    name="completions",
    path="/v1/completions",
    operation="create_completion",
    description="Continue a text.",
    body=CompletionBody,
    prompt="prompt",
    parse=parse_completion,
    answer=CompletionAnswer,
    whole=schemas.Completion,
    chunk=schemas.Completion,
)
