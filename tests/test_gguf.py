"""GGUF files: written here with the gguf package the way llama.cpp's converter does, compared with the model they came from."""

from __future__ import annotations

import dataclasses
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch

from conftest import Tiny, open_fp32
from dejavu.config import RopeConfig
from dejavu.engine.footprint import native_sizes
from dejavu.kernels.native import missing_reason
from dejavu.kernels.quantized import QuantizedMatrix
from dejavu.loading import load, wider_note
from dejavu.model.fingerprint import model_hash
from dejavu.model.gguf.header import Header, require_readable
from dejavu.model.lora import quantized_lora
from dejavu.model.source import read_config
from helpers.adapters import changing_weights, make_adapter
from helpers.gguf_files import Types, write_gguf

IDS = torch.tensor([[2, 5, 7, 11, 13, 17, 19]])


@pytest.mark.parametrize(
    "flags",
    [
        {"tied_head": True},
        {"head_dim": 16, "rope": RopeConfig(theta=1e5)},
        {"qkv_bias": True, "out_bias": True, "mlp_bias": True},
        {"rope": RopeConfig(type="linear", factor=2.0)},
    ],
    ids=str,
)
def test_fp32_gguf_is_the_model_bit_for_bit(tmp_path: Path, tiny: Tiny, tok96: tokenizers.Tokenizer, flags: dict[str, Any]) -> None:
    model = tiny("llama", **flags)
    write_gguf(model, tok96, tmp_path / "m.gguf")
    loaded = open_fp32(tmp_path / "m.gguf")
    assert loaded.config == model.config and loaded.name == "m" and loaded.stored_dtype == "fp32"
    assert torch.equal(loaded.model(IDS), model(IDS))
    assert loaded.base_hash == model_hash(model), "the same weights, whatever the file"


@pytest.mark.parametrize("kind", [Types.F16, Types.BF16, Types.Q8_0, Types.Q4_0, Types.Q4_1])
def test_quantised_gguf(tmp_path: Path, tiny: Tiny, tok96: tokenizers.Tokenizer, kind: Types) -> None:
    model = tiny("llama")
    write_gguf(model, tok96, tmp_path / "m.gguf", kind=kind)
    loaded = open_fp32(tmp_path / "m.gguf")
    assert loaded.stored_dtype == {"F16": "fp16"}.get(kind.name, kind.name.lower())
    stored = gguf.quants.dequantize(gguf.quants.quantize(model.blocks[1].up.weight.numpy(), kind), kind)
    assert np.array_equal(loaded.model.blocks[1].up.weight.numpy(), stored)
    bound = {"F16": 0.01, "BF16": 0.1, "Q8_0": 0.1}.get(kind.name, 1.5)
    error = (loaded.model(IDS) - model(IDS)).abs().max().item()
    assert 0 < error < bound


