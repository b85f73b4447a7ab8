"""Falcon: attention and MLP side by side on one norm (7B) or one each (40B, 180B), or in turn; q, k, v in one matrix whose
rows are laid out by key/value head. ALiBi positions (Falcon-RW) are not supported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dejavu.config import ModelConfig, require
from dejavu.model.families.family import Fused
from dejavu.model.families.fields import HF_ACTIVATION_NAMES, activation, common, positive, size, written_rope
from dejavu.model.families.llama import LLAMA, whole_rope

MODULES = {
    "norm1": "input_layernorm",
    "q": "self_attention.query",
    "k": "self_attention.key",
    "v": "self_attention.value",
    "o": "self_attention.dense",
    "norm2": "post_attention_layernorm",
    "up": "mlp.dense_h_to_4h",
    "down": "mlp.dense_4h_to_h",
}


def _read(given: Mapping[str, Any]) -> ModelConfig:
    older = {"hidden_size": given.get("n_embed"), "num_attention_heads": given.get("n_head"), "num_hidden_layers": given.get("n_layer")}
    # The published ones do not state their context; some copies have the names of before.
    hf: dict[str, Any] = {"max_position_embeddings": 2048} | {key: value for key, value in older.items() if value is not None} | dict(given)
    require(not hf.get("alibi"), "config.json: alibi positions are not supported; use a Falcon with rotary ones")
    rotary, bias = whole_rope(hf), hf.get("bias", False)
    require(rotary.type != "longrope", "config.json: rope type 'longrope' is not supported for model_type 'falcon'")
    shared = common(hf)
    new = hf.get("new_decoder_architecture", False)
    parallel = new or hf.get("parallel_attn", True)
    norms = hf.get("num_ln_in_parallel_attn")
    norms = (2 if new else 1) if norms is None else norms
    require(norms == 1 or new, f"config.json: num_ln_in_parallel_attn {norms} belongs to new_decoder_architecture")
    heads = shared["num_heads"]
    groups = (hf.get("num_kv_heads") or heads) if new or not hf.get("multi_query", True) else 1
    return ModelConfig(
        **shared,
        intermediate_size=4 * shared["hidden_size"] if hf.get("ffn_hidden_size") is None else size(hf, "ffn_hidden_size"),
        num_kv_heads=groups,
        activation=activation(hf.get("activation", "gelu")),
        norm_eps=positive(hf, "layer_norm_epsilon", 1e-5),
        positions="rope",
        position_offset=0,
        rope=rotary,
        parallel=parallel,
        shared_norm=parallel and norms == 1,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        tied_head=hf.get("tie_word_embeddings", True),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    """As the new architecture where blocks are side by side: its layout holds every number of key/value heads."""
    assert config.rope is not None and config.qkv_bias == config.out_bias == config.mlp_bias, "Falcon has no such config"
    return {
        "ffn_hidden_size": config.intermediate_size,
        "num_kv_heads": config.num_kv_heads,
        "activation": HF_ACTIVATION_NAMES.get(config.activation, config.activation),
        "layer_norm_epsilon": config.norm_eps,
        "new_decoder_architecture": config.parallel,
        "num_ln_in_parallel_attn": (1 if config.shared_norm else 2) if config.parallel else None,
        "multi_query": config.num_kv_heads == 1,
        "parallel_attn": config.parallel,
        "alibi": False,
        "bias": config.mlp_bias,
        **written_rope(config.rope),
    }


def _renamed(config: ModelConfig) -> dict[str, str]:
    return {"norm1": "ln_attn", "norm2": "ln_mlp"} if config.parallel and not config.shared_norm else {}


def _split(config: ModelConfig, rows: Tensor) -> tuple[Tensor, ...]:
    """Rows come by key/value head: its queries, its key, its value."""
    per = config.heads_per_group
    by_group = rows.unflatten(0, (config.num_kv_heads, per + 2, config.head_dim))
    return by_group[:, :per].flatten(0, 2), by_group[:, per].flatten(0, 1), by_group[:, per + 1].flatten(0, 1)


def _join(config: ModelConfig, parts: tuple[Tensor, ...]) -> Tensor:
    q, k, v = (part.unflatten(0, (config.num_kv_heads, -1, config.head_dim)) for part in parts)
    return torch.cat([q, k, v], 1).flatten(0, 2)


FALCON = replace(
    LLAMA,
    architecture="FalconForCausalLM",
    prefix="transformer.",
    optional_prefixes=("transformer.",),
    read_config=_read,
    write_config=_write,
    modules={"embed": "word_embeddings", "final_norm": "ln_f", "head": "lm_head"},
    layer_modules=MODULES,
    renamed=_renamed,
    fused={"self_attention.query_key_value": Fused(parts=("q", "k", "v"), split=_split, join=_join)},
    layers="h",
    ties_absent_head=True,
)
