"""Folders of GPTQ, AWQ and compressed-tensors: what they hold is computed exactly, and what is not read is refused by its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import Tiny, open_fp32
from dejavu.kernels.quantized import QuantizedMatrix, wide
from dejavu.loading import load
from dejavu.model.bundle import export
from dejavu.model.checkpoint import assembled, load_checkpoint
from dejavu.model.families import config_from_hf
from dejavu.model.fingerprint import model_hash
from dejavu.model.grids import grid_of
from dejavu.model.source import open_source
from dejavu.model.tokenizer import Tokenizer
from helpers.adapters import make_adapter
from helpers.command_line import obj
from helpers.engines import decode, ids_of
from helpers.native import engine_of, needs_library
from helpers.packed_folders import Form, awq, compressed, gptq, packed_folder

IDS = ids_of(3, 12)
SIZES = {"hidden_size": 64, "num_heads": 2, "num_kv_heads": 1, "head_dim": 32, "intermediate_size": 192}
BF16 = torch.bfloat16
FORMS = {
    "gptq": (Form(config=gptq(), group=64, symmetric=True, zero_offset=1), "q4_0"),
    "gptq, zero points": (Form(config=gptq(sym=False, group_size=32, desc_act=True), group=32, zero_offset=1), "w4_fp16"),
    "gptq_v2, whole rows": (Form(config=gptq(sym=False, group_size=-1, checkpoint_format="gptq_v2")), "w4_fp16"),
    "gptq, 8 bits": (Form(config=gptq(bits=8), bits=8, group=64, symmetric=True, zero_offset=1), "q8_0"),
    "awq": (Form(config=awq(), group=32), "w4_fp16"),
    "w4a16": (Form(config=compressed(), group=32, symmetric=True, scales=BF16), "w4_bf16"),
    "w4a16, zero points": (Form(config=compressed(symmetric=False, strategy="channel")), "w4_fp16"),
    "w8a16": (Form(config=compressed(num_bits=8, group_size=64), bits=8, group=64, symmetric=True), "q8_0"),
    "int8": (Form(config=compressed("int-quantized", num_bits=8, strategy="channel"), bits=8, symmetric=True, scales=BF16), "w8_bf16"),
    "int8, zero points": (Form(config=compressed("int-quantized", num_bits=8, strategy="channel", symmetric=False), bits=8), "w8_fp16"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny, tokenizer: Tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "source"
    export(tiny("llama", **SIZES), tokenizer, folder)
    return folder


@needs_library
@pytest.mark.parametrize("name", FORMS)
def test_a_packed_folder_computes_what_its_values_do(tmp_path: Path, plain: Path, name: str) -> None:
    """In torch the same bits as of the dequantised folder; in the native engine what is left is how vectors are rounded."""
    form, grid = FORMS[name]
    folder = packed_folder(plain, tmp_path / "packed", form)
    found, expected = load_checkpoint(folder, dtype=None), open_fp32(tmp_path / "packed-plain")
    label = f"{form.config['quant_method']}-int{form.bits}"
    assert found.stored_dtype == open_source(folder).stored_dtype == found.model.stored_as == label
    assert found.notes == () and found.base_hash == expected.base_hash == model_hash(found.model)
    for (part, held), (_, values) in zip(found.model.named_matrices(), expected.model.named_weights(), strict=True):
        assert torch.equal(wide(held), values), part
    held_as = {part.split(".")[2]: held.grid for part, held in found.model.named_matrices() if isinstance(held, QuantizedMatrix)}
    assert held_as == dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), grid)
    logits = expected.model(torch.tensor([IDS]))[0]
    assert torch.equal(found.model(torch.tensor([IDS]))[0], logits)
    engine = engine_of(found.model, dtype="stored", cache_dtype="fp32")
    computed, _ = decode(engine, IDS)
    assert (computed - logits).abs().mean() < 3e-2 * logits.std()
    exact, _ = decode(engine_of(found.model, dtype="fp32"), IDS)  # nothing of vectors is rounded
    torch.testing.assert_close(exact, logits, rtol=0, atol=1e-4)


@needs_library
def test_the_rest_works_from_a_packed_folder(tmp_path: Path, plain: Path, call: Callable[..., str]) -> None:
    """info, an adapter by the base's hash, the engine that is picked, export: as of any other model."""
    folder = packed_folder(plain, tmp_path / "packed", FORMS["awq"][0])
    told = obj(call("info", str(folder), "--json"))
    assert told["stored_dtype"] == "awq-int4" and told["types"].keys() == {"fp32", "w4_fp16"}
    auto = next(row for row in told["memory"] if row["auto"] and row["backend"] == "native")
    weights = told["types"]["fp32"] * 4 + told["types"]["w4_fp16"] * 19 / 32
    assert auto["dtype"] == "awq-int4" and auto["weights"] == pytest.approx(weights)
    base = load_checkpoint(folder, dtype=None)
    make_adapter(base.config, base.base_hash).save(tmp_path / "adapter")
    lm = load(folder, adapter=tmp_path / "adapter")
    assert lm.model.stored_as == "awq-int4" and lm.generate("the cat", max_new_tokens=4)
    call("export", str(folder), str(tmp_path / "exported"), "--json")
    assert open_fp32(tmp_path / "exported").base_hash == open_fp32(tmp_path / "packed-plain").base_hash
    rounded = [load(each, backend="torch", dtype="bf16").logits(IDS) for each in (folder, tmp_path / "exported")]
    assert torch.equal(*rounded)