def test_the_tokenizer_of_the_metadata(tmp_path: Path, tiny: Tiny, tok96: tokenizers.Tokenizer) -> None:
    model = tiny("llama")
    write_gguf(model, tok96, tmp_path / "m.gguf")
    tokenizer = open_fp32(tmp_path / "m.gguf").tokenizer
    for text in ("the cat sat", "  The hat!\n\nand 123", "", "a</s>b"):
        assert tokenizer.encode(text) == tok96.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text.replace("</s>", "")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids, tokenizer.vocab_size) == (2, (2,), 96)
    assert tokenizer.chat_template == "{{ messages }}" and tokenizer.named_templates == {"tool_use": "{{ tools }}"}
    assert tokenizer.num_rows == 96 and tokenizer.special_tokens["bos_token"] == "</s>"
    write_gguf(model, tok96, tmp_path / "n.gguf", add_bos=False, pre="smollm")
    tokenizer = open_fp32(tmp_path / "n.gguf").tokenizer
    assert not tokenizer.adds_bos and tokenizer.encode("the") == tok96.encode("the").ids[1:]
    pieces = [piece for piece, _ in tokenizer.backend.pre_tokenizer.pre_tokenize_str("ab 123")]
    assert pieces == ["ab", "Ġ", "1", "2", "3"], "smollm splits every digit off"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "mamba"}, r"GGUF architecture 'mamba' is not supported: it needs state-space or linear-attention layers"),
        ({"architecture": "qwen3moe"}, r"GGUF architecture 'qwen3moe' is not supported: it needs mixtures of experts"),
        ({"architecture": "gemma3n"}, r"'gemma3n' is not supported: it needs embeddings for each layer"),
        ({"architecture": "bert"}, r"'bert' is not supported: it needs attention to both sides \(an encoder\)"),
        ({"architecture": "clip"}, r"'clip' is not supported: it needs the layers of a vision model"),
        ({"architecture": "gpt2"}, r"GGUF architecture 'gpt2' is not supported; supported: arcee, falcon, .*, stablelm, starcoder2"),
        ({"keys": {"expert_count": 8}}, r"GGUF architecture 'llama' is not supported: it needs mixtures of experts"),
        ({"keys": {"attention.clamp_kqv": 8.0}}, r"GGUF key 'llama.attention.clamp_kqv' is 8.0, which is not understood"),
        ({"keys": {"a.new.key": 1}}, r"GGUF key 'llama.a.new.key' is 1, which is not understood and may change the numbers"),
        ({"keys": {"rope.scaling.type": "magic"}}, r"llama.rope.scaling.type 'magic' has no tensors of factors"),
        ({"keys": {"block_count": None}}, r"GGUF metadata has no 'llama.block_count'"),
        ({"keys": {"block_count": 1 << 31}}, r"has 2147483648 layers by its metadata and tensors of 2"),
        ({"keys": {"attention.head_count": "four"}}, r"llama.attention.head_count must be a positive whole number, not 'four'"),
        ({"keys": {"attention.value_length": 4}}, r"keys of 8 numbers and values of 4 are not supported"),
        ({"keys": {"feed_forward_length": [48, 32]}}, r"llama.feed_forward_length differs by layer"),
        ({"tokenizer": "rwkv"}, r"GGUF tokenizer 'rwkv' is not supported; supported: gpt2, llama, t5"),
        ({"pre": "kimi-k2"}, r"GGUF pre-tokenizer 'kimi-k2' is not supported; supported: .*, gpt-2, .*, llama-bpe, .*, smollm"),
        ({"extra": {"blk.0.attn_sinks.weight": np.ones(4, dtype=np.float32)}}, r"tensor 'blk.0.attn_sinks.weight' is not supported"),
        ({"extra": {"rope_freqs.weight": np.zeros(4, dtype=np.float32)}}, r"tensor 'rope_freqs.weight' has values that are no positive"),
        ({"extra": {"x": np.ones(4, dtype=np.int32)}}, r"tensor 'x' is of type I32, which is not read"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_what_is_not_supported_is_named(
    tmp_path: Path, tiny: Tiny, tok96: tokenizers.Tokenizer, changes: dict[str, Any], message: str
) -> None:
    write_gguf(tiny("llama"), tok96, tmp_path / "m.gguf", **changes)
    with pytest.raises(ValueError, match=message):
        open_fp32(tmp_path / "m.gguf")


def test_keys_that_change_nothing_and_the_older_spelling_of_a_factor(tmp_path: Path, tiny: Tiny, tok96: tokenizers.Tokenizer) -> None:
    neutral = {
        "expert_count": 0,
        "attention.causal": True,
        "logit_scale": 1.0,
        "rope.scaling.finetuned": False,
        "attention.sliding_window": 0,
    }
    write_gguf(tiny("llama"), tok96, tmp_path / "m.gguf", keys=neutral | {"rope.scale_linear": 4.0})
    assert read_config(tmp_path / "m.gguf").rope == RopeConfig(type="linear", factor=4.0)


def test_the_parts_of_a_split_file(tmp_path: Path, tiny: Tiny, tok96: tokenizers.Tokenizer) -> None:
    model = tiny("llama")
    write_gguf(model, tok96, tmp_path / "m.gguf", parts=3)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"m-0000{index}-of-00003.gguf" for index in (1, 2, 3)]
    for name in names:
        loaded = open_fp32(tmp_path / name)
        assert torch.equal(loaded.model(IDS), model(IDS)) and loaded.tokenizer.vocab_size == 96
    (tmp_path / names[1]).rename(tmp_path / "other.gguf")
    with pytest.raises(ValueError, match=rf"part 3 of 3, and {names[1]} is not beside it"):
        open_fp32(tmp_path / names[2])
    with pytest.raises(ValueError, match=r"other.gguf is part 2 of 3; its name has to end in -00002-of-00003.gguf"):
        open_fp32(tmp_path / "other.gguf")
    (tmp_path / names[1]).write_bytes((tmp_path / names[2]).read_bytes())
    with pytest.raises(ValueError, match=rf"{names[1]} says that it is part 2 of 3, counted from 0"):
        open_fp32(tmp_path / names[0])


