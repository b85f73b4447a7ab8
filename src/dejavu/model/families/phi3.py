"""Phi-3 and Phi-4: Llama whose q, k, v and whose gate and up are stored as one matrix each; heads may be rotated in part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dejavu.config import ModelConfig
from dejavu.model.families.family import Fused
from dejavu.model.families.fields import activation_fields, rope, windows
from dejavu.model.families.llama import LLAMA, gated_rms, written_gated


def _read(hf: Mapping[str, Any]) -> ModelConfig:
    fields = gated_rms(hf, rope(hf)) | activation_fields(hf)
    layers = list(range(fields["num_layers"]))
    return ModelConfig(**fields, **windows(hf, hf.get("sliding_window"), layers), tied_head=hf.get("tie_word_embeddings", False))


def _write(config: ModelConfig) -> dict[str, Any]:
    original = {} if config.rope is None or config.rope.type != "longrope" else {
        "original_max_position_embeddings": config.rope.original_max_positions
    }  # fmt: skip
    return written_gated(config) | original | {"sliding_window": config.window}


def _split_heads(config: ModelConfig, rows: Tensor) -> tuple[Tensor, ...]:
    groups = config.num_kv_heads * config.head_dim
    return rows.split([config.num_heads * config.head_dim, groups, groups])


def _joined(config: ModelConfig, parts: tuple[Tensor, ...]) -> Tensor:
    return torch.cat(parts)


PHI3 = replace(
    LLAMA,
    architecture="Phi3ForCausalLM",
    read_config=_read,
    write_config=_write,
    fused={
        "self_attn.qkv_proj": Fused(parts=("q", "k", "v"), split=_split_heads, join=_joined),
        "mlp.gate_up_proj": Fused(parts=("gate", "up"), split=lambda config, rows: rows.chunk(2), join=_joined),
    },
)
