"""Reading the fields of a Hugging Face config.json: each checked, an error naming the field and its value."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from dejavu.config import RopeConfig, require, shown

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


# What a family reads of a config.json beyond sizes: keys by the type of their values, of which null means none.
FLAGS = (
    "alibi", "attention_bias", "bias", "do_layer_norm_before", "enable_bias", "layer_norm_elementwise_affine", "mlp_bias", "multi_query",
    "new_decoder_architecture", "parallel_attn", "qk_layernorm", "_remove_final_layer_norm", "tie_word_embeddings", "use_bias",
    "use_bidirectional_attention", "use_parallel_residual", "use_qkv_bias", "use_sliding_window",
)  # fmt: skip
WHOLE = (
    "ffn_hidden_size", "max_window_layers", "n_embed", "n_head", "n_layer", "num_kv_heads", "num_ln_in_parallel_attn",
    "original_max_position_embeddings", "sliding_window", "sliding_window_pattern", "word_embed_proj_dim",
)  # fmt: skip
NUMBERS = (
    "attention_factor", "attn_logit_softcapping", "beta_fast", "beta_slow", "dim_model_base", "factor", "final_logit_softcapping",
    "hidden_act_param", "high_freq_factor", "layer_norm_epsilon", "low_freq_factor", "mscale", "mscale_all_dim", "norm_eps",
    "partial_rotary_factor", "query_pre_attn_scalar", "rope_local_base_freq", "rope_percent", "rope_percentage", "rope_theta",
    "scale_depth", "scale_emb",
)  # fmt: skip
NAMES = ("model_type", "rope_type", "type")
LISTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "architectures": (lambda each: isinstance(each, str), "names"),
    "layer_types": (lambda each: isinstance(each, str), "names"),
    "short_factor": (lambda each: _is_number(each), "numbers"),
    "long_factor": (lambda each: _is_number(each), "numbers"),
}
OBJECTS = ("rope_parameters", "rope_scaling", "full_attention", "sliding_attention")
MOST = (1 << 31) - 1  # of a whole number
LARGEST_FLOAT = 1e30  # of any other: rotary bases of long contexts are beyond 1e10


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST_FLOAT  # NaN is not


def checked(hf: Mapping[str, Any], within: str = "") -> dict[str, Any]:
    """The config, once for all that families read of it besides `size`, `positive` and names of activations: each value is of its type, and
    flags that are null are false. ValueError names the key and the value."""
    found = dict(hf)

    def hold(key: str, good: bool, kind: str) -> None:
        require(good, f"config.json: {within}{key} must be {kind}, not {shown(found[key])}")

    for key, value in hf.items():
        if key in FLAGS:
            hold(key, value is None or isinstance(value, bool), "true or false")
            found[key] = bool(value)
        elif value is None:
            continue
        elif key in WHOLE:
            hold(key, type(value) is int and abs(value) <= MOST, "a whole number")
        elif key in NUMBERS:
            hold(key, _is_number(value), "a number")
        elif key in NAMES:
            hold(key, isinstance(value, str), "a name")
        elif key in LISTS:
            kind, named = LISTS[key]
            hold(key, isinstance(value, list) and all(map(kind, value)), f"a list of {named}")
        elif key in OBJECTS:
            hold(key, isinstance(value, Mapping), "an object")
            found[key] = checked(value, f"{within}{key}.")
    return found


def required(hf: Mapping[str, Any], key: str) -> Any:
    require(hf.get(key) is not None, f"config.json has no {key!r}")
    return hf[key]


def given(hf: Mapping[str, Any], key: str, default: Any) -> Any:
    """The value; the default where there is none, or null."""
    return default if hf.get(key) is None else hf[key]


def size(hf: Mapping[str, Any], key: str) -> int:
    value = required(hf, key)
    require(type(value) is int and 0 < value <= MOST, f"config.json: {key} must be a positive whole number, not {shown(value)}")
    return value


def activation(name: object) -> str:
    if not isinstance(name, str) or name not in ACTIVATION_NAMES:
        raise ValueError(f"activation {shown(name)} is not supported; supported: {', '.join(sorted(ACTIVATION_NAMES))}")
    return ACTIVATION_NAMES[name]


def head_dim(hf: Mapping[str, Any], hidden_size: int, num_heads: int) -> int:
    if hf.get("head_dim") is not None:
        return size(hf, "head_dim")
    require(hidden_size % num_heads == 0, f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}; set head_dim")
    return hidden_size // num_heads


def token_ids(value: object) -> tuple[int, ...]:
    values = [] if value is None else value if isinstance(value, list) else [value]
    ids = tuple(token for token in values if type(token) is int and 0 <= token <= MOST)  # true is none
    require(len(ids) == len(values), f"config.json: eos_token_id must be one id or a list of ids, not {shown(value)}")
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
    require(_is_number(value) and value > 0, f"config.json: {key} must be a positive number, not {shown(value)}")
    return float(value)


def kv_heads(hf: Mapping[str, Any]) -> int:
    """num_key_value_heads; as many as query heads where it is not there."""
    return size(hf, "num_attention_heads") if hf.get("num_key_value_heads") is None else size(hf, "num_key_value_heads")


def windows(hf: Mapping[str, Any], window: int | None, windowed: list[int]) -> dict[str, Any]:
    """`window` and `windowed` of these layers; neither where no sequence is longer than the window."""
    if window is None or not windowed or window >= size(hf, "max_position_embeddings"):
        return {}
    require(window > 0, f"config.json: sliding_window must be a positive whole number, not {window}")
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


def rope(hf: Mapping[str, Any], *, partial: float = 1.0, theta: float = 10000.0) -> RopeConfig:
    """Rotary settings from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before); defaults of the family."""
    new, old = (hf.get(key) or {} for key in ("rope_parameters", "rope_scaling"))
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
    trained = size(hf, "max_position_embeddings") if original is None else original  # before it was stretched
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
    require(kind not in ("linear", "dynamic", "llama3") or values["factor"] is not None, f"config.json: rope type {kind!r} has no factor")
    return RopeConfig(**{key: value for key, value in values.items() if value is not None})


def _attention_factor(hf: Mapping[str, Any], kind: str, original: int, entry: Callable[..., Any]) -> float:
    """The stated scale of what is rotated, or the one that transformers works out."""
    stated, factor = entry("attention_factor", "attention_factor"), entry("factor", "factor")
    if stated is not None:
        return float(stated)
    require(original > 1, f"config.json: original_max_position_embeddings must be above 1, not {original}")
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
