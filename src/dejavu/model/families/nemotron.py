"""Nemotron: LayerNorm whose weight is stored less one, heads rotated in part, an ungated MLP with squared ReLU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dejavu.config import ModelConfig
from dejavu.model.families.fields import (
    activation_fields,
    common,
    context,
    given,
    kv_heads,
    positive,
    rope,
    size,
    written_activation,
    written_rope,
)
from dejavu.model.families.llama import LLAMA, UNGATED


def _read(hf: Mapping[str, Any]) -> ModelConfig:
    if (hf.get("rope_parameters") or {}).get("partial_rotary_factor") is not None:
        # transformers 5.17 writes its default next to the value that it computes with.
        hf = {key: value for key, value in hf.items() if key != "partial_rotary_factor"}
    share = given(hf, "rope_percent", given(hf, "rope_percentage", 0.5))  # its names before partial_rotary_factor
    rotary, bias = rope(hf, partial=share), hf.get("attention_bias", False)
    fields = common(hf) | activation_fields({"hidden_act": "relu2"} | dict(hf)) | context(hf, rotary)
    return ModelConfig(
        **fields,
        intermediate_size=size(hf, "intermediate_size"),
        num_kv_heads=kv_heads(hf),
        norm_eps=positive(hf, "norm_eps", 1e-5),
        positions="rope",
        position_offset=0,
        rope=rotary,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=hf.get("mlp_bias", False),
        tied_head=hf.get("tie_word_embeddings", False),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    assert config.rope is not None and config.qkv_bias == config.out_bias, "Nemotron has no such config"
    return {
        "intermediate_size": config.intermediate_size,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "norm_eps": config.norm_eps,
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "attention_dropout": 0.0,
        **written_activation(config),
        **written_rope(config.rope),
        "partial_rotary_factor": config.rope.partial,
    }


NEMOTRON = replace(
    LLAMA, architecture="NemotronForCausalLM", read_config=_read, write_config=_write, layer_modules=UNGATED, norm_shift=1.0
)  # fmt: skip
