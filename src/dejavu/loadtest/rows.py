"""Rows of a serving benchmark: percentiles, throughput, goodput and realised densities of what a load test found.

In: the `Segment`s of one model, the load, limits, facts of the server. Out: a `ServeRow`, which has all keys of a SpeedRow and its own.
Latencies are milliseconds, of whole answers alone; `p20_us`, `p50_us`, `p80_us` are microseconds from intended arrival to the end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from dejavu.bench.rows import SpeedRow
from dejavu.config import require
from dejavu.loadtest.run import Outcome, Segment
from dejavu.loadtest.workload import Load

PERCENTILES = (50, 90, 95, 99)
DENSE = ":dense"  # what the name of a model ends in where dejavu serves it without its adapter
UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a good request keeps to, in milliseconds: time to first token, and its mean time per further token. None: no limit."""

    ttft_ms: float | None = None
    itl_ms: float | None = None

    @property
    def any(self) -> bool:
        return self.ttft_ms is not None or self.itl_ms is not None

    def kept(self, outcome: Outcome) -> bool:
        """Whether a request was answered, and within the limits. One token has no further ones to wait for."""
        first, each = outcome.time_to_first_token_s * 1e3, (outcome.per_token_s or 0.0) * 1e3
        within = (self.ttft_ms is None or first <= self.ttft_ms) and (self.itl_ms is None or each <= self.itl_ms)
        return outcome.done and within


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeRow(SpeedRow):
    """What one model's server did under one load. `batch` is the most requests in flight at once, `context` the mean prompt.

    requests = completed + failed; rejected counts replies of status 429, of which a retried request may have several; errors counts the
    failed by kind. seconds: of all rounds, to each one's last answer. in_flight: mean number. Tokens are those of completed requests.
    late_p99_ms: how late this process sent what was due. itl: gaps between pieces of text, of all requests together; tpot: mean time
    per token after the first, of each request.
    """

    server: str
    endpoint: str
    rate: float | None
    concurrency: int | None
    rounds: int
    seed: int
    prompt_mix: str
    output_mix: str
    requests: int
    completed: int
    failed: int
    rejected: int
    errors: dict[str, int]
    seconds: float
    in_flight: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    requests_s: float
    total_tok_s: float
    late_p99_ms: float | None
    ttft_limit_ms: float | None
    itl_limit_ms: float | None
    goodput_s: float | None
    goodput_share: float | None
    ttft_p50_ms: float | None = None
    ttft_p90_ms: float | None = None
    ttft_p95_ms: float | None = None
    ttft_p99_ms: float | None = None
    itl_p50_ms: float | None = None
    itl_p90_ms: float | None = None
    itl_p95_ms: float | None = None
    itl_p99_ms: float | None = None
    tpot_p50_ms: float | None = None
    tpot_p90_ms: float | None = None
    tpot_p95_ms: float | None = None
    tpot_p99_ms: float | None = None
    e2e_p50_ms: float | None = None
    e2e_p90_ms: float | None = None
    e2e_p95_ms: float | None = None
    e2e_p99_ms: float | None = None


def percentile(values: Sequence[float], percent: float) -> float | None:
    """By linear interpolation; None of nothing."""
    return float(np.quantile(values, percent / 100)) if values else None


def _scaled(values: Sequence[float], percent: float, factor: float) -> float | None:
    found = percentile(values, percent)
    return None if found is None else found * factor


