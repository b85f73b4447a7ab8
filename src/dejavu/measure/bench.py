"""Speed of decode and prefill of one model, dense and sparse, taken in turns on one text.

In: model, adapter layers, token ids of a text. Out: Rows of results.py, one per op and mode. Modes: dense; sparse (MLP
predictors); sparse+heads (head predictors too). Each mode decodes the same tokens, one step of each mode after the other in
changing order, so that whatever slows the machine slows all of them. Prefill is dense in every mode and measured once.
Before anything is timed each mode's logits are held against a masked forward pass; where they differ nothing is reported.

Letters: B rows of a step  T tokens  V vocabulary  L layers
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from dejavu.config import Progress, require
from dejavu.engine.backends import make_engine
from dejavu.engine.interface import Engine, StepResult
from dejavu.measure.results import Row
from dejavu.model.predictor import LayerAdapter, MaskedSelection
from dejavu.model.transformer import DENSE, Transformer

Layers = tuple[LayerAdapter, ...]
WARMUP_STEPS = 4
CHECK_PROMPT, CHECK_STEPS = 8, 8


@dataclass
class Samples:
    """Durations of one op in one mode, in seconds, and the densities of its steps."""

    seconds: list[float] = field(default_factory=list)
    mlp: list[float] = field(default_factory=list)
    heads: list[float] = field(default_factory=list)

    def add(self, seconds: float, step: StepResult, num_neurons: int, num_heads: int) -> None:
        self.seconds.append(seconds)
        self.mlp.append(float(step.neurons_BL.double().mean()) / num_neurons)
        self.heads.append(float(step.heads_BL.double().mean()) / num_heads)


def modes_of(layers: Layers | None) -> dict[str, Layers | None]:
    """The modes that an adapter offers, with the layers of each."""
    modes: dict[str, Layers | None] = {"dense": None}
    if layers is None:
        return modes
    if any(layer.mlp is not None for layer in layers):
        modes["sparse"] = tuple(LayerAdapter(mlp=layer.mlp) for layer in layers)
    if any(layer.heads is not None for layer in layers):
        modes["sparse+heads"] = layers
    return modes


@torch.inference_mode()
def check_mode(
    model: Transformer, layers: Layers | None, ids: Sequence[int], backend: str, *, dtype: str | None = None, threads: int | None = None
) -> None:
    """Decode a few tokens and compare with the (masked) forward pass. Raises ValueError where they are not the same model."""
    count = min(CHECK_PROMPT + CHECK_STEPS, model.config.max_positions)
    prompt = max(1, count - CHECK_STEPS)
    engine = make_engine(model, layers, backend=backend, cache_tokens=count, dtype=dtype, threads=threads)
    engine.prefill(0, ids[:prompt])
    found = torch.stack([engine.step([token], [0]).logits_BV[0] for token in ids[prompt:count]]).cpu()
    ids_BT = torch.tensor([list(ids[:count])], device=model.embed.weight.device)
    sparse_BT = torch.arange(count, device=ids_BT.device)[None] >= prompt
    wanted = model(ids_BT, DENSE if layers is None else MaskedSelection(layers, sparse_BT))[0, prompt:].cpu()
    error = float((found - wanted).abs().mean() / wanted.std())
    limit = 0.02 if engine.info.dtype == "fp32" else 0.1
    require(error < limit, f"backend {backend!r} decodes other logits than the forward pass (error {error:.3g}, limit {limit}): not timed")


def bench(
    model: Transformer,
    layers: Layers | None,
    ids: Sequence[int],
    *,
    name: str,
    backend: str,
    dtype: str | None = None,
    threads: int | None = None,
    batch: int = 1,
    context: int = 128,
    steps: int = 32,
    progress: Progress | None = None,
) -> list[Row]:
    """Rows of decode in every mode and of prefill.

    ids: a text of at least context + steps tokens, of which row b of the batch reads its own stretch. dtype, threads: of the
    engines, see make_engine. Raises ValueError for a count that is not positive, a context that leaves no room for the
    steps, and a backend that fails its check.
    """
    limit, needed = model.config.max_positions, context + steps + WARMUP_STEPS
    for what, value in (("batch", batch), ("context", context), ("steps", steps)):
        require(value >= 1, f"{what} must be at least 1, not {value}")
    require(needed <= limit, f"context {context} and {steps} steps need {needed} positions, the model has {limit}; lower one of them")
    require(len(ids) >= needed, f"the text has {len(ids)} tokens, the benchmark reads {needed}; give a longer text")
    rows_BT = [[ids[(row * context + t) % len(ids)] for t in range(needed)] for row in range(batch)]
    modes = modes_of(layers)
    for mode_layers in modes.values():
        check_mode(model, mode_layers, ids, backend, dtype=dtype, threads=threads)
    engines = {
        mode: make_engine(
            model, mode_layers, backend=backend, num_slots=batch, cache_tokens=batch * (needed + 64), dtype=dtype, threads=threads
        )
        for mode, mode_layers in modes.items()
    }
    prefill = _prefills(engines["dense"], rows_BT[0][:context])
    decode = _decodes(engines, rows_BT, context, steps, progress)

    def row(op: str, mode: str, samples: Samples, tokens: int) -> Row:
        p20, p50, p80 = (float(value) * 1e6 for value in np.quantile(samples.seconds, [0.2, 0.5, 0.8]))
        return Row(
            op=op,
            mode=mode,
            backend=backend,
            model=name,
            layers=model.config.num_layers,
            dtype=engines["dense"].info.dtype,
            batch=batch if op == "decode" else 1,
            context=context,
            threads=engines["dense"].info.threads,
            synthetic=False,
            mlp_density=float(np.mean(samples.mlp)) if samples.mlp else 1.0,
            head_density=float(np.mean(samples.heads)) if samples.heads else 1.0,
            p20_us=p20,
            p50_us=p50,
            p80_us=p80,
            tok_s=tokens * 1e6 / p50,
        )

    return [row("prefill", "dense", prefill, context), *(row("decode", mode, samples, batch) for mode, samples in decode.items())]


def _prefills(engine: Engine, ids: list[int], repeats: int = 5) -> Samples:
    samples = Samples()
    for repeat in range(repeats + 1):
        start = time.perf_counter()
        engine.prefill(0, ids)
        if repeat > 0:  # the first one warms up
            samples.seconds.append(time.perf_counter() - start)
        engine.free(0)
    return samples


def _decodes(
    engines: dict[str, Engine], rows_BT: list[list[int]], context: int, steps: int, progress: Progress | None
) -> dict[str, Samples]:
    slots = list(range(len(rows_BT)))
    for engine in engines.values():
        for slot, row in zip(slots, rows_BT, strict=True):
            engine.prefill(slot, row[:context])
    samples = {mode: Samples() for mode in engines}
    order = list(engines)
    for step in range(steps + WARMUP_STEPS):
        tokens_B = [row[context + step] for row in rows_BT]
        for mode in order[step % len(order) :] + order[: step % len(order)]:
            start = time.perf_counter()
            result = engines[mode].step(tokens_B, slots)
            seconds = time.perf_counter() - start
            if step >= WARMUP_STEPS:
                samples[mode].add(seconds, result, engines[mode].info.num_neurons, engines[mode].info.num_heads)
        if progress is not None:
            progress("decode steps", step + 1, steps + WARMUP_STEPS)
    return samples
