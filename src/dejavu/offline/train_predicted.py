"""The method predicted: predictors of every layer, with candidate thresholds. Finished layers are kept in `work_folder`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dejavu.config import ModelConfig, Progress
from dejavu.damage import content_of
from dejavu.files import read_metadata, read_safetensors, write_safetensors
from dejavu.kernels.quantized import wide
from dejavu.model.adapter import quantized
from dejavu.model.adapter_config import LayerConfig
from dejavu.model.counts import DensityCounter
from dejavu.model.predictor import Predictor
from dejavu.model.selectors import LayerAdapter, PartConfig, PredictedHeads, PredictedNeurons
from dejavu.model.selectors.dense import ALL_HEADS, ALL_NEURONS
from dejavu.model.transformer import Transformer
from dejavu.offline.budget import Choice
from dejavu.offline.calibrate import Part, ThresholdCandidate, interpolate_divergence
from dejavu.offline.collect import LayerData, mean_input, sweep_layers
from dejavu.offline.fidelity import divergences
from dejavu.offline.memory import WorkMemory
from dejavu.offline.predictors import start_mlp, train_heads, train_mlp
from dejavu.offline.split import Split
from dejavu.offline.thresholds import MASS_LEVELS, Scored, SelectionQuality, score_heads, score_mlp
from dejavu.offline.train_config import TrainConfig

HEAD_DENSITIES = (0.5, 0.58, 0.66, 0.75, 0.8, 0.85, 0.9, 0.95)
MEASURED_EVERY = 3  # divergence is measured at every third candidate and interpolated between
HELD_OUT_SCORES = 10_000_000  # held-out scores of one layer that are sorted at a time
HELD_OUT_TOKENS = 3072
PRICED_TOKENS = 4096  # on which divergence is measured


@dataclass(slots=True)
class TrainedLayer:
    """The predictors of one layer before thresholds are chosen, with what thresholds would do (held-out text)."""

    predictors: dict[str, Predictor]
    options: dict[str, list[tuple[float, SelectionQuality]]]


def held_out_tokens(config: ModelConfig) -> int:
    """Tokens on which predictors are judged: fewer for wide layers, whose scores are sorted all at once."""
    return min(HELD_OUT_TOKENS, max(256, HELD_OUT_SCORES // config.intermediate_size))


def _options(scored: Scored, kind: str) -> list[tuple[float, SelectionQuality]]:
    """Distinct thresholds with what they select, from few to many."""
    if kind == "mlp":
        thresholds = {scored.threshold_for_mass(mass) for mass in MASS_LEVELS}
    else:
        thresholds = {scored.threshold_for_density(density) for density in HEAD_DENSITIES}
    return [(threshold, scored.quality(threshold)) for threshold in sorted(thresholds, reverse=True)]


def choose_lookahead(data: LayerData, model: Transformer, config: TrainConfig, train: int) -> Predictor:
    """The closed-form predictor of the lookahead that the budget prefers: the cheap test before full training."""
    block, rank = model.blocks[data.layer], config.rank_of(model.config.hidden_size)
    if config.lookahead != "auto":
        return start_mlp(data, block, rank, int(config.lookahead), train)
    held_out = slice(train, train + held_out_tokens(model.config) // 2)
    starts, density = [], []
    for lookahead in (0, 1):
        start = start_mlp(data, block, rank, lookahead, train)
        scored = score_mlp(start, data, block, held_out)
        starts.append(start)
        density.append(scored.quality(scored.threshold_for_mass(0.97)).density)
    return starts[1] if density[1] <= (1 + config.lookahead_tolerance) * density[0] else starts[0]


def choose_head_lookahead(data: LayerData, groups: int, config: TrainConfig, train: int) -> int:
    """The same cheap test for the heads: 1 where its closed-form predictor loses at most (1 + lookahead_tolerance) times the mass
    that lookahead 0 loses at the same density. Layer 0 has no layer before it to read."""
    if data.previous_mlp_ND is None:
        return 0
    if config.lookahead != "auto":
        return int(config.lookahead)
    held_out, lost = slice(train, train + HELD_OUT_TOKENS // 2), []
    for lookahead in (0, 1):
        start = train_heads(data, groups, lookahead, tokens=train, steps=0, generator=torch.Generator())
        scored = score_heads(start, data, held_out)
        lost.append(1 - scored.quality(scored.threshold_for_density(0.75)).mass)
    return int(lost[1] <= (1 + config.lookahead_tolerance) * lost[0])


def train_layer(data: LayerData, model: Transformer, config: TrainConfig, train: int) -> TrainedLayer:
    """Both predictors of a layer, rounded to what an adapter stores, from the first `train` tokens; judged on the rest."""
    block = model.blocks[data.layer]
    generator = torch.Generator().manual_seed(config.seed * 1009 + data.layer)
    held_out = slice(train, train + held_out_tokens(model.config))
    start = choose_lookahead(data, model, config, train)
    settings = {"epochs": config.epochs, "loss": config.loss, "learning_rate": config.learning_rate}
    mlp = train_mlp(data, block, start, tokens=train, generator=generator, **settings)
    mlp = quantized(mlp, mean_input(data.mlp_input(mlp.lookahead)[:train], data.device))
    predictors, options = {"mlp": mlp}, {"mlp": _options(score_mlp(mlp, data, block, held_out), "mlp")}
    if config.heads and model.config.num_kv_heads > 1:
        groups = model.config.num_kv_heads
        lookahead = choose_head_lookahead(data, groups, config, train)
        heads = train_heads(data, groups, lookahead, tokens=train, steps=100, generator=generator)
        heads = quantized(heads, mean_input(data.head_input(lookahead)[:train], data.device))
        predictors["heads"], options["heads"] = heads, _options(score_heads(heads, data, held_out), "heads")
    return TrainedLayer(predictors, options)


def _save_layer(folder: Path, layer: int, key: str, trained: TrainedLayer) -> None:
    """In one file, so that tensors and what is said of them are always of one run."""
    tensors, parts = {}, {}
    for kind, predictor in trained.predictors.items():
        tensors |= {f"{kind}.A": wide(predictor.A_RD), f"{kind}.B": wide(predictor.B_OR), f"{kind}.bias": predictor.bias_O}
        options = [[threshold, *dataclasses.astuple(quality)] for threshold, quality in trained.options[kind]]
        parts[kind] = {"lookahead": predictor.lookahead, "options": options}
    made = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    write_safetensors(_layer_file(folder, layer), made, {"key": key, "parts": json.dumps(parts)})


def _layer_file(folder: Path, layer: int) -> Path:
    return folder / f"layer_{layer}.safetensors"


def _load_layer(folder: Path, layer: int, key: str, model: Transformer) -> TrainedLayer | None:
    """A layer finished by an earlier, interrupted run of the same training, on the model's device; None where there is none."""
    path = _layer_file(folder, layer)
    if not path.exists() or (stored := read_metadata(path)).get("key") != key:
        return None
    tensors = read_safetensors(path)
    trained = TrainedLayer({}, {})
    with content_of(path, "remove it, and the layer is trained again"):
        for kind, part in json.loads(stored["parts"]).items():
            A, B, bias = (tensors[f"{kind}.{name}"] for name in ("A", "B", "bias"))
            predictor = quantized(Predictor(A_RD=A, B_OR=B, bias_O=bias, threshold=0.0, lookahead=part["lookahead"]))
            trained.predictors[kind] = predictor.to(model.device)
            trained.options[kind] = [(row[0], SelectionQuality(*row[1:])) for row in part["options"]]
            _selector(trained, kind, 0.0).check(layer, model.config)
    return trained


