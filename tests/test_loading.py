"""Opening checkpoints: layouts, shards, unsafe names, damage; what a user calls a model."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import Tiny, open_fp32
from dejavu.config import ModelConfig, RopeConfig
from dejavu.files import write_json
from dejavu.model.adapter import Adapter
from dejavu.model.bundle import export
from dejavu.model.checkpoint import load_checkpoint, resolve_model
from dejavu.model.fingerprint import model_hash
from dejavu.model.tokenizer import Tokenizer
from dejavu.model.transformer import Transformer
from helpers.elsewhere import DEVICE, elsewhere

IDS = torch.tensor([[2, 5, 7, 11, 13, 17, 19]])
INDEX = "model.safetensors.index.json"

Folder = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path, tiny: Tiny, tokenizer: Tokenizer) -> Folder:
    """`folder(family)`: a tiny model as a plain Hugging Face folder."""

    def write(family: str = "opt", **overrides: Any) -> Path:
        export(tiny(family, **overrides), tokenizer, tmp_path / "model")
        return tmp_path / "model"

    return write


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def replace_weights(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")


def shard(folder: Path, count: int = 3) -> dict[str, str]:
    """Split model.safetensors into shards with an index; returns its weight_map."""
    tensors = weights(folder)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {name: f"model-{i % count + 1:05}-of-{count:05}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, folder / file)
    write_json(folder / INDEX, {"metadata": {}, "weight_map": weight_map})
    return weight_map


def test_three_spellings_of_opt_and_a_bin_file_are_bit_equal(folder: Folder) -> None:
    path = folder()
    original = weights(path)
    expected = open_fp32(path)
    embed = original["model.decoder.embed_tokens.weight"]
    bare = {name.removeprefix("model."): tensor for name, tensor in original.items()}
    inside = {name.removeprefix("model.decoder."): tensor for name, tensor in original.items()}
    for tensors in (original | {"lm_head.weight": embed}, bare, inside):
        replace_weights(path, tensors)
        loaded = open_fp32(path)
        assert torch.equal(loaded.model(IDS), expected.model(IDS)) and loaded.base_hash == expected.base_hash
        assert loaded.notes == ()
    config = json.loads((path / "config.json").read_text())
    write_json(path / "config.json", config | {"tie_word_embeddings": False})
    assert torch.equal(open_fp32(path).model(IDS), expected.model(IDS)), "no head in the file: tied"
    (path / "model.safetensors").unlink()
    torch.save(bare, path / "pytorch_model.bin")
    assert torch.equal(open_fp32(path).model(IDS), expected.model(IDS))


def test_a_stored_head_that_differs_from_the_tied_embedding_is_used(folder: Folder) -> None:
    path = folder()
    tensors = weights(path)
    head = torch.randn(96, 32, generator=torch.Generator().manual_seed(3))
    replace_weights(path, tensors | {"lm_head.weight": head})
    loaded = open_fp32(path)
    assert not loaded.config.tied_head and "lm_head.weight" in loaded.notes[0]
    hidden = loaded.model.hidden(IDS)
    assert torch.equal(loaded.model(IDS), hidden @ head.T)


def test_missing_unknown_and_unused_tensors(folder: Folder) -> None:
    path = folder()
    tensors = weights(path)
    fc2 = "model.decoder.layers.1.fc2.weight"
    renamed = {name.replace("1.fc2.weight", "1.fc3.weight"): tensor for name, tensor in tensors.items()}
    replace_weights(path, renamed)
    with pytest.raises(ValueError, match=r"lacks 1 of \d+ tensors: layers\.1\.fc2\.weight;"):
        open_fp32(path)
    replace_weights(path, {name: tensor for name, tensor in tensors.items() if "layers.1" not in name})
    with pytest.raises(ValueError, match=r"lacks 16 of \d+ tensors: (layers\.1\.\S+, ){5}\.\.\."):
        open_fp32(path)
    replace_weights(path, tensors | {"model.decoder.layers.1.fc9.weight": tensors[fc2], "model.decoder.rotary_emb.inv_freq": torch.ones(4)})
    assert open_fp32(path).notes == ("1 tensors of the checkpoint are not used: model.decoder.layers.1.fc9.weight",)
    replace_weights(path, tensors | {"model.decoder.layers.1.fc9.bias": torch.ones(3)})
    with pytest.raises(ValueError, match=r"1 bias tensors .*layers\.1\.fc9\.bias"):
        open_fp32(path)
    replace_weights(path, tensors | {"decoder.layers.1.fc2.weight": tensors[fc2]})
    with pytest.raises(ValueError, match=r"'layers\.1\.fc2\.weight' twice"):
        open_fp32(path)
    replace_weights(path, tensors | {fc2: tensors[fc2][:, :-1]})
    with pytest.raises(ValueError, match=r"fc2\.weight' .* has shape \[32, 63\], config\.json makes it \[32, 64\]"):
        open_fp32(path)


def test_a_llama_without_its_own_head_is_incomplete(folder: Folder) -> None:
    path = folder("llama")
    replace_weights(path, {name: tensor for name, tensor in weights(path).items() if name != "lm_head.weight"})
    with pytest.raises(ValueError, match=r"lacks 1 of \d+ tensors: lm_head\.weight"):
        open_fp32(path)


def test_biases_that_the_config_denies_are_refused(folder: Folder) -> None:
    path = folder("llama", qkv_bias=True, out_bias=True)
    config = json.loads((path / "config.json").read_text())
    open_fp32(path)
    write_json(path / "config.json", config | {"attention_bias": False})
    with pytest.raises(ValueError, match=r"8 bias tensors"):
        open_fp32(path)


@pytest.mark.parametrize(("value", "count"), [(float("nan"), 3), (float("inf"), 1)])
def test_not_finite_weights_are_named_and_counted(folder: Folder, value: float, count: int) -> None:
    path = folder()
    tensors = weights(path)
    tensors["model.decoder.layers.1.fc1.weight"].view(-1)[5 : 5 + count] = value
    replace_weights(path, tensors)
    with pytest.raises(ValueError, match=rf"layers\.1\.fc1\.weight' .* has {count} NaN or infinite"):
        open_fp32(path)


def test_damaged_and_missing_files(folder: Folder, tmp_path: Path) -> None:
    path = folder()
    file = path / "model.safetensors"
    content = file.read_bytes()
    for length in (len(content) - 100, 50, 0):
        file.write_bytes(content[:length])
        with pytest.raises(ValueError, match=re.escape(str(file))):
            open_fp32(path)
    file.unlink()
    with pytest.raises(ValueError, match=r"no weights: no \*\.safetensors"):
        open_fp32(path)
    binary = path / "pytorch_model.bin"
    torch.save({"model.decoder.embed_tokens.weight": print}, binary)
    with pytest.raises(ValueError, match="it is not opened"):
        open_fp32(path)
    torch.save({"x": torch.ones(1000)}, binary)
    binary.write_bytes(binary.read_bytes()[:900])
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is truncated"):
        open_fp32(path)
    (path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        open_fp32(path)
    (path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config\.json"):
        open_fp32(path)


def test_a_bin_file_whose_tensors_have_more_values_than_it_has_bytes_is_refused(folder: Folder) -> None:
    path = folder()
    (path / "model.safetensors").unlink()
    for held in ({"a": torch.zeros(1).expand(1 << 40)}, {"a": torch.eye(3).to_sparse()}, {5: torch.ones(3)}, [torch.ones(3)]):
        torch.save(held, path / "pytorch_model.bin")
        with pytest.raises(ValueError, match=r"pytorch_model\.bin is no state dict"):
            open_fp32(path)


def test_an_adapter_a_lora_and_a_model_in_one_anothers_place_are_told(folder: Folder, tmp_path: Path) -> None:
    path, lora = folder(), tmp_path / "lora"
    lora.mkdir()
    write_json(lora / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "some/base"})
    model = open_fp32(path)
    uses: list[Callable[[Path], object]] = [
        open_fp32,
        lambda place: Adapter.load(place, model=model.config, base_hash=model.base_hash),
    ]
    for use in uses:
        with pytest.raises(ValueError, match=r"lora is a LoRA of PEFT .* for 'some/base', neither .*; merge it into its base"):
            use(lora)
    with pytest.raises(ValueError, match=r"model is a model \('opt'\), not an adapter"):
        uses[1](path)
    write_json(lora / "config.json", {"base_id": "some/base", "base_hashes": []})
    with pytest.raises(ValueError, match=r"lora is an adapter for 'some/base'; give that as the model, and this with --adapter"):
        open_fp32(lora)


def test_integer_weights_without_a_known_format_are_refused(folder: Folder) -> None:
    path = folder()
    tensors = weights(path)
    replace_weights(path, tensors | {"model.decoder.layers.0.fc1.weight": torch.ones(64, 32, dtype=torch.int8)})
    with pytest.raises(ValueError, match=r"fc1\.weight' .* is torch\.int8; supported: fp32, fp16, bf16"):
        open_fp32(path)


def test_sharded_equals_single(folder: Folder) -> None:
    path = folder("llama")
    expected = open_fp32(path)
    single = (path / "model.safetensors").read_bytes()
    weight_map = shard(path)
    loaded = open_fp32(path)
    assert torch.equal(loaded.model(IDS), expected.model(IDS)) and loaded.base_hash == expected.base_hash and loaded.notes == ()

    (path / "model.safetensors").write_bytes(single)
    tensors = weights(path)
    replace_weights(path, {name: tensor * 2 for name, tensor in tensors.items()})
    loaded = open_fp32(path)
    assert torch.equal(loaded.model(IDS), expected.model(IDS)), "the index decides"
    assert loaded.notes == (f"1 files that {INDEX} does not name are not used: model.safetensors",)

    (path / INDEX).unlink()
    with pytest.raises(ValueError, match=r"is in 'model-00001-of-00003\.safetensors' and in 'model\.safetensors'"):
        open_fp32(path)
    (path / "model.safetensors").unlink()
    assert torch.equal(open_fp32(path).model(IDS), expected.model(IDS)), "no index, all shards"

    write_json(path / INDEX, {"weight_map": weight_map})
    (path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks 1 files .*: model-00002-of-00003\.safetensors; incomplete download"):
        open_fp32(path)


def test_an_index_that_lies(folder: Folder) -> None:
    path = folder("llama")
    weight_map = shard(path)
    name = "model.layers.1.mlp.up_proj.weight"
    wrong = next(file for file in sorted(set(weight_map.values())) if file != weight_map[name])
    write_json(path / INDEX, {"weight_map": weight_map | {name: wrong}})
    with pytest.raises(ValueError, match=rf"promises '{re.escape(name)}' in '{wrong}', which lacks it"):
        open_fp32(path)
    for content in ("{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'):
        (path / INDEX).write_text(content)
        with pytest.raises(ValueError, match=re.escape(INDEX)):
            open_fp32(path)


def test_shard_names_stay_inside_the_folder(folder: Folder, tmp_path: Path) -> None:
    path = folder("llama")
    expected = open_fp32(path).model(IDS)
    weight_map = shard(path, count=1)
    file = path / "model-00001-of-00001.safetensors"
    outside = tmp_path / "x.safetensors"
    outside.write_bytes(file.read_bytes())
    (path / "link.safetensors").symlink_to(outside)
    for name in ("../x.safetensors", str(outside), "a/../../x.safetensors", "C:\\x.safetensors", "link.safetensors"):
        write_json(path / INDEX, {"weight_map": dict.fromkeys(weight_map, name)})
        with pytest.raises(ValueError, match=re.escape(repr(name))):
            open_fp32(path)
    (path / "sub").mkdir()
    file.rename(path / "sub" / "model-1.safetensors")
    write_json(path / INDEX, {"weight_map": dict.fromkeys(weight_map, "sub/model-1.safetensors")})
    assert torch.equal(open_fp32(path).model(IDS), expected)


def test_dtypes_and_gradients(folder: Folder) -> None:
    path = folder("llama")
    half = load_checkpoint(path, dtype=torch.float16)
    assert half.model.embed.weight.dtype == torch.float32 and half.notes == ("fp16 on the CPU is computed in fp32",)
    brain = load_checkpoint(path, dtype=torch.bfloat16)
    assert {p.dtype for p in brain.model.parameters()} == {torch.bfloat16} and brain.stored_dtype == "fp32"
    assert brain.model.get_buffer("inv_freq").dtype == torch.float32
    assert brain.base_hash == half.base_hash, "the hash is of what is stored, not of what it is cast to"
    assert not any(p.requires_grad for p in brain.model.parameters()) and not brain.model.training
    assert brain.model.blocks[1].down.weight.is_contiguous() and brain.name == "model"


def test_eos_ids_of_generation_config_come_first_and_those_of_config_stay(folder: Folder) -> None:
    path = folder()
    write_json(path / "generation_config.json", {"eos_token_id": [7, 9]})
    loaded = open_fp32(path)
    assert loaded.config.eos_token_ids == loaded.tokenizer.eos_token_ids == (7, 9, 2) and loaded.tokenizer.bos_token_id == 2


def changed(model: Transformer, name: str, row: int) -> Transformer:
    model.get_parameter(name).view(-1)[row] += 1e-3
    return model


def test_the_base_hash_sees_weights_and_architecture_and_nothing_else(tiny: Tiny) -> None:
    base = model_hash(tiny("opt"))
    assert base == model_hash(tiny("opt")) and len(base) == 64
    assert base == model_hash(tiny("opt", bos_token_id=5, eos_token_ids=(7,)))
    others = [
        tiny("opt", seed=1),
        tiny("opt", activation="gelu"),
        tiny("opt", norm_eps=1e-6),
        changed(tiny("opt"), "layers.1.down.weight", 2047),
        changed(tiny("opt"), "layers.0.norm1.bias", 3),
        changed(tiny("opt"), "embed.weight", 0),
    ]
    hashes = {model_hash(model) for model in others} | {base, model_hash(tiny("opt"), stored_as=torch.bfloat16)}
    assert len(hashes) == len(others) + 2


def test_fields_at_their_default_leave_the_hash_alone(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of the rotary positions: a field added later must not make strangers of models and their adapters."""
    rope = RopeConfig(theta=500.0)
    first = model_hash(tiny("llama", rope=rope))
    assert first == model_hash(tiny("llama", rope=RopeConfig(theta=500.0, partial=1.0)))
    assert first != model_hash(tiny("llama", rope=RopeConfig(theta=501.0)))
    fields = tuple(field for field in dataclasses.fields(RopeConfig) if field.name != "partial")  # as before `partial` was added
    usual = dataclasses.fields
    monkeypatch.setattr("dejavu.model.fingerprint.dataclasses.fields", lambda config: fields if config is rope else usual(config))
    assert model_hash(tiny("llama", rope=rope)) == first


