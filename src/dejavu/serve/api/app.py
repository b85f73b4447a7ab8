"""The server as an application of ASGI: its paths, the API key, the shape of every error, and the page.

In: what is served and a worker that runs; who makes the worker starts it and closes it. Out: a FastAPI app. Bodies are read and checked by
answers.py, so that a mistake in one is told in OpenAI's envelope and never in FastAPI's.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response
from starlette.types import Scope

from dejavu.serve.api import response_schemas as schemas
from dejavu.serve.api.answers import SequenceRunner, TextHandler
from dejavu.serve.api.assets import FOLDER, page_routes
from dejavu.serve.api.chat import CHAT
from dejavu.serve.api.completions import COMPLETIONS
from dejavu.serve.api.errors import ApiError, internal, not_running
from dejavu.serve.api.metrics import CONTENT_TYPE, Counted, Metrics
from dejavu.serve.api.openapi import answers_of, body_of, describe, errors
from dejavu.serve.api.origins import Gate
from dejavu.serve.api.requests import Served
from dejavu.serve.api.responses import to_bytes
from dejavu.version import __version__

ENDPOINTS = (COMPLETIONS, CHAT)
FAILURES = errors(400, 404, 413, 415, 429, 500, 503)


def create_app(
    served: Served, worker: SequenceRunner, *, api_key: str | None = None, hosts: frozenset[str] | None = None,
    origins: Sequence[str] = (), page: Path = FOLDER,
) -> FastAPI:  # fmt: skip
    """The app. api_key: that a request under /v1 has to bring; None: none. hosts: the names that it answers to; None: any. origins: of
    pages elsewhere that may ask it. page: the folder of the files at /.

    Its `state.ending` is an event: once it is set, by `new_server` when that ends, the texts that are being written end with an error.
    """
    app = FastAPI(title="dejavu", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    metrics = Metrics(worker.state, endpoints=[endpoint.name for endpoint in ENDPOINTS])
    known = [Depends(_key_check(api_key, lambda: None))]
    ending = app.state.ending = asyncio.Event()
    for endpoint in ENDPOINTS:
        keyed = Depends(_key_check(api_key, partial(metrics.request, endpoint.name, "refused")))
        app.post(
            endpoint.path, name=endpoint.operation, description=endpoint.description, dependencies=[keyed], response_model=None,
            openapi_extra=body_of(endpoint), responses=answers_of(endpoint) | FAILURES,
        )(TextHandler(endpoint, served, worker, metrics, ending))  # fmt: skip

    @app.get("/v1/models", dependencies=known, response_model=None, responses={200: {"model": schemas.ModelList}})
    async def list_models() -> Response:
        """The models that a request may name."""
        return _json(schemas.ModelList(object="list", data=[_card(name, served) for name in served.models]))

    card = {200: {"model": schemas.ModelCard}}

    @app.get("/v1/models/{model:path}", dependencies=known, response_model=None, responses=card | errors(404))
    async def retrieve_model(model: str) -> Response:
        """One of them."""
        return _json(_card(model, served))

    @app.get("/health", response_model=None, responses={200: {"model": schemas.Health}} | errors(503))
    async def health() -> Response:
        """Whether requests can be answered."""
        state = worker.state()
        if not state.alive:
            raise not_running(state.last_error)
        return _json(
            schemas.Health(
                status="ok", queued=state.queued, running=state.running, slots=state.slots, pages_free=state.pages_free,
                pages_total=state.pages_total, model=served.name, sparse=served.sparse, layers=served.num_layers, backend=served.backend,
                dtype=served.dtype, threads=served.threads, version=__version__,
            )
        )  # fmt: skip

    async def glance(request: Request) -> Response:
        """What some monitors ask for: the status of /health alone."""
        return await health()

    app.add_route("/health", glance, methods=["HEAD"], include_in_schema=False)
    text = {"description": "Prometheus' text format.", "content": {"text/plain": {"schema": {"type": "string"}}}}

    @app.get("/metrics", response_model=None, response_class=Response, responses={200: text})
    async def show_metrics() -> Response:
        """What the server has done and does."""
        return Response(metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    app.router.routes.extend(page_routes(page))
    if origins:
        headers = ["Authorization", "Content-Type"]
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=headers)
    app.add_middleware(Gate, hosts=hosts)
    app.add_middleware(Counted, metrics=metrics, counts_itself=_writes_text)  # added last, asked first
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _our_error)
    describe(app, served, ENDPOINTS, secured=api_key is not None)
    return app


def _writes_text(scope: Scope) -> bool:
    """Whether a request got to an endpoint that writes text."""
    return isinstance(scope.get("endpoint"), TextHandler) and scope["method"] == "POST"


def _key_check(api_key: str | None, refused: Callable[[], object]) -> Any:
    """refused: called for each request that does not bring it."""
    expected = (api_key or "").encode()

    async def check(request: Request) -> None:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if api_key is None or (scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode("latin-1"), expected)):
            return
        refused()
        message = "this server wants an API key: send the header Authorization: Bearer KEY with the one that it was started with"
        raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    return check


def _card(name: str, served: Served) -> schemas.ModelCard:
    """Raises ApiError (404) for a model that is not served."""
    mode = "dense" if served.is_dense(name) else "sparse"
    facts = schemas.ModelFacts(
        mode=mode, layers=served.num_layers, neurons=served.num_neurons, heads=served.num_heads,
        chat=served.tokenizer.has_template, backend=served.backend, dtype=served.dtype,
    )  # fmt: skip
    return schemas.ModelCard(id=name, object="model", created=served.created, owned_by="dejavu", max_model_len=served.limit, dejavu=facts)


def _json(thing: schemas.Schema) -> Response:
    return Response(to_bytes(thing), media_type="application/json")


def _sent(error: ApiError) -> Response:
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _sent(error)


async def _http_error(request: Request, error: Exception) -> Response:
    """What the framework refuses: a path that is not there, a method that a path does not take."""
    assert isinstance(error, HTTPException)
    path, takes = request.url.path[:80], (error.headers or {}).get("Allow", "another method")
    words = {
        404: (f"there is nothing at {path!r}; /openapi.json lists every path", "not_found"),
        405: (f"{path!r} does not take {request.method}; send {takes}", "method_not_allowed"),
    }
    message, code = words.get(error.status_code, (str(error.detail), None))
    return _sent(ApiError(error.status_code, message, code=code, headers=dict(error.headers or {})))


async def _our_error(request: Request, error: Exception) -> Response:
    """A bug: the server's log has it, with its traceback. uvicorn then ends the connection, which a client is told."""
    told = internal()
    return JSONResponse(told.body, status_code=told.status, headers={"Connection": "close"})
