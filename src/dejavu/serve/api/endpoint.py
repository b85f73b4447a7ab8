"""What sets an endpoint that generates text apart from the others; how it is read, run and answered is the same for all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dejavu.serve.api.parsing import Schema
from dejavu.serve.api.request_schemas import Sampled
from dejavu.serve.api.requests import ParsedRequest, Served
from dejavu.serve.api.responses import Answer


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEndpoint:
    """A path of OpenAI's API whose answer is generated text.

    name: in the metrics. operation, description: in the OpenAPI document. body: the class of a request's body; prompt: the field of it that
    holds the prompt. parse: from such a body to what is carried out, raises ApiError. answer: makes what is sent, of the classes `whole`
    or, as a stream, `chunk`.
    """

    name: str
    path: str
    operation: str
    description: str
    body: type[Sampled]
    prompt: str
    parse: Callable[[Any, Served], ParsedRequest]
    answer: Callable[[ParsedRequest, Served], Answer[Any]]
    whole: type[Schema]
    chunk: type[Schema]
