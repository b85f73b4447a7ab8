"""Neurons and heads by a predictor of their own (predictor.py). Source: Deja Vu, section 4 (arXiv 2310.17157).

In a file the predictor of layer 7's MLP is `layers.7.mlp.A` int8 [R, D] with `layers.7.mlp.A.scale` fp32 [R], `layers.7.mlp.B` int8
[O, R] with `layers.7.mlp.B.scale` fp32 [O], and `layers.7.mlp.bias` fp32 [O]; of its heads `layers.7.heads.*`.

Letters: D model  R predictor rank  O outputs (neurons F, or head groups G)
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from dejavu.config import Config, ModelConfig, require, require_shares
from dejavu.kernels.quantized import Matrix, QuantizedMatrix
from dejavu.model.predictor import HEAD_LOOKAHEADS, MLP_LOOKAHEADS, Predictor, head_predictor_input, mlp_predictor_input
from dejavu.model.selectors.dense import head_reads, mlp_reads
from dejavu.model.selectors.selector import HeadSelector, NeuronSelector, Scoring, Selector, threshold_below
from dejavu.model.transformer import LayerInputs

ABOUT = """Predictors that tell, token by token, which MLP neurons and attention heads of `{base}` are needed
(Deja Vu, arXiv 2310.17157)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PartConfig(Config):
    """One predictor as calibration left it. density, recall and mass are fractions measured on held-out text."""

    rank: int
    lookahead: int
    threshold: float
    density: float
    recall: float
    mass: float

    def __post_init__(self) -> None:
        require(self.rank > 0, f"predictor rank must be positive, not {self.rank}")
        require(math.isfinite(self.threshold), f"predictor threshold must be finite, not {self.threshold}")
        require_shares(density=self.density, recall=self.recall, mass=self.mass)


@dataclass(frozen=True, slots=True)
class _Predicted(Selector):
    """What both parts share. named: the part in messages."""

    predictor: Predictor
    method: ClassVar[str | None] = "predicted"
    entry_type: ClassVar[type[Config]] = PartConfig
    about: ClassVar[str] = ABOUT
    lookaheads: ClassVar[tuple[int, ...]]
    named: ClassVar[str]

    @classmethod
    def outputs(cls, config: ModelConfig) -> int:
        raise NotImplementedError

    @property
    def rank(self) -> int:
        return self.predictor.A_RD.shape[0]

    @property
    def tensors(self) -> tuple[Matrix, ...]:
        return self.predictor.A_RD, self.predictor.B_OR, self.predictor.bias_O

    def to(self, device: torch.device) -> Self:
        return dataclasses.replace(self, predictor=self.predictor.to(device))

    def at_threshold(self, threshold: float) -> Self:
        return dataclasses.replace(self, predictor=dataclasses.replace(self.predictor, threshold=threshold))

    def check(self, layer: int, config: ModelConfig) -> None:
        predictor, name = self.predictor, f"layer {layer}'s {self.named}"
        found, expected = (predictor.A_RD.shape[1], predictor.B_OR.shape[0]), (config.hidden_size, self.outputs(config))
        require(
            found == expected, f"the predictor of {name} maps {found[0]} to {found[1]} values, the model {expected[0]} to {expected[1]}"
        )
        looks = self.lookaheads
        require(predictor.lookahead in looks, f"the lookahead of {name} must be one of {looks}, not {predictor.lookahead}")
        allowed = " or ".join(map(str, looks[:-1]))
        its = f"its {self.named}'{'' if self.named.endswith('s') else 's'} lookahead"
        require(layer > 0 or predictor.lookahead < looks[-1], f"layer 0 has no layer before it: {its} must be {allowed}")

    def scoring(self, config: ModelConfig) -> Scoring:
        return Scoring(matrices=(self.predictor.A_RD, self.predictor.B_OR), values=self.predictor.bias_O.numel())

    def difference(self, entry: PartConfig) -> str | None:
        stated = (entry.rank, entry.lookahead, entry.threshold)
        held = (self.rank, self.predictor.lookahead, self.predictor.threshold)
        return None if stated == held else f"config says {stated}, predictor {held}"

    def entry(self, *, density: float, recall: float, mass: float) -> PartConfig:
        return part_config(self.predictor, density=density, recall=recall, mass=mass)

    def file_tensors(self, name: str) -> dict[str, Tensor]:
        """Of a predictor that is `quantized`: else what was measured is not what is stored."""
        found: dict[str, Tensor] = {}
        for letter, matrix in (("A", self.predictor.A_RD), ("B", self.predictor.B_OR)):
            assert isinstance(matrix, QuantizedMatrix), f"{name}.{letter} is not quantized: calibrate quantized(predictor)"
            found |= matrix.int8_tensors(f"{name}.{letter}")
        return found | {f"{name}.bias": self.predictor.bias_O.float().cpu().contiguous()}

    @classmethod
    def read(cls, entry: PartConfig, layer: int, tensors: dict[str, Tensor], model: ModelConfig, path: Path) -> Self:
        name, outputs = f"layers.{layer}.{cls.key}", cls.outputs(model)
        return cls(_read_predictor(name, layer, entry, outputs, model.hidden_size, tensors, path))

    @classmethod
    def check_entry(cls, layer: int, entry: PartConfig) -> None:
        looks = cls.lookaheads
        require(entry.lookahead in looks, f"layer {layer}: {cls.key} lookahead {entry.lookahead} is none of {looks}")
        previous = entry.lookahead == looks[-1]
        require(layer > 0 or not previous, f"layer 0: {cls.key} lookahead {entry.lookahead} reads a layer before the first")


