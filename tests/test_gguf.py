"""GGUF files: written here with the gguf package the way llama.cpp's converter does, compared with the model they came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch

from conftest import Tiny, open_fp32
from dejavu.config import RopeConfig
from dejavu.model.families import FAMILIES, is_transposed
from dejavu.model.fingerprint import model_hash
from dejavu.model.gguf import LAYER_MODULES, MODULES
from dejavu.model.transformer import Transformer

IDS = torch.tensor([[2, 5, 7, 11, 13, 17, 19]])
GGUF_NAMES = {theirs: ours for ours, theirs in (MODULES | LAYER_MODULES).items()}
Types = gguf.GGMLQuantizationType


def neighbours(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of q and k: row (h, s, j) of a head, s its half, goes to (h, j, s)."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(model: Transformer, tok96: tokenizers.Tokenizer, path: Path, *, kind: Types = Types.F32, **changes: Any) -> None:
    config = model.config
    assert config.rope is not None
    writer = gguf.GGUFWriter(path, changes.get("architecture", "llama"))
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_rope_dimension_count(config.head_dim)
    if config.rope.type == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope.factor)
    tokens = sorted(tok96.get_vocab(), key=lambda token: tok96.get_vocab()[token])
    merges = json.loads(tok96.to_str())["model"]["merges"]
    writer.add_tokenizer_model(changes.get("tokenizer", "gpt2"))
    writer.add_tokenizer_pre(changes.get("pre", "gpt-2"))
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if i < 4 else gguf.TokenType.NORMAL for i in range(96)])
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(changes.get("add_bos", True))
    writer.add_chat_template("{{ messages }}")
    for name, parameter in model.named_parameters():
        plain = FAMILIES["llama"].foreign_name(name, model.config)
        values = (parameter.T if is_transposed(name) else parameter).contiguous().numpy()
        parts = plain.split(".")
        if parts[0] == "layers":
            stored = f"blk.{parts[1]}.{GGUF_NAMES['.'.join(parts[2:-1])]}.{parts[-1]}"
        else:
            stored = f"{GGUF_NAMES[parts[0]]}.{parts[-1]}"
        for letter, heads in (("q", config.num_heads), ("k", config.num_kv_heads)):
            values = neighbours(values, heads) if f"attn_{letter}." in stored else values
        of_kind = kind if values.ndim == 2 else Types.F32
        writer.add_tensor(stored, gguf.quants.quantize(values, of_kind), raw_dtype=of_kind)
    for name, values in changes.get("extra", {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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
    assert loaded.config == model.config and loaded.name == "m" and loaded.stored_dtype == "f32"
    assert torch.equal(loaded.model(IDS), model(IDS))
    assert loaded.base_hash == model_hash(model), "the same weights, whatever the file"


@pytest.mark.parametrize("kind", [Types.F16, Types.BF16, Types.Q8_0, Types.Q4_0, Types.Q4_1])
def test_quantised_gguf(tmp_path: Path, tiny: Tiny, tok96: tokenizers.Tokenizer, kind: Types) -> None:
    model = tiny("llama")
    write_gguf(model, tok96, tmp_path / "m.gguf", kind=kind)
    loaded = open_fp32(tmp_path / "m.gguf")
    assert loaded.stored_dtype == kind.name.lower()
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
    assert tokenizer.chat_template == "{{ messages }}" and tokenizer.special_tokens["bos_token"] == "</s>"
    write_gguf(model, tok96, tmp_path / "n.gguf", add_bos=False, pre="smollm")
    tokenizer = open_fp32(tmp_path / "n.gguf").tokenizer
    assert not tokenizer.adds_bos and tokenizer.encode("the") == tok96.encode("the").ids[1:]
    pieces = [piece for piece, _ in tokenizer.backend.pre_tokenizer.pre_tokenize_str("ab 123")]
    assert pieces == ["ab", "Ġ", "1", "2", "3"], "smollm splits every digit off"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "mamba"}, r"GGUF architecture 'mamba' is not supported; supported: llama"),
        ({"tokenizer": "llama"}, r"GGUF tokenizer 'llama' is not supported"),
        ({"pre": "tekken"}, r"GGUF pre-tokenizer 'tekken' is not supported; supported: gpt-2, smollm"),
        ({"extra": {"rope_freqs.weight": np.ones(4, dtype=np.float32)}}, r"tensor 'rope_freqs.weight' is not supported"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_supported_is_named(
    tmp_path: Path, tiny: Tiny, tok96: tokenizers.Tokenizer, changes: dict[str, Any], message: str
) -> None:
    write_gguf(tiny("llama"), tok96, tmp_path / "m.gguf", **changes)
    with pytest.raises(ValueError, match=message):
        open_fp32(tmp_path / "m.gguf")


def test_truncated_gguf(tmp_path: Path, tiny: Tiny, tok96: tokenizers.Tokenizer) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(tiny("llama"), tok96, path)
    content = path.read_bytes()
    for length in (len(content) - 5000, len(content) // 2, 1000, 20, 2, 0):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"m\.gguf is no readable GGUF file"):
            open_fp32(path)
