"""The methods without predictors: candidate thresholds for gates and for inputs, each with what it reads and what it costs.

exact   nothing to choose: the threshold is 0
gate    for each layer thresholds on |activated gate| that keep a mass from 0.8 to 0.99997
input   for each layer and point thresholds on |x_i| n_i that keep from a few to nearly all of the inputs; every point of every layer is
        a part of its own, so that the budget goes where it buys most

Thresholds come from a dense pass over training tokens, one layer at a time. A candidate's cost is measured for a few of each part and
interpolated between, by what is lost: of the mass, or of the sum of the squares, which is how the error of a product grows.

Letters: N tokens  F neurons  I inputs  W windows  T tokens of a window
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
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
from dejavu.model.selectors.gate import gate_of, gate_reads
from dejavu.model.selectors.inputs import input_reads
from dejavu.model.transformer import LayerInputs, Selection, Transformer
from dejavu.offline.budget import Choice
from dejavu.offline.calibrate import Part, ThresholdCandidate, interpolate_divergence
from dejavu.offline.collect import down_norms
from dejavu.offline.fidelity import divergences
from dejavu.offline.split import Split
from dejavu.offline.thresholds import MASS_LEVELS, Scored, SelectionQuality

INPUT_DENSITIES = (0.02, 0.04, 0.07, *(i / 20 for i in range(2, 20)), 0.97)
MEASURED = {"gate": 4, "input": 3}  # candidates of a part whose divergence is measured
SEEN_TOKENS = 2048  # from which thresholds are taken, fewer where a layer is wide
SEEN_VALUES = 12_000_000  # values of one point that are sorted at a time
PRICED_TOKENS = 4096  # on which divergence is measured, fewer where there are many parts:
PRICED_PASSES = 100_000  # tokens times measured candidates, at most
LEAST_PRICED = 256

Options = dict[tuple[int, str], list[tuple[float, SelectionQuality]]]
"""By layer and kind ("gate", or a point): distinct thresholds with what they keep, from few to many."""


def _options(scored: Scored, levels: Sequence[float]) -> list[tuple[float, SelectionQuality]]:
    """With a threshold of 0, which leaves out exact zeros and loses nothing."""
    return [(threshold, scored.quality(threshold)) for threshold in sorted({0.0, *(max(0.0, level) for level in levels)}, reverse=True)]


class _Seen(Selection):
    """Takes thresholds for one method from a dense pass, layer by layer, as values come to be."""

    def __init__(self, model: Transformer, method: str) -> None:
        self.model, self.method = model, method
        self.options: Options = {}
        self._norms: dict[str, Tensor] = {}

    def inputs(self, layer: int, point: str, x: Tensor) -> Tensor:
        if self.method == "input":
            if point == POINTS[0]:
                self._norms = column_norms(self.model.blocks[layer])
            value_NI = (x.float().abs() * self._norms[point]).flatten(0, 1)
            scored = Scored(layer, value_NI, value_NI.square(), value_NI > 0, at_least_one=False)
            self.options[layer, point] = _options(scored, [scored.threshold_for_density(density) for density in INPUT_DENSITIES])
        return x

    def neurons(self, layer: int, inputs: LayerInputs, act_BTF: Tensor) -> Tensor:
        if self.method == "gate":
            act_NF = act_BTF.float().flatten(0, 1)
            contribution_NF = act_NF.abs() * down_norms(self.model.blocks[layer])
            scored = Scored(layer, gate_of(inputs).float().abs().flatten(0, 1), contribution_NF, act_NF != 0, at_least_one=False)
            self.options[layer, "gate"] = _options(scored, [scored.threshold_for_mass(mass) for mass in MASS_LEVELS])
        return act_BTF


@torch.inference_mode()
def seen_options(model: Transformer, ids_WT: Tensor, method: str) -> Options:
    """Candidates of every part, from the first tokens of the windows."""
    widest = max(model.config.intermediate_size, model.config.num_heads * model.config.head_dim, model.config.hidden_size)
    found = _Seen(model, method)
    model.hidden(_first_tokens(ids_WT, min(SEEN_TOKENS, max(LEAST_PRICED, SEEN_VALUES // widest))), found)
    return found.options


def _first_tokens(ids_WT: Tensor, tokens: int) -> Tensor:
    """Whole windows, or a part of one."""
    length = ids_WT.shape[1]
    return ids_WT[:1, :tokens] if length >= tokens else ids_WT[: tokens // length]


def _adapter(kind: str, threshold: float) -> LayerAdapter:
    if kind == "gate":
        return LayerAdapter(neurons=GateThreshold(threshold=threshold))
    return LayerAdapter(inputs=InputThresholds(**{kind: threshold}))


def _reads(config: ModelConfig, kind: str, density: float | None) -> float:
    """At a density; None is dense."""
    if kind != "gate":
        return input_reads(config, kind, density)
    return mlp_reads(config, 1.0, None) if density is None else gate_reads(config, density)


def _spread(count: int, picked: int) -> list[int]:
    """That many indices of so many, the first and the last among them."""
    return sorted({round(i * (count - 1) / max(1, picked - 1)) for i in range(picked)} if count else ())


def priced(model: Transformer, options: Options, ids_WT: Tensor, measured: int, progress: Progress | None) -> list[Part]:
    """The parts with what each candidate reads and costs."""
    points = {key: _spread(sum(threshold > 0 for threshold, _ in found), measured) for key, found in options.items()}
    passes = sum(map(len, points.values()))
    sample = _first_tokens(ids_WT, min(PRICED_TOKENS, max(LEAST_PRICED, PRICED_PASSES // max(1, passes))))
    variants: list[list[LayerAdapter]] = [[] for _ in range(model.config.num_layers)]
    for key, at in points.items():
        variants[key[0]] += [_adapter(key[1], options[key][index][0]) for index in at]
    costs = [iter(found) for found in divergences(model, sample, variants, progress)]
    parts = []
    for (layer, kind), found in options.items():
        at = points[layer, kind]
        kept, cost = [found[index][1].mass for index in at], [next(costs[layer]) for _ in at]
        candidates = tuple(
            ThresholdCandidate(
                threshold=threshold,
                quality=quality,
                reads=_reads(model.config, kind, quality.density),
                divergence=interpolate_divergence(kept, cost, quality.mass) if threshold > 0 else 0.0,
            )
            for threshold, quality in found
        )
        parts.append(Part(layer=layer, kind=kind, dense_reads=_reads(model.config, kind, None), candidates=candidates))
    return parts


def _stored_parts(path: Path, key: str) -> list[Part] | None:
    """Parts that an earlier, interrupted run of the same training has priced; None where there are none."""
    if not path.exists() or (stored := read_object(path)).get("key") != key:
        return None
    with content_of(path, "remove it, and it is computed again"):
        return [Part(**part | {"candidates": tuple(map(_candidate, part["candidates"]))}) for part in stored["parts"]]


def _candidate(values: dict[str, Any]) -> ThresholdCandidate:
    return ThresholdCandidate(**values | {"quality": SelectionQuality(**values["quality"])})


def _plain_parts(
    model: Transformer, split: Split, method: str, key: str, work_folder: Path | None, progress: Progress | None
) -> list[Part]:
    path = None if work_folder is None else work_folder / f"{method}_parts.json"
    parts = None if path is None else _stored_parts(path, key)
    if parts is None:
        parts = priced(model, seen_options(model, split.train, method), split.calibrate, MEASURED[method], progress)
        if path is not None:
            write_json(path, {"key": key, "parts": [dataclasses.asdict(part) for part in parts]})
    return parts


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


def gate_search_space(model: Transformer, split: Split, key: str, work_folder: Path | None, progress: Progress | None) -> GateSearchSpace:
    """A threshold for the gate of each layer. key: names the run whose priced parts may be taken over."""
    return GateSearchSpace(model.config.num_layers, _plain_parts(model, split, "gate", key, work_folder, progress))


def input_search_space(model: Transformer, split: Split, key: str, work_folder: Path | None, progress: Progress | None) -> InputSearchSpace:
    """A threshold for each point of each layer; key as above."""
    return InputSearchSpace(model.config.num_layers, _plain_parts(model, split, "input", key, work_folder, progress))
