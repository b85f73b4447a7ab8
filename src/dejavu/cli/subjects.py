"""What `dejavu bench` times: a loaded model, or a made-up one, with the predictors it runs with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from dejavu.cli.options import open_model
from dejavu.cli.output import Output, number, percent
from dejavu.engine.options import EngineOptions

if TYPE_CHECKING:
    from dejavu.bench.models.planted import PlantedModel, PlantedQuality
    from dejavu.bench.rows import Shape
    from dejavu.bench.variants import Layers, Variant
    from dejavu.kernels.screen import Screen
    from dejavu.language_model import LanguageModel
    from dejavu.model.transformer import Transformer

DEFAULT_DENSITY, PLAIN_DENSITY = 0.1, 0.5  # of predictors, and of gates or inputs
PLANTED_RANK = 128
PLANTED_SHARE = 0.5  # of the smallest density asked for, the neurons that fire: as with trained predictors, more are selected than fire


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is timed: a loaded model (lm), or a made-up one, of which `planted` runs on the device it was made on.

    layers_for(selection, density): predictors, see variants_at. options: of its engines. densities, selections: those to time. shape: of
    what is made up.
    """

    name: str
    model: Transformer
    layers_for: Callable[[str | None, float | None], Layers | None]
    ids: list[int]
    options: EngineOptions
    notes: list[str]
    densities: Sequence[float]
    selections: Sequence[str] = ()
    lm: LanguageModel | None = None
    planted: PlantedModel | None = None
    shape: Shape | None = None

    @property
    def screen(self) -> Screen | None:
        return None if self.lm is None else self.lm.screen()

    @property
    def synthetic(self) -> bool:
        return self.lm is None


def loaded(
    model: str,
    out: Output,
    options: EngineOptions,
    *,
    seed: int,
    texts: list[str] | None,
    adapter: Path | None,
    dense: bool,
    accept_base: bool,
    densities: Sequence[float],
    download: bool,
    offline: bool,
) -> Subject:
    """A model that exists, on a text."""
    from dejavu.model.texts import DATA, documents, named_texts

    named = named_texts(texts or [str(DATA / "evaluation.txt")])
    lm = open_model(
        model, out, options, texts=texts, seed=seed, adapter=adapter, dense=dense, accept_base=accept_base, download=download,
        offline=offline,
    )  # fmt: skip
    _check_ahead(options, lm.backend)
    layers = lm.layers()
    return Subject(
        name=lm.name,
        model=lm.model,
        layers_for=lambda selection, density: layers,
        ids=lm.tokenizer.encode("\n".join(part for whole in named.values() for part in documents(whole))),
        options=replace(lm.options, ahead=options.ahead),
        notes=list(lm.notes),
        densities=densities,
        lm=lm,
    )


