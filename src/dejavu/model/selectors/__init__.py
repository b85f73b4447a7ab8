"""How layers select, one file a method: what a mask is, what it reads, its thresholds, its tensors and its entry in an adapter.

A new method is a class of a file here, listed in SELECTORS, an offer where it is trained (offline/), and a case where an engine lowers
selectors to what it runs.
"""

from __future__ import annotations

from dejavu.model.selectors.dense import AllHeads, AllInputs, AllNeurons
from dejavu.model.selectors.gate import GateConfig, GateThreshold
from dejavu.model.selectors.inputs import MLP_POINTS, POINTS, InputConfig, InputPoints, InputsConfig, InputThresholds, column_norms
from dejavu.model.selectors.layer import LayerAdapter, check_layers
from dejavu.model.selectors.predicted import PartConfig, PredictedHeads, PredictedNeurons, part_config
from dejavu.model.selectors.selector import STATED_DENSE, HeadSelector, InputSelector, NeuronSelector, Scoring, Selector

# By the key of its entry in a layer of an adapter's config.
SELECTORS: dict[str, type[Selector]] = {kind.key: kind for kind in (PredictedNeurons, PredictedHeads, GateThreshold, InputThresholds)}
SELECTING_METHODS = tuple(dict.fromkeys(kind.method for kind in SELECTORS.values() if kind.method is not None))

__all__ = [
    "MLP_POINTS",
    "POINTS",
    "SELECTING_METHODS",
    "SELECTORS",
    "STATED_DENSE",
    "AllHeads",
    "AllInputs",
    "AllNeurons",
    "GateConfig",
    "GateThreshold",
    "HeadSelector",
    "InputConfig",
    "InputPoints",
    "InputSelector",
    "InputThresholds",
    "InputsConfig",
    "LayerAdapter",
    "NeuronSelector",
    "PartConfig",
    "PredictedHeads",
    "PredictedNeurons",
    "Scoring",
    "Selector",
    "check_layers",
    "column_norms",
    "part_config",
]