def serve_row(segments: Sequence[Segment], load: Load, limits: Limits, facts: Mapping[str, Any], *, endpoint: str, here: bool) -> ServeRow:
    """The row of one model's segments.

    facts: `server`, and what its /health tells of `backend`, `dtype`, `threads`, `layers`. here: whether it runs on this machine.
    Raises ValueError where no request arrived.
    """
    outcomes = [outcome for segment in segments for outcome in segment.outcomes]
    require(bool(outcomes), f"no request arrived for {segments[0].model}: the rate is too low for so few seconds; raise one of them")
    done = [outcome for outcome in outcomes if outcome.done]
    seconds, model = sum(segment.seconds for segment in segments), segments[0].model
    prompt_tokens = sum(outcome.reply.prompt_tokens or 0 for outcome in done)
    output_tokens = sum(outcome.reply.tokens for outcome in done)
    good = sum(limits.kept(outcome) for outcome in outcomes)
    samples = {
        "ttft": [outcome.time_to_first_token_s for outcome in done],
        "itl": [gap for outcome in done for gap in outcome.gaps_s],
        "tpot": [outcome.per_token_s for outcome in done if outcome.per_token_s is not None],
        "e2e": [outcome.end_to_end_s for outcome in done],
    }
    latencies: dict[str, Any] = {
        f"{name}_p{percent}_ms": _scaled(values, percent, 1e3) for name, values in samples.items() for percent in PERCENTILES
    }
    told = {str(outcome.reply.densities["mode"]) for outcome in done if "mode" in outcome.reply.densities}
    server = str(facts.get("server") or UNKNOWN)
    return ServeRow(
        op="serve",
        mode=next(iter(told)) if len(told) == 1 else DENSE[1:] if model.endswith(DENSE) else server,
        backend=str(facts.get("backend") or server),
        peer=not facts.get("backend"),
        sparse=told == {"sparse"},
        model=_model_name(model),
        layers=facts.get("layers"),
        dtype=str(facts.get("dtype") or UNKNOWN),
        batch=max(segment.busiest for segment in segments),
        context=round(prompt_tokens / len(done)) if done else 0,
        threads=facts.get("threads"),
        synthetic=False,
        mlp_density=_mean_density(done, "mlp_density"),
        head_density=_mean_density(done, "head_density"),
        union_density=_mean_density(done, "union_density"),
        p20_us=_scaled(samples["e2e"], 20, 1e6),
        p50_us=_scaled(samples["e2e"], 50, 1e6),
        p80_us=_scaled(samples["e2e"], 80, 1e6),
        tok_s=output_tokens / seconds,
        device=None if here else UNKNOWN,
        server=server,
        endpoint=endpoint,
        rate=load.rate if load.open else None,
        concurrency=load.concurrency,
        rounds=load.rounds,
        seed=load.seed,
        prompt_mix=str(load.prompt_tokens),
        output_mix=str(load.output_tokens),
        requests=len(outcomes),
        completed=len(done),
        failed=len(outcomes) - len(done),
        rejected=sum(outcome.rejected for outcome in outcomes),
        errors=dict(Counter(outcome.reply.error for outcome in outcomes if outcome.reply.error is not None)),
        seconds=seconds,
        in_flight=sum(outcome.reply.ended - outcome.intended for outcome in outcomes) / seconds,
        prompt_tokens=prompt_tokens,
        cached_tokens=sum(outcome.reply.cached_tokens for outcome in done),
        output_tokens=output_tokens,
        requests_s=len(done) / seconds,
        total_tok_s=(prompt_tokens + output_tokens) / seconds,
        late_p99_ms=_scaled([outcome.late_s for outcome in outcomes], 99, 1e3),
        ttft_limit_ms=limits.ttft_ms,
        itl_limit_ms=limits.itl_ms,
        goodput_s=good / seconds if limits.any else None,
        goodput_share=good / len(outcomes) if limits.any and outcomes else None,
        **latencies,
    )


def _mean_density(done: Sequence[Outcome], key: str) -> float | None:
    """Mean over decoded tokens, the first of an answer being none of them."""
    told = [(outcome.reply.densities[key], outcome.reply.tokens - 1) for outcome in done if key in outcome.reply.densities]
    weight = sum(tokens for _, tokens in told)
    return sum(density * tokens for density, tokens in told) / weight if weight else None


def _model_name(model: str) -> str:
    """The model's name without what makes it dense; of a path, as some servers name what they serve, its last part."""
    absolute = PurePosixPath(model).is_absolute() or PureWindowsPath(model).is_absolute()
    name = PureWindowsPath(model).name if absolute else model
    return name.removesuffix(DENSE)


def notes_on(row: ServeRow, segments: Sequence[Segment]) -> list[str]:
    """What a reader of the row should know: failures in the server's words, samples too few, pieces that are no tokens, a late client."""
    outcomes = [outcome for segment in segments for outcome in segment.outcomes]
    done = [outcome for outcome in outcomes if outcome.done]
    where, notes = f"{row.model} ({row.mode})", []
    for kind, count in row.errors.items():
        example = next(outcome.reply.message for outcome in outcomes if outcome.reply.error == kind)
        notes.append(f"{where}: {count} of {row.requests} requests failed: {kind}{f': {example}' if example else ''}")
    if 0 < row.completed < 100:
        few = "1 answer is" if row.completed == 1 else f"{row.completed} answers are"
        notes.append(f"{where}: {few} too few for a 99th percentile of requests: it is close to the slowest one")
    pieces = sum(len(outcome.reply.texts) for outcome in done)
    if pieces < 0.95 * row.output_tokens:
        notes.append(f"{where}: {row.output_tokens} tokens came in {pieces} pieces of text; ITL is of pieces, TPOT of tokens")
    short = sum(outcome.reply.tokens < outcome.requested_tokens for outcome in done)
    if short:
        notes.append(f"{where}: {short} answers are shorter than asked for")
    if row.cached_tokens:
        notes.append(f"{where}: {row.cached_tokens} of {row.prompt_tokens} prompt tokens came from a shared prefix")
    if row.rate is not None and row.late_p99_ms is not None and row.ttft_p50_ms is not None and row.late_p99_ms > 0.1 * row.ttft_p50_ms:
        notes.append(
            f"{where}: requests were sent up to {row.late_p99_ms:.1f} ms late (99th percentile): this process is too slow, or lacks a core"
        )
    return notes