def made_up(
    name: str,
    out: Output,
    options: EngineOptions,
    *,
    seed: int,
    rank: int | None,
    num_layers: int | None,
    dense: bool,
    densities: Sequence[float],
    heads: bool,
    selections: Sequence[str],
    ops: bool,
    method: str | None,
) -> Subject:
    """A model of a known shape: made on the GPU for the cuda backend, planted where predictors select, else random. heads: with predictors
    of heads.

    selections: on the cuda backend one at most that is planted, or those of `ops`. method: of SELECTING_METHODS; None: the shape's usual
    one.
    """
    from dejavu.bench.models.random import shape_of, usual_method
    from dejavu.config import require
    from dejavu.engine.backends import CAPABILITIES, pick_backend
    from dejavu.kernels.processors import limit_torch
    from dejavu.loading import set_threads
    from dejavu.model.selectors import SELECTING_METHODS

    picked = pick_backend(options.backend, dtype="int8" if options.dtype == "auto" else options.dtype)
    capabilities = CAPABILITIES[picked]
    usual = "fp16" if picked == "cuda" else "int8" if "int8" in capabilities.dtypes else "fp32"
    dtype = usual if options.dtype == "auto" else options.dtype
    offered = [each for each in capabilities.dtypes if picked != "torch" or each in ("fp32", "bf16")]
    require(
        dtype in offered,
        f"dtype {dtype!r} is not available for a synthetic model on backend {picked!r}; choose one of {', '.join(offered)}",
    )
    _check_ahead(options, picked)
    if options.threads is None:
        limit_torch()
    else:
        set_threads(options.threads)
    cached = capabilities.cache_dtype(options.cache_dtype, dtype=dtype)
    require(not options.screened_head, "a screened head is trained on a text, which a made-up model has not; leave --screened-head out")
    settled = replace(options, backend=picked, dtype=dtype, cache_dtype=cached)
    require(method is None or not dense, f"--dense leaves nothing to select; drop it or --method {method}")
    selects = method or usual_method(shape_of(name))
    require(selects in SELECTING_METHODS, f"--method {selects} cannot be made up; choose one of {', '.join(SELECTING_METHODS)}")
    if selects != "predicted":
        by = f"--method {selects}" if method else f"{name} selects by {selects}, and"
        require(rank is None and not selections, f"{by} has no predictors: leave --rank and --selection out")
        require(
            not heads or selects == "input", f"--method {selects} selects no heads: leave --head-density out, or take --method predicted"
        )
    targets = [] if dense else list(densities) or [DEFAULT_DENSITY if selects == "predicted" else PLAIN_DENSITY]
    if picked == "cuda":
        planted = [] if ops else list(selections)
        require(len(planted) <= 1, "a planted model has one selection on the cuda backend: name one, or add --ops, which times several")
        if selects == "predicted":
            subject = _planted(
                name, settled, rank=rank, num_layers=num_layers, densities=targets, heads=heads, selections=planted, seed=seed
            )  # fmt: skip
        else:
            subject = _made_there(name, settled, method=selects, num_layers=num_layers, densities=targets, seed=seed)
    else:
        require(num_layers is None, f"--layers takes a slice of a model planted on the GPU; backend {picked!r} has none, leave it out")
        chosen = [] if dense or selects != "predicted" else selections or ["uniform"]
        subject = _random(name, settled, method=selects, rank=rank, densities=targets, heads=heads, selections=chosen, seed=seed)
    size = subject.model.num_parameters
    about = f"(synthetic) · {size / 1e6:,.1f} M parameters · backend {picked} · {dtype} · cache {cached}"
    out.show(f"[bold]{escape(subject.name)}[/bold] {about}")
    return subject


def _check_ahead(options: EngineOptions, backend: str) -> None:
    from dejavu.config import require

    require(options.ahead is None or backend == "cuda", f"--ahead {options.ahead} is of the cuda backend, not of {backend!r}; leave it out")


def _random(
    name: str,
    options: EngineOptions,
    *,
    method: str,
    rank: int | None,
    densities: list[float],
    heads: bool,
    selections: Sequence[str],
    seed: int,
) -> Subject:
    """Random weights, and predictors, gates or inputs that select by themselves."""
    from dejavu.bench.models.random import RANK, plain_layers, planted_layers, random_ids, synthetic_model
    from dejavu.bench.rows import Shape

    made = synthetic_model(name, backend=options.backend, dtype=options.dtype, seed=seed)
    if options.backend == "native":
        made = replace(made, model=made.model.rounded("fp32", cache_dtype=options.cache_dtype))

    def layers_for(selection: str | None, density: float | None) -> Layers | None:
        if density is None:
            return None
        if method != "predicted":
            return plain_layers(made.config, method=method)
        assert selection is not None, "predictors have one"
        return planted_layers(
            made.config, selection=selection, density=density, heads=heads, rank=RANK if rank is None else rank, seed=seed
        )

    ids = random_ids(made.config, 2 * made.config.max_positions, seed=seed)
    return Subject(
        name=name,
        model=made.model,
        layers_for=layers_for,
        ids=ids,
        options=options,
        notes=[],
        densities=densities,
        selections=selections,
        shape=Shape(name=name, layers=made.config.num_layers),
    )


