"""Every configuration value of the package, checked once, where the user's string arrives.

In: keyword arguments or a dict read from a file. Out: frozen dataclasses. An unknown key, an impossible size or a value
outside its range is a ValueError that names the value and the fix.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, Self, TypeVar

ACTIVATIONS = ("relu", "relu2", "silu", "gelu", "gelu_tanh", "fatrelu")
EXACT_ZERO_ACTIVATIONS = ("relu", "relu2", "fatrelu")
DTYPES = ("fp32", "fp16", "bf16", "int8", "int4")
BACKENDS = ("auto", "torch", "native", "cuda")
ROUNDING = 1e-5  # of sums in fp32 that make a fraction
MAX_NEW_TOKENS = 256  # of a text, where nobody says how many
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
# Sizes beyond which a config is damaged: several times those of any model, and products of two of them have 64 bits.
LARGEST = dict.fromkeys(("hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim"), 1 << 24)
LARGEST |= {"vocab_size": 1 << 28, "num_layers": 1024, "max_positions": (1 << 31) - 1}

Progress = Callable[[str, int, int], None]
"""progress(what, done, total): what is a step's name, e.g. "wiki.txt dense"; done and total count its tokens, pairs or rows."""


class Config:
    """Base of the configuration dataclasses: `from_dict` refuses keys that are no field, values of another type and what is missing."""

    __slots__ = ()
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        require(isinstance(values, Mapping), f"{cls.__name__} must be an object, not {shown(values)}")
        fields = dataclasses.fields(cls)
        known = {field.name for field in fields}
        unknown = sorted(set(values) - known)
        require(not unknown, f"unknown keys {shown(unknown)} for {cls.__name__}; it knows {sorted(known)}")
        needed = [field.name for field in fields if field.default is field.default_factory is dataclasses.MISSING]
        missing = [name for name in needed if name not in values]
        require(not missing, f"{cls.__name__} has no {', '.join(missing)}")
        check_types(cls, values)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless the condition holds: for what a user or a file can get wrong."""
    if not condition:
        raise ValueError(message)


def with_tuples(values: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """The values with the lists of these keys, as JSON has them, as tuples."""
    require(isinstance(values, Mapping), f"{shown(values)} is no object")
    lists = {key: tuple(values[key]) for key in keys if isinstance(values.get(key), list)}
    return {**values, **lists}


def shown(value: object, longest: int = 60) -> str:
    """A value in a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= longest else f"{text[:longest]}..."


def check_types(cls: type[Config], values: Mapping[str, Any]) -> None:
    """Raise ValueError where a value is not of the type that its field is declared with.

    Whole numbers stand for numbers, true and false do not; a number is finite, a whole one has at most 64 bits. What is within a tuple or a
    dict is checked too.
    """
    hints = _hints(cls)
    for name, value in values.items():
        require(_fits(value, hints[name]), f"{name} must be {_words(hints[name])}, not {shown(value)}")


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _fits(value: Any, hint: Any) -> bool:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or origin is ClassVar or isinstance(hint, TypeVar):  # of a type variable its class checks
        return True
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return any(type(value) is type(part) for part in parts)  # which of them is for the class to say
    if origin in (tuple, list):
        return isinstance(value, origin) and all(_fits(each, parts[0]) for each in value)
    if origin is not None and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(_fits(key, parts[0]) and _fits(each, parts[1]) for key, each in value.items())
    if hint in (int, float):
        whole = isinstance(value, int) and not isinstance(value, bool) and -(1 << 63) <= value < 1 << 63
        return whole or (hint is float and isinstance(value, float) and math.isfinite(value))
    return isinstance(value, hint)


