"""Every configuration value of the package, checked once, where the user's string arrives.

In: keyword arguments or a dict read from a file. Out: frozen dataclasses. An unknown key, an impossible size or a value
outside its range is a ValueError that names the value and the fix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, Self

ACTIVATIONS = ("relu", "relu2", "silu", "gelu", "gelu_tanh", "fatrelu")
EXACT_ZERO_ACTIVATIONS = ("relu", "relu2", "fatrelu")
DTYPES = ("fp32", "fp16", "bf16", "int8", "int4")
BACKENDS = ("auto", "torch", "native", "cuda")
ROPE_TYPES = ("default", "linear", "llama3")

Progress = Callable[[str, int, int], None]
"""progress(what, done, total): what is a step's name, e.g. "wiki.txt dense"; done and total count its tokens, pairs or rows."""


class Config:
    """Base of the configuration dataclasses: `from_dict` refuses keys that are no field."""

    __slots__ = ()
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown keys {unknown} for {cls.__name__}; it knows {sorted(known)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless the condition holds: for what a user or a file can get wrong."""
    if not condition:
        raise ValueError(message)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig(Config):
    """Rotary positions: base and, for long-context variants, how frequencies are rescaled (transformers' names)."""

    theta: float = 10000.0
    type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self) -> None:
        require(self.type in ROPE_TYPES, f"rope type {self.type!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
        require(self.theta > 0, f"rope theta must be positive, not {self.theta}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(Config):
    """The architecture of a decoder-only model. A family is a set of these values, not a subclass.

    hidden_size D, intermediate_size F (neurons of one MLP), num_heads H query heads of head_dim K, num_kv_heads G.
    embed_size is the width of the embedding table (OPT-350m: half of hidden_size). position_offset is the number of
    unused rows at the start of a learned position table (OPT: 2).
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
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "max_positions")
        for name in sizes:
            require(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}")
        require(
            self.activation in ACTIVATIONS,
            f"activation {self.activation!r} is not supported; supported: {', '.join(ACTIVATIONS)}",
        )
        require(
            self.activation != "fatrelu" or self.activation_threshold > 0,
            f"activation fatrelu needs a positive threshold (hidden_act_param), not {self.activation_threshold}",
        )
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}",
        )
        require((self.positions == "rope") == (self.rope is not None), "rope settings belong to rope positions, and only there")
        require(self.rope is None or self.head_dim % 2 == 0, f"head_dim {self.head_dim} must be even for rotary positions")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        fields = dict(values)
        if isinstance(fields.get("rope"), Mapping):
            fields["rope"] = RopeConfig.from_dict(fields["rope"])
        if "eos_token_ids" in fields:
            fields["eos_token_ids"] = tuple(fields["eos_token_ids"])
        return super(ModelConfig, cls).from_dict(fields)

    @property
    def embed_width(self) -> int:
        return self.embed_size or self.hidden_size

    @property
    def heads_per_group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def has_exact_zeros(self) -> bool:
        """True where an activation can be exactly zero, so that skipping a neuron can be lossless."""
        return self.activation in EXACT_ZERO_ACTIVATIONS


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig(Config):
    """How the next token is drawn. temperature 0 is greedy; top_k and top_p cut the tail before drawing.

    seed: repeats the draws, and with the same logits the text, on the same backend. Backends draw from different streams of random
    numbers: on another one the same seed may give another text. A greedy text is the same on all, but for rounding.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        require(self.temperature >= 0, f"temperature must be 0 (greedy) or positive, not {self.temperature}")
        require(self.top_k is None or self.top_k >= 1, f"top_k must be at least 1, not {self.top_k}")
        require(self.top_p is None or 0 < self.top_p <= 1, f"top_p must lie in (0, 1], not {self.top_p}")
