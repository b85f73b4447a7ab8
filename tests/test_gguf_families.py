"""GGUF files of every family equal transformers: tiny random models, written as llama.cpp's converters write them, whose weights have the
values that the file's type gives them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

from conftest import open_fp32
from dejavu.engine.backends import CAPABILITIES, make_engine
from dejavu.engine.options import EngineOptions
from dejavu.kernels.native import missing_reason
from dejavu.model.checkpoint import load_checkpoint
from dejavu.model.families import FAMILIES
from dejavu.model.gguf.families import GGUF_FAMILIES
from helpers.gguf_files import Types, rope_factors, round_weights, write_converted
from helpers.transformers_models import IDS, SIZES, randomise, reference_of

WIDE: dict[str, Any] = SIZES | {"hidden_size": 64, "intermediate_size": 96}  # rows of whole blocks
FALCON: dict[str, Any] = {key: value for key, value in WIDE.items() if key not in ("num_key_value_heads", "intermediate_size")}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN: dict[str, Any] = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
PARTIAL: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
LONG: dict[str, Any] = {
    "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16,
    "long_factor": [1.0 + index for index in range(8)], "short_factor": [1.0 + index / 10 for index in range(8)],
}  # fmt: skip
SLIDING = ["sliding_attention", "sliding_attention", "sliding_attention"]
# name, architecture of the file, model_type, fields
CASES: list[tuple[str, str, str, dict[str, Any]]] = [
    ("llama", "llama", "llama", WIDE),
    ("llama, biases, tied", "llama", "llama", WIDE | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("llama 3.1", "llama", "llama", WIDE | {"rope_parameters": LLAMA3}),
    ("llama, yarn", "llama", "llama", WIDE | {"rope_parameters": YARN}),
    ("llama, yarn, stated", "llama", "llama", WIDE | {
        "rope_parameters": YARN | {"attention_factor": 1.5, "beta_fast": 8.0, "beta_slow": 2.0},
    }),
    ("mistral", "mistral3", "mistral", WIDE | {"sliding_window": None, "head_dim": 32}),
    ("mistral, yarn", "mistral3", "mistral", WIDE | {"sliding_window": None, "rope_parameters": YARN}),
    ("mistral, window", "llama", "mistral", WIDE | {"sliding_window": 4}),
    ("qwen2", "qwen2", "qwen2", WIDE | {"tie_word_embeddings": True}),
    ("qwen3", "qwen3", "qwen3", WIDE | {"head_dim": 32}),
    ("arcee", "arcee", "arcee", WIDE),
    ("nemotron", "nemotron", "nemotron", WIDE),
    ("phi3", "phi3", "phi3", WIDE | {"sliding_window": 4}),
    ("phi3, in part", "phi3", "phi3", WIDE | {"rope_parameters": PARTIAL}),
    ("phi3, longrope", "phi3", "phi3", WIDE | {"original_max_position_embeddings": 16, "rope_parameters": LONG}),
    ("gemma", "gemma", "gemma", WIDE | {"head_dim": 32}),
    ("gemma2", "gemma2", "gemma2", WIDE | {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 4}),
    ("gemma3", "gemma3", "gemma3_text", WIDE | {
        "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 4, "layer_types": SLIDING,
    }),
    ("granite", "granite", "granite", WIDE | {
        "embedding_multiplier": 12.0, "attention_multiplier": 0.2, "residual_multiplier": 0.22, "logits_scaling": 8.0,
    }),
    ("starcoder2", "starcoder2", "starcoder2", WIDE),
    ("stablelm", "stablelm", "stablelm", WIDE | {"use_qkv_bias": True}),
    ("stablelm, beside", "stablelm", "stablelm", WIDE | {"use_parallel_residual": True}),
    ("falcon", "falcon", "falcon", FALCON | {"ffn_hidden_size": 96}),
    ("falcon, new", "falcon", "falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    ("falcon, new, one norm", "falcon", "falcon", FALCON | {
        "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1, "tie_word_embeddings": False,
    }),
]  # fmt: skip


def made(case: tuple[str, str, str, dict[str, Any]], kind: Types, tok96: tokenizers.Tokenizer, folder: Path) -> tuple[torch.Tensor, Path]:
    """The logits of transformers and the file."""
    name, architecture, model_type, fields = case
    reference = randomise(reference_of(model_type, fields))
    round_weights(reference, kind)
    rope = reference.config.rope_parameters
    extra = rope_factors(reference.config.to_dict()) if rope.get("rope_type") in ("llama3", "longrope") else {}
    keys = {"attention.sliding_window": fields["sliding_window"]} if name == "mistral, window" else {}
    path = folder / f"{architecture}.gguf"
    write_converted(reference, tok96, path, architecture=architecture, kind=kind, extra=extra, keys=keys)
    with torch.inference_mode():
        return reference(IDS).logits, path


@pytest.mark.parametrize(
    ("case", "kind"), [(case, Types.Q8_0) for case in CASES] + [(CASES[0], Types.F16)], ids=[case[0] for case in CASES] + ["llama in f16"]
)
def test_a_file_of_the_family_equals_transformers(
    tmp_path: Path, tok96: tokenizers.Tokenizer, case: tuple[str, str, str, dict[str, Any]], kind: Types
) -> None:
    logits, path = made(case, kind, tok96, tmp_path)
    assert logits.std() > 0.1, "a reference that says something"
    checkpoint = load_checkpoint(path, dtype=None)
    assert checkpoint.config.family == case[2] and checkpoint.notes == ()
    with torch.inference_mode():
        torch.testing.assert_close(checkpoint.model(IDS), logits, rtol=1e-5, atol=5e-5)
    model = open_fp32(path).model
    if missing_reason() is None and not CAPABILITIES["native"].beyond(model.config):
        engine = make_engine(model, None, EngineOptions(backend="native"))
        prompt = IDS[0].tolist()
        found = [engine.prefill(0, prompt[:5]), *(engine.step([token], [0]).logits_BV[0] for token in prompt[5:])]
        torch.testing.assert_close(torch.stack(found), logits[0, 4:], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("stated", [True, False])
def test_minicpm_is_llama_with_scales(tmp_path: Path, tok96: tokenizers.Tokenizer, stated: bool) -> None:
    """transformers has no such class: its Llama, with the embedding, what blocks add and the logits scaled in the weights. Files of before
    state no scales: those of MiniCPM 2B then."""
    reference = randomise(reference_of("llama", WIDE))
    round_weights(reference, Types.Q8_0)
    embedding, depth, base = (3.0, 1.2, 32) if stated else (12.0, 1.4, 256)
    keys = {"embedding_scale": embedding, "residual_scale": depth / 3**0.5, "logit_scale": 64 / base} if stated else {}
    path = tmp_path / "m.gguf"
    write_converted(reference, tok96, path, architecture="minicpm", kind=Types.Q8_0, keys=keys)
    config = open_fp32(path).config
    assert (config.embed_scale, config.logit_scale) == (embedding, pytest.approx(base / 64))
    with torch.no_grad():
        reference.model.embed_tokens.weight *= embedding
        reference.lm_head.weight *= base / 64
        for layer in reference.model.layers:
            layer.self_attn.o_proj.weight *= depth / 3**0.5
            layer.mlp.down_proj.weight *= depth / 3**0.5
        torch.testing.assert_close(open_fp32(path).model(IDS), reference(IDS).logits, rtol=1e-4, atol=1e-4)


def test_every_family_has_a_map_or_no_architecture_of_gguf() -> None:
    assert set(FAMILIES) - {family.model_type for family in GGUF_FAMILIES.values()} == {"opt"}
    tested = {case[1] for case in CASES} | {"minicpm"}
    assert tested == set(GGUF_FAMILIES)
