"""What a server has done and does, for Prometheus: names begin with dejavu_, and with process_ for memory and processor time.

In: the events of its streams, the ends of its requests, and the worker's state, which is asked for when the numbers are. Out: the text
of /metrics, from a registry of the server's own. A time or a density is a histogram, by mode (sparse or dense); what only the worker
knows is a gauge or a counter. An endpoint that writes text says itself how a request ended; any other answer counts by its status.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dejavu.serve.core.interface import Event, WorkerState

Outcome = Literal["completed", "refused", "busy", "failed", "cancelled"]
OUTCOMES: tuple[Outcome, ...] = ("completed", "refused", "busy", "failed", "cancelled")
OTHER = "other"  # the endpoint of requests that write no text
MODES = ("sparse", "dense")
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
TOKEN_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
SHARES = (0.01, 0.02, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """The numbers of one server. state: asks the worker how it does. endpoints: names of those that write text."""

    def __init__(self, state: Callable[[], WorkerState], *, endpoints: Iterable[str]) -> None:
        self._registry = registry = CollectorRegistry()

        def histogram(name: str, help: str, buckets: tuple[float, ...]) -> dict[str, Histogram]:
            """By mode: looking one up by its labels takes longer than counting in it, and this happens for every token."""
            found = Histogram(f"dejavu_{name}", help, ["mode"], buckets=buckets, registry=registry)
            return {mode: found.labels(mode) for mode in MODES}

        self._requests = Counter("dejavu_requests", "Requests by how they ended.", ["endpoint", "outcome"], registry=registry)
        for endpoint in (*endpoints, OTHER):
            for outcome in OUTCOMES:  # zero is a number too
                self._requests.labels(endpoint, outcome)
        self._first = histogram("time_to_first_token_seconds", "From a request's arrival to its first token.", SECONDS)
        self._later = histogram(
            "time_per_output_token_seconds", "Between tokens of a text after its first, mean of each text.", TOKEN_SECONDS
        )
        self._mlp = histogram("mlp_density", "Share of MLP neurons used, of each decoded token, mean over layers.", SHARES)
        self._heads = histogram("head_density", "Share of attention heads used, of each decoded token, mean over layers.", SHARES)
        self._union = histogram("union_density", "Share of MLP neurons that the rows of a step used together, mean of each text.", SHARES)
        registry.register(_Worker(state))
        ProcessCollector(registry=registry)

    def request(self, endpoint: str, outcome: Outcome) -> None:
        """A request has ended."""
        self._requests.labels(endpoint, outcome).inc()

    def event(self, event: Event, *, mode: str) -> None:
        """Something has come of a stream."""
        for token in event.tokens:
            if token.mlp_density is not None:
                self._mlp[mode].observe(token.mlp_density)
            if token.head_density is not None:
                self._heads[mode].observe(token.head_density)
        summary = event.summary
        if summary is None or summary.completion_tokens == 0:
            return
        self._first[mode].observe(summary.time_to_first_token_s)
        if summary.completion_tokens > 1:
            self._later[mode].observe(summary.decode_s / (summary.completion_tokens - 1))
        if summary.union_density is not None:
            self._union[mode].observe(summary.union_density)

    def text(self) -> bytes:
        """All of it, in Prometheus' text format (CONTENT_TYPE)."""
        return generate_latest(self._registry)


class Counted:
    """Middleware of ASGI: counts the answers whose requests `counts_itself` does not say true of, as they begin."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, counts_itself: Callable[[Scope], bool]) -> None:
        self._app, self._metrics, self._counts_itself = app, metrics, counts_itself

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start" and not self._counts_itself(scope):
                self._metrics.request(OTHER, _outcome(message["status"]))
            await send(message)

        try:
            await self._app(scope, receive, counted)
        except Exception:  # answered with 500 behind this
            self._metrics.request(OTHER, "failed")
            raise


def _outcome(status: int) -> Outcome:
    return "completed" if status < 400 else "refused" if status < 500 else "failed"


class _Worker(Collector):
    """The worker's state as it is when somebody looks, by engine."""

    def __init__(self, state: Callable[[], WorkerState]) -> None:
        self._state = state

    def describe(self) -> Iterable[Metric]:
        return []  # else the registry would ask for the state to learn the names

    def collect(self) -> Iterable[Metric]:
        state = self._state()

        def gauge(name: str, help: str, value: Callable[..., float]) -> Metric:
            found = GaugeMetricFamily(f"dejavu_{name}", help, labels=["engine"])
            for engine in state.engines:
                found.add_metric([engine.mode], value(engine))
            return found

        def counter(name: str, help: str, value: Callable[..., float]) -> Metric:
            found = CounterMetricFamily(f"dejavu_{name}", help, labels=["engine"])
            for engine in state.engines:
                found.add_metric([engine.mode], value(engine))
            return found

        layers = state.layers
        yield GaugeMetricFamily("dejavu_up", "Whether the model runs.", value=float(state.alive))
        yield gauge("jobs_queued", "Texts that wait for a slot.", lambda engine: engine.queued)
        yield gauge("jobs_running", "Texts that have a slot.", lambda engine: engine.running)
        yield gauge("slots", "Texts that can run at a time.", lambda engine: engine.slots)
        yield gauge("kv_pages", "Pages of the key/value cache.", lambda engine: engine.pages_total)
        yield gauge("kv_pages_free", "Pages that no text holds; those kept for reuse are free.", lambda engine: engine.pages_free)
        yield gauge(
            "kv_used_share", "Share of the pages that texts hold.",
            lambda engine: 1 - engine.pages_free / engine.pages_total if engine.pages_total else 0.0,
        )  # fmt: skip
        yield counter("decode_steps", "Decode steps.", lambda engine: engine.steps)
        yield counter("tokens_generated", "Tokens written.", lambda engine: engine.tokens)
        yield counter("prompt_tokens_computed", "Tokens of prompts that were computed.", lambda engine: engine.prompt_tokens)
        yield counter("prompt_tokens_cached", "Tokens of prompts that a shared prefix saved.", lambda engine: engine.cached_tokens)
        yield counter("jobs_finished", "Texts that ended well.", lambda engine: engine.finished)
        yield counter("jobs_failed", "Texts whose step failed.", lambda engine: engine.failed)
        yield counter("jobs_cancelled", "Texts whose reader went away.", lambda engine: engine.cancelled)
        yield counter("dense_fallback_layers", "Layers of decode steps that a batch ran dense.", lambda engine: engine.fallback_layers)
        yield gauge(
            "dense_fallback_share", "Share of the layers of all decode steps that a batch ran dense.",
            lambda engine: engine.fallback_layers / (engine.steps * layers) if engine.steps and layers else 0.0,
        )  # fmt: skip