def test_what_is_not_packed_stays_as_it_is_stored(tmp_path: Path, plain: Path) -> None:
    folder = packed_folder(plain, tmp_path / "packed", FORMS["awq"][0], skip=("down_proj", "layers.1.self_attn.q_proj"))
    found = load_checkpoint(folder, dtype=None)
    grids = {name: getattr(held, "grid", "fp32") for name, held in found.model.named_matrices()}
    assert grids["layers.0.down.weight"] == grids["layers.1.q.weight"] == grids["head.weight"] == "fp32"
    assert grids["layers.0.q.weight"] == grids["layers.1.up.weight"] == "w4_fp16"
    assert found.base_hash == open_fp32(tmp_path / "packed-plain").base_hash


def test_rounded_activations_of_a_scheme_are_a_note(tmp_path: Path, plain: Path) -> None:
    config = compressed("int-quantized", num_bits=8, strategy="channel")
    config["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "type": "int", "dynamic": True}
    found = load_checkpoint(packed_folder(plain, tmp_path / "packed", Form(config=config, bits=8, symmetric=True)), dtype=None)
    assert found.notes == ("the checkpoint's scheme rounds activations as well; here they are not",)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "quantised by 'bitsandbytes'"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "quantised by 'fp8'"),
        ({"quant_method": "exl3", "bits": 4.0}, "quantised by 'exl3'"),
        ({"quant_method": "hqq"}, "quantised by 'hqq'"),
        ({"bits": 4, "group_size": 64}, "quantised by None"),
        (gptq(bits=3), "gptq with bits 3"),
        (gptq(bits=4.0), "gptq with bits 4.0"),
        (gptq(dynamic=7), "gptq with settings by module"),
        (gptq(group_size=16), "gptq with group_size 16"),
        (gptq(checkpoint_format="marlin"), "gptq with checkpoint_format 'marlin'"),
        (gptq(is_marlin_format=True), "gptq with checkpoint_format 'marlin'"),
        (gptq(dynamic={"-:.*gate": {}, "+:.*down": {"bits": 8}}), "gptq with settings by module"),
        (awq(version="gemv"), "awq with version 'gemv'"),
        (awq(zero_point=False), "awq with zero_point false"),
        (compressed("float-quantized", num_bits=8), "compressed-tensors with format 'float-quantized'"),
        (compressed("nvfp4-pack-quantized"), "compressed-tensors with format 'nvfp4-pack-quantized'"),
        (compressed("marlin-24"), "compressed-tensors with format 'marlin-24'"),
        (compressed(type="float"), "compressed-tensors with weights of type 'float'"),
        (compressed(num_bits=3), "compressed-tensors with num_bits 3"),
        (compressed(strategy="block"), "compressed-tensors with strategy 'block'"),
        (compressed(actorder="group"), "compressed-tensors with actorder 'group'"),
        (compressed(top={"config_groups": {}}), "compressed-tensors with no config_groups"),
        (compressed(top={"sparsity_config": "yes"}), "compressed-tensors with sparsity_config"),
        (compressed(top={"sparsity_config": {"format": "sparse-24-bitmask"}}), "compressed-tensors with sparsity_config"),
    ],
    ids=str,
)
def test_what_is_not_read_is_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"the checkpoint is {message}|the checkpoint is quantised by {message}") as caught:
        config_from_hf({"model_type": "llama", "quantization_config": config})
    assert "GGUF" in str(caught.value) and "\n" not in str(caught.value)