def _selector(trained: TrainedLayer, kind: str, threshold: float) -> PredictedNeurons | PredictedHeads:
    predictor = dataclasses.replace(trained.predictors[kind], threshold=threshold)
    return PredictedNeurons(predictor) if kind == PredictedNeurons.key else PredictedHeads(predictor)


def priced_parts(
    model: Transformer, layers: Sequence[TrainedLayer], ids_WT: Tensor, config: TrainConfig, progress: Progress | None
) -> list[Part]:
    """Every part of every layer with its candidates: reads counted, divergence measured or interpolated."""
    measured = {
        (layer, kind): sorted({0, len(options) - 1, *range(1, len(options), MEASURED_EVERY)})
        for layer, trained in enumerate(layers)
        for kind, options in trained.options.items()
    }
    variants = [
        [
            LayerAdapter.of([_selector(trained, kind, options[i][0])])
            for kind, options in trained.options.items()
            for i in measured[layer, kind]
        ]
        for layer, trained in enumerate(layers)
    ]
    costs = divergences(model, ids_WT, variants, progress)
    parts = []
    for layer, trained in enumerate(layers):
        first = 0
        for kind, options in trained.options.items():
            points = measured[layer, kind]
            divergence = costs[layer][first : first + len(points)]
            first += len(points)
            selector = _selector(trained, kind, 0.0)
            masses = [options[i][1].mass for i in points]
            candidates = []
            for threshold, quality in options:
                reads = selector.reads(model.config, quality.density, config.cached_tokens)
                cost = interpolate_divergence(masses, divergence, quality.mass)
                candidates.append(ThresholdCandidate(threshold=threshold, quality=quality, reads=reads, divergence=cost))
            dense = (ALL_NEURONS if kind == PredictedNeurons.key else ALL_HEADS).reads(model.config, 1.0, config.cached_tokens)
            parts.append(Part(layer=layer, kind=kind, dense_reads=dense, candidates=tuple(candidates)))
    return parts


