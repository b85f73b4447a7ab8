"""What the metadata and tensors of a GGUF file mean for a model: a map for each architecture, by GGUF's name of it.

In: a Header's metadata and tensors. Out: the fields of a Hugging Face config.json, and for each tensor which of our matrices it holds.
What a converter changed on the way is told by the map: rows of q and k in pairs, norm weights with one added. Facts are those of
llama.cpp's converters and loaders. A key of the architecture that is not read here is refused, unless its value is one that changes
nothing: numbers would be wrong without a word.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dejavu.config import require
from dejavu.model.gguf.header import TensorInfo

KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
RMS_EPSILON, EPSILON = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"
WINDOW, PATTERN, LOCAL_BASE = "attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa"
ROPE_KEYS = (
    "rope.dimension_count", "rope.freq_base", "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor",
    "rope.scaling.original_context_length", "rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_log_multiplier", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
)  # fmt: skip
HEAD_KEYS = ("attention.head_count_kv", "attention.key_length", "attention.value_length")
READ = {*KEYS, *HEAD_KEYS, *ROPE_KEYS, RMS_EPSILON, EPSILON, "vocab_size"}
# Keys that are not read, with the values that change nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,), "attention.clamp_kqv": (0.0,), "attention.max_alibi_bias": (0.0,), "attention.scale": (0.0,),
    "attention.temperature_scale": (0.0,), "attn_logit_softcapping": (0.0,), "embedding_scale": (1.0,), "expert_count": (0,),
    "expert_used_count": (0,), "final_logit_softcapping": (0.0,), "logit_scale": (1.0,), "nextn_predict_layers": (0,), "pooling_type": (0,),
    "residual_scale": (1.0,), "rope.scaling.alpha": (0.0,), "rope.scaling.finetuned": (True, False),
    "rope.scaling.yarn_ext_factor": (1.0, -1.0), "tensor_data_layout": ("jploski", "Meta AI original pth"),
    "use_parallel_residual": (False,), WINDOW: (0,),
}  # fmt: skip

MODULES = {"token_embd": "embed", "output_norm": "final_norm", "output": "head"}
LAYER_MODULES = {
    "attn_norm": "norm1", "attn_q": "q", "attn_k": "k", "attn_v": "v", "attn_output": "o", "attn_q_norm": "q_norm", "attn_k_norm": "k_norm",
    "post_attention_norm": "norm1_out", "ffn_norm": "norm2", "ffn_gate": "gate", "ffn_up": "up", "ffn_down": "down",
    "post_ffw_norm": "norm2_out",
}  # fmt: skip
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
IGNORED_MODULE = "attn_rot_embd"  # frequencies that follow from the metadata


class Source:
    """The metadata and tensors of one file, or of all parts of a split one. factors: the values of one of the ROPE_TENSORS."""

    def __init__(
        self, path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, TensorInfo], factors: Callable[[str], list[float]]
    ) -> None:
        self.path, self.metadata, self.tensors, self._factors = path, metadata, tensors, factors
        architecture = metadata.get("general.architecture")
        require(isinstance(architecture, str), f"{path}: GGUF metadata has no 'general.architecture'")
        self.architecture = str(architecture)

    def get(self, key: str, default: Any = None) -> Any:
        """A value; of an array with a value for each layer that one, where all are equal."""
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if not isinstance(value, np.ndarray):
            return value
        each = set(value.tolist())
        require(len(each) == 1, f"{self.path}: {self.architecture}.{key} differs by layer, which is not supported")
        return each.pop()

    def need(self, key: str) -> Any:
        value = self.get(key)
        require(value is not None, f"{self.path}: GGUF metadata has no '{self.architecture}.{key}'")
        return value

    def whole(self, key: str, default: int | None = None) -> int:
        """A positive whole number; needed where there is no default."""
        value = self.need(key) if default is None else self.get(key, default)
        good = isinstance(value, int) and not isinstance(value, bool) and value > 0
        require(good, f"{self.path}: {self.architecture}.{key} must be a positive whole number, not {value!r}")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.get(key, default)
        good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        require(good, f"{self.path}: {self.architecture}.{key} must be a number, not {value!r}")
        return value

    def factors(self, tensor: str) -> list[float]:
        """The divisors of frequencies that a tensor holds."""
        require(self.has(tensor), f"{self.path} has no tensor {tensor!r}")
        found = self._factors(tensor)
        require(all(0 < each < math.inf for each in found), f"{self.path}: tensor {tensor!r} has values that are no positive numbers")
        return found

    def has(self, tensor: str) -> bool:
        return tensor in self.tensors

    @property
    def heads(self) -> int:
        return self.whole("attention.head_count")

    @property
    def kv_heads(self) -> int:
        return self.whole("attention.head_count_kv", self.heads)

    @property
    def head_dim(self) -> int:
        keys = self.whole("attention.key_length", max(1, self.whole("embedding_length") // self.heads))
        values = self.whole("attention.value_length", keys)
        require(keys == values, f"{self.path}: keys of {keys} numbers and values of {values} are not supported")
        return keys


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFFamily:
    """One architecture.

    model_type: of the config.json that its fields make. epsilon: the key of the norms' epsilon, and its field. keys: further keys of the
    architecture and their fields. fields: what holds for every model of it. more: fields that take more than a name, by a function of
    the source; also_read: the keys that these read. modules: what it calls otherwise than LAYER_MODULES. fused: stored modules that hold
    several of ours. pairs: rows of q and k lie so that the halves of a rotated pair are neighbours. norm_shift: what was added to norms'
    weights.
    """

    model_type: str
    epsilon: tuple[str, str] = (RMS_EPSILON, "rms_norm_eps")
    keys: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=lambda: {"hidden_act": "silu"})
    more: Callable[[Source], dict[str, Any]] = lambda source: {}
    also_read: Collection[str] = ()
    modules: Callable[[Source], Mapping[str, str]] = lambda source: {}
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: {"attn_qkv": ("q", "k", "v")})
    pairs: bool = False
    norm_shift: float = 0.0

    def config(self, source: Source) -> dict[str, Any]:
        """The Hugging Face config that the metadata stand for. ValueError names a key that is missing or not understood."""
        self._check_keys(source)
        layers, held = source.whole("block_count"), len({name.split(".")[1] for name in source.tensors if name.startswith("blk.")})
        require(layers <= held, f"{source.path} has {layers} layers by its metadata and tensors of {held}; incomplete?")
        stated = {field: source.get(key) for key, field in self.keys.items()}
        key, epsilon = self.epsilon
        found: dict[str, Any] = {
            "model_type": self.model_type,
            "vocab_size": _rows(source, "token_embd.weight"),
            **{field: source.need(key) for key, field in KEYS.items()},
            "num_key_value_heads": source.kv_heads,
            "head_dim": source.head_dim,
            epsilon: source.need(key),
            "tie_word_embeddings": not source.has("output.weight"),
            **self.fields,
            **{field: value for field, value in stated.items() if value is not None},
            **_rope(source),
        }
        return found | self.more(source)

    def _check_keys(self, source: Source) -> None:
        prefix = source.architecture + "."
        read = READ | {*self.keys, *self.also_read}
        for key, value in source.metadata.items():
            name = key.removeprefix(prefix)
            if key.startswith(prefix) and name not in read:
                values = np.unique(value).tolist() if isinstance(value, np.ndarray) else [value]
                known = name in NEUTRAL and all(each in NEUTRAL[name] for each in values)
                require(known, f"{source.path}: GGUF key {key!r} is {_shown(value)}, which is not understood and may change the numbers")


def _shown(value: object) -> str:
    text = repr(value.tolist() if isinstance(value, np.ndarray) else value)
    return text if len(text) <= 60 else text[:57] + "..."


def _rows(source: Source, tensor: str) -> int:
    require(source.has(tensor), f"{source.path} has no tensor {tensor!r}")
    return source.tensors[tensor].shape[0]


def _rope(source: Source) -> dict[str, Any]:
    """Rotary settings as config.json has them, in their older spelling."""
    head = source.head_dim
    rotated = source.whole("rope.dimension_count", head)
    found: dict[str, Any] = {"rope_theta": source.number("rope.freq_base", 10000.0)}
    if rotated != head:
        share = rotated / head
        found["partial_rotary_factor"] = share if int(head * share) == rotated else math.nextafter(share, 1.0)
    found["rope_scaling"] = _factors(source) or _scaling(source)
    return found


def _factors(source: Source) -> dict[str, Any] | None:
    """Divisors of the frequencies that the file has as tensors. rope_freqs (Llama 3.1 to 3.3) is one for each frequency, whatever the
    length of the sequence: longrope with the same ones for short and long sequences."""
    context = source.whole("context_length")
    if source.has("rope_freqs.weight"):
        factors = source.factors("rope_freqs.weight")
        lengths: dict[str, Any] = {"original_max_position_embeddings": context, "attention_factor": 1.0}
        return {"rope_type": "longrope", "short_factor": factors, "long_factor": factors} | lengths
    if not source.has("rope_factors_short.weight"):
        return None
    scale = source.get("rope.scaling.attn_factor")
    return {
        "rope_type": "longrope",
        "short_factor": source.factors("rope_factors_short.weight"),
        "long_factor": source.factors("rope_factors_long.weight"),
        "original_max_position_embeddings": source.whole("rope.scaling.original_context_length", context),
    } | ({} if scale is None else {"attention_factor": scale})


def _scaling(source: Source) -> dict[str, Any] | None:
    kind = source.get("rope.scaling.type", "linear")
    factor = source.number("rope.scaling.factor", 0.0) or source.number("rope.scale_linear", 0.0) or 1.0  # the latter is the key of before
    require(factor > 0, f"{source.path}: a factor of rotary positions must be positive, not {factor}")
    require(
        kind in ("none", "linear", "yarn"), f"{source.path}: {source.architecture}.rope.scaling.type {kind!r} has no tensors of factors"
    )
    scale = source.number("rope.scaling.attn_factor", 1.0)
    require(
        kind == "yarn" or scale == 1, f"{source.path}: {source.architecture}.rope.scaling.attn_factor {scale} belongs to yarn and longrope"
    )
    if kind == "none" or factor == 1.0:
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    every = source.number("rope.scaling.yarn_log_multiplier", 0.0)  # mscale_all_dim of config.json
    worked_out = (0.1 * math.log(factor) + 1) / (0.1 * every * math.log(factor) + 1) if factor > 1 else 1.0
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": source.whole("rope.scaling.original_context_length", source.whole("context_length")),
        "attention_factor": scale * source.number("rope.scaling.yarn_attn_factor", worked_out),
        "beta_fast": source.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": source.number("rope.scaling.yarn_beta_slow", 1.0),
    }


def _biases(source: Source) -> dict[str, Any]:
    return {
        "attention_bias": source.has("blk.0.attn_q.bias") or source.has("blk.0.attn_qkv.bias"),
        "mlp_bias": source.has("blk.0.ffn_up.bias"),
    }


def _llama(source: Source) -> dict[str, Any]:
    """A file of Mistral is one of llama; where it says that it has a window, it is Mistral's."""
    window = source.get(WINDOW)
    return _biases(source) | ({"model_type": "mistral", "sliding_window": window} if window else {})


