"""Granite (dense): Llama whose embedding, attention scores, blocks and logits are scaled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dejavu.config import ModelConfig
from dejavu.model.families.fields import activation_fields, positive
from dejavu.model.families.llama import LLAMA, gated_rms, whole_rope, written_gated


def _read(hf: Mapping[str, Any]) -> ModelConfig:
    bias = hf.get("attention_bias", False)
    return ModelConfig(
        **gated_rms(hf, whole_rope(hf)) | activation_fields(hf),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=hf.get("mlp_bias", False),
        tied_head=hf.get("tie_word_embeddings", False),
        embed_scale=positive(hf, "embedding_multiplier", 1.0),
        attention_scale=positive(hf, "attention_multiplier", 1.0),
        residual_scale=positive(hf, "residual_multiplier", 1.0),
        logit_scale=1 / positive(hf, "logits_scaling", 1.0),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    assert config.qkv_bias == config.out_bias and config.attention_scale is not None, "Granite has no such config"
    return written_gated(config) | {
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "embedding_multiplier": config.embed_scale,
        "attention_multiplier": config.attention_scale,
        "residual_multiplier": config.residual_scale,
        "logits_scaling": 1 / config.logit_scale,
    }


GRANITE = replace(LLAMA, architecture="GraniteForCausalLM", read_config=_read, write_config=_write)
