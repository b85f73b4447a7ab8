"""Thresholds that give the target density, on any model and predictors."""

from __future__ import annotations

import math

import pytest
import torch

from conftest import Tiny
from dejavu.bench.models.density import rethresholded
from dejavu.bench.variants import variants_at, variants_of
from dejavu.model.masked import MaskedSelection
from dejavu.model.selectors import GateThreshold, InputThresholds, LayerAdapter
from dejavu.model.transformer import Transformer
from helpers.adapters import heads_of, mlp_of
from helpers.engines import ids_of, random_layers

IDS = ids_of(3, 60)


def measured(model: Transformer, layers: tuple[LayerAdapter, ...]) -> MaskedSelection:
    selection = MaskedSelection(layers)
    with torch.inference_mode():
        model.hidden(torch.tensor([IDS]), selection)
    return selection


@pytest.mark.parametrize("density", [0.01, 0.1, 0.55, 1.0])
@pytest.mark.parametrize("family", ["opt", "llama"])
def test_neurons(tiny: Tiny, family: str, density: float) -> None:
    model = tiny(family)
    found = measured(model, rethresholded(model, random_layers(model, mlp=1, heads=None), IDS, mlp_density=density))
    assert found.counter.mlp_per_layer() == pytest.approx([density] * 2, abs=1 / (60 * 64))


@pytest.mark.parametrize("density", [0.25, 0.4, 0.75, 1.0])
def test_heads_keep_at_least_one_and_meet_the_density(tiny: Tiny, density: float) -> None:
    model = tiny("opt")
    found = measured(model, rethresholded(model, random_layers(model, mlp=1, heads=1), IDS, mlp_density=0.2, head_density=density))
    assert found.counter.heads_per_layer() == pytest.approx([density] * 2, abs=1 / 60)
    assert found.counter.mlp_per_layer() == pytest.approx([0.2] * 2, abs=0.01)


def test_what_is_not_asked_for_stays(tiny: Tiny) -> None:
    model = tiny("opt")
    layers = random_layers(model, mlp=0, heads=0)
    changed = rethresholded(model, layers, IDS, head_density=0.5)
    assert [mlp_of(layer) is mlp_of(other) for layer, other in zip(changed, layers, strict=True)] == [True, True]
    assert all(math.isfinite(heads_of(layer).threshold) for layer in changed)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({"mlp_density": 0.0}, r"density must lie in \(0, 1\], not 0"),
        ({"mlp_density": 1.5}, r"density must lie in \(0, 1\], not 1.5"),
        ({"head_density": 0.5}, "head density 0.5 needs predictors of that part"),
    ],
)
def test_densities_that_cannot_be(tiny: Tiny, targets: dict[str, float], message: str) -> None:
    model = tiny("opt")
    with pytest.raises(ValueError, match=message):
        rethresholded(model, random_layers(model, mlp=0, heads=None), IDS, **targets)


def test_less_than_one_head_group_cannot_be(tiny: Tiny) -> None:
    model = tiny("llama")
    with pytest.raises(ValueError, match=r"head density 0.3 is less than one of 2 head groups; give at least 0.500"):
        rethresholded(model, random_layers(model, mlp=None, heads=0), IDS, head_density=0.3)


def test_variants(tiny: Tiny) -> None:
    model = tiny("opt")
    layers = random_layers(model, mlp=1, heads=0)
    as_they_are = variants_at(model, lambda *_: layers, IDS)
    assert [variant.mode for variant in as_they_are] == ["dense", "sparse", "sparse+heads"] and as_they_are[2].layers is layers
    assert variants_at(model, lambda *_: None, IDS) == as_they_are[:1] and variants_of(None) == []
    requested: list[tuple[str | None, float | None]] = []

    def layers_for(selection: str | None, density: float | None) -> tuple[LayerAdapter, ...]:
        requested.append((selection, density))
        return layers

    found = variants_at(model, layers_for, IDS, densities=[0.1, 0.3], head_densities=[0.5, 0.75], selections=["uniform"])
    assert requested == [("uniform", 0.1), ("uniform", 0.3)]
    assert [variant.mode for variant in found] == ["dense", *(["sparse", "sparse+heads", "sparse+heads"] * 2)]
    for variant, (mlp, heads) in zip(found[1:], [(0.1, 1), (0.1, 0.5), (0.1, 0.75), (0.3, 1), (0.3, 0.5), (0.3, 0.75)], strict=True):
        assert variant.layers is not None and variant.selection == "uniform"
        counter = measured(model, variant.layers).counter
        assert (counter.mlp_density(), counter.head_density()) == pytest.approx((mlp, heads), abs=0.05)
    with pytest.raises(ValueError, match="a density needs predictors"):
        variants_at(model, lambda *_: None, IDS, densities=[0.1])


def test_gates_and_inputs_have_the_target_density(tiny: Tiny) -> None:
    model = tiny("llama")
    gate = (LayerAdapter(neurons=GateThreshold(threshold=9.0)),) * 2
    counter = measured(model, rethresholded(model, gate, IDS, mlp_density=0.3)).counter
    assert counter.mlp_density() == pytest.approx(0.3, abs=0.02) and counter.head_density() == 1
    inputs = (LayerAdapter(inputs=InputThresholds(attention=9.0)),) * 2
    counter = measured(model, rethresholded(model, inputs, IDS, mlp_density=0.6, head_density=0.4)).counter
    assert (counter.mlp_density(), counter.head_density()) == pytest.approx((0.6, 0.4), abs=0.02)
    found = variants_at(model, lambda *_: inputs, IDS, head_densities=[0.4, 0.8])
    assert [variant.mode for variant in found] == ["dense", "sparse", "sparse"]
    with pytest.raises(ValueError, match=r"head density 0.5 needs predictors of that part, or a gate or inputs"):
        rethresholded(model, gate, IDS, head_density=0.5)
