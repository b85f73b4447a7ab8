"""The OpenAPI document of the server: what each path takes, and every status that it can answer with.

FastAPI is given the answers with each route and knows nothing of the requests, which are read from raw bytes. Here their classes are added,
the same ones that check a body, with the names of the models that are served; and what FastAPI promises of its own accord (its 422) is
taken out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from dejavu.serve.api import response_schemas as schemas
from dejavu.serve.api.endpoint import TextEndpoint
from dejavu.serve.api.requests import Served
from dejavu.version import __version__

REF = "#/components/schemas/{model}"
KEY = "key"  # the name of the security scheme
OPEN = ("/health", "/metrics")  # paths that ask for no key
ERRORS = {
    400: "Not a request that can be answered: `param` is the field at fault.",
    401: "No API key, or another one.",
    404: "No such model.",
    413: "The body is too large.",
    415: "The body is not said to be JSON.",
    429: "The queue is full; Retry-After says in how many seconds to try again.",
    500: "The model or the server failed.",
    503: "The model is not running.",
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The answers of a route other than its 200."""
    found: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        found[status] = {"model": schemas.ErrorEnvelope, "description": ERRORS[status]}
    if 429 in found:
        found[429]["headers"] = {"Retry-After": {"required": True, "schema": {"type": "integer", "minimum": 1}}}
    return found


def body_of(endpoint: TextEndpoint) -> dict[str, Any]:
    """What a route is told of its request's body."""
    content = {"application/json": {"schema": {"$ref": REF.format(model=endpoint.body.__name__)}}}
    return {"requestBody": {"required": True, "content": content}}


def answers_of(endpoint: TextEndpoint) -> dict[int | str, dict[str, Any]]:
    """The 200 of a route whose answer may be one object or a stream, each event of which has a chunk as its data."""
    chunk = endpoint.chunk
    events = {"itemSchema": {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}}
    description = f"The answer; with `stream` as server-sent events: each is a {chunk.__name__} or an error, and the last one `[DONE]`."
    return {200: {"model": endpoint.whole, "description": description, "content": {"text/event-stream": events}}}


def describe(app: FastAPI, served: Served, endpoints: Sequence[TextEndpoint], *, secured: bool) -> None:
    """Have the app make this document. secured: whether there is an API key."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app, served, endpoints, secured=secured)
        return app.openapi_schema

    app.openapi = document  # pyrefly: ignore[missing-attribute, bad-assignment]  # how FastAPI is told


def _document(app: FastAPI, served: Served, endpoints: Sequence[TextEndpoint], *, secured: bool) -> dict[str, Any]:
    description = "OpenAI's API for one language model, with what contextual sparsity saved."
    found = get_openapi(title="dejavu", version=__version__, description=description, routes=app.routes)
    parts = found.setdefault("components", {})
    schemas = parts.setdefault("schemas", {})
    bodies = [endpoint.body for endpoint in endpoints]
    kinds = [*bodies, *(endpoint.chunk for endpoint in endpoints)]  # no reference leads to a chunk: `[DONE]` is none of them
    _, definitions = models_json_schema([(kind, "validation") for kind in kinds], ref_template=REF)
    schemas |= definitions["$defs"]
    for kind in bodies:
        schemas[kind.__name__]["properties"]["model"]["enum"] = list(served.models)
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for path, methods in found["paths"].items():
        for operation in methods.values():
            operation["responses"].pop("422", None)
            if secured and path not in OPEN:
                operation["security"] = [{KEY: []}]
                operation["responses"]["401"] = {
                    "description": ERRORS[401],
                    "content": {"application/json": {"schema": {"$ref": REF.format(model="ErrorEnvelope")}}},
                }
    if secured:
        parts["securitySchemes"] = {KEY: {"type": "http", "scheme": "bearer"}}
    return found