def test_resolve_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Folder) -> None:
    path = folder()
    monkeypatch.chdir(tmp_path)
    assert resolve_model("model") == resolve_model("./model") == resolve_model(str(path)) == path
    (tmp_path / "runs").mkdir()
    for name in ("./nothing", "runs/nothing", "../nothing", "~/nothing-here", "/no/such/folder", "a/b/c"):
        with pytest.raises(ValueError, match=r"model directory not found: /"):
            resolve_model(name)
    with pytest.raises(ValueError, match=r"model file not found: .*/x\.gguf"):
        resolve_model("x.gguf")
    with pytest.raises(ValueError, match=r"unknown model 'opt-maxi': no bundled model .*config\.json, a \.gguf file, or a hub id"):
        resolve_model("opt-maxi")
    with pytest.raises(ValueError, match="empty name"):
        resolve_model(" ")
    (tmp_path / "weights.bin").write_text("")
    with pytest.raises(ValueError, match=r"weights\.bin is a file"):
        resolve_model("weights.bin")


def test_hub_ids_come_from_the_local_cache_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(ValueError, match=r"hub model 'facebook/opt-125m' is not on this machine"):
        resolve_model("facebook/opt-125m")
    with pytest.raises(ValueError, match=r"hub model 'facebook/opt-125m@v9' is not on this machine"):
        resolve_model("facebook/opt-125m", revision="v9")
    repository = tmp_path / "hub" / "models--facebook--opt-125m"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (snapshot / name).write_text("{}")
    assert resolve_model("facebook/opt-125m") == snapshot


def test_config_round_trip_through_its_dict(tiny: Tiny) -> None:
    config = tiny("llama").config
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("place", ["elsewhere", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("dtype", "held"), [(torch.float16, "bf16"), (torch.bfloat16, "bf16"), (None, "bf16"), (torch.float32, "fp32")])
def test_a_checkpoint_is_read_onto_another_device_as_it_is_onto_the_cpu(
    folder: Folder, place: str, dtype: torch.dtype | None, held: str
) -> None:
    """Each tensor is looked at, hashed and cast there: none that was computed on the CPU takes part."""
    path, device = folder("llama"), DEVICE if place == "elsewhere" else torch.device("cuda", 0)
    if held == "bf16":
        replace_weights(path, {name: values.bfloat16() for name, values in weights(path).items()})
    here = load_checkpoint(path, dtype=torch.float32)
    with elsewhere() if place == "elsewhere" else nullcontext():
        there = load_checkpoint(path, dtype=dtype, device=device)
        assert there.base_hash == here.base_hash
        expected = dict(here.model.named_weights())
        for name, values in there.model.named_weights():
            assert values.device == device and (dtype is None or values.dtype == dtype)
            assert torch.equal(values.cpu().float(), expected[name].to(dtype or torch.float32).float()), name
