"""`dejavu serve`: an OpenAI-compatible server for one model, until ^C."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dejavu.cli.messages import ChatTemplateKwargs, ControlTokens, template_kwargs
from dejavu.cli.options import (
    AdapterFolder,
    AsJson,
    Backend,
    CacheDtype,
    Dense,
    Download,
    Dtype,
    Model,
    Offline,
    ScreenedHead,
    Threads,
    open_model,
)
from dejavu.cli.output import Output
from dejavu.engine.options import EngineOptions

if TYPE_CHECKING:
    from dejavu.model.tokenizer import Tokenizer
    from dejavu.serve.api.requests import Served

NEEDED = ("fastapi", "prometheus_client", "pydantic", "uvicorn")


def serve(
    model: Model,
    host: Annotated[
        str, typer.Option("--host", metavar="NAME", help="The address to listen at; 0.0.0.0: all of this machine's.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", metavar="N", help="The port; 0: any free one.")] = 8000,
    api_key: Annotated[str | None, typer.Option("--api-key", metavar="KEY", help="What a request has to bring; not set: nothing.")] = None,
    allowed_host: Annotated[
        list[str] | None, typer.Option("--allowed-host", metavar="NAME", help="A name that requests may call this server by; '*': any.")
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option("--cors-origin", metavar="ORIGIN", help="Pages of this origin may ask; '*': of any.")
    ] = None,
    slots: Annotated[int, typer.Option("--slots", metavar="N", help="Texts that are written at a time.")] = 8,
    cache_tokens: Annotated[
        int | None, typer.Option("--cache-tokens", metavar="N", help="Tokens that the key/value cache holds over all texts.")
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option("--max-model-len", metavar="N", help="Tokens of the longest prompt and answer; not set: the context.")
    ] = None,
    queue: Annotated[int, typer.Option("--queue", metavar="N", help="Texts that may wait; one more is told to come back.")] = 64,
    connections: Annotated[
        int, typer.Option("--connections", metavar="N", help="Connections at a time; one more is told to come back.")
    ] = 512,
    prefill_chunk: Annotated[
        int | None,
        typer.Option(
            "--prefill-chunk",
            metavar="N",
            help="Tokens of prompts read in a step beside the texts that are written; not set: 128, on a GPU 1024.",
        ),
    ] = None,
    no_prefix_reuse: Annotated[bool, typer.Option("--no-prefix-reuse", help="Read every prompt anew.")] = False,
    chat_template: Annotated[
        Path | None, typer.Option("--chat-template", metavar="FILE", help="A Jinja template for messages, in place of the model's own.")
    ] = None,
    chat_template_kwargs: ChatTemplateKwargs = None,
    control_tokens: ControlTokens = False,
    adapter: AdapterFolder = None,
    dense: Dense = False,
    backend: Backend = "auto",
    dtype: Dtype = "auto",
    cache_dtype: CacheDtype = "auto",
    screened_head: ScreenedHead = None,
    threads: Threads = None,
    download: Download = False,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Answer OpenAI's API over HTTP, sparse where the model has an adapter, with metrics and a page; ^C ends it."""
    check_extra()
    from dejavu.config import require
    from dejavu.engine.footprint import cache_bytes, free_bytes
    from dejavu.files import read_text
    from dejavu.loading import bundled_adapters
    from dejavu.serve.api.app import create_app
    from dejavu.serve.api.origins import checked_origins, host_names
    from dejavu.serve.api.requests import served_by
    from dejavu.serve.api.server import allow_connections, bound_socket, is_local, new_server, url_of
    from dejavu.serve.config import ServeConfig
    from dejavu.serve.core.worker import Worker

    out = Output(as_json)
    config = ServeConfig(
        slots=slots, cache_tokens=cache_tokens, max_model_len=max_model_len, queue=queue, prefill_chunk=prefill_chunk,
        prefix_reuse=not no_prefix_reuse,
    )  # fmt: skip
    require(api_key is None or api_key.strip() == api_key != "", "--api-key must be a word without spaces around it; give one, or none")
    allow_connections(connections)
    origins = checked_origins(cors_origin or [])
    host_names(allowed_host or [], local=True, key=False, host=host)  # what is no name is said before a model is loaded
    template = None if chat_template is None else read_text(chat_template, kind="a file with a Jinja template")
    kwargs = template_kwargs(chat_template_kwargs)
    options = EngineOptions(backend=backend, dtype=dtype, cache_dtype=cache_dtype, screened_head=screened_head, threads=threads)
    with bound_socket(host, port) as bound:  # before the model is loaded, which may take minutes
        lm = open_model(
            model, out, options, seed=0,
            adapter=adapter, dense=dense, download=download, offline=offline,
        )  # fmt: skip
        tokenizer = lm.tokenizer if template is None else with_template(lm.tokenizer, template, str(chat_template))
        if lm.backend == "cuda":
            out.say("Warming the engine up; compiled kernels are kept, so that the next start takes less")
        try:
            lm.hand_over(dense=not lm.one_engine)
            worker = Worker(lm, config)
        except MemoryError as error:
            raise ValueError(f"{error}, with --cache-tokens, or fewer texts at a time, with --slots (now {slots})") from error
        worker.start()
        try:
            state = worker.state()
            # An adapter that comes without its base is asked for by its own name: the base's stands for the model that it was.
            name = model if model in bundled_adapters() and not dense and adapter is None else None
            served = served_by(
                tokenizer, state, queue=config.queue, threads=lm.num_threads, name=name, sampling=lm.sampling,
                dense_sampling=lm.sampling_of(dense=True), chat_template_kwargs=kwargs, sanitize_control_tokens=not control_tokens,
            )  # fmt: skip

            cached, free = config.cached(lm.config.max_positions), free_bytes(lm.backend)
            per_token = cache_bytes(lm.config, backend=lm.backend, cache_dtype=lm.cache_dtype)
            # On the CPU memory of the cache that was not written to yet is still free.
            taken = cached if lm.backend == "cuda" else 0
            room = None if free is None else max(cached, taken + free // per_token)

            def announce() -> None:
                url = url_of(bound)
                out.say(f"Serving at {url} (a page; OpenAI's API under /v1; /health, /metrics); ^C ends it")
                out.say(f"Models: {', '.join(served.models)} · {'no' if api_key is None else 'with an'} API key")
                texts = "1 text" if config.slots == 1 else f"{config.slots} texts"
                out.say(f"{texts} at a time, {config.queue} may wait, {served.limit:,} tokens a text")
                out.say(f"A request that does not say how to draw: {drawing_words(served)}")
                if room is not None:
                    fit = f"{room:,} tokens, {room // served.limit:,} texts of {served.limit:,}"
                    out.say(f"Keys and values of {cached:,} tokens are kept; free memory has room for {fit}")
                if api_key is None and not is_local(bound):
                    out.warn("no API key is set, and other machines can reach this address: whoever does may use it; see --api-key")
                out.finish(
                    {
                        "url": url, "model": served.name, "models": list(served.models), "sparse": served.sparse, "backend": lm.backend,
                        "dtype": lm.dtype, "cache_dtype": lm.cache_dtype, "screened_head": lm.screened_head, "slots": config.slots,
                        "queue": config.queue, "max_model_len": served.limit, "cache_tokens": cached, "cache_room": room,
                        "notes": list(lm.notes),
                    }
                )  # fmt: skip
                sys.stdout.flush()  # whoever waits for the address reads a pipe

            hosts = host_names(allowed_host or [], local=is_local(bound), key=api_key is not None, host=host)
            app = create_app(served, worker, api_key=api_key, hosts=hosts, origins=origins)
            new_server(app, connections=connections, on_start=announce).run(sockets=[bound])
        finally:
            worker.close()


def drawing_words(served: Served) -> str:
    """How each served name draws, by name where they differ."""
    words = {name: (served.dense_sampling if served.is_dense(name) else served.sampling).words for name in served.models}
    if len(set(words.values())) == 1:
        return words[served.name]
    return "; ".join(f"{name}: {drawn}" for name, drawn in words.items())


def check_extra() -> None:
    """Raises ValueError where the packages of the extra `serve` are not installed."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"dejavu serve needs {', '.join(missing)}; install what is missing with: pip install 'dejavu-llm[serve]'")


def with_template(tokenizer: Tokenizer, template: str, path: str) -> Tokenizer:
    """The tokenizer with another chat template, that of a file. Raises ValueError for one that cannot even render a greeting."""
    from dejavu.model.template import rendered

    changed = dataclasses.replace(tokenizer, chat_template=template, named_templates={})
    try:
        rendered(changed, [{"role": "user", "content": "Hello"}])
    except ValueError as error:
        raise ValueError(f"--chat-template {path}: {error}") from error
    return changed
