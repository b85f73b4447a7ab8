"""GGUF files of tiny models, written with the gguf package the way llama.cpp's converters do: its names of tensors, its keys."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
import torch
from transformers import PreTrainedModel

from dejavu.model.families import FAMILIES, config_to_hf
from dejavu.model.transformer import Transformer

Types = gguf.GGMLQuantizationType
PAIRS = ("llama", "mistral3", "arcee", "granite", "minicpm")  # rows of q and k are written as pairs
ONE_MORE = ("gemma", "gemma2", "gemma3", "nemotron")  # norm weights are written with one added
ROTATED_DIMENSIONS = ("llama", "mistral3", "arcee", "granite", "phi3", "nemotron", "stablelm")  # state how many values are rotated
SCALES = ("embedding_scale", "residual_scale", "logit_scale", "attention.scale")


def neighbours(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of q and k: row (h, s, j) of a head, s its half, goes to (h, j, s)."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def round_weights(model: PreTrainedModel, kind: Types) -> None:
    """Give every matrix the values that it has in a file of that type."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(parameter.numpy(), kind), kind)))


def write_gguf(model: Transformer, tok96: tokenizers.Tokenizer, path: Path, *, kind: Types = Types.F32, **changes: Any) -> None:
    """A file of architecture llama. changes: see `write_converted`, and architecture: what the file says that it is."""
    family, hf = FAMILIES["llama"], config_to_hf(model.config)
    stored = family.stored(dict(model.named_weights()), model.config)
    tensors = {family.full_name(plain): values.contiguous().numpy() for plain, values in stored.items()}
    rope = hf.pop("rope_scaling") or {"rope_type": "default"}
    hf["rope_parameters"] = rope | {"rope_theta": hf["rope_theta"]}
    _write("llama", hf, tensors, tok96, path, kind, changes)