@dataclass(frozen=True, slots=True)
class PredictedSearchSpace:
    """See budget.SearchSpace."""

    trained: Sequence[TrainedLayer]
    parts: Sequence[Part]

    def layers(self, choice: Choice) -> tuple[LayerAdapter, ...]:
        return _layer_adapters(self.parts, choice, self.trained)

    def configs(self, choice: Choice, counter: DensityCounter) -> tuple[LayerConfig, ...]:
        return _layer_configs(self.parts, choice, self.trained)

    def rows(self, choice: Choice, counter: DensityCounter) -> list[dict[str, Any]]:
        return _layer_rows(self.parts, choice, self.trained)


def predicted_search_space(
    model: Transformer, split: Split, config: TrainConfig, key: str, work_folder: Path | None, progress: Progress | None
) -> PredictedSearchSpace:
    """Predictors for neurons and heads. key: names the run whose finished layers may be taken over."""
    layers = _trained_layers(model, split, config, key, work_folder, progress)
    sample = split.calibrate[: max(1, PRICED_TOKENS // split.calibrate.shape[1])]
    return PredictedSearchSpace(layers, priced_parts(model, layers, sample, config, progress))


def _layer_adapters(parts: Sequence[Part], choice: Choice, layers: Sequence[TrainedLayer]) -> tuple[LayerAdapter, ...]:
    chosen: list[list[PredictedNeurons | PredictedHeads]] = [[] for _ in layers]
    for part, candidate in zip(parts, choice, strict=True):
        if candidate is not None:
            chosen[part.layer].append(_selector(layers[part.layer], part.kind, candidate.threshold))
    return tuple(map(LayerAdapter.of, chosen))


def _layer_configs(parts: Sequence[Part], choice: Choice, layers: Sequence[TrainedLayer]) -> tuple[LayerConfig, ...]:
    chosen: list[dict[str, PartConfig]] = [{} for _ in layers]
    for part, candidate in zip(parts, choice, strict=True):
        if candidate is not None:
            selector = _selector(layers[part.layer], part.kind, candidate.threshold)
            chosen[part.layer][part.kind] = selector.entry(**dataclasses.asdict(candidate.quality))
    return tuple(LayerConfig(layer=layer, entries=entries) for layer, entries in enumerate(chosen))


def _trained_layers(
    model: Transformer, split: Split, config: TrainConfig, key: str, work_folder: Path | None, progress: Progress | None
) -> list[TrainedLayer]:
    """Every layer's predictors: taken from the work folder where finished, trained otherwise."""
    num_layers = model.config.num_layers
    layers = [None if work_folder is None else _load_layer(work_folder, layer, key, model) for layer in range(num_layers)]
    if all(trained is not None for trained in layers):
        return [trained for trained in layers if trained is not None]
    train = split.train.numel()
    held_out = split.calibrate[: max(1, -(-held_out_tokens(model.config) // split.calibrate.shape[1]))]
    finished: list[TrainedLayer] = []
    work = WorkMemory.of(config.work_memory, work_folder)
    for data in sweep_layers(model, torch.cat([split.train, held_out]), work=work, progress=progress):
        trained = layers[data.layer]
        if trained is None:
            if progress is not None:
                progress("training predictors", data.layer, num_layers)
            trained = train_layer(data, model, config, train)
            if work_folder is not None:
                _save_layer(work_folder, data.layer, key, trained)
        finished.append(trained)
        if progress is not None:
            progress("training predictors", data.layer + 1, num_layers)
        del data
    return finished


def _layer_rows(parts: Sequence[Part], choice: Choice, layers: Sequence[TrainedLayer]) -> list[dict[str, Any]]:
    """What was measured per layer on held-out text; a dense MLP has density 1, recall 1, mass 1 and no lookahead."""
    dense = {"recall": 1.0, "mass": 1.0, "density": 1.0, "lookahead": None}
    rows: list[dict[str, Any]] = [{**dense, "heads": None, "curve": []} for _ in layers]
    for part, candidate in zip(parts, choice, strict=True):
        row = rows[part.layer]
        if part.kind == "mlp":
            row["curve"] = [[c.quality.density, c.quality.recall, c.quality.mass] for c in part.candidates]
        if candidate is None:
            continue
        measured = dataclasses.asdict(candidate.quality) | {"lookahead": layers[part.layer].predictors[part.kind].lookahead}
        if part.kind == "mlp":
            row |= measured
        else:
            row["heads"] = measured
    return rows
