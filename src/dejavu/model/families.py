"""Families of models: what Hugging Face calls a config field or a tensor, and what we call it.

In: a Hugging Face `config.json` as a dict, or a ModelConfig. Out: the other one, and the names of the tensors both ways.
A family is an entry of FAMILIES; adding one adds an entry (and the two functions of its config fields), no model code.

Tensor names here are *plain*: without the prefix (`model.`, `model.decoder.`, `decoder.`) that checkpoints of one family
carry or not. Our `o` and `down` hold a row per input, Hugging Face's a row per output: they are transposed on the way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from dejavu.config import ModelConfig, RopeConfig, require
from dejavu.model.transformer import Transformer

# Ours on the right. fatrelu takes its threshold from `hidden_act_param`.
ACTIVATION_NAMES = {
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "fatrelu": "fatrelu",
}
HF_ACTIVATION_NAMES = {"gelu_tanh": "gelu_pytorch_tanh"}
TRANSPOSED_MODULES = ("o", "down")
LAYER_NAME = re.compile(r"layers\.(\d+)\.(\w+)\.(weight|bias)")


@dataclass(frozen=True, slots=True)
class Target:
    """Where a stored tensor goes: the parameter's name in Transformer, and whether its two axes swap on the way."""

    name: str
    transposed: bool


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model_type. `modules` and `layer_modules` map our module names to theirs; `ignored` are plain names to pass over."""

    architecture: str
    prefix: str
    optional_prefixes: tuple[str, ...]
    read_config: Callable[[Mapping[str, Any]], ModelConfig]
    write_config: Callable[[ModelConfig], dict[str, Any]]
    modules: Mapping[str, str]
    layer_modules: Mapping[str, str]
    ties_absent_head: bool = False
    ignored: tuple[re.Pattern[str], ...] = field(default=(re.compile(r".*\brotary_emb\.inv_freq"),))

    def plain_name(self, stored: str) -> str:
        """A tensor's name without the optional prefixes of its file."""
        for prefix in self.optional_prefixes:
            stored = stored.removeprefix(prefix)
        return stored

    def foreign_name(self, ours: str) -> str:
        """The plain Hugging Face name of our parameter."""
        match = LAYER_NAME.fullmatch(ours)
        if match:
            layer, module, kind = match.groups()
            return f"layers.{layer}.{self.layer_modules[module]}.{kind}"
        module, kind = ours.rsplit(".", 1)
        return f"{self.modules[module]}.{kind}"

    def full_name(self, ours: str) -> str:
        """The name under which transformers saves our parameter."""
        plain = self.foreign_name(ours)
        return plain if plain == "lm_head.weight" else self.prefix + plain

    def is_ignored(self, plain: str) -> bool:
        return any(pattern.fullmatch(plain) for pattern in self.ignored)


def is_transposed(ours: str) -> bool:
    match = LAYER_NAME.fullmatch(ours)
    return match is not None and match[2] in TRANSPOSED_MODULES and match[3] == "weight"


class _NoInitialisation(TorchFunctionMode):
    """Skips the random initialisation of modules: on the meta device it does nothing but load torch's compiler (a second or two)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_):
            return kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def empty_model(config: ModelConfig) -> Transformer:
    """Transformer(config) on the meta device: shapes without memory, for `load_state_dict(..., assign=True)`."""
    with torch.device("meta"), _NoInitialisation():
        return Transformer(config)


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of Transformer(config), without allocating one."""
    return {name: tuple(parameter.shape) for name, parameter in empty_model(config).named_parameters()}


def foreign_targets(config: ModelConfig) -> dict[str, Target]:
    """For every parameter: plain Hugging Face tensor name -> where it goes."""
    family = FAMILIES[config.family]
    return {family.foreign_name(ours): Target(ours, is_transposed(ours)) for ours in parameter_shapes(config)}


