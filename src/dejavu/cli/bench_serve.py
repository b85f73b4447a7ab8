"""`dejavu bench-serve`: a load test over HTTP of any OpenAI-compatible server, or of `dejavu serve` on a model; models in turns."""

from __future__ import annotations

import asyncio
import math
import shlex
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer

from dejavu.cli.options import AdapterFolder, AsJson, Backend, Dtype, OptionalTexts, Seed, Threads
from dejavu.cli.output import Output, progress_bars
from dejavu.cli.serving_tables import show

USUAL_CLIENTS = 4
HERE = ("127.0.0.1", "localhost", "::1")
MODEL_HELP = "Start `dejavu serve MODEL` and test that; instead of --url."
MIX_HELP = "e.g. 128, or 32:0.5,128:0.3,512:0.2."

ApiKey = Annotated[str | None, typer.Option("--api-key", metavar="KEY", help="Sent to the server of --url.")]
Chat = Annotated[bool, typer.Option("--chat", help="Ask /v1/chat/completions, not /v1/completions.")]
CheckLeaks = Annotated[bool, typer.Option("--check-leaks", help="Compare the server's free pages and memory before and after.")]
Concurrency = Annotated[int | None, typer.Option("--concurrency", metavar="N", help="Clients that each wait for their answer.")]
EndOfText = Annotated[bool, typer.Option("--end-of-text", help="Let answers end early; not set: ignore_eos is asked for.")]
ItlLimit = Annotated[float | None, typer.Option("--itl-limit", metavar="MS", help="Of a good request: mean time per further token.")]
Models = Annotated[list[str] | None, typer.Option("--model", metavar="NAME", help="As the server names it; may repeat.")]
OptionalModel = Annotated[str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
OutputTokens = Annotated[str, typer.Option("--output-tokens", metavar="MIX", help=f"Lengths of answers: {MIX_HELP}")]
PromptTokens = Annotated[str, typer.Option("--prompt-tokens", metavar="MIX", help=f"Lengths of prompts: {MIX_HELP}")]
Rate = Annotated[float, typer.Option("--rate", metavar="X", help="Requests a second, at random times; inf: clients that wait.")]
Requests = Annotated[int | None, typer.Option("--requests", metavar="N", help="Requests to each model.")]
Results = Annotated[Path | None, typer.Option("--results", metavar="FILE", help="Append the rows to a .jsonl file.")]
Retries = Annotated[int, typer.Option("--retries", metavar="N", help="Send a request again that got a 429, when Retry-After says.")]
Rounds = Annotated[int | None, typer.Option("--rounds", metavar="N", help="Turns of each model.")]
Seconds = Annotated[float | None, typer.Option("--seconds", metavar="X", help="How long requests to each model arrive.")]
ServerOptions = Annotated[str | None, typer.Option("--server-options", metavar="TEXT", help="More options of dejavu serve, in one string.")]
Timeout = Annotated[float, typer.Option("--timeout", metavar="X", help="Seconds that a whole answer may take.")]
TtftLimit = Annotated[float | None, typer.Option("--ttft-limit", metavar="MS", help="Of a good request: time to first token.")]
Url = Annotated[str | None, typer.Option("--url", metavar="URL", help="A running server, e.g. http://127.0.0.1:8000.")]
WarmUp = Annotated[int | None, typer.Option("--warm-up", metavar="N", help="Requests to each model at once before the load.")]


def bench_serve(
    model: OptionalModel = None,
    url: Url = None,
    models: Models = None,
    api_key: ApiKey = None,
    rate: Rate = math.inf,
    concurrency: Concurrency = None,
    requests: Requests = None,
    seconds: Seconds = None,
    prompt_tokens: PromptTokens = "128",
    output_tokens: OutputTokens = "64",
    text: OptionalTexts = None,
    chat: Chat = False,
    end_of_text: EndOfText = False,
    ttft_limit: TtftLimit = None,
    itl_limit: ItlLimit = None,
    retries: Retries = 0,
    timeout: Timeout = 600,
    warm_up: WarmUp = None,
    rounds: Rounds = None,
    check_leaks: CheckLeaks = False,
    results: Results = None,
    server_options: ServerOptions = None,
    adapter: AdapterFolder = None,
    backend: Backend = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Test a server under load over HTTP: latencies from intended arrival, throughput, goodput, failures; its models in turns."""
    from importlib.util import find_spec

    from dejavu.config import require

    out = Output(as_json)
    require(find_spec("httpx") is not None, "bench-serve needs httpx; install it with: pip install 'dejavu-llm[serve]'")
    from dejavu.bench.rows import append_rows, completed
    from dejavu.loadtest.benchmark import bench_serving
    from dejavu.loadtest.client import Target
    from dejavu.loadtest.process import served
    from dejavu.loadtest.rows import Limits
    from dejavu.loadtest.workload import USUAL_REQUESTS, Load, Mix
    from dejavu.model.texts import DATA, documents, named_texts

    require((model is None) != (url is None), "give either MODEL, to be served here, or the --url of a server, one of the two")
    own = _own_options(adapter, backend, dtype, threads, server_options)
    require(model is not None or not own, f"{' '.join(own[:1])} is of a server that is started here, for a MODEL; leave it out with --url")
    require(model is None or api_key is None, "--api-key belongs to --url; a MODEL is served here without one")
    for name, value in {"--ttft-limit": ttft_limit, "--itl-limit": itl_limit, "--timeout": timeout}.items():
        require(value is None or 0 < value < math.inf, f"{name} must be positive, not {value}")
    for name, count in {"--retries": retries, "--warm-up": warm_up}.items():
        require(count is None or count >= 0, f"{name} must be 0 or more, not {count}")
    require(rounds is None or rounds >= 1, f"--rounds must be at least 1, not {rounds}")
    most = None if seconds is not None and requests is None else USUAL_REQUESTS if requests is None else requests
    require(
        math.isinf(rate) or concurrency is None,
        "--rate sends whether or not earlier requests are answered; --concurrency has clients that wait; give one of the two",
    )
    load = Load(
        prompt_tokens=Mix.parse(prompt_tokens, "--prompt-tokens"),
        output_tokens=Mix.parse(output_tokens, "--output-tokens"),
        rate=rate,
        concurrency=None if math.isfinite(rate) else USUAL_CLIENTS if concurrency is None else concurrency,
        requests=most,
        seconds=seconds,
        seed=seed,
    )
    source = "\n".join(part for whole in named_texts(text or [str(DATA / "evaluation.txt")]).values() for part in documents(whole))
    with ExitStack() as stack:
        server = None if model is None else stack.enter_context(served([model, *own]))
        target = Target(
            url=_base(url or "") if server is None else server.url,
            api_key=api_key,
            chat=chat,
            ignore_eos=not end_of_text,
            timeout_s=timeout,
        )
        progress = stack.enter_context(progress_bars(shown=most is not None))
        found = asyncio.run(
            bench_serving(
                target, load, source, models=models or (), rounds=rounds, limits=Limits(ttft_ms=ttft_limit, itl_ms=itl_limit),
                retries=retries, warm_up_requests=warm_up, check_leaks=check_leaks, process=None if server is None else server.process.pid,
                here=urlsplit(target.url).hostname in HERE, progress=progress,
            )
        )  # fmt: skip
        notes = found.notes + ([f"the server ended by itself: {server.last_words()}"] if server is not None and server.ended else [])
    rows = completed(found.rows) if results is None else append_rows(results, found.rows)
    show(out, found, notes)
    leaks = None if found.leaks is None else found.leaks.to_dict()
    out.finish({"rows": [row.to_dict() for row in rows], "ratios": found.ratios, "leaks": leaks, "notes": notes})
    if found.failed:
        failed = sum(row.failed for row in found.rows)
        out.warn(
            f"{failed} of {sum(row.requests for row in found.rows)} requests failed{'; the server leaks' if found.leaks_found else ''}"
        )
        raise typer.Exit(1)


def _own_options(adapter: Path | None, backend: str, dtype: str, threads: int | None, more: str | None) -> list[str]:
    """Options of `dejavu serve`, as far as they are given."""
    named = {
        "--adapter": adapter,
        "--backend": None if backend == "auto" else backend,
        "--dtype": None if dtype == "auto" else dtype,
        "--threads": threads,
    }
    given = [part for name, value in named.items() if value is not None for part in (name, str(value))]
    return given + shlex.split(more or "")


def _base(url: str) -> str:
    """The URL without /v1. Raises ValueError where it is none."""
    from dejavu.config import require

    parts = urlsplit(url)
    require(parts.scheme in ("http", "https") and bool(parts.hostname), f"--url takes an address like http://127.0.0.1:8000, not {url!r}")
    return url.rstrip("/").removesuffix("/v1")
