"""Llama and those that differ from it by a few fields: Mistral, Qwen2, Qwen3, Arcee, and MiniCPM with its scales.

ReLU-fied ones are these with another activation: relu (ReluLLaMA), fatrelu (ProSparse, MiniCPM-S), drelu (TurboSparse).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dejavu.config import ModelConfig, RopeConfig, require
from dejavu.model.families.family import Family
from dejavu.model.families.fields import (
    activation_fields,
    common,
    context,
    given,
    kv_heads,
    positive,
    rope,
    size,
    sliding_layers,
    windows,
    written_activation,
    written_rope,
)


def gated_rms(hf: Mapping[str, Any], rotary: RopeConfig) -> dict[str, Any]:
    """What Llama and its kin share: RMSNorm, rotary positions, a gated MLP."""
    return common(hf) | {
        "intermediate_size": size(hf, "intermediate_size"),
        "num_kv_heads": kv_heads(hf),
        "gated": True,
        "norm": "rmsnorm",
        "norm_eps": positive(hf, "rms_norm_eps", 1e-6),
        "positions": "rope",
        "position_offset": 0,
        "rope": rotary,
        **context(hf, rotary),
    }


def whole_rope(hf: Mapping[str, Any]) -> RopeConfig:
    """Rotary settings of a family that rotates whole heads."""
    found = rope(hf)
    require(found.partial == 1, f"partial_rotary_factor {found.partial} is not supported for model_type {hf['model_type']!r}; only 1.0 is")
    return found


def _read_llama(hf: Mapping[str, Any]) -> ModelConfig:
    attention_bias = hf.get("attention_bias", False)
    fields = gated_rms(hf, whole_rope(hf)) | activation_fields(hf)
    fields |= {"qkv_bias": attention_bias, "out_bias": attention_bias, "mlp_bias": hf.get("mlp_bias", False)}
    return ModelConfig(**fields, tied_head=hf.get("tie_word_embeddings", False))


def written_gated(config: ModelConfig) -> dict[str, Any]:
    assert config.rope is not None, "these families have rotary positions"
    return {
        "intermediate_size": config.intermediate_size,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "attention_dropout": 0.0,
        **written_activation(config),
        **written_rope(config.rope),
    }


def _write_llama(config: ModelConfig) -> dict[str, Any]:
    assert config.qkv_bias == config.out_bias, "Llama has no such config"
    return written_gated(config) | {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}


def _read_mistral(hf: Mapping[str, Any]) -> ModelConfig:
    fields = gated_rms(hf, whole_rope(hf)) | activation_fields(hf)
    layers = list(range(fields["num_layers"]))
    return ModelConfig(**fields, **windows(hf, hf.get("sliding_window", 4096), layers), tied_head=hf.get("tie_word_embeddings", False))


def _write_mistral(config: ModelConfig) -> dict[str, Any]:
    return written_gated(config) | {"sliding_window": config.window}


def _qwen_windows(hf: Mapping[str, Any]) -> dict[str, Any]:
    if not hf.get("use_sliding_window", False):
        require(not sliding_layers(hf), "config.json: layer_types has sliding layers, and use_sliding_window is off")
        return {}
    layers = sliding_layers(hf)
    first = given(hf, "max_window_layers", 28)
    layers = list(range(max(0, first), size(hf, "num_hidden_layers"))) if layers is None else layers
    return windows(hf, hf.get("sliding_window", 4096), layers)


def _read_qwen2(hf: Mapping[str, Any]) -> ModelConfig:
    fields = gated_rms(hf, whole_rope(hf)) | activation_fields(hf) | {"qkv_bias": True}
    return ModelConfig(**fields, **_qwen_windows(hf), tied_head=hf.get("tie_word_embeddings", False))


def _read_qwen3(hf: Mapping[str, Any]) -> ModelConfig:
    bias = hf.get("attention_bias", False)
    fields = gated_rms(hf, whole_rope(hf)) | activation_fields(hf) | {"qkv_bias": bias, "out_bias": bias, "qk_norm": True}
    fields["head_dim"] = size(hf, "head_dim") if hf.get("head_dim") is not None else 128  # its own default
    return ModelConfig(**fields, **_qwen_windows(hf), tied_head=hf.get("tie_word_embeddings", False))


def _write_qwen(config: ModelConfig) -> dict[str, Any]:
    sliding = set(config.windowed)
    types = ["sliding_attention" if index in sliding else "full_attention" for index in range(config.num_layers)]
    fields = {"use_sliding_window": bool(sliding), "sliding_window": config.window, "layer_types": types}
    return written_gated(config) | fields | ({"attention_bias": config.qkv_bias} if config.qk_norm else {})


def _read_arcee(hf: Mapping[str, Any]) -> ModelConfig:
    attention_bias = hf.get("attention_bias", False)
    fields = gated_rms(hf, whole_rope(hf)) | activation_fields({"hidden_act": "relu2"} | dict(hf)) | {"gated": False}
    fields |= {"qkv_bias": attention_bias, "out_bias": attention_bias, "mlp_bias": hf.get("mlp_bias", False)}
    return ModelConfig(**fields, tied_head=hf.get("tie_word_embeddings", False))


def _read_minicpm(hf: Mapping[str, Any]) -> ModelConfig:
    """Llama whose embedding, blocks and logits are scaled; the fields of the checkpoints' own code."""
    fields = gated_rms(hf, whole_rope(hf)) | activation_fields(hf)
    layers, width = fields["num_layers"], fields["hidden_size"]
    return ModelConfig(
        **fields,
        tied_head=hf.get("tie_word_embeddings", True),
        embed_scale=float(given(hf, "scale_emb", 1.0)),
        residual_scale=float(given(hf, "scale_depth", 1.0)) / layers**0.5,
        logit_scale=float(given(hf, "dim_model_base", width)) / width,
    )


def _write_minicpm(config: ModelConfig) -> dict[str, Any]:
    return written_gated(config) | {
        "scale_emb": config.embed_scale,
        "scale_depth": config.residual_scale * config.num_layers**0.5,
        "dim_model_base": config.logit_scale * config.hidden_size,
    }


UNGATED = {
    "norm1": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "norm2": "post_attention_layernorm",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
GATED = UNGATED | {"gate": "mlp.gate_proj"}
QK_NORMS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}

LLAMA = Family(
    architecture="LlamaForCausalLM",
    prefix="model.",
    optional_prefixes=("model.",),
    read_config=_read_llama,
    write_config=_write_llama,
    modules={"embed": "embed_tokens", "final_norm": "norm", "head": "lm_head"},
    layer_modules=GATED,
)
MISTRAL = replace(LLAMA, architecture="MistralForCausalLM", read_config=_read_mistral, write_config=_write_mistral)
QWEN2 = replace(LLAMA, architecture="Qwen2ForCausalLM", read_config=_read_qwen2, write_config=_write_qwen)
QWEN3 = replace(
    LLAMA, architecture="Qwen3ForCausalLM", read_config=_read_qwen3, write_config=_write_qwen, layer_modules=GATED | QK_NORMS
)  # fmt: skip
ARCEE = replace(LLAMA, architecture="ArceeForCausalLM", read_config=_read_arcee, layer_modules=UNGATED)
MINICPM = replace(LLAMA, architecture="MiniCPMForCausalLM", read_config=_read_minicpm, write_config=_write_minicpm)
