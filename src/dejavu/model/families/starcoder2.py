"""StarCoder2: LayerNorm, rotary positions, grouped heads, an ungated MLP and biases throughout; perhaps a window in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dejavu.config import ModelConfig
from dejavu.model.families.fields import (
    activation_fields,
    common,
    context,
    kv_heads,
    positive,
    size,
    windows,
    written_activation,
    written_rope,
)
from dejavu.model.families.llama import LLAMA, UNGATED, whole_rope


def _read(hf: Mapping[str, Any]) -> ModelConfig:
    rotary, bias, shared = whole_rope(hf), hf.get("use_bias", True), common(hf)
    return ModelConfig(
        **shared | activation_fields({"hidden_act": "gelu_pytorch_tanh"} | dict(hf)) | context(hf, rotary),
        **windows(hf, hf.get("sliding_window"), list(range(shared["num_layers"]))),
        intermediate_size=size(hf, "intermediate_size"),
        num_kv_heads=kv_heads(hf),
        norm_eps=positive(hf, "norm_epsilon", 1e-5),
        positions="rope",
        position_offset=0,
        rope=rotary,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        tied_head=hf.get("tie_word_embeddings", True),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    assert config.rope is not None and config.qkv_bias == config.out_bias == config.mlp_bias, "StarCoder2 has no such config"
    return {
        "intermediate_size": config.intermediate_size,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "norm_epsilon": config.norm_eps,
        "use_bias": config.mlp_bias,
        "sliding_window": config.window,
        "attention_dropout": 0.0,
        "residual_dropout": 0.0,
        "embedding_dropout": 0.0,
        **written_activation(config),
        **written_rope(config.rope),
    }


STARCODER2 = replace(
    LLAMA,
    architecture="Starcoder2ForCausalLM",
    read_config=_read,
    write_config=_write,
    layer_modules=UNGATED | {"up": "mlp.c_fc", "down": "mlp.c_proj"},
)
