"""Speed of prompts and of whole requests: our engine in every mode, and peers, in turns on the same tokens.

In: a model, variants of running it that `decode.bench` has checked, token ids. Out: `Bench`: rows, ratios. A prompt is one prefill. A
request of P and N tokens is a prefill of P, whose logits give the first new token, and N - 1 steps; the tokens are those of the text,
nothing is drawn, so that every program does the same work. A duration is that of the whole, from the prompt to the last token's logits.

A prompt is read densely in every mode, but each mode's engine lays its weights out in its own way. The first turn does not count: it
warms up, and tells what the steps of a request select.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from dejavu.bench.decode import USUAL_AHEAD, Bench, named_ahead, ratios_of
from dejavu.bench.facts import engine_facts, on_gpu, peer_facts, variant_facts
from dejavu.bench.rows import Shape, SpeedRow
from dejavu.bench.timing import MIN_REPEATS, Work, nothing, percentiles, time_interleaved
from dejavu.bench.variants import Peer, Variant
from dejavu.config import ModelConfig, Progress, require
from dejavu.engine.backends import make_engine
from dejavu.engine.interface import Engine
from dejavu.engine.options import EngineOptions
from dejavu.model.transformer import Transformer

ROUNDS = MIN_REPEATS + 1  # the first one does not count
PREFILL, REQUEST = "prefill", "request"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """prompt: tokens that are read. new: tokens that are written; None: a prompt alone."""

    prompt: int
    new: int | None = None

    @property
    def positions(self) -> int:
        return self.prompt + (self.new or 0)

    def __str__(self) -> str:
        return f"{self.prompt}" if self.new is None else f"{self.prompt}+{self.new}"


USUAL = (Request(prompt=512), Request(prompt=128, new=128), Request(prompt=1024, new=128))


def request_of(text: str) -> Request:
    """`128+128`: a prompt of 128 tokens and 128 new ones. Raises ValueError for anything else."""
    found = re.fullmatch(r"(\d+)\+(\d+)", text)
    require(found is not None, f"--request {text} is no PROMPT+NEW, such as 128+128")
    assert found is not None
    return Request(prompt=int(found[1]), new=int(found[2]))


@dataclass(eq=False)
class _Runner:
    """One variant's engine. densities: of neurons and heads, at the steps of the request under way."""

    engine: Engine
    variant: Variant
    densities: list[tuple[float, float]] = field(default_factory=list)

    def work(self, request: Request, ids: Sequence[int], sync: Callable[[], None]) -> Work:
        prompt, rest = ids[: request.prompt], ids[request.prompt : request.positions - 1]
        self.densities = []

        def run(number: int) -> None:
            self.engine.prefill(0, prompt)
            for token in rest:
                result = self.engine.step([token], [0])
                if number == 0:
                    mlp_BL, heads_BL = result.counts.densities(self.engine.info)
                    self.densities.append((float(mlp_BL.mean()), float(heads_BL.mean())))

        return Work(run=run, sync=sync, done=lambda *_: self.engine.free(0))

    def facts(self, config: ModelConfig, name: str, shape: Shape | None, adapter: str | None, ahead: str | None) -> dict[str, Any]:
        facts = engine_facts(self.engine.info, config, name=name, shape=shape) | variant_facts(self.variant, adapter=adapter, ahead=ahead)
        if self.densities:
            mlp, heads = np.mean(self.densities, axis=0).tolist()
            facts |= {"mlp_density": mlp, "head_density": heads}
        return facts


def _peer_work(peer: Peer, request: Request, ids: Sequence[int], sync: Callable[[], None]) -> Work:
    prompt, rest = ids[: request.prompt], ids[request.prompt : request.positions - 1]

    def run(_: int) -> None:
        peer.prefill(prompt)
        for token in rest:
            peer.step(token)

    return Work(run=run, sync=sync)


def fits(request: Request, config: ModelConfig, ids: Sequence[int]) -> str | None:
    """Why a request cannot be timed; None where it can."""
    if request.prompt < 1 or request.new == 0:
        return f"a request of {request} tokens has no prompt or nothing new; give at least 1 of each"
    if request.positions > config.max_positions:
        return f"a request of {request} tokens needs {request.positions} positions, the model has {config.max_positions}"
    if request.positions > len(ids):
        return f"a request of {request} tokens needs a text of {request.positions}, this one has {len(ids)}; give a longer text"
    return None


def bench_requests(
    model: Transformer,
    variants: Sequence[Variant],
    ids: Sequence[int],
    options: EngineOptions,
    *,
    name: str,
    requests: Sequence[Request] = USUAL,
    adapter: str | None = None,
    shape: Shape | None = None,
    peers: Sequence[Peer] = (),
    clock: Callable[[], float] = time.perf_counter,
    progress: Progress | None = None,
) -> Bench:
    """Rows of op prefill and request, one sequence, in every variant and of every peer; `tok_s` is of the prompt's tokens or of new ones.

    adapter, shape, name: as of `decode.bench`, which has checked variants and peers. Raises ValueError for a request that has no room in
    the model or the text.
    """
    for request in requests:
        reason = fits(request, model.config, ids)
        require(reason is None, str(reason))
    room = max((request.positions for request in requests), default=0) + 64
    options = dataclasses.replace(options, num_slots=1, cache_tokens=room)
    runners = [
        _Runner(engine=make_engine(model, variant.layers, variant.options(options)), variant=variant)
        for variant in named_ahead(variants, options.ahead)
    ]
    ahead = (options.ahead or USUAL_AHEAD) if options.backend == "cuda" else None
    sync = torch.cuda.synchronize if on_gpu(runners[0].engine.info.device) else nothing
    rows = []
    for request in requests:
        works: dict[Any, Work] = {runner: runner.work(request, ids, sync) for runner in runners}
        works |= {index: _peer_work(peer, request, ids, sync) for index, peer in enumerate(peers)}
        found = time_interleaved(works, ROUNDS, clock=clock, progress=progress, name=f"requests of {request}")
        ours = [runner.facts(model.config, name, shape, adapter, ahead) for runner in runners]
        theirs = [ours[0] | peer_facts(peer, name=name) for peer in peers]
        rows += [_row(facts, request, seconds) for facts, seconds in zip(ours + theirs, found.values(), strict=True)]
    return Bench(rows=rows, ratios=ratios_of(rows, ops=(PREFILL, REQUEST)), notes=[])


def _row(facts: Mapping[str, Any], request: Request, seconds: list[float]) -> SpeedRow:
    p20, p50, p80 = percentiles(seconds[1:])
    counted = request.prompt if request.new is None else request.new
    op = {"op": PREFILL if request.new is None else REQUEST, "context": request.prompt, "new_tokens": request.new, "batch": 1}
    times = {"p20_us": p20, "p50_us": p50, "p80_us": p80, "tok_s": counted * 1e6 / p50}
    return SpeedRow.from_dict({**facts, **op, **times})
