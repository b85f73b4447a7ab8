"""GGUF files: written here with the gguf package the way llama.cpp's converter does, compared with the model they came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch

from conftest import Tiny, open_fp32
from dejavu.config import RopeConfig
from dejavu.kernels.native import missing_reason
from dejavu.loading import load
from dejavu.model.fingerprint import model_hash
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
