"""StableLM: LayerNorm, heads rotated in part, a gated MLP, after attention or beside it on the same norm. A norm of its own for each head
(StableLM 2 12B) is not supported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dejavu.config import ModelConfig, require
from dejavu.model.families.fields import (
    activation_fields,
    common,
    context,
    kv_heads,
    positive,
    rope,
    size,
    written_activation,
    written_rope,
)
from dejavu.model.families.llama import LLAMA


def _read(hf: Mapping[str, Any]) -> ModelConfig:
    require(not hf.get("qk_layernorm"), "config.json: qk_layernorm, a norm of its own for each head, is not supported")
    rotary, parallel = rope(hf, partial=0.25), hf.get("use_parallel_residual", False)
    return ModelConfig(
        **common(hf) | activation_fields({"hidden_act": "silu"} | dict(hf)) | context(hf, rotary),
        intermediate_size=size(hf, "intermediate_size"),
        num_kv_heads=kv_heads(hf),
        gated=True,
        norm_eps=positive(hf, "layer_norm_eps", 1e-5),
        positions="rope",
        position_offset=0,
        rope=rotary,
        parallel=parallel,
        shared_norm=parallel,
        qkv_bias=hf.get("use_qkv_bias", False),
        tied_head=hf.get("tie_word_embeddings", False),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    assert config.rope is not None and config.parallel == config.shared_norm, "StableLM has no such config"
    return {
        "intermediate_size": config.intermediate_size,
        "num_key_value_heads": config.num_kv_heads,
        "layer_norm_eps": config.norm_eps,
        "use_qkv_bias": config.qkv_bias,
        "use_parallel_residual": config.parallel,
        "qk_layernorm": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        **written_activation(config),
        **written_rope(config.rope),
        "partial_rotary_factor": config.rope.partial,
    }


STABLELM = replace(LLAMA, architecture="StableLmForCausalLM", read_config=_read, write_config=_write)
