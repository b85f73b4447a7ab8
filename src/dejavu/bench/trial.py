"""What sparsity gains a model on this machine, with nothing trained: `dejavu try`.

In: a loaded model, a text to set thresholds on and another to measure on. Out: a `Trial`: a row for dense, for the adapter that came with
the model, and for each way to select that needs no training (exact where activations are exactly zero; else gates and inputs at a few
densities), each with its speed, what it reads, and the change of perplexity; and a sentence of advice with the command to run next.
Speeds come from the benchmark's own steps and checks, all ways in turns; perplexity masks every token (perplexity.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dejavu.bench.decode import bench
from dejavu.bench.fastest import head_cannot_pay, room
from dejavu.bench.models.density import rethresholded
from dejavu.bench.models.random import plain_layers
from dejavu.bench.variants import DENSE_VARIANT, Layers, Variant, check_mode
from dejavu.config import EXACT_ZERO_ACTIVATIONS, Config, ModelConfig, Progress, require
from dejavu.engine.footprint import weight_bytes
from dejavu.engine.options import EngineOptions
from dejavu.kernels.screen import Screen
from dejavu.model.transformer import Transformer
from dejavu.quality.perplexity import MaskedSelections, PerplexityResult, dense_selection, paired_rise, perplexity

DENSITIES = (0.5, 0.7)  # of gates, and of inputs
TOKENS, CONTEXT = 1024, 256  # of perplexity
GAINS, COSTS = 1.05, 0.03  # from which speed, and up to which rise of perplexity, a way pays


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRow(Config):
    """One way to run the model. keeps: the density that thresholds were set to, None where nothing was set. read_share: of a dense
    step's bytes. times: tok_s over that of dense. rise: relative, of perplexity. note: why a way has no numbers."""

    way: str
    keeps: float | None = None
    mlp_density: float | None = None
    head_density: float | None = None
    read_share: float | None = None
    tok_s: float | None = None
    times: float | None = None
    ppl: float | None = None
    rise: float | None = None
    rise_stderr: float | None = None
    note: str | None = None

    @property
    def label(self) -> str:
        return self.way if self.keeps is None else f"{self.way} {self.keeps:g}"

    @property
    def pays(self) -> bool:
        return self.way != "dense" and (self.times or 0) >= GAINS and self.rise is not None and self.rise <= COSTS


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """advice: a sentence. command: what to run next. weight_bytes: of the weights as the engine holds them, once."""

    rows: tuple[TrialRow, ...]
    advice: str
    command: str
    weight_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Way:
    way: str
    layers: Layers | None
    keeps: float | None = None
    screen: Screen | None = None


def memory_needed(sizes: Mapping[str, int], config: ModelConfig, *, backend: str, dtype: str) -> int:
    """Bytes that a trial takes at least: the model and, on the native engine, a packed copy for each layout of the ways to select.

    sizes, dtype: as of `weight_bytes` (engine/footprint.py). The native engine's model holds its weights in the engine's dtype, too.
    """
    weights = weight_bytes(sizes, dtype)
    if backend != "native":
        return weights
    layouts = 2 if config.activation in EXACT_ZERO_ACTIVATIONS else 3
    return (1 + layouts) * weights


def ways(model: Transformer, ids: Sequence[int], own: Layers | None, screen: Screen | None = None) -> list[_Way]:
    """What can be tried; thresholds are set on the ids."""
    found = [] if own is None and screen is None else [_Way(way="its adapter", layers=own, screen=screen)]
    if model.config.activation in EXACT_ZERO_ACTIVATIONS:
        return [*found, _Way(way="exact", layers=plain_layers(model.config, method="gate"))]
    gates, inputs = (plain_layers(model.config, method=method) for method in ("gate", "input"))
    for density in DENSITIES:
        found.append(_Way(way="gate", keeps=density, layers=rethresholded(model, gates, ids, mlp_density=density)))
    for density in DENSITIES:
        chosen = rethresholded(model, inputs, ids, mlp_density=density, head_density=density)
        found.append(_Way(way="input", keeps=density, layers=chosen))
    return found