def write_converted(
    model: PreTrainedModel, tok96: tokenizers.Tokenizer, path: Path, *, architecture: str, kind: Types, **changes: Any
) -> None:
    """A file of a model of transformers. changes: keys (of the architecture: value, None for none), tokenizer, pre, add_bos, extra
    (tensors by name), parts (how many files)."""
    tensors = {name: values.numpy() for name, values in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    _write(architecture, model.config.to_dict(), tensors, tok96, path, kind, changes)


def _write(
    architecture: str,
    hf: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    tok96: tokenizers.Tokenizer,
    path: Path,
    kind: Types,
    changes: Mapping[str, Any],
) -> None:
    parts = changes.get("parts", 0)
    per_part = math.ceil((len(tensors) + len(changes.get("extra", {}))) / parts) if parts else 0
    said = changes.get("architecture", architecture)
    writer = gguf.GGUFWriter(path, said, split_max_tensors=per_part)
    for key, value in (_keys(architecture, hf, tensors) | changes.get("keys", {})).items():
        if value is not None:
            _add(writer, f"{said}.{key}", value)
    _add_tokenizer(writer, tok96, changes)
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], hf["num_hidden_layers"])
    for name, values in tensors.items():
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, f"{architecture} has no tensor {name}"
        values = _as_converted(architecture, hf, name, values)
        of_kind = kind if values.ndim == 2 else Types.F32
        writer.add_tensor(stored, gguf.quants.quantize(np.ascontiguousarray(values), of_kind), raw_dtype=of_kind)
    for name, values in changes.get("extra", {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def _keys(architecture: str, hf: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The architecture's metadata."""
    rope = hf["rope_parameters"]
    local, rope = rope.get("sliding_attention", {}), rope.get("full_attention", rope)
    heads, hidden = hf["num_attention_heads"], hf["hidden_size"]
    head = hf.get("head_dim") or hidden // heads
    found: dict[str, Any] = {
        "block_count": hf["num_hidden_layers"],
        "context_length": hf.get("max_position_embeddings", 64),
        "embedding_length": hidden,
        "feed_forward_length": hf.get("intermediate_size") or hf.get("ffn_hidden_size"),
        "attention.head_count": heads,
        "attention.head_count_kv": hf.get("num_key_value_heads"),
        "rope.freq_base": rope.get("rope_theta"),
        "rope.freq_base_swa": local.get("rope_theta"),
        "attention.layer_norm_rms_epsilon": hf.get("rms_norm_eps"),
        "attention.layer_norm_epsilon": next(
            (hf[key] for key in ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps") if key in hf), None
        ),
        "attention.key_length": hf.get("head_dim"),
        "attention.value_length": hf.get("head_dim"),
    }
    if rope["rope_type"] in ("linear", "yarn"):
        found |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": rope["factor"]}
    if rope["rope_type"] == "yarn":
        found |= {
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
            "rope.scaling.yarn_attn_factor": rope.get("attention_factor"),
            "rope.scaling.yarn_beta_fast": rope.get("beta_fast"),
            "rope.scaling.yarn_beta_slow": rope.get("beta_slow"),
        }
    if rope["rope_type"] == "longrope":
        scale = found["context_length"] / rope["original_max_position_embeddings"]
        found["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        found["rope.scaling.attn_factor"] = math.sqrt(1 + math.log(scale) / math.log(rope["original_max_position_embeddings"]))
    if architecture in ROTATED_DIMENSIONS:
        found["rope.dimension_count"] = int(head * rope.get("partial_rotary_factor", 1.0))
    match architecture:
        case "falcon":
            found |= {
                "attention.head_count_kv": hf["num_kv_heads"] if hf["new_decoder_architecture"] else 1,
                "tensor_data_layout": "jploski",
            }
        case "gemma2" | "gemma3":
            found |= {"attention.sliding_window": hf["sliding_window"], "final_logit_softcapping": hf.get("final_logit_softcapping")}
            if architecture == "gemma2":
                found["attn_logit_softcapping"] = hf["attn_logit_softcapping"]
        case "phi3":
            found["attention.sliding_window"] = hf["sliding_window"] or 0
        case "nemotron":
            found["rope.scaling.type"] = "none"
        case "granite":
            multipliers = ("embedding_multiplier", "residual_multiplier", "logits_scaling", "attention_multiplier")
            found |= {key: hf[field] for key, field in zip(SCALES, multipliers, strict=True)}
        case "stablelm":
            found["use_parallel_residual"] = hf["use_parallel_residual"]
    return found


def _as_converted(architecture: str, hf: Mapping[str, Any], name: str, values: np.ndarray) -> np.ndarray:
    heads = hf["num_attention_heads"]
    groups = hf.get("num_key_value_heads") or heads
    if architecture in PAIRS and ".q_proj." in name:
        return neighbours(values, heads)
    if architecture in PAIRS and ".k_proj." in name:
        return neighbours(values, groups)
    if architecture in ONE_MORE and name.endswith("norm.weight"):
        return values + 1
    if "query_key_value" in name:
        groups = hf["num_kv_heads"] if hf["new_decoder_architecture"] else 1
        by_group = values.reshape(groups, heads // groups + 2, -1, *values.shape[1:])
        parts = (by_group[:, :-2], by_group[:, -2:-1], by_group[:, -1:])
        return np.concatenate([part.reshape(-1, *values.shape[1:]) for part in parts])
    return values


def rope_factors(hf: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tensors of divisors of the frequencies that converters add: of llama3's rule, and of longrope's lists."""
    rope = hf["rope_parameters"]
    if rope["rope_type"] == "longrope":
        return {f"rope_factors_{which}.weight": np.array(rope[f"{which}_factor"], np.float32) for which in ("long", "short")}
    size = hf["hidden_size"] // hf["num_attention_heads"]
    wavelength = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, size, 2) / size)
    original, low, high = (rope[key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"))
    smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
    return {"rope_freqs.weight": (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)}


def _add_tokenizer(writer: gguf.GGUFWriter, tok96: tokenizers.Tokenizer, changes: Mapping[str, Any]) -> None:
    tokens = sorted(tok96.get_vocab(), key=lambda token: tok96.get_vocab()[token])
    merges = json.loads(tok96.to_str())["model"]["merges"]
    writer.add_tokenizer_model(changes.get("tokenizer", "gpt2"))
    if changes.get("pre", "gpt-2") is not None:
        writer.add_tokenizer_pre(changes.get("pre", "gpt-2"))
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if i < 4 else gguf.TokenType.NORMAL for i in range(len(tokens))])
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(2)
    if changes.get("add_bos", True) is not None:
        writer.add_add_bos_token(changes.get("add_bos", True))
    for name, index in changes.get("ends", {}).items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", index)
    writer.add_chat_template([{"name": "default", "template": "{{ messages }}"}, {"name": "tool_use", "template": "{{ tools }}"}])