def test_a_file_that_does_not_say_how_words_are_split_is_taken_as_llama_cpp_takes_it(
    tmp_path: Path, tiny: Tiny, tok96: tokenizers.Tokenizer
) -> None:
    write_gguf(tiny("llama"), tok96, tmp_path / "m.gguf", pre=None)
    loaded = open_fp32(tmp_path / "m.gguf")
    assert [note for note in loaded.notes if "tokenizer.ggml.pre" in note and "default is used" in note]
    pieces = [piece for piece, _ in loaded.tokenizer.backend.pre_tokenizer.pre_tokenize_str("it's 12345")]
    assert pieces == ["it", "'", "s", "Ġ", "123", "45"]


def test_every_end_is_one(tmp_path: Path, tiny: Tiny, tok96: tokenizers.Tokenizer) -> None:
    """That of the text, of a turn and of a message by their keys, and control tokens that are known to be ends: </s> here."""
    write_gguf(tiny("llama"), tok96, tmp_path / "m.gguf", ends={"eos": 1, "eot": 7, "eom": 9})
    loaded = open_fp32(tmp_path / "m.gguf")
    assert loaded.tokenizer.eos_token_ids == loaded.config.eos_token_ids == (1, 7, 9, 2)


def test_truncated_gguf(tmp_path: Path, tiny: Tiny, tok96: tokenizers.Tokenizer) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(tiny("llama"), tok96, path)
    content = path.read_bytes()
    for length in (len(content) - 5000, len(content) // 2, 1000, 500, 100, 20, 2, 0):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"m\.gguf is (no readable GGUF file|empty)"):
            open_fp32(path)


HUGE = struct.pack("<Q", 1 << 62)
KEY = struct.pack("<Q", 1) + b"k"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGML" + bytes(40), r"begins with b'GGML'"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(40), r"its version is 1; versions 2 and 3 are read"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(40), r"big-endian"),
        (b"GGUF" + struct.pack("<I", 3) + HUGE + HUGE, r"do not fit into 24 bytes"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + HUGE + bytes(40), "cut off"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + KEY + struct.pack("<I", 99) + bytes(40), r"'k' has a value of type 99"),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + KEY + struct.pack("<II", 9, 8) + HUGE + bytes(40),
            r"array of 4611686018427387904 strings",
        ),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + KEY + struct.pack("<II", 9, 4) + HUGE + bytes(40), "cut off"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + KEY + struct.pack("<II", 9, 9) + HUGE + bytes(40), r"array of type 9, which is not read"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + 2 * (KEY + struct.pack("<IB", 0, 1)), r"the key 'k' twice"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + KEY + struct.pack("<IQIQ", 1, 8, 999, 0) + bytes(99), r"type 999, which is not known"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + KEY + struct.pack("<IQIQ", 77, 8, 0, 0) + bytes(99), r"tensor 'k' has 77 axes"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + KEY + struct.pack("<IQIQ", 1, 1 << 62, 0, 0) + bytes(99), r"within tensor 'k'"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + KEY + struct.pack("<IQIQ", 1, 8, 0, 1 << 62) + bytes(99), r"within tensor 'k'"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + KEY + struct.pack("<IQIQ", 1, 33, 8, 0) + bytes(99), r"is \[33\] in blocks of 32"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + KEY + struct.pack("<IQIQ", 1, 0, 0, 0) + bytes(99), r"is \[0\] in blocks of 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_hostile_header_is_named_and_nothing_is_made_of_its_counts(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=rf"m\.gguf is no readable GGUF file: .*{message}"):
            Header(tmp_path / "m.gguf")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