def _words(hint: Any) -> str:
    """A type as a message names it."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", types.NoneType: "null"}
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_words(part) for part in parts)
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if origin in (tuple, list):
        return f"a list, each entry {_words(parts[0])}"
    return plain.get(hint, "an object")


def require_shares(**values: float) -> None:
    """Raise ValueError for a fraction that is none."""
    for name, value in values.items():
        require(0 <= value <= 1 + ROUNDING, f"{name} must lie in [0, 1], not {value}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig(Config):
    """Rotary positions: base and, for long-context variants, how frequencies are rescaled (transformers' names).

    partial: share of a head's values that is rotated, the first ones. attention_factor scales what is rotated (yarn, longrope).
    longrope divides by short_factors up to original_max_positions tokens and by long_factors beyond; dynamic is default up to the
    model's context. Neither reaches beyond that here: the keys of a sequence that grows past it would have to be rotated anew.
    """

    theta: float = 10000.0
    type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    partial: float = 1.0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_types(RopeConfig, {field.name: getattr(self, field.name) for field in dataclasses.fields(RopeConfig)})
        require(self.type in ROPE_TYPES, f"rope type {self.type!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
        for name in ("theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_positions", "attention_factor"):
            require(getattr(self, name) > 0, f"rope {name} must be positive, not {getattr(self, name)}")
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            below = 0 < getattr(self, low) < getattr(self, high)
            require(below, f"rope {low} must be positive and less than {high}, not {getattr(self, low)} and {getattr(self, high)}")
        for name in ("short_factors", "long_factors"):
            odd = [each for each in getattr(self, name) if each <= 0]
            require(not odd, f"rope {name} must be positive, not {odd[:1]}")
        require(0 < self.partial <= 1, f"partial_rotary_factor must lie in (0, 1], not {self.partial}")
        for name in ("short_factors", "long_factors"):
            belongs = (self.type == "longrope") == bool(getattr(self, name))
            require(belongs, f"{name.replace('_', ' ')} belong to rope type 'longrope', and only there")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        return super(RopeConfig, cls).from_dict(with_tuples(values, "short_factors", "long_factors"))

    def size(self, head_dim: int) -> int:
        """How many values of a head are rotated."""
        return int(head_dim * self.partial)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(Config):
    """The architecture of a decoder-only model. A family is a set of these values, not a subclass.

    hidden_size D, intermediate_size F (neurons of one MLP), num_heads H query heads of head_dim K, num_kv_heads G.
    embed_size is the width of the embedding table (OPT-350m: half of hidden_size). position_offset is the number of
    unused rows at the start of a learned position table (OPT: 2).

    qk_norm: a norm of every query and key head, before rotation. block_norms: a norm of what each block adds, besides the one of its
    input. parallel: the MLP reads the input of attention, by a norm of its own unless shared_norm. up_activation: of the up
    projection of a gated MLP, None for none. windowed: layers whose tokens see the last `window` tokens alone, themselves
    included; local_rope: their rotary positions where they have others. attention_scale: of scores, head_dim^-0.5 if None.
    A cap c turns x into c tanh(x / c), 0 is none. Scales multiply the embedding, what a block adds, and the logits.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    activation: str
    activation_threshold: float = 0.0
    gated: bool = False
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = 1e-5
    norm_affine: bool = True
    pre_norm: bool = True
    final_norm: bool = True
    positions: Literal["learned", "rope"] = "learned"
    position_offset: int = 2
    rope: RopeConfig | None = None
    embed_size: int | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tied_head: bool = True
    qk_norm: bool = False
    block_norms: bool = False
    parallel: bool = False
    shared_norm: bool = False
    up_activation: str | None = None
    window: int | None = None
    windowed: tuple[int, ...] = ()
    local_rope: RopeConfig | None = None
    attention_scale: float | None = None
    attention_cap: float = 0.0
    logit_cap: float = 0.0
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_types(ModelConfig, {field.name: getattr(self, field.name) for field in dataclasses.fields(ModelConfig)})
        for name, most in LARGEST.items():
            value = getattr(self, name)
            require(0 < value <= most, f"{name} must be positive and at most {most:,}, not {value:,}")
        width = self.num_heads * self.head_dim
        require(width <= LARGEST["hidden_size"], f"{self.num_heads} heads of {self.head_dim} are wider than {LARGEST['hidden_size']:,}")
        for name in ("norm_eps", "embed_scale", "residual_scale", "logit_scale"):
            require(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}")
        for name in ("attention_cap", "logit_cap", "position_offset"):
            require(getattr(self, name) >= 0, f"{name} must be 0 or positive, not {getattr(self, name)}")
        require(self.embed_size is None or 0 < self.embed_size <= LARGEST["hidden_size"], f"embed_size {self.embed_size} is not possible")
        require(self.attention_scale is None or self.attention_scale > 0, f"attention_scale must be positive, not {self.attention_scale}")
        for token_id in (*self.eos_token_ids, *(() if self.bos_token_id is None else (self.bos_token_id,))):
            require(0 <= token_id < 1 << 31, f"{token_id} is no token id")
        outside = [index for index in self.windowed if not 0 <= index < self.num_layers]
        require(not outside, f"windowed layers {outside[:3]} of {self.num_layers} layers")
        require(
            self.activation != "fatrelu" or self.activation_threshold > 0,
            f"activation fatrelu needs a positive threshold (hidden_act_param), not {self.activation_threshold}",
        )
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}",
        )
        require((self.positions == "rope") == (self.rope is not None), "rope settings belong to rope positions, and only there")
        for rope in (self.rope, self.local_rope):
            rotated = 0 if rope is None else rope.size(self.head_dim)
            given = 0 if rope is None else len(rope.short_factors)
            require(given in (0, rotated // 2), f"{given} short factors of longrope are not one for each of {rotated // 2} pairs")
            require(rotated % 2 == 0, f"head_dim {self.head_dim} must be even for rotary positions, of which {rotated} values are rotated")
        for activation in (self.activation, self.up_activation):
            require(
                activation is None or activation in ACTIVATIONS,
                f"activation {activation!r} is not supported; supported: {', '.join(ACTIVATIONS)}",
            )
        require(self.gated or self.up_activation is None, "an activation of the up projection belongs to a gated MLP")
        require(self.window is None or self.window >= 1, f"a window holds at least 1 token, not {self.window}")
        require((self.window is None) == (not self.windowed), "a window belongs to windowed layers, and only there")
        require(self.parallel or not self.shared_norm, "one norm for both blocks belongs to parallel blocks")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        fields = dict(values)
        for key in ("rope", "local_rope"):
            if isinstance(fields.get(key), Mapping):
                fields[key] = RopeConfig.from_dict(fields[key])
        return super(ModelConfig, cls).from_dict(with_tuples(fields, "eos_token_ids", "windowed"))

    @property
    def embed_width(self) -> int:
        return self.embed_size or self.hidden_size

    @property
    def heads_per_group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def special(self) -> dict[str, str]:
        """What this architecture has that not every engine computes, in words by name."""
        rope = self.rope
        parts = (
            ("post_norm", not self.pre_norm, "norms after the blocks"),
            ("no_final_norm", not self.final_norm, "no final norm"),
            ("narrow_embedding", self.embed_width != self.hidden_size, "an embedding narrower than the model"),
            ("odd_head", self.head_dim % 2 == 1, f"an odd head size, {self.head_dim}"),
            ("partial_rotary", rope is not None and rope.partial < 1, "heads rotated in part"),
            ("rotary_scale", rope is not None and rope.attention_factor != 1, "a scale of rotary positions"),
            ("local_rope", self.local_rope is not None, "rotary positions by layer"),
            ("qk_norm", self.qk_norm, "norms of queries and keys"),
            ("block_norms", self.block_norms, "norms of what blocks add"),
            ("parallel", self.parallel, "parallel blocks"),
            ("up_activation", self.up_activation is not None, "an activation of the up projection"),
            ("window", self.window is not None, "sliding windows"),
            ("attention_scale", self.attention_scale is not None, "a scale of attention"),
            ("caps", self.attention_cap > 0 or self.logit_cap > 0, "capped scores or logits"),
            ("scales", {self.embed_scale, self.residual_scale, self.logit_scale} != {1}, "scaled embeddings, blocks or logits"),
        )
        return {name: words for name, there, words in parts if there}

    @property
    def has_exact_zeros(self) -> bool:
        """True where an activation can be exactly zero, so that skipping a neuron can be lossless."""
        return {self.activation, self.up_activation} & set(EXACT_ZERO_ACTIVATIONS) != set()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig(Config):
    """How the next token is drawn. temperature 0 is greedy; min_p, top_k and top_p cut the tail before drawing (None: no cut). min_p keeps
    what is at least so likely, at that temperature, as the likeliest token times it.

    seed: repeats the draws, and with the same logits the text, on the same backend. Backends draw from different streams of random
    numbers: on another one the same seed may give another text. A greedy text is the same on all, but for rounding.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        require(self.temperature >= 0, f"temperature must be 0 (greedy) or positive, not {self.temperature}")
        require(self.top_k is None or self.top_k >= 1, f"top_k must be at least 1, not {self.top_k}")
        require(self.top_p is None or 0 < self.top_p <= 1, f"top_p must lie in (0, 1], not {self.top_p}")
        require(self.min_p is None or 0 < self.min_p <= 1, f"min_p must lie in (0, 1], not {self.min_p}")

    def overridden(
        self, *, temperature: float | None = None, top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
        seed: int | None = None,
    ) -> SamplingConfig:  # fmt: skip
        """This sampling with the given values in place of its own, each by itself: None leaves it, a top_k or min_p of 0 and a top_p of 1
        take a cut away. The seed is the given one. Raises ValueError for a value out of range.
        """
        return SamplingConfig(
            temperature=self.temperature if temperature is None else temperature,
            top_k=self.top_k if top_k is None else top_k or None,
            top_p=self.top_p if top_p is None else None if top_p == 1 else top_p,
            min_p=self.min_p if min_p is None else min_p or None,
            seed=seed,
        )

    @property
    def words(self) -> str:
        """For people: greedy, or such as "temperature 0.6, top_p 0.9"."""
        if self.temperature == 0:
            return "greedy"
        parts = (("temperature", self.temperature), ("top_k", self.top_k), ("top_p", self.top_p), ("min_p", self.min_p))
        return ", ".join(f"{name} {value:g}" for name, value in parts if value is not None)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Penalties(Config):
    """What is taken from the logits of tokens that a text has already: frequency times how often, presence once, of those written.
    repetition divides positive logits of those written or of the prompt, and multiplies negative ones (CTRL, arXiv 1909.05858)."""

    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0

    def __post_init__(self) -> None:
        require(self.repetition > 0, f"a repetition penalty must be positive, not {self.repetition}")

    @property
    def any(self) -> bool:
        return self != NO_PENALTIES


NO_PENALTIES = Penalties()
