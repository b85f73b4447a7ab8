"""A selection method of one's own: a class, and it is masked, decoded, counted, weighed and stored; engines that do not know it say so."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import pytest
import torch
from torch import Tensor

from conftest import Tiny
from dejavu.bench.bytes_read import Formats, dense_reads, step_bytes
from dejavu.bench.models.density import rethresholded
from dejavu.config import Config, ModelConfig
from dejavu.engine.cuda.weights import layer_predictors
from dejavu.engine.native.selectors import set_selectors
from dejavu.engine.torch_engine import TorchEngine
from dejavu.model import adapter_config
from dejavu.model.adapter import Adapter
from dejavu.model.adapter_config import LayerConfig
from dejavu.model.counts import Counts
from dejavu.model.selectors import (
    SELECTORS,
    AllHeads,
    GateConfig,
    GateThreshold,
    InputConfig,
    InputsConfig,
    InputThresholds,
    LayerAdapter,
    NeuronSelector,
    PartConfig,
    PredictedNeurons,
)
from dejavu.model.transformer import LayerInputs
from helpers.adapters import make_adapter, mlp_of
from helpers.engines import decode, ids_of, masked_forward


@dataclass(frozen=True, kw_only=True, slots=True)
class EveryConfig(Config):
    step: int
    density: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EveryNeuron(NeuronSelector):
    """Every `step`-th neuron where the first input is positive, else all but those."""

    step: int
    neurons: int
    method: ClassVar[str | None] = "every"
    key: ClassVar[str] = "every"
    entry_type: ClassVar[type[Config]] = EveryConfig
    about: ClassVar[str] = "Every so many neurons of `{base}`."

    def mask(self, inputs: LayerInputs) -> Tensor:
        chosen_F = torch.arange(self.neurons) % self.step == 0
        return torch.where(inputs.attention[..., :1] > 0, chosen_F, ~chosen_F)

    def at_density(self, inputs: LayerInputs, density: float) -> Self:
        return type(self)(step=round(1 / density), neurons=self.neurons)

    def reads(self, config: ModelConfig, density: float, cached_tokens: int) -> float:
        return density

    def difference(self, entry: EveryConfig) -> str | None:
        return None if entry.step == self.step else "config and steps differ"

    def entry(self, *, density: float, recall: float, mass: float) -> EveryConfig:
        return EveryConfig(step=self.step, density=density)

    @classmethod
    def read(cls, entry: EveryConfig, layer: int, tensors: dict[str, Tensor], model: ModelConfig, path: Path) -> Self:
        return cls(step=entry.step, neurons=model.intermediate_size)

    @classmethod
    def cells(cls, entry: EveryConfig) -> dict[str, str]:
        return {"MLP": f"every {entry.step}"}


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The method listed as those of the package are."""
    monkeypatch.setitem(SELECTORS, EveryNeuron.key, EveryNeuron)
    for table, value in (("SELECTS", "every"), ("PARTS", ("every",)), ("SCHEMA_VERSIONS", 1)):
        monkeypatch.setitem(getattr(adapter_config, table), "every", value)
    monkeypatch.setattr(adapter_config, "METHODS", (*adapter_config.METHODS, "every"))


def layers_of(config: ModelConfig) -> tuple[LayerAdapter, ...]:
    return LayerAdapter(neurons=EveryNeuron(step=4, neurons=config.intermediate_size)), *[LayerAdapter()] * (config.num_layers - 1)


def test_it_is_masked_decoded_and_counted(tiny: Tiny) -> None:
    model, ids = tiny("llama"), ids_of(3)
    layers = layers_of(model.config)
    expected, selection = masked_forward(model, layers, ids)
    engine = TorchEngine(model, layers)
    logits, steps = decode(engine, ids)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    counts = Counts.cat([step.counts for step in steps])
    assert set(counts.neurons[:, 0].tolist()) == {16, 48} and (counts.neurons[:, 1] == 64).all()
    assert float(counts.densities(engine.info)[0].mean()) == pytest.approx(selection.counter.mlp_density())
    assert layers[0].methods == ("every",) and layers[0].sparse and not layers[1].sparse


