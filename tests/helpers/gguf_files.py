"""A GGUF file of a tiny model, written with the gguf package the way llama.cpp's converter does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers

from dejavu.model.families import FAMILIES, is_transposed
from dejavu.model.gguf import LAYER_MODULES, MODULES
from dejavu.model.transformer import Transformer

GGUF_NAMES = {theirs: ours for ours, theirs in (MODULES | LAYER_MODULES).items()}
Types = gguf.GGMLQuantizationType


def neighbours(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of q and k: row (h, s, j) of a head, s its half, goes to (h, j, s)."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(model: Transformer, tok96: tokenizers.Tokenizer, path: Path, *, kind: Types = Types.F32, **changes: Any) -> None:
    config = model.config
    assert config.rope is not None
    writer = gguf.GGUFWriter(path, changes.get("architecture", "llama"))
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_rope_dimension_count(config.head_dim)
    if config.rope.type == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope.factor)
    tokens = sorted(tok96.get_vocab(), key=lambda token: tok96.get_vocab()[token])
    merges = json.loads(tok96.to_str())["model"]["merges"]
    writer.add_tokenizer_model(changes.get("tokenizer", "gpt2"))
    writer.add_tokenizer_pre(changes.get("pre", "gpt-2"))
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if i < 4 else gguf.TokenType.NORMAL for i in range(96)])
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(changes.get("add_bos", True))
    writer.add_chat_template("{{ messages }}")
    for name, parameter in model.named_weights():
        plain = FAMILIES["llama"].foreign_name(name, model.config)
        values = (parameter.T if is_transposed(name) else parameter).contiguous().numpy()
        parts = plain.split(".")
        if parts[0] == "layers":
            stored = f"blk.{parts[1]}.{GGUF_NAMES['.'.join(parts[2:-1])]}.{parts[-1]}"
        else:
            stored = f"{GGUF_NAMES[parts[0]]}.{parts[-1]}"
        for letter, heads in (("q", config.num_heads), ("k", config.num_kv_heads)):
            values = neighbours(values, heads) if f"attn_{letter}." in stored else values
        of_kind = kind if values.ndim == 2 else Types.F32
        writer.add_tensor(stored, gguf.quants.quantize(values, of_kind), raw_dtype=of_kind)
    for name, values in changes.get("extra", {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