def trial(
    model: Transformer,
    *,
    name: str,
    called: str,
    chatted: str,
    chatted_dense: str,
    own: Layers | None,
    screen: Screen | None = None,
    threshold_ids: Sequence[int],
    measured_ids: Sequence[int],
    bos: int | None,
    options: EngineOptions,
    progress: Progress | None = None,
) -> Trial:
    """Try every way. called, chatted: the model and options for a command to run next, of training and of a chat, which has an adapter that
    was named; chatted_dense: of a dense one, which takes none. own, screen: of the model's adapter. options: with a dtype by name.

    Raises ValueError for a text or a context too short to time a step on.
    """
    fits = room(model.config.max_positions, len(measured_ids))
    require(fits is not None, f"{len(measured_ids)} tokens in a context of {model.config.max_positions} are too few to time a step on")
    assert fits is not None
    tried, notes = [], {}
    for way in ways(model, threshold_ids, own, screen):
        try:
            check_mode(model, way.layers, measured_ids, replace(options, screen=way.screen))
            tried.append(way)
        except ValueError as error:  # an engine that does not compute this way, in this dtype
            notes[id(way)] = TrialRow(way=way.way, keeps=way.keeps, note=str(error))
    variants = [DENSE_VARIANT, *(Variant(mode=way.way, layers=way.layers, screen=way.screen) for way in tried)]
    run = bench(model, variants, measured_ids, options, name=name, context=fits[0], steps=fits[1], progress=progress)
    timed_dense, *timed = run.decodes
    context = min(CONTEXT, model.config.max_positions)
    scored = list(measured_ids[:TOKENS])

    def quality(index: int, layers: Layers | None) -> PerplexityResult:
        if progress is not None:
            progress("perplexity", index, len(variants))
        factory = dense_selection if layers is None else MaskedSelections(layers)
        return perplexity(model, scored, bos=bos, context=context, selection_factory=factory)

    dense = quality(0, None)
    dense_speed = timed_dense.speed
    rows = [TrialRow(way="dense", mlp_density=1.0, head_density=1.0, read_share=1.0, tok_s=dense_speed, times=1.0, ppl=dense.ppl, rise=0.0)]
    for index, (way, row) in enumerate(zip(tried, timed, strict=True), start=1):
        masked = quality(index, way.layers)
        rise = paired_rise(dense, masked)
        rows.append(
            TrialRow(
                way=way.way, keeps=way.keeps, mlp_density=row.mlp_density, head_density=row.head_density, read_share=row.read_share,
                tok_s=row.speed, times=row.speed / dense_speed, ppl=masked.ppl, rise=rise.rise, rise_stderr=rise.stderr,
            )
        )  # fmt: skip
    rows += notes.values()
    zeros, head = model.config.activation in EXACT_ZERO_ACTIVATIONS, screen is None and head_cannot_pay(model, options) is None
    advice, command = advise(rows, called, chatted, chatted_dense, zeros=zeros, head=head)
    return Trial(rows=tuple(rows), advice=advice, command=command, weight_bytes=weight_bytes(model.sizes(), options.dtype))


def advise(rows: Sequence[TrialRow], called: str, chatted: str, chatted_dense: str, *, zeros: bool, head: bool = False) -> tuple[str, str]:
    """A sentence on what pays, and the command to run next. zeros: whether predictors can be trained; head: whether a screened head may
    pay, which nobody can tell before it is trained."""
    paying = max((row for row in rows if row.pays), key=lambda row: row.times or 0, default=None)
    own = next((row for row in rows if row.way == "its adapter"), None)
    train = f"dejavu train {called} --text YOUR.txt -o my-adapter"
    if own is not None and own.times is not None and own.rise is not None and own.times >= GAINS and paying in (None, own):
        cost = "at no measurable cost" if own.rise < 0.005 else f"for {own.rise:+.1%} of perplexity"
        return f"Its adapter makes it {own.times:.2f}x as fast as dense here, {cost}.", f"dejavu chat {chatted}"
    if paying is not None and zeros:
        text = f"Sparse by nature, without loss: {paying.times:.2f}x dense. Trained predictors read less still."
        return text, f"{train} --method auto"
    if paying is not None:
        text = f"It pays here: by {paying.label}, {paying.times:.2f}x dense for {paying.rise:+.1%} of perplexity."
        return text, f"{train} --method auto --budget {max(0.01, round(paying.rise or 0.0, 2)):g}"
    timed = [row for row in rows if row.way not in ("dense", "its adapter") and row.times is not None]
    best = max(timed, key=lambda row: row.times or 0, default=None)
    seen = "" if best is None else f"; the fastest, {best.label}, is {best.times:.2f}x dense for {best.rise:+.1%} of perplexity"
    if zeros:
        return f"Skipping true zeros alone does not pay here{seen}; predictors may.", f"{train} --method auto"
    if head:
        return (
            f"In the layers sparsity does not pay here{seen}. Its large vocabulary may: a screened head is trained.",
            f"{train} --method auto",
        )
    return f"Without training sparsity does not pay here{seen}. Run it dense.", f"dejavu chat {chatted_dense} --dense"
