"""Adapters on disk: exact names, every way a folder can be wrong, and the same numbers after a round trip."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import Tiny
from dejavu.config import ModelConfig
from dejavu.files import write_json
from dejavu.kernels.quantize import dequantize_rows, quantize_rows
from dejavu.kernels.quantized import wide
from dejavu.model.adapter import Adapter
from dejavu.model.adapter_config import AdapterConfig, LayerConfig
from dejavu.model.bundle import bundled_folder
from dejavu.model.fingerprint import model_hash
from dejavu.model.selectors import InputsConfig, LayerAdapter, part_config
from dejavu.model.source import read_config
from helpers.adapters import predicted, predictor, predictors_of, varied_adapter, without_predictors

LAYERS = 12


@dataclasses.dataclass(frozen=True)
class Case:
    model: ModelConfig
    base_hash: str
    folder: Path
    adapter: Adapter

    def load(self, **options: Any) -> Adapter:
        arguments: dict[str, Any] = {"model": self.model, "base_hash": self.base_hash} | options
        return Adapter.load(self.folder, **arguments)

    def edit_config(self, edit: Callable[[dict[str, Any]], object]) -> None:
        config = json.loads((self.folder / "config.json").read_text())
        edit(config)
        write_json(self.folder / "config.json", config)

    def edit_tensors(self, edit: Callable[[dict[str, Tensor]], object]) -> None:
        tensors = load_file(self.folder / "adapter.safetensors")
        edit(tensors)
        save_file(tensors, self.folder / "adapter.safetensors")


@pytest.fixture
def case(tmp_path: Path, tiny: Tiny) -> Case:
    model = tiny("opt", num_layers=LAYERS)
    adapter = varied_adapter(model.config, model_hash(model))
    adapter.save(tmp_path / "adapter")
    return Case(model.config, model_hash(model), tmp_path / "adapter", adapter)


def test_round_trip_is_bit_exact(case: Case) -> None:
    loaded = case.load()
    assert loaded.config == case.adapter.config
    for index, (ours, theirs) in enumerate(zip(case.adapter.layers, loaded.layers, strict=True)):
        assert ours.stored.keys() == theirs.stored.keys()
        for before, after in zip(predictors_of(ours), predictors_of(theirs), strict=True):
            assert torch.equal(wide(before.A_RD), wide(after.A_RD)) and torch.equal(wide(before.B_OR), wide(after.B_OR))
            assert (before.threshold, before.lookahead) == (after.threshold, after.lookahead)
            assert set(after.bias_O.tolist()) == {float(index)}, "layer 1 is not one of layers 10 to 19"


def test_the_card_and_the_file_say_what_is_inside(case: Case) -> None:
    card = (case.folder / "README.md").read_text()
    assert "base_model: tiny-opt" in card and case.base_hash in card and "| 3 | dense | density 0.125, recall 0.900" in card
    assert "| ppl_sparse | 20.05 |" in card and "max_tokens" not in card
    tensors = load_file(case.folder / "adapter.safetensors")
    assert tensors["layers.7.mlp.A"].dtype == torch.int8 and tensors["layers.7.mlp.A.scale"].shape == (5,)
    assert sorted(name for name in tensors if name.startswith("layers.3.")) == [
        f"layers.3.heads.{suffix}" for suffix in ("A", "A.scale", "B", "B.scale", "bias")
    ]


def test_an_adapter_without_changes_is_what_older_readers_know(case: Case) -> None:
    config = json.loads((case.folder / "config.json").read_text())
    assert config["schema_version"] == 1 and "lora" not in config
    config_with = AdapterConfig.from_dict(config | {"lora": None})
    assert config_with == case.adapter.config


def test_a_missing_predictor_names_its_layer(case: Case) -> None:
    case.edit_config(lambda config: config["layers"].pop(7))
    with pytest.raises(ValueError, match=rf"predictor for layer 7 not found: {re.escape(str(case.folder))}"):
        case.load()
    case.adapter.save(case.folder)
    case.edit_tensors(lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("layers.7.mlp.")])
    with pytest.raises(ValueError, match=r"predictor for layer 7 not found: layers\.7\.mlp\.A in .*adapter\.safetensors"):
        case.load()
    case.adapter.save(case.folder)
    case.edit_tensors(lambda tensors: tensors.pop("layers.1.heads.bias"))
    with pytest.raises(ValueError, match=r"layers\.1\.heads\.bias"):
        case.load()


def test_entries_are_found_by_layer_not_by_order(case: Case) -> None:
    case.edit_config(lambda config: config["layers"].reverse())
    assert case.load().config == case.adapter.config


def test_another_model_is_refused_naming_both_hashes(case: Case, tiny: Tiny, tmp_path: Path) -> None:
    other = model_hash(tiny("opt", num_layers=LAYERS, seed=1))
    with pytest.raises(ValueError, match=rf"belongs to tiny-opt with base hash {case.base_hash}, but the model's is {other}"):
        case.load(base_hash=other)
    accepted = case.load(base_hash=other, accept=True).with_base(other)
    accepted.save(tmp_path / "both")
    for base_hash in (case.base_hash, other):
        Adapter.load(tmp_path / "both", model=case.model, base_hash=base_hash)
    assert accepted.with_base(other) is accepted


def test_swapped_manifests_of_two_models(case: Case, tiny: Tiny, tmp_path: Path) -> None:
    other = tiny("opt", num_layers=LAYERS, seed=1)
    varied_adapter(case.model, model_hash(other)).save(tmp_path / "other")
    (case.folder / "config.json").write_text((tmp_path / "other" / "config.json").read_text())
    with pytest.raises(ValueError, match=r"belongs to tiny-opt with base hash"):
        case.load()


@pytest.mark.parametrize("sizes", [{"hidden_size": 40, "num_heads": 5, "num_kv_heads": 5}, {"intermediate_size": 72}, {"num_layers": 11}])
def test_wrong_shapes(case: Case, sizes: dict[str, Any]) -> None:
    model = dataclasses.replace(case.model, **sizes)
    with pytest.raises(ValueError, match=r"this model needs torch\.int8 \[|lists 12 layers, the model has 11"):
        case.load(model=model)


def test_damaged_files(case: Case, tmp_path: Path) -> None:
    file = case.folder / "adapter.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-7])
    with pytest.raises(ValueError, match=r"adapter\.safetensors"):
        case.load()
    file.write_bytes(content)
    case.edit_tensors(lambda tensors: tensors["layers.2.mlp.bias"].fill_(float("nan")))
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.bias in .* has 64 NaN"):
        case.load()
    file.write_bytes(content)
    case.edit_tensors(lambda tensors: tensors.update({"layers.12.mlp.A": torch.ones(1)}))
    with pytest.raises(ValueError, match=r"does not list: layers\.12\.mlp\.A"):
        case.load()
    file.unlink()
    with pytest.raises(ValueError, match=r"adapter\.safetensors"):
        case.load()
    with pytest.raises(ValueError, match=r"adapter not found: .*nowhere"):
        Adapter.load(tmp_path / "nowhere", model=case.model, base_hash=case.base_hash)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda config: config.update(colour="red"), r"unknown keys \['colour'\]"),
        (lambda config: config["layers"][4]["mlp"].update(colour="red"), r"unknown keys \['colour'\]"),
        (lambda config: config.pop("base_hashes"), r"base_hashes"),
        (lambda config: config.update(schema_version=2), r"schema_version 2 is not supported"),
        (lambda config: config.update(method="guess"), r"method 'guess' is not supported; supported: predicted"),
        (lambda config: config["layers"][0]["mlp"].update(lookahead=2), r"layer 0: mlp lookahead 2 reads a layer before"),
        (lambda config: config["layers"][1]["heads"].update(lookahead=2), r"layer 1: heads lookahead 2 is none of"),
        (lambda config: config["layers"][1]["mlp"].update(rank=0), r"rank must be positive"),
        (lambda config: config["layers"][1]["mlp"].update(rank=6), r"layers\.1\.mlp\.A"),
        (lambda config: config["layers"][1]["mlp"].update(rank=True), r"rank must be a whole number, not True"),
        (lambda config: config["layers"][1]["mlp"].update(density=1.5), r"density must lie in \[0, 1\], not 1\.5"),
        (lambda config: config["layers"][1]["mlp"].update(threshold="0"), r"threshold must be a number, not '0'"),
        (lambda config: config["layers"][1].update(mlp=[3]), r"PartConfig must be an object, not \[3\]"),
        (lambda config: config["layers"][1].update(inputs=[3]), r"inputs must be an object, not \[3\]"),
        (lambda config: config["layers"][1].update(layer="1"), r"layer must be a whole number, not '1'"),
        (lambda config: config["layers"].insert(0, 3), r"LayerConfig must be an object, not 3"),
        (lambda config: config.update(layers={}), r"layers must be a list, each entry an object, not \{\}"),
        (lambda config: config.update(base_hashes="abc"), r"base_hashes must be a list, each entry a string, not 'abc'"),
        (lambda config: config.update(quality=[1]), r"quality must be an object, not \[1\]"),
        (lambda config: config.update(lora=[1]), r"lora must be an object or null, not \[1\]"),
        (lambda config: config.update(mlp_density=-0.1), r"mlp_density must lie in \[0, 1\], not -0\.1"),
        (lambda config: config.update(seed=1 << 64), r"seed must be a whole number, not 18446744073709551616"),
    ],
)
def test_bad_configs(case: Case, edit: Callable[[dict[str, Any]], object], message: str) -> None:
    case.edit_config(edit)
    with pytest.raises(ValueError, match=message):
        case.load()


def test_what_was_measured_is_what_is_stored(case: Case) -> None:
    raw = dataclasses.replace(predictor(64, layer=1), A_RD=torch.randn(5, 32, generator=torch.Generator().manual_seed(0)))
    layers = (predicted(mlp=raw), *case.adapter.layers[1:])
    entry = LayerConfig(layer=0, entries={"mlp": part_config(raw, density=0.1, recall=0.9, mass=0.9)})
    adapter = Adapter(layers=layers, config=dataclasses.replace(case.adapter.config, layers=(entry, *case.adapter.config.layers[1:])))
    before = (case.folder / "config.json").read_text()
    with pytest.raises(AssertionError, match=r"layers\.0\.mlp\.A is not quantized"):
        adapter.save(case.folder)
    assert (case.folder / "config.json").read_text() == before, "the old folder is whole"
    with pytest.raises(AssertionError, match="config and selectors differ"):
        Adapter(layers=(LayerAdapter(), *case.adapter.layers[1:]), config=case.adapter.config)


# Selection without predictors


@pytest.fixture(params=["exact", "gate", "input"])
def plain(request: pytest.FixtureRequest, tmp_path: Path, tiny: Tiny) -> Case:
    model = tiny("opt", num_layers=LAYERS)
    adapter = without_predictors(request.param, model.config, model_hash(model))
    adapter.save(tmp_path / "adapter")
    return Case(model.config, model_hash(model), tmp_path / "adapter", adapter)


def test_thresholds_come_back_as_they_were(plain: Case) -> None:
    loaded = plain.load()
    assert loaded.config == plain.adapter.config and loaded.layers == plain.adapter.layers
    assert load_file(plain.folder / "adapter.safetensors") == {} and loaded.config.schema_version == 1
    card, method = (plain.folder / "README.md").read_text(), plain.adapter.config.method
    assert f"Method `{method}`" in card and "Predictors" not in card
    row = "| 1 | density 0.500, threshold 0.1 | dense |" if method == "input" else "| 1 | density 0.250, mass 0.990, threshold "
    assert row in card and (method == "input") == ("| layer | attention | output | mlp | down |" in card)


def test_an_adapter_of_predictors_is_byte_for_byte_what_it_was(tmp_path: Path) -> None:
    """The bundled one, written before there was another method."""
    folder = bundled_folder("opt-mini") / "adapter"
    config = read_config(bundled_folder("opt-mini"))
    hashes = json.loads((folder / "config.json").read_text())["base_hashes"]
    Adapter.load(folder, model=config, base_hash=hashes[0]).save(tmp_path / "again")
    for name in ("config.json", "README.md", "adapter.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda config: config.update(method="predicted"), r"layer 1 has (gate|inputs), and method predicted is of mlp and heads"),
        (lambda config: config["layers"][1].update(mlp=PART), r"layer 1 has mlp, and method (exact|gate|input) is of (gate|inputs)"),
        (lambda config: config["layers"][1].update(colour="red"), r"unknown keys \['colour'\]"),
        (lambda config: part_of(config).update(colour="red"), r"unknown keys \['colour'\]"),
        (lambda config: part_of(config).update(threshold=-1.0), r"threshold.* must be 0 or more, not -1"),
        (lambda config: part_of(config).pop("density"), r"density"),
        (lambda config: config.update(schema_version=2), r"schema_version 2 is not supported"),
        (lambda config: config["layers"].pop(5), r"layer 5 not found"),
    ],
)
def test_thresholds_that_are_wrong(plain: Case, edit: Callable[[dict[str, Any]], object], message: str) -> None:
    plain.edit_config(edit)
    with pytest.raises(ValueError, match=message):
        plain.load()


PART = {"rank": 5, "lookahead": 0, "threshold": 0.0, "density": 0.1, "recall": 0.9, "mass": 0.9}


def part_of(config: dict[str, Any]) -> dict[str, Any]:
    """The first threshold of layer 1."""
    layer = config["layers"][1]
    return layer["gate"] if "gate" in layer else layer["inputs"]["attention" if layer["inputs"]["attention"] else "mlp"]


def test_damaged_files_without_tensors(plain: Case) -> None:
    file = plain.folder / "adapter.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-3])
    with pytest.raises(ValueError, match=r"adapter\.safetensors"):
        plain.load()
    file.write_bytes(content)
    plain.edit_tensors(lambda tensors: tensors.update({"layers.1.gate": torch.ones(1)}))
    with pytest.raises(ValueError, match=r"does not list: layers\.1\.gate"):
        plain.load()
    (plain.folder / "config.json").write_text((plain.folder / "config.json").read_text()[:-20])
    with pytest.raises(ValueError, match=r"config\.json"):
        plain.load()


def test_exact_is_a_threshold_of_zero_on_a_gate_with_zeros(tiny: Tiny, tmp_path: Path) -> None:
    model, silu = tiny("opt", num_layers=LAYERS), tiny("llama", num_layers=LAYERS)
    adapter = without_predictors("exact", model.config, "h")
    adapter.save(tmp_path / "adapter")
    with pytest.raises(ValueError, match="method exact, which needs a gate with exact zeros, and this model has silu"):
        Adapter.load(tmp_path / "adapter", model=silu.config, base_hash="h")
    with pytest.raises(ValueError, match=r"layer 1: method exact has a threshold of 0, not 0\.1"):
        dataclasses.replace(without_predictors("gate", model.config, "h").config, method="exact")
    with pytest.raises(ValueError, match="inputs without a threshold; name one of attention, output, mlp, down"):
        InputsConfig()
    with pytest.raises(AssertionError, match="layer 1: config and selectors differ"):
        Adapter(layers=(LayerAdapter(),) * LAYERS, config=adapter.config)


@given(rows=st.integers(1, 7), columns=st.integers(1, 33), seed=st.integers(0, 1000), exponent=st.integers(-25, 25))
def test_int8_rows_are_close_and_a_fixed_point(rows: int, columns: int, seed: int, exponent: int) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    matrix[0] = 0
    q, scale = quantize_rows(matrix)
    again = dequantize_rows(q, scale)
    assert (again - matrix).abs().le(matrix.abs().amax(1, keepdim=True) * (0.5 / 127 + 1e-4)).all()
    assert torch.equal(again.double(), q.double() * scale.double()[:, None]), "the products are exact in fp32"
    assert scale[0] == 0 and not again[0].any()
    q2, scale2 = quantize_rows(again)
    assert torch.equal(q, q2) and torch.equal(scale, scale2)