def test_it_is_weighed_and_meets_a_density(tiny: Tiny) -> None:
    model = tiny("opt")
    config, layers = model.config, layers_of(model.config)
    formats = Formats(weights="fp32", cache="fp32", vectors="fp32", int8_predictors=False)
    assert step_bytes(config, formats, dense_reads(config), layers) == step_bytes(config, formats, dense_reads(config))
    (first, second) = rethresholded(model, layers, ids_of(1), mlp_density=0.125)
    assert first.neurons == EveryNeuron(step=8, neurons=64) and second == layers[1]
    with pytest.raises(ValueError, match="head density 0.5 needs predictors of that part"):
        rethresholded(model, layers, ids_of(1), head_density=0.5)


def test_it_comes_back_from_an_adapter(tiny: Tiny, tmp_path: Path, known: None) -> None:
    config = tiny("opt").config
    layers = layers_of(config)
    entries: tuple[LayerConfig, ...] = tuple(LayerConfig.of(i, each, density=0.5, recall=1.0, mass=0.5) for i, each in enumerate(layers))
    values: dict[str, Any] = {**make_adapter(config, "h").config.to_dict(), "method": "every", "layers": [e.to_dict() for e in entries]}
    adapter = Adapter(layers=layers, config=adapter_config.AdapterConfig.from_dict(values))
    adapter.save(tmp_path / "adapter")
    loaded = Adapter.load(tmp_path / "adapter", model=config, base_hash="h")
    assert loaded.layers == layers and loaded.digest == adapter.digest != make_adapter(config, "h").digest
    assert "| 0 | every 4 | dense |\n| 1 | dense | dense |" in (tmp_path / "adapter" / "README.md").read_text()
    other = (LayerAdapter(neurons=EveryNeuron(step=5, neurons=64)), *layers[1:])
    with pytest.raises(AssertionError, match="layer 0: config and steps differ"):
        Adapter(layers=other, config=adapter.config)


def test_an_engine_that_does_not_know_it_says_so(tiny: Tiny) -> None:
    model = tiny("opt")
    layers = layers_of(model.config)
    with pytest.raises(ValueError, match="layer 0 selects by method every: backend 'native' does not; use --backend torch"):
        set_selectors(None, None, layers, None, model)  # pyrefly: ignore[bad-argument-type]  # refused before the library is asked
    with pytest.raises(ValueError, match="selects by method every: backend 'cuda' does not; use --backend torch"):
        layer_predictors(layers, model.config, torch.device("cpu"))


def test_a_layer_of_selectors(tiny: Tiny) -> None:
    predicted = make_adapter(tiny("opt").config, "h").layers[-1]
    assert list(predicted.stored) == ["mlp", "heads"] and predicted.methods == ("predicted",)
    assert LayerAdapter.of(predicted.stored.values()) == predicted and LayerAdapter.of([]) == LayerAdapter()
    gate = GateThreshold(threshold=0.0)
    assert LayerAdapter(neurons=gate, heads=predicted.heads).methods == ("gate", "predicted") and not gate.by_value
    assert GateThreshold(threshold=0.1).by_value and not predicted.neurons.by_value
    moved = predicted.neurons.shifted(0.5)
    assert isinstance(moved, PredictedNeurons) and moved.predictor.threshold == mlp_of(predicted).threshold + 0.5
    assert gate.shifted(0.5) is gate and gate.lookahead is None and predicted.neurons.lookahead == 0
    inputs = InputThresholds(down=0.1)
    assert gate.difference(GateConfig(threshold=0.1, density=1.0, mass=1.0)) == "config and thresholds differ"
    assert inputs.difference(InputsConfig(mlp=InputConfig(threshold=0.1, density=0.5))) == "config and thresholds differ"
    assert inputs.difference(InputsConfig(down=InputConfig(threshold=0.1, density=0.5))) is None
    stated = predicted.neurons.entry(density=0.5, recall=1.0, mass=1.0)
    assert (
        isinstance(stated, PartConfig)
        and predicted.neurons.difference(stated) is None
        and "config says" in (moved.difference(stated) or "")
    )
    with pytest.raises(AssertionError, match="inputs are selected alone"):
        LayerAdapter(neurons=gate, heads=AllHeads(), inputs=InputThresholds(down=0.1))
