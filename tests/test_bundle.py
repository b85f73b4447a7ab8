"""Bundled folders (int8 per row) and exports: what is written is what is read, here and in transformers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from conftest import Tiny, open_fp32
from dejavu.bench.models.random import shape_of
from dejavu.kernels.quantize import dequantize_rows, quantize_rows
from dejavu.loading import bundled_adapters
from dejavu.model import bundle
from dejavu.model.adapter import Adapter
from dejavu.model.bundle import MODELS_FOLDER, bundled_models, export, write_bundle
from dejavu.model.checkpoint import resolve_model
from dejavu.model.fingerprint import model_hash
from dejavu.model.hub import PACKAGED
from dejavu.model.tokenizer import Tokenizer
from helpers.adapters import mlp_of, varied_adapter

IDS = torch.tensor([[2, 5, 7, 11, 13, 17, 19, 23, 29]])
FAMILIES = [
    ("opt", {}),
    ("opt", {"embed_size": 16, "pre_norm": False, "final_norm": False}),
    ("opt", {"activation": "gelu_tanh", "tied_head": False}),
    ("llama", {}),
    ("llama", {"tied_head": True, "qkv_bias": True, "out_bias": True, "mlp_bias": True, "head_dim": 16}),
]


@pytest.mark.parametrize(("family", "flags"), FAMILIES, ids=str)
def test_bundle_round_trip(tmp_path: Path, tiny: Tiny, tokenizer: Tokenizer, family: str, flags: dict[str, Any]) -> None:
    model = tiny(family, **flags)
    write_bundle(model, tokenizer, tmp_path / "a")
    loaded = open_fp32(tmp_path / "a")
    assert loaded.config == model.config and loaded.stored_dtype == "int8" and loaded.notes == ()
    weights = dict(loaded.model.named_weights())
    for name, parameter in model.named_weights():
        expected = dequantize_rows(*quantize_rows(parameter)) if parameter.dim() == 2 else parameter
        assert torch.equal(weights[name], expected), name
    error = (loaded.model(IDS) - model(IDS)).abs().max()
    assert 0 < error < 0.2
    write_bundle(loaded.model, loaded.tokenizer, tmp_path / "b")
    for file in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), "a second trip changes nothing"


def test_each_scale_belongs_to_one_neuron_or_output(tmp_path: Path, tiny: Tiny, tokenizer: Tokenizer) -> None:
    write_bundle(tiny("opt"), tokenizer, tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    for name, rows in (("layers.0.up.weight", 64), ("layers.0.down.weight", 64), ("embed.weight", 96), ("position.weight", 66)):
        assert tensors[name].dtype == torch.int8 and tensors[f"{name}.scale"].shape == (rows,) and tensors[name].shape == (rows, 32)
    assert tensors["layers.0.up.bias"].dtype == torch.float32


def test_a_damaged_bundle(tmp_path: Path, tiny: Tiny, tokenizer: Tokenizer) -> None:
    write_bundle(tiny("opt"), tokenizer, tmp_path)
    file, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    tensors = load_file(file)
    save_file({name: tensor for name, tensor in tensors.items() if name != "layers.1.up.weight.scale"}, file)
    with pytest.raises(ValueError, match=r"'layers\.1\.up\.weight' is int8 \[64, 32\] without a scale"):
        open_fp32(tmp_path)
    save_file({name: tensor for name, tensor in tensors.items() if name != "layers.1.up.weight"}, file)
    with pytest.raises(ValueError, match=r"scales without their tensor: layers\.1\.up\.weight"):
        open_fp32(tmp_path)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dejavu_format": "int4-groups"}))
    with pytest.raises(ValueError, match=r"dejavu_format 'int4-groups' is not supported; supported: int8-rows, grids"):
        open_fp32(tmp_path)


@pytest.mark.parametrize(("family", "flags"), FAMILIES, ids=str)
def test_transformers_loads_an_export_with_equal_logits(
    tmp_path: Path, tiny: Tiny, tokenizer: Tokenizer, family: str, flags: dict[str, Any]
) -> None:
    model = tiny(family, **flags)
    export(model, tokenizer, tmp_path / "hf")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto").eval()
    assert reference.dtype == torch.float32
    with torch.inference_mode():
        torch.testing.assert_close(reference(IDS).logits, model(IDS), rtol=1e-5, atol=1e-5)
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path / "hf")("the cat")["input_ids"] == tokenizer.encode("the cat")
    again = open_fp32(tmp_path / "hf")
    assert torch.equal(again.model(IDS), model(IDS)) and again.base_hash == model_hash(model) and again.config == model.config


def test_bf16_export(tmp_path: Path, tiny: Tiny, tokenizer: Tokenizer) -> None:
    model = tiny("llama")
    export(model, tokenizer, tmp_path / "hf", dtype="bf16")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto").eval()
    assert reference.dtype == torch.bfloat16
    loaded = open_fp32(tmp_path / "hf")
    assert loaded.stored_dtype == "bf16" and loaded.base_hash == model_hash(model, stored_as=torch.bfloat16)
    with torch.inference_mode():
        torch.testing.assert_close(reference.float()(IDS).logits, loaded.model(IDS), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"dtype 'fp8' cannot be exported; choose one of fp32, bf16, int8, int4"):
        export(model, tokenizer, tmp_path / "other", dtype="fp8")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_export_takes_its_adapter_along(tmp_path: Path, tiny: Tiny, tokenizer: Tokenizer, dtype: str) -> None:
    """From the int8 bundle: the fp32 export shares its hash, a bf16 copy adds one; both find their adapter."""
    write_bundle(tiny("opt"), tokenizer, tmp_path / "bundled")
    bundled = open_fp32(tmp_path / "bundled")
    assert bundled.adapter_folder is None
    varied_adapter(bundled.config, bundled.base_hash).save(tmp_path / "bundled" / "adapter")
    folder = bundled.adapter_folder
    assert folder is not None and folder == tmp_path / "bundled" / "adapter"
    adapter = Adapter.load(folder, model=bundled.config, base_hash=bundled.base_hash)
    export(bundled.model, bundled.tokenizer, tmp_path / "hf", dtype=dtype, adapter=adapter)
    exported = open_fp32(tmp_path / "hf")
    assert exported.adapter_folder is not None
    loaded = Adapter.load(exported.adapter_folder, model=exported.config, base_hash=exported.base_hash)
    assert (exported.base_hash == bundled.base_hash) == (dtype == "fp32")
    assert loaded.config.base_hashes == tuple(dict.fromkeys((bundled.base_hash, exported.base_hash)))
    assert dataclasses.replace(loaded.config, base_hashes=()) == dataclasses.replace(adapter.config, base_hashes=())


def test_bundled_models_are_found_by_name(tmp_path: Path, tiny: Tiny, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "MODELS_FOLDER", tmp_path / "models")
    assert bundled_models() == []
    write_bundle(tiny("opt"), tokenizer, tmp_path / "models" / "opt-nano")
    assert bundled_models() == ["opt-nano"] and resolve_model("opt-nano") == tmp_path / "models" / "opt-nano"
    with pytest.raises(ValueError, match=r"unknown model 'opt-nana': no bundled model \(opt-nano\)"):
        resolve_model("opt-nana")


def test_a_failed_export_leaves_nothing_behind(tmp_path: Path, tiny: Tiny, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: object, stored_as: torch.dtype) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(bundle, "model_hash", fail)
    model = tiny("opt")
    with pytest.raises(KeyboardInterrupt):
        export(model, tokenizer, tmp_path / "hf", adapter=varied_adapter(model.config, "0" * 64))
    assert list(tmp_path.iterdir()) == []


def test_the_bundled_adapter_of_smollm2_is_whole() -> None:
    """It loads for its base's architecture, every layer predicts, weights change, and it stays within its size."""
    folder = MODELS_FOLDER / "smollm2-sparse" / "adapter"
    values = json.loads((folder / "config.json").read_text())
    adapter = Adapter.load(folder, model=shape_of("smollm2-135m"), base_hash=values["base_hashes"][0])
    assert adapter.config.base_id in PACKAGED and adapter.config.mlp_density < 0.2
    thresholds = {mlp_of(layer).threshold for layer in adapter.layers}
    assert adapter.lora is not None and len(thresholds) == 1  # moved together
    assert sum(file.stat().st_size for file in folder.iterdir()) < 16e6 and "smollm2-sparse" in bundled_adapters()