READABLE = [kind for kind in Types if kind.name not in ("Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64", "Q1_0")]


def test_every_type_that_gguf_turns_into_numbers_is_read_as_a_view_of_the_file(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    stored = {}
    for kind in READABLE:
        size, size_bytes = gguf.GGML_QUANT_SIZES[kind]
        rows = generator.integers(0, 64, (3, 512 // size * size_bytes), dtype=np.uint8)  # small enough for finite scales
        stored[kind.name] = rows.view({"F32": np.float32, "F16": np.float16}.get(kind.name, np.uint8))
        writer.add_tensor(kind.name, stored[kind.name], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = Header(tmp_path / "m.gguf")
    assert [(info.type, info.shape) for info in header.tensors.values()] == [(kind.name, (3, 512)) for kind in READABLE]
    for name, info in header.tensors.items():
        require_readable(header.path, info)
        held = header.view(info)
        assert held.data_ptr() == header.view(info).data_ptr(), "no copy"
        want = gguf.quants.dequantize(stored[name], Types[name])
        grid = {"F16": "fp16"}.get(name, name.lower())
        found = held if name == "F32" else QuantizedMatrix(grid, held, None, 512).dequantize()
        assert np.array_equal(found.numpy(), want, equal_nan=True), name


@pytest.mark.skipif(missing_reason() is not None, reason="the native library is absent")
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("kind", [Types.BF16, Types.Q8_0, Types.Q4_1])
def test_the_native_engine_of_a_quantised_gguf(tmp_path: Path, tiny: Tiny, tok96: tokenizers.Tokenizer, kind: Types, dtype: str) -> None:
    """Its logits are those of the forward pass over the values of that dtype, whichever way round a matrix is stored."""
    write_gguf(tiny("llama", intermediate_size=32), tok96, tmp_path / "m.gguf", kind=kind)
    lm = load(tmp_path / "m.gguf", backend="native", dtype=dtype, cache_dtype="fp32")
    engine, ids = lm.engine(num_slots=1, cache_tokens=16), IDS[0].tolist()
    engine.prefill(0, ids[:3])
    found = torch.stack([engine.step([token], [0]).logits_BV[0] for token in ids[3:]])
    torch.testing.assert_close(found, lm.logits(ids)[3:], rtol=0, atol=1e-4 if dtype in ("fp32", "bf16") else 0.1)


def test_what_the_native_engine_holds_wider_than_the_file_is_said() -> None:
    assert wider_note({"fp32": 10, "q4_k": 100, "q6_k": 50}) is None
    assert wider_note({"fp32": 10, "q2_k": 60, "iq3_s": 30}) == (
        "90% of the weights (q2_k, iq3_s) are held in fp16: the native engine has no kernels for them"
    )
    assert native_sizes({"fp32": 10, "q2_k": 60, "iq3_s": 30}) == {"fp32": 10, "fp16": 90}
    assert native_sizes({"q4_k": 100}) == {"q4_k": 100}


@pytest.mark.skipif(missing_reason() is not None, reason="the native library is absent")
def test_what_an_adapter_changes_leaves_the_grid_of_the_file_and_says_so(tmp_path: Path, tiny: Tiny, tok96: tokenizers.Tokenizer) -> None:
    write_gguf(tiny("llama", intermediate_size=96), tok96, tmp_path / "m.gguf", kind=Types.Q4_1)
    base = load(tmp_path / "m.gguf", backend="native")
    adapter = changing_weights(make_adapter(base.config, base.base_hash), base.config)
    adapter = dataclasses.replace(adapter, lora=tuple(map(quantized_lora, adapter.lora or ())))
    lm = load(tmp_path / "m.gguf", backend="native", adapter=adapter)
    assert base.notes == () and lm.notes == ("what the adapter changes is held in bf16: in q4_1 a sum has no place",)
    grids = lm.engine(num_slots=1, cache_tokens=16).info.grids
    assert grids is not None and (grids.layers[0].up, grids.layers[0].q) == ("bf16", "q4_1")
