"""Reading the fields of a Hugging Face config.json: each checked, an error naming the field and its value."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from dejavu.config import RopeConfig, require

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


def required(hf: Mapping[str, Any], key: str) -> Any:
    require(hf.get(key) is not None, f"config.json has no {key!r}")
    return hf[key]


def size(hf: Mapping[str, Any], key: str) -> int:
    value = required(hf, key)
    require(isinstance(value, int) and value > 0, f"config.json: {key} must be a positive whole number, not {value!r}")
    return value


def activation(name: object) -> str:
    if not isinstance(name, str) or name not in ACTIVATION_NAMES:
        raise ValueError(f"activation {name!r} is not supported; supported: {', '.join(sorted(ACTIVATION_NAMES))}")
    return ACTIVATION_NAMES[name]


def head_dim(hf: Mapping[str, Any], hidden_size: int, num_heads: int) -> int:
    if hf.get("head_dim") is not None:
        return size(hf, "head_dim")
    require(hidden_size % num_heads == 0, f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}; set head_dim")
    return hidden_size // num_heads


def token_ids(value: object) -> tuple[int, ...]:
    values = [] if value is None else value if isinstance(value, list) else [value]
    ids = tuple(token for token in values if type(token) is int)  # true is none
    require(len(ids) == len(values), f"config.json: eos_token_id must be one id or a list of ids, not {value!r}")
    return tuple(dict.fromkeys(ids))


def common(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that every family calls the same."""
    hidden_size, num_heads = size(hf, "hidden_size"), size(hf, "num_attention_heads")
    return {
        "family": hf["model_type"],
        "vocab_size": size(hf, "vocab_size"),
        "hidden_size": hidden_size,
        "num_layers": size(hf, "num_hidden_layers"),
        "num_heads": num_heads,
        "head_dim": head_dim(hf, hidden_size, num_heads),
        "max_positions": size(hf, "max_position_embeddings"),
        "bos_token_id": hf.get("bos_token_id"),
        "eos_token_ids": token_ids(hf.get("eos_token_id")),
    }


def one_of(new: Any, old: Any, name: str, places: str) -> Any:
    """A value that two generations of configs keep in two places: both may hold it if they agree."""
    require(new is None or old is None or new == old, f"config.json has two values of {name}: {new!r} and {old!r} ({places}); keep one")
    return old if new is None else new


def positive(hf: Mapping[str, Any], key: str, default: float) -> float:
    """A positive number; the default where it is not there."""
    value = hf.get(key, default)
    good = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
    require(good, f"config.json: {key} must be a positive number, not {value!r}")
    return float(value)


def kv_heads(hf: Mapping[str, Any]) -> int:
    """num_key_value_heads; as many as query heads where it is not there."""
    return size(hf, "num_attention_heads") if hf.get("num_key_value_heads") is None else size(hf, "num_key_value_heads")


def windows(hf: Mapping[str, Any], window: int | None, windowed: list[int]) -> dict[str, Any]:
    """`window` and `windowed` of these layers; neither where no sequence is longer than the window."""
    if window is None or not windowed or window >= hf["max_position_embeddings"]:
        return {}
    require(isinstance(window, int) and window > 0, f"config.json: sliding_window must be a positive whole number, not {window!r}")
    return {"window": window, "windowed": tuple(windowed)}


def sliding_layers(hf: Mapping[str, Any]) -> list[int] | None:
    """The layers that `layer_types` calls sliding; None where it is not there."""
    types = hf.get("layer_types")
    if types is None:
        return None
    known = ("full_attention", "sliding_attention")
    other = sorted({str(each) for each in types if each not in known})
    require(not other, f"config.json: layer_types {', '.join(other)} are not supported; supported: {', '.join(known)}")
    require(len(types) == size(hf, "num_hidden_layers"), f"config.json: {len(types)} layer_types of {hf['num_hidden_layers']} layers")
    return [index for index, each in enumerate(types) if each == "sliding_attention"]


