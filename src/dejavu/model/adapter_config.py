"""What an adapter's config.json holds: how each layer selects, where it comes from, what was measured.

In: JSON. Out: frozen values; an unknown key, a value that cannot be and a part that its method does not have are errors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from dejavu.config import Config, require
from dejavu.model.lora import LoraConfig
from dejavu.model.predictor import HEAD_LOOKAHEADS, MLP_LOOKAHEADS, Predictor
from dejavu.model.selectors import POINTS, GateThreshold, InputThresholds
from dejavu.version import __version__

# By method. A reader that knows only 1 must refuse an adapter that changes weights; one that does not know a method refuses it by name.
SCHEMA_VERSIONS = {"predicted": 1, "adapted": 2, "exact": 1, "gate": 1, "input": 1}
SELECTS = {"predicted": "predicted", "adapted": "predicted", "exact": "gate", "gate": "gate", "input": "input"}  # see LayerAdapter.methods
PARTS = {"predicted": ("mlp", "heads"), "gate": ("gate",), "input": ("inputs",)}  # of a LayerConfig
LOOKAHEADS = {"mlp": MLP_LOOKAHEADS, "heads": HEAD_LOOKAHEADS}
METHODS = tuple(SCHEMA_VERSIONS)


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


@dataclass(frozen=True, kw_only=True, slots=True)
class GateConfig(Config):
    """The threshold of one layer's gate. density of neurons and mass are fractions measured on held-out text."""

    threshold: float
    density: float
    mass: float

    def __post_init__(self) -> None:
        GateThreshold(threshold=self.threshold)


@dataclass(frozen=True, kw_only=True, slots=True)
class InputConfig(Config):
    """The threshold of the inputs at one point, and the fraction of them that it keeps on held-out text."""

    threshold: float
    density: float


@dataclass(frozen=True, kw_only=True, slots=True)
class InputsConfig(Config):
    """The points of one layer (see selectors.py); None where all inputs are kept."""

    attention: InputConfig | None = None
    output: InputConfig | None = None
    mlp: InputConfig | None = None
    down: InputConfig | None = None

    def __post_init__(self) -> None:
        require(any(self.of(point) is not None for point in POINTS), f"inputs without a threshold; name one of {', '.join(POINTS)}")
        self.thresholds()

    def of(self, point: str) -> InputConfig | None:
        return getattr(self, point)

    def thresholds(self) -> InputThresholds:
        return InputThresholds(**{point: config.threshold for point in POINTS if (config := self.of(point)) is not None})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        points = {point: InputConfig.from_dict(values[point]) for point in POINTS if isinstance(values.get(point), Mapping)}
        return super(InputsConfig, cls).from_dict({**values, **points})


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerConfig(Config):
    """The parts of one layer; None where the part runs dense. Which there may be is the method's."""

    layer: int
    mlp: PartConfig | None = None
    heads: PartConfig | None = None
    gate: GateConfig | None = None
    inputs: InputsConfig | None = None

    def __post_init__(self) -> None:
        for part, config in self.parts():
            previous = config.lookahead == LOOKAHEADS[part][-1]
            require(
                config.lookahead in LOOKAHEADS[part],
                f"layer {self.layer}: {part} lookahead {config.lookahead} is none of {LOOKAHEADS[part]}",
            )
            require(self.layer > 0 or not previous, f"layer 0: {part} lookahead {config.lookahead} reads a layer before the first")

    def parts(self) -> list[tuple[str, PartConfig]]:
        """(part, its config) of the parts that have a predictor."""
        return [(part, config) for part, config in (("mlp", self.mlp), ("heads", self.heads)) if config is not None]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        kinds: dict[str, type[Config]] = {"mlp": PartConfig, "heads": PartConfig, "gate": GateConfig, "inputs": InputsConfig}
        parts = {key: kind.from_dict(values[key]) for key, kind in kinds.items() if isinstance(values.get(key), Mapping)}
        return super(LayerConfig, cls).from_dict({**values, **parts})

    def to_dict(self) -> dict[str, Any]:
        """As it is written: without `gate` and `inputs` where there are none, so that readers of predictors alone know all keys."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None or name not in ("gate", "inputs")}


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterConfig(Config):
    """Provenance and measurements of an adapter, what its config.json holds.

    base_hashes: every accepted form of the base (see fingerprint.py). budget: allowed relative rise of perplexity.
    calibration_max_tokens: how many tokens of the calibration text were asked for, None where that is not known.
    quality: measured numbers by name, e.g. ppl_dense, ppl_sparse. Densities are averages over all layers. lora: how the weights
    change, where the method is "adapted".
    """

    schema_version: int = 1
    base_id: str
    base_hashes: tuple[str, ...]
    method: str
    budget: float | None
    calibration_text_hash: str
    calibration_max_tokens: int | None = None
    quality: dict[str, float]
    mlp_density: float
    head_density: float
    seed: int
    layers: tuple[LayerConfig, ...]
    lora: LoraConfig | None = None
    dejavu_version: str = __version__

    @property
    def selects(self) -> str:
        """How the layers select, see LayerAdapter.methods."""
        return "gate" if self.lora is not None and self.lora.activation is not None else SELECTS[self.method]

    def __post_init__(self) -> None:
        require(self.method in METHODS, f"adapter method {self.method!r} is not supported; supported: {', '.join(METHODS)}")
        known = SCHEMA_VERSIONS[self.method]
        require(
            self.schema_version == known,
            f"adapter schema_version {self.schema_version} is not supported (this dejavu {__version__} reads {known} for {self.method})",
        )
        require((self.lora is not None) == (self.method == "adapted"), "method adapted has lora settings, and only that")
        allowed = PARTS[self.selects]
        for entry in self.layers:
            wrong = [part for parts in PARTS.values() for part in parts if part not in allowed and getattr(entry, part) is not None]
            require(not wrong, f"layer {entry.layer} has {' and '.join(wrong)}, and method {self.method} is of {' and '.join(allowed)}")
            exact = self.method not in ("exact", "adapted") or entry.gate is None or entry.gate.threshold == 0
            require(
                exact, f"layer {entry.layer}: method {self.method} has a threshold of 0, not {entry.gate.threshold if entry.gate else 0}"
            )
        tokens = self.calibration_max_tokens
        require(tokens is None or tokens >= 1, f"calibration_max_tokens must be at least 1, not {tokens}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        fields = dict(values)
        if isinstance(fields.get("layers"), list):
            fields["layers"] = tuple(LayerConfig.from_dict(layer) for layer in fields["layers"])
        if isinstance(fields.get("base_hashes"), list):
            fields["base_hashes"] = tuple(fields["base_hashes"])
        if isinstance(fields.get("lora"), Mapping):
            fields["lora"] = LoraConfig.from_dict(fields["lora"])
        return super(AdapterConfig, cls).from_dict(fields)

    def to_dict(self) -> dict[str, Any]:
        """As it is written: an adapter without changes has no `lora`, so that readers of schema 1 know all of its keys."""
        values = dataclasses.asdict(self) | {"layers": [entry.to_dict() for entry in self.layers]}
        return values if self.lora is not None else {name: value for name, value in values.items() if name != "lora"}


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