@dataclass(frozen=True, slots=True)
class PredictedNeurons(_Predicted, NeuronSelector):
    """The neurons whose score exceeds the threshold; may be none."""

    key: ClassVar[str] = "mlp"
    lookaheads: ClassVar[tuple[int, ...]] = MLP_LOOKAHEADS
    named: ClassVar[str] = "MLP"

    @classmethod
    def outputs(cls, config: ModelConfig) -> int:
        return config.intermediate_size

    @property
    def lookahead(self) -> int | None:
        return self.predictor.lookahead

    def mask(self, inputs: LayerInputs) -> Tensor:
        return self.predictor.neuron_mask(mlp_predictor_input(inputs, self.predictor.lookahead))

    def at_density(self, inputs: LayerInputs, density: float) -> Self:
        scores = self.predictor.scores(mlp_predictor_input(inputs, self.predictor.lookahead))
        return self.at_threshold(threshold_below(scores, density * scores.numel()))

    def reads(self, config: ModelConfig, density: float, cached_tokens: int) -> float:
        return mlp_reads(config, density, self.rank)

    def shifted(self, by: float) -> Self:
        return self.at_threshold(self.predictor.threshold + by)

    @classmethod
    def cells(cls, entry: PartConfig) -> dict[str, str]:
        return {"MLP": _cell(entry)}

    @classmethod
    def stated(cls, entry: PartConfig, model: ModelConfig) -> dict[str, Any]:
        return _stated(entry)


@dataclass(frozen=True, slots=True)
class PredictedHeads(_Predicted, HeadSelector):
    """The groups whose score exceeds the threshold, and always the best one."""

    key: ClassVar[str] = "heads"
    lookaheads: ClassVar[tuple[int, ...]] = HEAD_LOOKAHEADS
    named: ClassVar[str] = "heads"

    @classmethod
    def outputs(cls, config: ModelConfig) -> int:
        return config.num_kv_heads

    def mask(self, inputs: LayerInputs) -> Tensor:
        return self.predictor.group_mask(head_predictor_input(inputs, self.predictor.lookahead))

    def at_density(self, inputs: LayerInputs, density: float) -> Self:
        scores = self.predictor.scores(head_predictor_input(inputs, self.predictor.lookahead))
        return self.at_threshold(_group_threshold(scores, density))

    def reads(self, config: ModelConfig, density: float, cached_tokens: int) -> float:
        return head_reads(config, density, self.rank, cached_tokens)

    @classmethod
    def cells(cls, entry: PartConfig) -> dict[str, str]:
        return {"heads": _cell(entry)}

    @classmethod
    def stated(cls, entry: PartConfig, model: ModelConfig) -> dict[str, Any]:
        return {"heads": _stated(entry)}


def part_config(predictor: Predictor, *, density: float, recall: float, mass: float) -> PartConfig:
    """The config entry of a predictor with what was measured of it."""
    return PartConfig(
        rank=predictor.A_RD.shape[0],
        lookahead=predictor.lookahead,
        threshold=predictor.threshold,
        density=density,
        recall=recall,
        mass=mass,
    )


def _cell(part: PartConfig) -> str:
    return f"density {part.density:.3f}, recall {part.recall:.3f}, mass {part.mass:.3f}, rank {part.rank}, lookahead {part.lookahead}"


def _stated(part: PartConfig) -> dict[str, Any]:
    return {"recall": part.recall, "mass": part.mass, "density": part.density, "lookahead": part.lookahead}


def _group_threshold(scores_BTG: Tensor, density: float) -> float:
    """As threshold_below, where the best group of each token is selected whatever its score."""
    scores_NG = scores_BTG.flatten(0, -2)
    tokens, groups = scores_NG.shape
    rest = (
        scores_NG.scatter(1, scores_NG.argmax(1, keepdim=True), -math.inf).flatten().sort(descending=True).values[: tokens * (groups - 1)]
    )
    if rest.numel() == 0:  # one group: it always runs
        return float(scores_NG.max())
    return threshold_below(rest, tokens * (groups * density - 1))


def _read_predictor(
    name: str, layer: int, config: PartConfig, outputs: int, size: int, tensors: dict[str, Tensor], path: Path
) -> Predictor:
    """Take the tensors of one predictor out of `tensors`, checked for presence, type, shape and finite values."""
    expected = {
        "A": ((config.rank, size), torch.int8),
        "A.scale": ((config.rank,), torch.float32),
        "B": ((outputs, config.rank), torch.int8),
        "B.scale": ((outputs,), torch.float32),
        "bias": ((outputs,), torch.float32),
    }
    held: dict[str, Tensor] = {}
    for suffix, (shape, dtype) in expected.items():
        key = f"{name}.{suffix}"
        require(key in tensors, f"predictor for layer {layer} not found: {key} in {path}")
        tensor = tensors.pop(key)
        found = (tuple(tensor.shape), tensor.dtype)
        require(found == (shape, dtype), f"{key} in {path} is {found[1]} {list(found[0])}; this model needs {dtype} {list(shape)}")
        bad = int((~torch.isfinite(tensor)).sum())
        require(bad == 0, f"{key} in {path} has {bad} NaN or infinite values; train the adapter again")
        held[suffix] = tensor
    return Predictor(
        A_RD=QuantizedMatrix("int8", held["A"], held["A.scale"], size),
        B_OR=QuantizedMatrix("int8", held["B"], held["B.scale"], config.rank),
        bias_O=held["bias"],
        threshold=config.threshold,
        lookahead=config.lookahead,
    )