def _settings(hf: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = hf.get(key) or {}
    require(isinstance(value, Mapping), f"config.json: {key} must be an object, not {value!r}")
    return value


def rope(hf: Mapping[str, Any], *, partial: float = 1.0, theta: float = 10000.0) -> RopeConfig:
    """Rotary settings from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before); defaults of the family."""
    new, old = (_settings(hf, key) for key in ("rope_parameters", "rope_scaling"))
    places = "rope_parameters against rope_theta and rope_scaling"
    base = one_of(new.get("rope_theta"), one_of(hf.get("rope_theta"), old.get("rope_theta"), "rope_theta", places), "rope_theta", places)

    def entry(name: str, *keys: str) -> Any:
        first = next((new[key] for key in keys if new.get(key) is not None), None)
        second = next((old[key] for key in keys if old.get(key) is not None), None)
        return one_of(first, second, name, places)

    share = one_of(
        entry("partial_rotary_factor", "partial_rotary_factor"), hf.get("partial_rotary_factor"), "partial_rotary_factor", places
    )
    kind = entry("rope_type", "rope_type", "type")
    original = entry("original_max_position_embeddings", "original_max_position_embeddings")
    original = hf.get("original_max_position_embeddings") if original is None else original
    kind = "longrope" if kind == "su" else kind  # its first name
    trained = size(hf, "max_position_embeddings") if original is None else int(original)  # before it was stretched
    values: dict[str, Any] = {
        "theta": theta if base is None else base,
        "type": kind,
        "factor": entry("factor", "factor"),
        "low_freq_factor": entry("low_freq_factor", "low_freq_factor"),
        "high_freq_factor": entry("high_freq_factor", "high_freq_factor"),
        "original_max_positions": trained if kind in ("yarn", "longrope") else original,
        "partial": partial if share is None else share,
        "beta_fast": entry("beta_fast", "beta_fast"),
        "beta_slow": entry("beta_slow", "beta_slow"),
        "truncate": entry("truncate", "truncate"),
        "short_factors": tuple(entry("short_factor", "short_factor") or ()) or None,
        "long_factors": tuple(entry("long_factor", "long_factor") or ()) or None,
    }
    if kind in ("yarn", "longrope"):
        values["attention_factor"] = _attention_factor(hf, kind, trained, entry)
        if values["factor"] is None and kind == "yarn":
            values["factor"] = size(hf, "max_position_embeddings") / trained
    for name in ("theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
        good = isinstance(values[name], int | float | None) and not isinstance(values[name], bool)
        require(good, f"config.json: {name} of the rotary positions must be a number, not {values[name]!r}")
    require(kind not in ("linear", "dynamic", "llama3") or values["factor"] is not None, f"config.json: rope type {kind!r} has no factor")
    return RopeConfig(**{key: value for key, value in values.items() if value is not None})


def _attention_factor(hf: Mapping[str, Any], kind: str, original: int, entry: Callable[..., Any]) -> float:
    """The stated scale of what is rotated, or the one that transformers works out."""
    stated, factor = entry("attention_factor", "attention_factor"), entry("factor", "factor")
    if stated is not None:
        return float(stated)
    factor = size(hf, "max_position_embeddings") / original if factor is None else factor
    if factor <= 1:
        return 1.0
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original))
    scale, scale_all = entry("mscale", "mscale"), entry("mscale_all_dim", "mscale_all_dim")
    if scale and scale_all:
        return (0.1 * scale * math.log(factor) + 1) / (0.1 * scale_all * math.log(factor) + 1)
    return 0.1 * math.log(factor) + 1


def context(hf: Mapping[str, Any], rotary: RopeConfig) -> dict[str, Any]:
    """max_positions: with longrope only what its short factors are for."""
    longest = size(hf, "max_position_embeddings")
    return {"max_positions": min(longest, rotary.original_max_positions) if rotary.type == "longrope" else longest}


def written_rope(rotary: RopeConfig) -> dict[str, Any]:
    """What stands for these settings in a config.json, in the older of the two spellings: transformers 4 and 5 both read it."""
    scaling: dict[str, Any] = {} if rotary.type == "default" else {"rope_type": rotary.type, "factor": rotary.factor}
    if rotary.type in ("llama3", "yarn", "longrope"):
        scaling["original_max_position_embeddings"] = rotary.original_max_positions
    if rotary.type == "llama3":
        scaling |= {"low_freq_factor": rotary.low_freq_factor, "high_freq_factor": rotary.high_freq_factor}
    if rotary.type in ("yarn", "longrope"):
        scaling["attention_factor"] = rotary.attention_factor
    if rotary.type == "yarn":
        scaling |= {"beta_fast": rotary.beta_fast, "beta_slow": rotary.beta_slow, "truncate": rotary.truncate}
    if rotary.type == "longrope":
        scaling |= {"short_factor": list(rotary.short_factors), "long_factor": list(rotary.long_factors)}
    partial = {} if rotary.partial == 1 else {"partial_rotary_factor": rotary.partial}
    return {"rope_theta": rotary.theta, "rope_scaling": scaling or None} | partial


def activation_fields(hf: Mapping[str, Any], key: str = "hidden_act") -> dict[str, Any]:
    """activation, and the threshold of fatrelu. drelu is ReLU on both factors of a gated MLP."""
    if required(hf, key) == "drelu":
        return {"activation": "relu", "up_activation": "relu"}
    name = activation(required(hf, key))
    require(
        name != "fatrelu" or hf.get("hidden_act_param") is not None,
        "hidden_act 'fatrelu' needs its threshold: config.json has no 'hidden_act_param'",
    )
    return {"activation": name, "activation_threshold": float(hf["hidden_act_param"]) if name == "fatrelu" else 0.0}


def written_activation(config: Any, key: str = "hidden_act") -> dict[str, Any]:
    if config.up_activation is not None:
        assert (config.activation, config.up_activation) == ("relu", "relu"), "no config has another"
        return {key: "drelu"}
    threshold = {"hidden_act_param": config.activation_threshold} if config.activation == "fatrelu" else {}
    return {key: HF_ACTIVATION_NAMES.get(config.activation, config.activation)} | threshold