def find_family(model_type: object) -> Family:
    """The family of a config's model_type; ValueError with the supported ones where there is none."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"model_type {model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a Hugging Face config dict. ValueError names a missing field, an unsupported type or activation."""
    family = find_family(hf.get("model_type"))
    require(
        not hf.get("quantization_config"),
        "the checkpoint is quantised (quantization_config in config.json); use an unquantised one, or a GGUF file of it",
    )
    return family.read_config(hf)


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The Hugging Face config dict of a ModelConfig, as transformers would write it (without dtype)."""
    family = FAMILIES[config.family]
    eos = config.eos_token_ids
    return {
        "architectures": [family.architecture],
        "model_type": config.family,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "pad_token_id": None,
        "tie_word_embeddings": config.tied_head,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.max_positions,
    } | family.write_config(config)


def _value(hf: Mapping[str, Any], key: str) -> Any:
    require(hf.get(key) is not None, f"config.json has no {key!r}")
    return hf[key]


def _size(hf: Mapping[str, Any], key: str) -> int:
    value = _value(hf, key)
    require(isinstance(value, int) and value > 0, f"config.json: {key} must be a positive whole number, not {value!r}")
    return value


def _activation(name: object) -> str:
    if not isinstance(name, str) or name not in ACTIVATION_NAMES:
        raise ValueError(f"activation {name!r} is not supported; supported: {', '.join(sorted(ACTIVATION_NAMES))}")
    return ACTIVATION_NAMES[name]


def _head_dim(hf: Mapping[str, Any], hidden_size: int, num_heads: int) -> int:
    if hf.get("head_dim") is not None:
        return _size(hf, "head_dim")
    require(hidden_size % num_heads == 0, f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}; set head_dim")
    return hidden_size // num_heads


def _token_ids(value: object) -> tuple[int, ...]:
    values = [] if value is None else value if isinstance(value, list) else [value]
    ids = tuple(token for token in values if isinstance(token, int))
    require(len(ids) == len(values), f"config.json: eos_token_id must be one id or a list of ids, not {value!r}")
    return ids


def _common(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that every family calls the same."""
    hidden_size, num_heads = _size(hf, "hidden_size"), _size(hf, "num_attention_heads")
    return {
        "family": hf["model_type"],
        "vocab_size": _size(hf, "vocab_size"),
        "hidden_size": hidden_size,
        "num_layers": _size(hf, "num_hidden_layers"),
        "num_heads": num_heads,
        "head_dim": _head_dim(hf, hidden_size, num_heads),
        "max_positions": _size(hf, "max_position_embeddings"),
        "bos_token_id": hf.get("bos_token_id"),
        "eos_token_ids": _token_ids(hf.get("eos_token_id")),
    }


def _one_of(new: Any, old: Any, name: str, places: str) -> Any:
    """A value that two generations of configs keep in two places: both may hold it if they agree."""
    require(new is None or old is None or new == old, f"config.json has two values of {name}: {new!r} and {old!r} ({places}); keep one")
    return old if new is None else new