def damaged(folder: Path, changes: dict[str, torch.Tensor | None]) -> Path:
    tensors = load_file(folder / "model.safetensors") | {f"model.layers.1.mlp.{name}": values for name, values in changes.items()}
    save_file({name: values for name, values in tensors.items() if values is not None}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gptq", {"down_proj.g_idx": torch.arange(192).flip(0).int() // 64}, r"mlp.down_proj.*act-order \(desc_act\), which is not read"),
        ("gptq", {"up_proj.qzeros": None}, "up_proj.*lacks qzeros"),
        ("gptq", {"up_proj.scales": torch.ones(2, 192).half()}, r"scales of .*up_proj.*\[2, 192\], expected \[1, 192\]"),
        ("gptq", {"up_proj.qweight": torch.zeros(8, 100).int()}, "up_proj.* expected"),
        ("awq", {"up_proj.scales": torch.full((2, 192), torch.inf).half()}, "up_proj.*NaN or infinite scales; the checkpoint is damaged"),
        ("awq", {"up_proj.scales": torch.full((2, 192), 1 / 3)}, "up_proj.*neither fp16 nor bf16 holds"),
        ("awq", {"up_proj.bias": torch.ones(192)}, "bias tensors that the model has no place for"),
        ("w4a16", {"up_proj.weight_shape": torch.tensor([192, 65])}, "up_proj.*does not hold 192 x 65"),
        ("w4a16", {"up_proj.weight_scale": None}, "up_proj.*has of a compressed matrix only weight_packed, weight_shape; incomplete"),
        ("w4a16, zero points", {"up_proj.weight_zero_point": torch.ones(192, 1)}, "weight_zero_point of .*up_proj.* does not fit"),
        ("gptq", {"up_proj.g_idx": torch.tensor(0)}, "up_proj.*act-order"),
        ("gptq", {"up_proj.qweight": torch.zeros(8).int()}, r"qweight of .*up_proj.* is torch.int32 \[8\], no packed matrix"),
        ("awq", {"up_proj.scales": torch.ones(2, 192).int()}, "up_proj.*scales of torch.int32; the checkpoint is damaged"),
        ("w4a16", {"up_proj.weight_scale": torch.ones(192, 4).bfloat16()}, "up_proj.*16 inputs to a scale, no multiple of 32"),
    ],
)  # fmt: skip
def test_damaged_parts_are_named(tmp_path: Path, plain: Path, name: str, changes: dict[str, torch.Tensor | None], message: str) -> None:
    folder = damaged(packed_folder(plain, tmp_path / "packed", FORMS[name][0]), changes)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(folder, dtype=None)


def test_a_quantised_model_in_memory_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Net is quantised \(quantization_config\): load its folder"):
        assembled({"model_type": "llama", "quantization_config": awq()}, {}, dtype=torch.float32, device="cpu", where="Net")


def test_weights_of_several_schemes_are_told_apart_by_their_shapes(tmp_path: Path, plain: Path) -> None:
    """A folder whose down is of 8 bits, everything else of 4: config_groups have one scheme each."""
    four = packed_folder(plain, tmp_path / "four", FORMS["w4a16, zero points"][0])
    eight = packed_folder(plain, tmp_path / "eight", Form(config=compressed(num_bits=8, symmetric=False, strategy="channel"), bits=8))
    groups = [json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"] for folder in (four, eight)]
    both = groups[0] | {"config_groups": {f"group_{index}": each["config_groups"]["group_0"] for index, each in enumerate(groups)}}
    config = json.loads((four / "config.json").read_text(encoding="utf-8")) | {"quantization_config": both}
    (four / "config.json").write_text(json.dumps(config), encoding="utf-8")
    first, second = (load_file(folder / "model.safetensors") for folder in (four, eight))
    save_file({name: (second if "down_proj" in name else first)[name] for name in first}, four / "model.safetensors")
    found, down = load_checkpoint(four, dtype=None).model.blocks[0], load_checkpoint(eight, dtype=None).model.blocks[0].down.matrix
    assert torch.equal(wide(found.down.matrix), wide(down)) and grid_of(found.up.matrix) == "w4_fp16"
    assert open_source(four).sizes["w8_fp16"] == 2 * 64 * 192