def _phi3(source: Source) -> dict[str, Any]:
    return {"sliding_window": source.get(WINDOW) or None}  # 0 in files of Phi-4, which has none


def _gemma(source: Source, large: int) -> dict[str, Any]:
    """The largest of both generations, told by its layers, scales attention by another size than that of its heads."""
    hidden, heads = source.whole("embedding_length"), source.heads
    return {"query_pre_attn_scalar": hidden // heads if source.whole("block_count") == large else source.head_dim}


def _gemma2(source: Source) -> dict[str, Any]:
    return {"sliding_window": source.get(WINDOW, 4096)} | _gemma(source, 46)


def _gemma3(source: Source) -> dict[str, Any]:
    layers, window = source.whole("block_count"), source.get(WINDOW)
    pattern = source.metadata.get(f"{source.architecture}.{PATTERN}")
    if isinstance(pattern, np.ndarray):  # whether each layer has a window; else every so many layers one has none
        sliding = [bool(each) for each in pattern.tolist()]
    else:
        every = source.whole(PATTERN, 6)
        sliding = [bool((index + 1) % every) for index in range(layers)]
    types = ["sliding_attention" if window and each else "full_attention" for each in sliding]
    local = {"rope_local_base_freq": source.number(LOCAL_BASE, 10000.0)}
    return {"sliding_window": window or 4096, "layer_types": types} | local | _gemma(source, 62)


def _two_norms(source: Source) -> bool:
    return source.has("blk.0.attn_norm_2.weight")


def _falcon(source: Source) -> dict[str, Any]:
    """Its newer layout holds every number of key/value heads."""
    return {
        "new_decoder_architecture": True,
        "num_kv_heads": source.whole("attention.head_count_kv", 1),
        "num_ln_in_parallel_attn": 2 if _two_norms(source) else 1,
        "ffn_hidden_size": source.need("feed_forward_length"),
        "bias": source.has("blk.0.attn_qkv.bias"),
    }


def _minicpm(source: Source) -> dict[str, Any]:
    """Scales as config.json spells them; files of before had none, and stood for the only ones that there were."""
    layers, width = source.whole("block_count"), source.whole("embedding_length")
    return {
        "scale_emb": source.number("embedding_scale", 12.0),
        "scale_depth": source.number("residual_scale", 1.4 / layers**0.5) * layers**0.5,
        "dim_model_base": width / (source.number("logit_scale", width / 256) or 1.0),
    }


def _granite(source: Source) -> dict[str, Any]:
    rotated = source.get("rope.scaling.finetuned", True)  # of Granite: whether it has rotary positions
    require(rotated, f"{source.path}: layers without positions are not supported (granite.rope.scaling.finetuned is false)")
    require(source.get("attention.scale") != 0, f"{source.path}: granite.attention.scale is 0")
    return _biases(source) | ({} if source.get("attention.scale") else {"attention_multiplier": source.head_dim**-0.5})


def _stablelm(source: Source) -> dict[str, Any]:
    require(not source.has("blk.0.attn_q_norm.weight"), f"{source.path}: a norm of its own for each head (StableLM 2 12B) is not supported")
    return {
        "use_qkv_bias": source.has("blk.0.attn_q.bias"),
        "use_parallel_residual": not source.has("blk.0.ffn_norm.weight"),
        "partial_rotary_factor": source.whole("rope.dimension_count", source.head_dim) / source.head_dim,
    }


LLAMA = GGUFFamily(model_type="llama", more=_llama, also_read=(WINDOW,), pairs=True)
GELU = {"hidden_activation": "gelu_pytorch_tanh"}
CAP = {"final_logit_softcapping": "final_logit_softcapping"}
GGUF_FAMILIES: dict[str, GGUFFamily] = {
    "llama": LLAMA,
    "mistral3": GGUFFamily(model_type="mistral", fields={"hidden_act": "silu", "sliding_window": None}, pairs=True),
    "qwen2": GGUFFamily(model_type="qwen2"),
    "qwen3": GGUFFamily(model_type="qwen3", more=lambda source: {"attention_bias": source.has("blk.0.attn_q.bias")}),
    "gemma": GGUFFamily(model_type="gemma", fields={"hidden_act": "gelu_pytorch_tanh"}, norm_shift=1.0),
    "gemma2": GGUFFamily(
        model_type="gemma2", fields=GELU, more=_gemma2, also_read=(WINDOW,), norm_shift=1.0,
        keys=CAP | {"attn_logit_softcapping": "attn_logit_softcapping"},
    ),
    "gemma3": GGUFFamily(
        model_type="gemma3_text", fields=GELU, more=_gemma3, also_read=(WINDOW, PATTERN, LOCAL_BASE), keys=CAP, norm_shift=1.0
    ),
    "phi3": GGUFFamily(
        model_type="phi3", more=_phi3, also_read=(WINDOW,), fused={"attn_qkv": ("q", "k", "v"), "ffn_up": ("gate", "up")}
    ),
    "falcon": GGUFFamily(
        model_type="falcon", epsilon=(EPSILON, "layer_norm_epsilon"), fields={}, more=_falcon,
        modules=lambda source: {"attn_norm": "norm2", "attn_norm_2": "norm1"} if _two_norms(source) else {},
    ),
    "nemotron": GGUFFamily(
        model_type="nemotron", epsilon=(EPSILON, "norm_eps"), fields={"hidden_act": "relu2"}, norm_shift=1.0,
        more=lambda source: {"partial_rotary_factor": 1.0} | _rope(source) | _biases(source),
    ),
    "arcee": GGUFFamily(model_type="arcee", fields={"hidden_act": "relu2"}, more=_biases, pairs=True),
    "minicpm": GGUFFamily(
        model_type="minicpm", more=_minicpm, also_read=("embedding_scale", "residual_scale", "logit_scale"), pairs=True
    ),
    "granite": GGUFFamily(
        model_type="granite", more=_granite, pairs=True, also_read=("rope.scaling.finetuned",),
        keys={
            "embedding_scale": "embedding_multiplier", "residual_scale": "residual_multiplier",
            "attention.scale": "attention_multiplier", "logit_scale": "logits_scaling",
        },
    ),
    "starcoder2": GGUFFamily(
        model_type="starcoder2", epsilon=(EPSILON, "norm_epsilon"), fields={"hidden_act": "gelu_pytorch_tanh"}, also_read=(WINDOW,),
        more=lambda source: {"use_bias": source.has("blk.0.attn_q.bias"), "sliding_window": source.get(WINDOW) or None},
    ),
    "stablelm": GGUFFamily(
        model_type="stablelm", epsilon=(EPSILON, "layer_norm_eps"), more=_stablelm, also_read=("use_parallel_residual",)
    ),
}  # fmt: skip

EXPERTS, STATES, ENCODER = "mixtures of experts", "state-space or linear-attention layers", "attention to both sides (an encoder)"
LATENT, SECTIONS = "keys and values from a latent vector", "rotary positions by section (for images)"
PER_LAYER, VISION = "embeddings for each layer", "the layers of a vision model"
MISSING: dict[str, str] = {
    **dict.fromkeys(
        (
            "llama4", "qwen2moe", "qwen3moe", "phimoe", "olmoe", "dbrx", "arctic", "deepseek", "glm4moe", "granitemoe", "grok", "gpt-oss",
            "bailingmoe", "bailingmoe2", "dots1", "ernie4_5-moe", "hunyuan-moe", "grovemoe", "afmoe", "exaone-moe", "llada-moe",
            "minimax-m2", "smallthinker", "rnd1", "mimo2", "step35", "mistral4", "nomic-bert-moe", "glm-dsa",
        ),
        EXPERTS,
    ),
    **dict.fromkeys(
        (
            "mamba", "mamba2", "jamba", "falcon-h1", "nemotron_h", "nemotron_h_moe", "granitehybrid", "plamo2", "qwen3next", "qwen35",
            "qwen35moe", "lfm2", "lfm2moe", "kimi-linear", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7",
        ),
        STATES,
    ),
    **dict.fromkeys(
        (
            "bert", "modern-bert", "nomic-bert", "neo-bert", "jina-bert-v2", "jina-bert-v3", "eurobert", "t5", "t5encoder",
            "gemma-embedding", "llama-embed", "dream", "llada",
        ),
        ENCODER,
    ),
    **dict.fromkeys(("deepseek2", "deepseek2-ocr", "minicpm3", "plm"), LATENT),
    **dict.fromkeys(("qwen2vl", "qwen3vl", "qwen3vlmoe", "paddleocr", "hunyuan_vl"), SECTIONS),
    **dict.fromkeys(("gemma3n", "gemma4"), PER_LAYER),
    **dict.fromkeys(("clip", "cogvlm"), VISION),
    "wavtokenizer-dec": "the layers of an audio decoder",
    "olmo2": "norms of whole queries and keys, and none before the blocks",
    "smollm3": "layers without positions",
    "chameleon": "norms after the blocks alone",
}  # fmt: skip
GENERAL_TYPES = {"adapter": "a LoRA adapter", "mmproj": "the vision part of a model", "imatrix": "statistics for quantising"}


def gguf_family(source: Source) -> GGUFFamily:
    """The map of the file's architecture. ValueError names the part of it that is missing here, where that is known."""
    kind = source.metadata.get("general.type", "model")
    require(kind not in GENERAL_TYPES, f"{source.path} holds {GENERAL_TYPES.get(str(kind))} and no model; give the model's file")
    name = source.architecture
    missing = EXPERTS if source.metadata.get(f"{name}.expert_count") else MISSING.get(name)
    require(missing is None, f"{source.path}: GGUF architecture {name!r} is not supported: it needs {missing}")
    known = ", ".join(sorted(GGUF_FAMILIES))
    require(name in GGUF_FAMILIES, f"{source.path}: GGUF architecture {name!r} is not supported; supported: {known}")
    return GGUF_FAMILIES[name]
