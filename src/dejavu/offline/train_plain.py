"""The methods without predictors: candidate thresholds for gates and for inputs, each with what it reads and what it costs.

exact   nothing to choose: the threshold is 0
gate    for each layer thresholds on |activated gate| that keep a mass from 0.8 to 0.99997
input   for each layer and point thresholds on |x_i| n_i that keep from a few to nearly all of the inputs; every point of every layer is
        a part of its own, so that the budget goes where it buys most

Thresholds, and what each costs, come from one dense pass over training tokens and its gradients (curvature.py), which both methods share.

Letters: N tokens  F neurons  I inputs  W windows  T tokens of a window
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dejavu.config import EXACT_ZERO_ACTIVATIONS, ModelConfig, Progress, require
from dejavu.damage import content_of
from dejavu.files import read_object, write_json
from dejavu.model.adapter_config import LayerConfig
from dejavu.model.counts import DensityCounter
from dejavu.model.selectors import POINTS, GateThreshold, InputConfig, InputsConfig, InputThresholds, LayerAdapter, column_norms
from dejavu.model.selectors.dense import mlp_reads
from dejavu.model.selectors.gate import gate_reads
from dejavu.model.selectors.inputs import input_reads
from dejavu.model.transformer import Transformer
from dejavu.offline.budget import Choice
from dejavu.offline.calibrate import Part, ThresholdCandidate
from dejavu.offline.collect import down_norms
from dejavu.offline.curvature import Loss, layer_slopes, losses
from dejavu.offline.thresholds import MASS_LEVELS, Scored, SelectionQuality

INPUT_DENSITIES = (0.02, 0.04, 0.07, *(i / 20 for i in range(2, 20)), 0.97)
SEEN_TOKENS, SEEN_LENGTH = 4096, 512  # that are read, in windows of so many, fewer where a layer is wide:
SEEN_VALUES = 12_000_000  # values of one point, at most
LEAST_SEEN = 256  # tokens
SORTED_VALUES = 500_000  # of which thresholds are taken, and what they keep is counted


def seen_windows(model: Transformer, ids_WT: Tensor) -> Tensor:
    """Beginnings of windows that are spread evenly over the text."""
    config = model.config
    widest = max(config.intermediate_size, config.num_heads * config.head_dim, config.hidden_size)
    tokens = min(SEEN_TOKENS, max(LEAST_SEEN, SEEN_VALUES // widest))
    length = min(ids_WT.shape[1], SEEN_LENGTH, tokens)
    count = min(len(ids_WT), tokens // length)
    return ids_WT[torch.linspace(0, len(ids_WT) - 1, count).long(), :length]


def _losses(
    layer: int, score_NI: Tensor, slope_NI: Tensor, contribution_NI: Tensor, *, mass: Sequence[float] = (), density: Sequence[float] = ()
) -> list[Loss]:
    """Of thresholds that keep these shares, and of 0, which leaves out exact zeros and loses nothing."""
    every = -(-score_NI.numel() // SORTED_VALUES)
    some_NI = contribution_NI[::every]
    scored = Scored(layer, score_NI[::every], some_NI, some_NI > 0, at_least_one=False)
    levels = [*map(scored.threshold_for_mass, mass), *map(scored.threshold_for_density, density)]
    return losses(score_NI, slope_NI, contribution_NI, sorted({0.0, *(max(0.0, level) for level in levels)}), every=every)


def plain_parts(
    model: Transformer, ids_WT: Tensor, methods: Sequence[str], *, seed: int, progress: Progress | None = None
) -> dict[str, list[Part]]:
    """The parts of each of the methods gate and input, with what each candidate reads and costs, by layer and point."""
    found: dict[str, list[Part]] = {method: [] for method in methods}
    for of in layer_slopes(model, seen_windows(model, ids_WT), seed=seed, progress=progress):
        block = model.blocks[of.layer]
        if "gate" in found:
            contribution_NF = of.values["down"].abs() * down_norms(block)
            kept = _losses(of.layer, of.gate.abs(), of.slopes["down"], contribution_NF, mass=MASS_LEVELS)
            found["gate"].append(_part(model.config, of.layer, "gate", kept))
        if "input" in found:
            norms = column_norms(block)
            for point in reversed(POINTS):
                score_NI = of.values[point].abs() * norms[point]
                kept = _losses(of.layer, score_NI, of.slopes[point], score_NI.square(), density=INPUT_DENSITIES)
                found["input"].append(_part(model.config, of.layer, point, kept))
    return {method: parts[::-1] for method, parts in found.items()}


def _part(config: ModelConfig, layer: int, kind: str, found: Sequence[Loss]) -> Part:
    candidates = tuple(
        ThresholdCandidate(
            threshold=loss.threshold,
            quality=loss.quality,
            reads=_reads(config, kind, loss.quality.density),
            divergence=loss.divergence if loss.threshold > 0 else 0.0,
        )
        for loss in found
    )
    return Part(layer=layer, kind=kind, dense_reads=_reads(config, kind, None), candidates=candidates)


def _adapter(kind: str, threshold: float) -> LayerAdapter:
    if kind == "gate":
        return LayerAdapter(neurons=GateThreshold(threshold=threshold))
    return LayerAdapter(inputs=InputThresholds(**{kind: threshold}))


def _reads(config: ModelConfig, kind: str, density: float | None) -> float:
    """At a density; None is dense."""
    if kind != "gate":
        return input_reads(config, kind, density)
    return mlp_reads(config, 1.0, None) if density is None else gate_reads(config, density)


def _stored_parts(path: Path, key: str) -> dict[str, list[Part]] | None:
    """Parts that an earlier, interrupted run of the same training has priced; None where there are none."""
    if not path.exists() or (stored := read_object(path)).get("key") != key:
        return None
    with content_of(path, "remove it, and it is computed again"):
        return {
            method: [Part(**part | {"candidates": tuple(map(_candidate, part["candidates"]))}) for part in parts]
            for method, parts in stored["parts"].items()
        }


def _candidate(values: dict[str, Any]) -> ThresholdCandidate:
    return ThresholdCandidate(**values | {"quality": SelectionQuality(**values["quality"])})


@dataclass(slots=True, kw_only=True)
class PlainPricing:
    """The parts of gate and input, priced when first asked for, of all methods in one pass. key: names the run whose parts may be taken."""

    model: Transformer
    ids_WT: Tensor
    methods: Sequence[str]
    seed: int
    key: str
    work_folder: Path | None
    _parts: dict[str, list[Part]] | None = field(default=None, init=False)

    def parts(self, method: str, progress: Progress | None) -> list[Part]:
        path = None if self.work_folder is None else self.work_folder / "plain_parts.json"
        if self._parts is None and path is not None:
            self._parts = _stored_parts(path, self.key)
        if self._parts is None:
            plain = [method for method in ("gate", "input") if method in self.methods]
            self._parts = plain_parts(self.model, self.ids_WT, plain, seed=self.seed, progress=progress)
            if path is not None:
                stored = {name: [dataclasses.asdict(part) for part in parts] for name, parts in self._parts.items()}
                write_json(path, {"key": self.key, "parts": stored})
        return self._parts[method]


def _row(density: float, quality: SelectionQuality | None, **others: Any) -> dict[str, Any]:
    """Of one layer, with the keys that predictors have; recall and mass None where neurons are not what is selected."""
    recall, mass = (None, None) if quality is None else (quality.recall, quality.mass)
    return {"recall": recall, "mass": mass, "density": density, "lookahead": None, "heads": None, "curve": []} | others


DENSE = SelectionQuality(1.0, 1.0, 1.0)


@dataclass(frozen=True, slots=True)
class GateSearchSpace:
    """See budget.SearchSpace. exact: the threshold is 0 in every layer, and there is nothing to choose."""

    num_layers: int
    parts: Sequence[Part]
    exact: bool = False

    def _chosen(self, choice: Choice) -> list[ThresholdCandidate | None]:
        """By layer."""
        if self.exact:
            kept = SelectionQuality(density=1.0, recall=1.0, mass=1.0)
            return [ThresholdCandidate(threshold=0.0, quality=kept, reads=0.0, divergence=0.0)] * self.num_layers
        return list(choice)

    def layers(self, choice: Choice) -> tuple[LayerAdapter, ...]:
        return tuple(LayerAdapter() if found is None else _adapter("gate", found.threshold) for found in self._chosen(choice))

    def configs(self, choice: Choice, counter: DensityCounter) -> tuple[LayerConfig, ...]:
        density_L = counter.mlp_per_layer()
        quality_L = [DENSE if found is None else found.quality for found in self._chosen(choice)]
        return tuple(
            LayerConfig.of(layer, own, density=density_L[layer], recall=quality_L[layer].recall, mass=quality_L[layer].mass)
            for layer, own in enumerate(self.layers(choice))
        )

    def rows(self, choice: Choice, counter: DensityCounter) -> list[dict[str, Any]]:
        density_L = counter.mlp_per_layer()
        curves = [[[c.quality.density, c.quality.recall, c.quality.mass] for c in part.candidates] for part in self.parts]
        return [
            _row(
                density_L[layer],
                DENSE if found is None else found.quality,
                threshold=None if found is None else found.threshold,
                curve=curves[layer] if curves else [],
            )
            for layer, found in enumerate(self._chosen(choice))
        ]


@dataclass(frozen=True, slots=True)
class InputSearchSpace:
    """See budget.SearchSpace."""

    num_layers: int
    parts: Sequence[Part]

    def _chosen(self, choice: Choice) -> list[dict[str, ThresholdCandidate]]:
        """By layer and point, without those that stay dense."""
        found: list[dict[str, ThresholdCandidate]] = [{} for _ in range(self.num_layers)]
        for part, candidate in zip(self.parts, choice, strict=True):
            if candidate is not None:
                found[part.layer][part.kind] = candidate
        return found

    def layers(self, choice: Choice) -> tuple[LayerAdapter, ...]:
        thresholds = ({point: candidate.threshold for point, candidate in points.items()} for points in self._chosen(choice))
        return tuple(LayerAdapter(inputs=InputThresholds(**points)) if points else LayerAdapter() for points in thresholds)

    def configs(self, choice: Choice, counter: DensityCounter) -> tuple[LayerConfig, ...]:
        entries = (
            {point: InputConfig(threshold=candidate.threshold, density=candidate.quality.density) for point, candidate in points.items()}
            for points in self._chosen(choice)
        )
        return tuple(
            LayerConfig(layer=layer, entries={InputThresholds.key: InputsConfig(**points)} if points else {})
            for layer, points in enumerate(entries)
        )

    def rows(self, choice: Choice, counter: DensityCounter) -> list[dict[str, Any]]:
        densities = zip(counter.mlp_per_layer(), counter.heads_per_layer(), self._chosen(choice), strict=True)
        return [
            _row(
                mlp,
                None if points else DENSE,
                attention=attention,
                inputs={point: points[point].quality.density if point in points else 1.0 for point in POINTS},
            )
            for mlp, attention, points in densities
        ]


def exact_search_space(model: Transformer) -> GateSearchSpace:
    """Raises ValueError where the gate is never exactly zero."""
    config = model.config
    require(
        config.activation in EXACT_ZERO_ACTIVATIONS,
        f"method exact needs a gate with exact zeros ({', '.join(EXACT_ZERO_ACTIVATIONS)}), and this model has {config.activation}; "
        "use --method auto, which tries gate and input",
    )
    return GateSearchSpace(config.num_layers, (), exact=True)
