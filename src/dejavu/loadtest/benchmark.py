"""A whole serving benchmark: look at the server, warm it up, put the load on its models in turns, and say what came of it.

In: a `Target`, a `Load`, a text for prompts. Out: `ServingBench`: a row for each model, how a sparse one compares with the dense one, what
the server kept (leaks), notes. Failed requests are in the rows, apart from what was completed, and make `failed` true.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypedDict

from dejavu.config import Progress
from dejavu.loadtest.client import Reply, Target, ask
from dejavu.loadtest.rows import DENSE, Limits, ServeRow, notes_on, serve_row
from dejavu.loadtest.run import probe, run_load, warm_up
from dejavu.loadtest.server_stats import SETTLE_S, LeakCheck, LeakReport, health, listed_models, pick_models
from dejavu.loadtest.workload import Load, Prompts

USUAL_ROUNDS = 4


class ServingRatio(TypedDict):
    """How many times better a sparse row is than the dense one of its model, of each figure; None where one of the two has none."""

    model: str
    mode: str
    against: str
    tok_s: float | None
    ttft_p50_ms: float | None
    itl_p50_ms: float | None
    tpot_p50_ms: float | None
    e2e_p50_ms: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingBench:
    """What a benchmark found."""

    rows: list[ServeRow]
    ratios: list[ServingRatio]
    notes: list[str]
    leaks: LeakReport | None

    @property
    def failed(self) -> bool:
        """Whether a request failed or something leaked."""
        return any(row.failed for row in self.rows) or self.leaks_found

    @property
    def leaks_found(self) -> bool:
        return self.leaks is not None and self.leaks.leaks


async def bench_serving(
    target: Target,
    load: Load,
    text: str,
    *,
    models: Sequence[str] = (),
    rounds: int | None = None,
    limits: Limits | None = None,
    retries: int = 0,
    warm_up_requests: int | None = None,
    check_leaks: bool = False,
    process: int | None = None,
    settle_s: float = SETTLE_S,
    here: bool = True,
    clock: Callable[[], float] = time.perf_counter,
    progress: Progress | None = None,
) -> ServingBench:
    """Put the load on each of the models, or on the one that the server lists, with and without its adapter.

    rounds: turns of each model, instead of the load's; None: USUAL_ROUNDS where there are several models or leaks are looked for, else 1.
    warm_up_requests: see `warm_up`. process: the server's id, where it is known. settle_s: how long pages may take to come back.
    here: whether the server runs on this machine.
    Raises ValueError where the server does not answer, has no such model, or the text is too short for the longest prompt.
    """
    limits = limits or Limits()
    async with target.client() as client:

        async def send(model: str, prompt: str, max_tokens: int) -> Reply:
            return await ask(client, target, model, prompt, max_tokens, clock=clock)

        listed, owner = await listed_models(client)
        chosen = pick_models(list(models), listed, DENSE)
        told = await health(client)
        version = told.get("version")
        facts = told | {"server": owner if version is None else f"{owner or 'dejavu'} {version}"}
        usual = min(USUAL_ROUNDS, load.requests or USUAL_ROUNDS) if len(chosen) > 1 or check_leaks else 1
        load = dataclasses.replace(load, rounds=usual if rounds is None else rounds)
        prompts: dict[str, Prompts] = {}
        notes: list[str] = []
        for model in chosen:
            prompts[model], note = await probe(send, model, text, load.prompt_tokens.longest)
            notes += [] if note is None or note in notes else [note]
        notes += await warm_up(load, prompts, send, warm_up_requests)
        check = LeakCheck(client, process, settle_s) if check_leaks else None
        if check is not None:
            await check.start()
        segments = await run_load(
            load, prompts, send, clock=clock, retries=retries, after_round=None if check is None else check.sample, progress=progress
        )
        leaks = None if check is None else await check.finish()
    rows = []
    for model in chosen:
        own = [segment for segment in segments if segment.model == model]
        rows.append(serve_row(own, load, limits, facts, endpoint=target.endpoint, here=here))
        notes += notes_on(rows[-1], own)
    notes += _leak_notes(leaks)
    return ServingBench(rows=rows, ratios=ratios_of(rows), notes=notes, leaks=leaks)


def ratios_of(rows: Sequence[ServeRow]) -> list[ServingRatio]:
    """Throughput of each sparse row over that of its model's dense row, and latencies of the dense one over its own: above 1 is better."""

    def over(one: float | None, other: float | None) -> float | None:
        return one / other if one and other else None

    return [
        ServingRatio(
            model=row.model, mode=row.mode, against="dense", tok_s=over(row.tok_s, dense.tok_s),
            ttft_p50_ms=over(dense.ttft_p50_ms, row.ttft_p50_ms), itl_p50_ms=over(dense.itl_p50_ms, row.itl_p50_ms),
            tpot_p50_ms=over(dense.tpot_p50_ms, row.tpot_p50_ms), e2e_p50_ms=over(dense.e2e_p50_ms, row.e2e_p50_ms),
        )
        for dense in rows if dense.mode == "dense"
        for row in rows if row.model == dense.model and row.mode != "dense"
    ]  # fmt: skip


def _leak_notes(leaks: LeakReport | None) -> list[str]:
    if leaks is None:
        return []
    notes = []
    if leaks.pages_lost:
        notes.append(f"leak: {leaks.pages_lost} of {leaks.pages_total} pages did not come back after the last answer")
    if leaks.leaks and not leaks.pages_lost:
        notes.append(f"leak: resident memory grew by {leaks.growth_mb or 0:.0f} MB in the second half of the load")
    if leaks.pages_before is None:
        notes.append("the server does not tell its free pages: only its memory was compared")
    if leaks.growth_mb is None:
        why = "it takes at least two rounds" if leaks.memory_mb else "the server does not tell it"
        notes.append(f"the server's memory was not compared: {why}")
    return notes
