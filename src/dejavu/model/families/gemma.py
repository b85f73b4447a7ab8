"""Gemma: norms whose weights are stored less one, a scaled embedding. Gemma 2 and 3 (text) have norms before and after each block, and
windows in some layers. Gemma 2 caps scores and logits; Gemma 3 norms queries and keys, and its windowed layers have rotary positions of
their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dejavu.config import ModelConfig, RopeConfig, require
from dejavu.model.families.fields import (
    activation_fields,
    given,
    positive,
    rope,
    size,
    sliding_layers,
    windows,
    written_activation,
    written_rope,
)
from dejavu.model.families.llama import GATED, LLAMA, QK_NORMS, gated_rms, whole_rope, written_gated

NORMS = {
    "norm1_out": "post_attention_layernorm",
    "norm2": "pre_feedforward_layernorm",
    "norm2_out": "post_feedforward_layernorm",
}
LOCAL_THETA, GLOBAL_THETA = 10000.0, 1000000.0


def _sliding(hf: Mapping[str, Any], full: int) -> list[int]:
    """Layers with a window: all but every `full`-th, unless layer_types says otherwise."""
    stated = sliding_layers(hf)
    require(full > 0, f"config.json: sliding_window_pattern must be positive, not {full}")
    return [index for index in range(size(hf, "num_hidden_layers")) if (index + 1) % full] if stated is None else stated


def _shared(hf: Mapping[str, Any], rotary: RopeConfig) -> dict[str, Any]:
    """What all three have."""
    require(not hf.get("use_bidirectional_attention"), "config.json: use_bidirectional_attention is not supported: it is for encoders")
    bias, fields = hf.get("attention_bias", False), gated_rms({"head_dim": 256} | dict(hf), rotary)
    return fields | {
        "embed_scale": fields["hidden_size"] ** 0.5,
        "qkv_bias": bias,
        "out_bias": bias,
        "tied_head": hf.get("tie_word_embeddings", True),
    }


def _read1(hf: Mapping[str, Any]) -> ModelConfig:
    """hidden_act "gelu" of the first checkpoints stands for the approximation by tanh."""
    hf = dict(hf)
    if given(hf, "hidden_act", "gelu") == "gelu":
        hf["hidden_act"] = "gelu_pytorch_tanh"
    return ModelConfig(**_shared(hf, whole_rope(hf)), **activation_fields(hf))


def _write1(config: ModelConfig) -> dict[str, Any]:
    return written_gated(config) | {"attention_bias": config.qkv_bias}


def _fields(hf: Mapping[str, Any], rotary: RopeConfig, sliding: list[int]) -> dict[str, Any]:
    hf = {key: value for key, value in hf.items() if value is not None or key != "hidden_activation"}
    fields = _shared(hf, rotary) | activation_fields({"hidden_activation": "gelu_pytorch_tanh"} | hf, "hidden_activation")
    return fields | windows(hf, hf.get("sliding_window", 4096), sliding) | {
        "block_norms": True,
        "attention_scale": positive(hf, "query_pre_attn_scalar", 256) ** -0.5,
    }  # fmt: skip


def _read2(hf: Mapping[str, Any]) -> ModelConfig:
    caps = {
        "attention_cap": float(hf.get("attn_logit_softcapping", 50.0) or 0),
        "logit_cap": float(hf.get("final_logit_softcapping", 30.0) or 0),
    }
    return ModelConfig(**_fields(hf, rope(hf), _sliding(hf, 2)), **caps)


def _read3(hf: Mapping[str, Any]) -> ModelConfig:
    nested = hf.get("rope_parameters") or {}
    older = {key: hf.get(key) for key in ("rope_theta", "rope_scaling") if hf.get(key) is not None}
    whole = nested.get("full_attention", {} if "sliding_attention" in nested else nested)
    part = nested.get("sliding_attention") or {}
    sizes = {key: hf[key] for key in ("max_position_embeddings",) if key in hf}
    rotary = rope(older | sizes | {"rope_parameters": whole}, theta=GLOBAL_THETA)
    local = rope(sizes | {"rope_theta": hf.get("rope_local_base_freq"), "rope_parameters": part}, theta=LOCAL_THETA)
    sliding = _sliding(hf, given(hf, "sliding_window_pattern", 6))
    fields = _fields(hf, rotary, sliding)
    caps = {
        "attention_cap": float(hf.get("attn_logit_softcapping") or 0),
        "logit_cap": float(hf.get("final_logit_softcapping") or 0),
    }
    if local != rotary and sliding and "window" not in fields:  # a window that no sequence fills, in layers rotated their own way
        fields |= {"window": fields["max_positions"], "windowed": tuple(sliding)}
    local_rope = local if fields.get("windowed") and local != rotary else None
    return ModelConfig(**fields, **caps, qk_norm=True, local_rope=local_rope)


def _write(config: ModelConfig) -> dict[str, Any]:
    sliding = set(config.windowed)
    assert config.attention_scale is not None, "Gemma states its scale"
    return written_gated(config) | written_activation(config, "hidden_activation") | {
        "query_pre_attn_scalar": round(config.attention_scale**-2),
        "sliding_window": config.window or config.max_positions,
        "layer_types": ["sliding_attention" if index in sliding else "full_attention" for index in range(config.num_layers)],
        "attn_logit_softcapping": config.attention_cap or None,
        "final_logit_softcapping": config.logit_cap or None,
        "attention_bias": config.qkv_bias,
    }  # fmt: skip


def _write3(config: ModelConfig) -> dict[str, Any]:
    assert config.rope is not None
    local = config.local_rope or config.rope
    require(local.type == "default", f"rope type {local.type!r} of windowed layers cannot be written")
    return _write(config) | {"rope_local_base_freq": local.theta} | written_rope(config.rope)


GEMMA = replace(LLAMA, architecture="GemmaForCausalLM", read_config=_read1, write_config=_write1, norm_shift=1.0)
GEMMA2 = replace(
    LLAMA, architecture="Gemma2ForCausalLM", read_config=_read2, write_config=_write, layer_modules=GATED | NORMS, norm_shift=1.0
)  # fmt: skip
GEMMA3 = replace(
    GEMMA2, architecture="Gemma3ForCausalLM", read_config=_read3, write_config=_write3, layer_modules=GATED | NORMS | QK_NORMS
)  # fmt: skip
