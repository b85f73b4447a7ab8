"""Which of several adapters of a model decodes fastest on this machine, or whether none beats the dense model.

In: a model, adapters with what training measured of each, a text's token ids, the engine's options. Out: the same measurements with
`tok_s`, `tok_s_dense` and `speedup`, each adapter timed in turns with the dense model, and which one to take: the fastest within the
budget, or none where no one is at least MARGIN times as fast as dense. What is read decides nothing here: time does.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from dejavu.bench.decode import SKIPPED, TURN, bench
from dejavu.bench.timing import MIN_REPEATS
from dejavu.bench.variants import DENSE_VARIANT, Variant
from dejavu.config import Progress
from dejavu.engine.backends import CAPABILITIES
from dejavu.engine.options import EngineOptions
from dejavu.kernels.screen import Screen
from dejavu.model.selectors import LayerAdapter
from dejavu.model.transformer import Transformer
from dejavu.offline.train import Trained

MARGIN = 1.02  # less is within the noise of a timing, and no reason to give quality away
CONTEXT, STEPS = 64, 48
PASSES = 3  # of which the middle one counts: what else the machine does may last longer than one
LONG = 15.0  # seconds: a pass that takes so long counts alone
SHOWN = ("method", "rise", "rise_stderr", "within_budget", "mlp_density", "head_density", "reads", "read_share", "seconds")
SPEEDS = ("tok_s", "tok_s_dense", "speedup")


def head_cannot_pay(model: Transformer, options: EngineOptions) -> str | None:
    """Why no head makes a step MARGIN times as fast: the engine has no screened one, or the whole head is less of the model than that."""
    if not CAPABILITIES[options.backend].screened_head:
        return f"the backend {options.backend} has none"
    share = model.config.vocab_size * model.config.embed_width / model.num_parameters
    return None if share > 1 - 1 / MARGIN else f"the head is {share:.1%} of the model"


def room(max_positions: int, tokens: int) -> tuple[int, int] | None:
    """Context and steps of a timing that a model's context and a text of so many tokens hold; None where they hold too few."""
    most = min(max_positions, tokens)
    context = min(CONTEXT, most // 2)
    steps = min(STEPS, (most - context) // TURN * (TURN - SKIPPED))
    return (context, steps) if context >= 1 and steps >= MIN_REPEATS else None


def speeds(
    model: Transformer,
    layers: tuple[LayerAdapter, ...],
    ids: Sequence[int],
    options: EngineOptions,
    *,
    name: str,
    screen: Screen | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """SPEEDS of decoding one sequence, sparse (with a screened head) in turns with dense; each None, with a `speed_note`, where it cannot
    be timed."""
    unknown: dict[str, Any] = dict.fromkeys(SPEEDS)
    selects = any(layer.sparse for layer in layers)
    if not selects and screen is None:
        return unknown | {"speed_note": "no layer selects"}
    fits = room(model.config.max_positions, len(ids))
    if fits is None:
        return unknown | {"speed_note": "the text is too short to time a step on"}
    way = Variant(mode="sparse" if selects else "screened", layers=layers if selects else None, screen=screen)
    passes: list[list[float]] = []
    try:
        started = time.monotonic()
        while len(passes) < PASSES and not (passes and time.monotonic() - started > LONG):
            found = bench(model, [DENSE_VARIANT, way], ids, options, name=name, context=fits[0], steps=fits[1], progress=progress)
            passes.append([row.speed for row in found.decodes])
    except (ValueError, MemoryError, torch.OutOfMemoryError) as error:  # an engine that does not compute this method, too little memory
        return unknown | {"speed_note": " ".join(str(error).split()) or type(error).__name__}
    dense, sparse = sorted(passes, key=lambda pair: pair[1] / pair[0])[(len(passes) - 1) // 2]
    return {"tok_s": sparse, "tok_s_dense": dense, "speedup": sparse / dense}


def fastest(found: Sequence[Trained]) -> Trained | None:
    """The fastest of those that keep the budget and are worth it; None where the dense model is."""
    worth = [each for each in found if each[1]["within_budget"] and (each[1]["speedup"] or 0) >= MARGIN * each[1].get("speedup_without", 1)]
    return max(worth, key=lambda each: each[1]["speedup"], default=None)


def why(found: Sequence[Trained], taken: Trained | None, no_head: str | None) -> str:
    """What was taken and why, in a sentence; and why no candidate has a screened head, where none has."""
    return _taken(found, taken) + ("" if no_head is None else f"; no screened head: {no_head}")


def _taken(found: Sequence[Trained], taken: Trained | None) -> str:
    if taken is not None:
        result = taken[1]
        head = result.get("screened_head")
        missed = "" if head is None else f", {head['missed']:.2%} of probability missed"
        return f"{result['method']} is fastest here: {result['speedup']:.2f}x dense, perplexity {result['rise']:+.2%}{missed}"
    kept = [result for _, result in found if result["within_budget"] and result["speedup"] is not None]
    if not kept:
        notes = [result["speed_note"] for _, result in found if result.get("speed_note")]
        return "sparsity does not pay here: no method keeps the budget" + (f" and could be timed ({notes[0]})" if notes else "")
    best = max(kept, key=lambda result: result["speedup"])
    return f"sparsity does not pay here ({best['method']}, the fastest, {best['speedup']:.2f}x dense): the model stays dense"


def dense_result(found: Sequence[Trained]) -> dict[str, Any]:
    """What `dejavu train` says where no adapter is taken."""
    result = found[0][1]
    kept = {name: result[name] for name in ("ppl_dense", "budget", "tokens", "tokens_given")}
    reads = result["reads"] / result["read_share"]
    none = {
        "method": "dense",
        "layers": [],
        "rise": 0.0,
        "rise_stderr": 0.0,
        "within_budget": True,
        "mlp_density": 1.0,
        "head_density": 1.0,
    }
    return {**none, **kept, "ppl_sparse": kept["ppl_dense"], "reads": reads, "read_share": 1.0, **dict.fromkeys(SPEEDS), "speedup": 1.0}


def chosen(found: Sequence[Trained], no_head: str | None = None) -> tuple[Trained | None, dict[str, Any]]:
    """Of method auto: what is taken, and its measurements with all `candidates` (without their layers) and `why`. no_head: why none has a
    screened head."""
    taken = fastest(found)
    candidates = [{name: result.get(name) for name in (*SHOWN, *SPEEDS, "speed_note", "screened_head")} for _, result in found]
    result = dense_result(found) if taken is None else taken[1]
    return taken, result | {
        "candidates": candidates,
        "why": why(found, taken, no_head),
        "seconds": sum(each["seconds"] for _, each in found),
    }
