"""OPT: learned positions, LayerNorm before or after the blocks, an ungated MLP with biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dejavu.config import ModelConfig, require
from dejavu.model.families.family import Family
from dejavu.model.families.fields import HF_ACTIVATION_NAMES, activation, common, size


def _read_opt(hf: Mapping[str, Any]) -> ModelConfig:
    shared = common(hf)
    pre_norm, bias = hf.get("do_layer_norm_before", True), hf.get("enable_bias", True)
    require(hf.get("head_dim") is None, "config.json: head_dim is no field of model_type 'opt'")
    return ModelConfig(
        **shared,
        intermediate_size=size(hf, "ffn_dim"),
        num_kv_heads=shared["num_heads"],
        activation=activation(hf.get("activation_function", "relu")),
        norm_affine=hf.get("layer_norm_elementwise_affine", True),
        pre_norm=pre_norm,
        final_norm=pre_norm and not hf.get("_remove_final_layer_norm", False),
        positions="learned",
        position_offset=2,
        embed_size=None if hf.get("word_embed_proj_dim") in (None, shared["hidden_size"]) else size(hf, "word_embed_proj_dim"),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        tied_head=hf.get("tie_word_embeddings", True),
    )


def _write_opt(config: ModelConfig) -> dict[str, Any]:
    assert config.num_kv_heads == config.num_heads and config.qkv_bias == config.out_bias == config.mlp_bias, "OPT has no such config"
    return {
        "ffn_dim": config.intermediate_size,
        "word_embed_proj_dim": config.embed_width,
        "do_layer_norm_before": config.pre_norm,
        "_remove_final_layer_norm": config.pre_norm and not config.final_norm,
        "activation_function": HF_ACTIVATION_NAMES.get(config.activation, config.activation),
        "enable_bias": config.mlp_bias,
        "layer_norm_elementwise_affine": config.norm_affine,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "layerdrop": 0.0,
    }


OPT = Family(
    architecture="OPTForCausalLM",
    prefix="model.decoder.",
    optional_prefixes=("model.", "decoder."),
    read_config=_read_opt,
    write_config=_write_opt,
    ties_absent_head=True,
    modules={
        "embed": "embed_tokens",
        "position": "embed_positions",
        "project_in": "project_in",
        "project_out": "project_out",
        "final_norm": "final_layer_norm",
        "head": "lm_head",
    },
    layer_modules={
        "norm1": "self_attn_layer_norm",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.out_proj",
        "norm2": "final_layer_norm",
        "up": "fc1",
        "down": "fc2",
    },
)