def _planted(
    name: str,
    options: EngineOptions,
    *,
    rank: int | None,
    num_layers: int | None,
    densities: list[float],
    heads: bool,
    selections: Sequence[str],
    seed: int,
) -> Subject:
    """Sparsity that predictors predict, made on the GPU. A slice of the shape says so in its name."""
    from dejavu.bench.models.planted import planted_model
    from dejavu.bench.models.random import random_ids
    from dejavu.bench.rows import Shape
    from dejavu.model.selectors import LayerAdapter

    made = planted_model(
        name, device="cuda", dtype=options.dtype, density=PLANTED_SHARE * min(densities or [DEFAULT_DENSITY]),
        rank=PLANTED_RANK if rank is None else rank, num_layers=num_layers, selection=next(iter(selections), "uniform"), seed=seed,
    )  # fmt: skip
    layers = made.layers if heads else tuple(LayerAdapter(neurons=layer.neurons) for layer in made.layers)
    return Subject(
        name=made.label,
        model=made.model,
        layers_for=lambda selection, density: layers if densities else None,
        ids=random_ids(made.config, 2 * made.config.max_positions, seed=seed),
        densities=densities,
        selections=selections,
        planted=made,
        shape=Shape(name=name, layers=made.layers_of_full),
        options=options,
        notes=[],
    )


def _made_there(name: str, options: EngineOptions, *, method: str, num_layers: int | None, densities: list[float], seed: int) -> Subject:
    """Gates or inputs that select by themselves, in weights made on the GPU: random ones, planted where the shape has ReLU."""
    from dejavu.bench.models import made_up
    from dejavu.bench.models.planted import not_plantable
    from dejavu.bench.models.random import plain_layers, random_ids, shape_of
    from dejavu.bench.rows import Shape

    fired = None if not_plantable(shape_of(name)) else max(densities)  # a gate cannot keep more than fires
    asked = made_up.made_up(name, dtype=options.dtype, density=fired, num_layers=num_layers)
    model = made_up.made_up_model(asked, device="cuda", seed=seed)
    layers = plain_layers(asked.config, method=method)
    whole = asked.config.num_layers == asked.full
    return Subject(
        name=name if whole else f"{name}[{asked.config.num_layers} of {asked.full} layers]",
        model=model,
        layers_for=lambda selection, density: None if density is None else layers,
        ids=random_ids(asked.config, 2 * asked.config.max_positions, seed=seed),
        densities=densities,
        shape=Shape(name=name, layers=asked.full),
        options=options,
        notes=[],
    )


def planted_qualities(subject: Subject, variants: Sequence[Variant]) -> list[tuple[str, PlantedQuality]]:
    """Mode, and what the predictors find and miss on other tokens than their thresholds come from, of each sparse variant."""
    from dejavu.bench.models.density import MAX_TOKENS
    from dejavu.bench.models.planted import planted_quality

    made = subject.planted
    if made is None:
        return []
    others = subject.ids[min(MAX_TOKENS, made.config.max_positions) :]
    return [(each.mode, planted_quality(made, each.layers, others)) for each in variants if each.layers is not None]


def quality_line(mode: str, quality: PlantedQuality) -> str:
    """What planted predictors were measured to do, for a person."""
    logits = quality.mlp_and_heads or quality.mlp
    selected = f"selected: {percent(quality.mlp_density)} of neurons, {percent(quality.head_density)} of heads"
    kept = f"recall {percent(quality.recall)}, KL to dense {number(logits.kl)}, same next token after {percent(logits.same_argmax)}"
    return f"planted, {mode}: {percent(quality.natural_density)} of the neurons fire; {selected}; {kept}"
