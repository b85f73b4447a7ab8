"""What an adapter's config.json holds: how each layer selects, where it comes from, what was measured.

In: JSON. Out: frozen values; an unknown key, a value that cannot be and a part that its method does not have are errors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from dejavu.config import Config, check_types, require, require_shares, shown, with_tuples
from dejavu.kernels.screen import check_threshold
from dejavu.model.lora import LoraConfig
from dejavu.model.selectors import SELECTING_METHODS, SELECTORS, GateThreshold, LayerAdapter
from dejavu.version import __version__

# How the layers of an adapter's method select, see LayerAdapter.methods.
SELECTS = {"predicted": "predicted", "adapted": "predicted", "exact": "gate"} | {each: each for each in (*SELECTING_METHODS, "head")}
METHODS = tuple(SELECTS)
# A reader that knows only 1 must refuse an adapter that changes weights; one that does not know a method refuses it by name.
SCHEMA_VERSIONS = {method: 2 if method == "adapted" else 1 for method in METHODS}
# The keys of a layer's entries, by how it selects.
PARTS = {method: tuple(key for key, kind in SELECTORS.items() if kind.method == method) for method in SELECTS.values()}


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerConfig(Config):
    """One layer: an entry for each of its selectors, by key (see SELECTORS). Which there may be is the method's."""

    layer: int
    entries: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, entry in self.entries.items():
            SELECTORS[key].check_entry(self.layer, entry)

    @classmethod
    def of(cls, layer: int, selectors: LayerAdapter, **measured: float) -> Self:
        """With what was measured (density, recall, mass) of all that it selects."""
        return cls(layer=layer, entries={key: selector.entry(**measured) for key, selector in selectors.stored.items()})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        known = {"layer", *SELECTORS}
        require(isinstance(values, Mapping), f"{cls.__name__} must be an object, not {shown(values)}")
        unknown = sorted(set(values) - known)
        require(not unknown, f"unknown keys {shown(unknown)} for {cls.__name__}; it knows {sorted(known)}")
        check_types(cls, {"layer": values.get("layer")})
        entries = {key: kind.entry_type.from_dict(values[key]) for key, kind in SELECTORS.items() if values.get(key) is not None}
        return cls(layer=values["layer"], entries=entries)

    def to_dict(self) -> dict[str, Any]:
        """As it is written: keys of predictors always, others where there is something, so that readers of predictors alone know all."""
        written = {key: dataclasses.asdict(self.entries[key]) if key in self.entries else None for key in SELECTORS}
        return {"layer": self.layer} | {key: entry for key, entry in written.items() if entry is not None or key in PARTS["predicted"]}


@dataclass(frozen=True, kw_only=True, slots=True)
class ScreenConfig(Config):
    """A screened head (kernels/screen.py) with what was measured of it on the check windows: tokens of a shortlist and missed mass in the
    mean, agreement with the full head's choices.
    """

    threshold: float
    clusters: int
    tokens: float
    agreement: float
    missed: float
    missed_stderr: float

    def __post_init__(self) -> None:
        check_threshold(self.threshold)
        require(self.clusters >= 1, f"a screened head has at least 1 cluster, not {self.clusters}")
        require(self.tokens > 0 and self.missed_stderr >= 0, f"impossible measurements of a screened head: {shown(self.to_dict())}")
        require_shares(agreement=self.agreement, missed=self.missed)


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterConfig(Config):
    """Provenance and measurements of an adapter, what its config.json holds.

    base_hashes: every accepted form of the base (see fingerprint.py). budget: allowed relative rise of perplexity.
    calibration_max_tokens: how many tokens of the calibration text were asked for, None where that is not known. calibration_texts: the
    names of its files, none where they are not known.
    quality: measured numbers by name, e.g. ppl_dense, ppl_sparse. Densities are averages over all layers. lora: how the weights
    change, where the method is "adapted". screened_head: where there is one; with method "head" it is all there is.
    """

    schema_version: int = 1
    base_id: str
    base_hashes: tuple[str, ...]
    method: str
    budget: float | None
    calibration_text_hash: str
    calibration_max_tokens: int | None = None
    calibration_texts: tuple[str, ...] = ()
    quality: dict[str, float]
    mlp_density: float
    head_density: float
    seed: int
    layers: tuple[LayerConfig, ...]
    lora: LoraConfig | None = None
    screened_head: ScreenConfig | None = None
    dejavu_version: str = __version__

    @property
    def calibration_text(self) -> str:
        """The text in words, by what is known of it."""
        named = f"{', '.join(self.calibration_texts)}, " if self.calibration_texts else ""
        return f"the text that it was trained on ({named}SHA-256 {self.calibration_text_hash})"

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
        require(self.method != "head" or self.screened_head is not None, "method head has a screened_head")
        allowed = PARTS[self.selects]
        for entry in self.layers:
            wrong = [key for parts in PARTS.values() for key in parts if key not in allowed and key in entry.entries]
            require(not wrong, f"layer {entry.layer} has {' and '.join(wrong)}, and method {self.method} is of {' and '.join(allowed)}")
            threshold = entry.entries[GateThreshold.key].threshold if GateThreshold.key in entry.entries else 0
            exact = self.method not in ("exact", "adapted") or threshold == 0
            require(exact, f"layer {entry.layer}: method {self.method} has a threshold of 0, not {threshold}")
        require_shares(mlp_density=self.mlp_density, head_density=self.head_density)
        tokens = self.calibration_max_tokens
        require(tokens is None or tokens >= 1, f"calibration_max_tokens must be at least 1, not {tokens}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        fields = dict(values)
        if isinstance(fields.get("layers"), list):
            fields["layers"] = tuple(LayerConfig.from_dict(layer) for layer in fields["layers"])
        if isinstance(fields.get("lora"), Mapping):
            fields["lora"] = LoraConfig.from_dict(fields["lora"])
        if isinstance(fields.get("screened_head"), Mapping):
            fields["screened_head"] = ScreenConfig.from_dict(fields["screened_head"])
        return super(AdapterConfig, cls).from_dict(with_tuples(fields, "base_hashes", "calibration_texts"))

    def to_dict(self) -> dict[str, Any]:
        """As it is written: what is optional only where there is some, so that older readers know all keys of others."""
        values = dataclasses.asdict(self) | {"layers": [entry.to_dict() for entry in self.layers]}
        return {name: value for name, value in values.items() if value or name not in ("lora", "screened_head", "calibration_texts")}