def _rope(hf: Mapping[str, Any]) -> RopeConfig:
    """Rotary settings from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    new, old = hf.get("rope_parameters") or {}, hf.get("rope_scaling") or {}
    places = "rope_parameters against rope_theta and rope_scaling"
    theta = _one_of(new.get("rope_theta"), _one_of(hf.get("rope_theta"), old.get("rope_theta"), "rope_theta", places), "rope_theta", places)

    def entry(name: str, *keys: str) -> Any:
        first = next((new[key] for key in keys if new.get(key) is not None), None)
        second = next((old[key] for key in keys if old.get(key) is not None), None)
        return _one_of(first, second, name, places)

    rotated = _one_of(
        entry("partial_rotary_factor", "partial_rotary_factor"), hf.get("partial_rotary_factor"), "partial_rotary_factor", places
    )
    require(rotated in (None, 1.0), f"partial_rotary_factor {rotated} is not supported for model_type {hf['model_type']!r}; only 1.0 is")
    values = {
        "theta": theta,
        "type": entry("rope_type", "rope_type", "type"),
        "factor": entry("factor", "factor"),
        "low_freq_factor": entry("low_freq_factor", "low_freq_factor"),
        "high_freq_factor": entry("high_freq_factor", "high_freq_factor"),
        "original_max_positions": entry("original_max_position_embeddings", "original_max_position_embeddings"),
    }
    return RopeConfig(**{key: value for key, value in values.items() if value is not None})


def _read_opt(hf: Mapping[str, Any]) -> ModelConfig:
    common = _common(hf)
    pre_norm, bias = hf.get("do_layer_norm_before", True), hf.get("enable_bias", True)
    require(hf.get("head_dim") is None, "config.json: head_dim is no field of model_type 'opt'")
    return ModelConfig(
        **common,
        intermediate_size=_size(hf, "ffn_dim"),
        num_kv_heads=common["num_heads"],
        activation=_activation(hf.get("activation_function", "relu")),
        norm_affine=hf.get("layer_norm_elementwise_affine", True),
        pre_norm=pre_norm,
        final_norm=pre_norm and not hf.get("_remove_final_layer_norm", False),
        positions="learned",
        position_offset=2,
        embed_size=None if hf.get("word_embed_proj_dim") in (None, common["hidden_size"]) else _size(hf, "word_embed_proj_dim"),
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


def _read_llama(hf: Mapping[str, Any]) -> ModelConfig:
    common = _common(hf)
    activation = _activation(_value(hf, "hidden_act"))
    require(
        activation != "fatrelu" or hf.get("hidden_act_param") is not None,
        "hidden_act 'fatrelu' needs its threshold: config.json has no 'hidden_act_param'",
    )
    attention_bias, mlp_bias = hf.get("attention_bias", False), hf.get("mlp_bias", False)
    return ModelConfig(
        **common,
        intermediate_size=_size(hf, "intermediate_size"),
        num_kv_heads=common["num_heads"] if hf.get("num_key_value_heads") is None else _size(hf, "num_key_value_heads"),
        activation=activation,
        activation_threshold=float(hf["hidden_act_param"]) if activation == "fatrelu" else 0.0,
        gated=True,
        norm="rmsnorm",
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        positions="rope",
        position_offset=0,
        rope=_rope(hf),
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        mlp_bias=mlp_bias,
        tied_head=hf.get("tie_word_embeddings", False),
    )


def _write_llama(config: ModelConfig) -> dict[str, Any]:
    rope = config.rope
    assert rope is not None and config.qkv_bias == config.out_bias, "Llama has no such config"
    scaling: dict[str, Any] = {} if rope.type == "default" else {"rope_type": rope.type, "factor": rope.factor}
    if rope.type == "llama3":
        scaling["low_freq_factor"] = rope.low_freq_factor
        scaling["high_freq_factor"] = rope.high_freq_factor
        scaling["original_max_position_embeddings"] = rope.original_max_positions
    threshold = {"hidden_act_param": config.activation_threshold} if config.activation == "fatrelu" else {}
    return {
        "intermediate_size": config.intermediate_size,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": HF_ACTIVATION_NAMES.get(config.activation, config.activation),
        "rms_norm_eps": config.norm_eps,
        # The older of the two spellings: transformers 4 and 5 both read it.
        "rope_theta": rope.theta,
        "rope_scaling": scaling or None,
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "attention_dropout": 0.0,
    } | threshold


FAMILIES: dict[str, Family] = {
    "opt": Family(
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
    ),
    "llama": Family(
        architecture="LlamaForCausalLM",
        prefix="model.",
        optional_prefixes=("model.",),
        read_config=_read_llama,
        write_config=_write_llama,
        modules={"embed": "embed_tokens", "final_norm": "norm", "head": "lm_head"},
        layer_modules={
            "norm1": "input_layernorm",
            "q": "self_attn.q_proj",
            "k": "self_attn.k_proj",
            "v": "self_attn.v_proj",
            "o": "self_attn.o_proj",
            "norm2": "post_attention_layernorm",
            "gate": "mlp.gate_proj",
            "up": "mlp.up_proj",
            "down": "mlp.down_proj",
        },
    ),
}
