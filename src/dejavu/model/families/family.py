"""What a family of models is: how Hugging Face calls its config fields and its tensors, and what we call them.

Tensor names here are *plain*: without the prefix (`model.`, `model.decoder.`, `decoder.`) that checkpoints of one family
carry or not. Our `o` and `down` hold a row per input, Hugging Face's a row per output: they are transposed on the way. Some
families store several of our matrices as one, or a norm's weight less one: they come apart, and are added to, on the way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dejavu.config import ModelConfig, require
from dejavu.kernels.quantized import Matrix, QuantizedMatrix

TRANSPOSED_MODULES = ("o", "down")
NORMS = ("norm1", "norm1_out", "norm2", "norm2_out", "q_norm", "k_norm", "final_norm")
LAYER_NAME = re.compile(r"layers\.(\d+)\.(\w+)\.(weight|bias)")


@dataclass(frozen=True, slots=True)
class TensorTarget:
    """Where a stored tensor goes: the parameter's name in Transformer, and whether its two axes swap on the way."""

    name: str
    transposed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Fused:
    """Several of our matrices of a layer stored as one: which, how its rows come apart, and how they are put together.

    split(config, values [rows, ..]) gives the parts in the order of `parts`; join is its inverse. Biases likewise, [rows].
    """

    parts: tuple[str, ...]
    split: Callable[[ModelConfig, Tensor], tuple[Tensor, ...]]
    join: Callable[[ModelConfig, tuple[Tensor, ...]], Tensor]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model_type. `modules` and `layer_modules` map our module names to theirs; `ignored` are plain names to pass over.

    renamed(config): layer modules that some configs of the family call otherwise. fused: by the stored module's name. norm_shift is
    added to every norm's weight as stored. layers: what comes before a layer's number.
    """

    architecture: str
    prefix: str
    optional_prefixes: tuple[str, ...]
    read_config: Callable[[Mapping[str, Any]], ModelConfig]
    write_config: Callable[[ModelConfig], dict[str, Any]]
    modules: Mapping[str, str]
    layer_modules: Mapping[str, str]
    renamed: Callable[[ModelConfig], Mapping[str, str]] = lambda config: {}
    fused: Mapping[str, Fused] = field(default_factory=dict)
    norm_shift: float = 0.0
    layers: str = "layers"
    ties_absent_head: bool = False
    ignored: tuple[re.Pattern[str], ...] = field(default=(re.compile(r".*\brotary_emb\.inv_freq"),))

    def plain_name(self, stored: str) -> str:
        """A tensor's name without the optional prefixes of its file."""
        for prefix in self.optional_prefixes:
            stored = stored.removeprefix(prefix)
        return stored

    def foreign_name(self, ours: str, config: ModelConfig) -> str:
        """The plain Hugging Face name of our parameter. Of one that is stored within another, that of a file where it is not."""
        match = LAYER_NAME.fullmatch(ours)
        if match:
            layer, module, kind = match.groups()
            return f"{self.layers}.{layer}.{self._module(module, config)}.{kind}"
        module, kind = ours.rsplit(".", 1)
        return f"{self.modules[module]}.{kind}"

    def _module(self, ours: str, config: ModelConfig) -> str:
        return self.renamed(config).get(ours) or self.layer_modules[ours]

    def full_name(self, plain: str) -> str:
        """The name under which transformers saves the tensor of that plain name."""
        return plain if plain == "lm_head.weight" else self.prefix + plain

    def is_ignored(self, plain: str) -> bool:
        return any(pattern.fullmatch(plain) for pattern in self.ignored)

    def unfused(self, plain: str, values: Matrix, config: ModelConfig) -> dict[str, Matrix]:
        """The stored tensor, or, of one that holds several, these by their plain names: of a quantised one its rows as they are."""
        match = re.fullmatch(rf"({self.layers}\.\d+\.)([\w.]+)\.(weight|bias)", plain)
        if match is None or match[2] not in self.fused:
            return {plain: values}
        fused = self.fused[match[2]]
        rows = sum(_num_rows(part, config) for part in fused.parts)
        require(values.shape[:1] == (rows,), f"tensor {plain!r} is {list(values.shape)}, config.json makes it {rows} rows")
        if isinstance(values, QuantizedMatrix):
            rows = fused.split(config, torch.arange(values.shape[0])[:, None])
            parts = tuple(_rows(values, row[:, 0]) for row in rows)
        else:
            parts = fused.split(config, values)
        return {f"{match[1]}{self._module(part, config)}.{match[3]}": values for part, values in zip(fused.parts, parts, strict=True)}

    def stored(self, values: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
        """Our parameters by plain Hugging Face name, as a checkpoint of the family holds them."""
        found: dict[str, Tensor] = {}
        joined: dict[str, dict[str, Tensor]] = {}
        owner = {part: (name, fused) for name, fused in self.fused.items() for part in fused.parts}
        for ours, parameter in values.items():
            value = parameter.T if is_transposed(ours) else parameter
            if self.norm_shift and is_norm_weight(ours):
                value = value - self.norm_shift
            match = LAYER_NAME.fullmatch(ours)
            if match is not None and match[2] in owner:
                name, _ = owner[match[2]]
                joined.setdefault(f"{self.layers}.{match[1]}.{name}.{match[3]}", {})[match[2]] = value
            else:
                found[self.foreign_name(ours, config)] = value
        for name, held in joined.items():
            fused = next(fused for module, fused in self.fused.items() if f".{module}." in name)
            found[name] = fused.join(config, tuple(held[part] for part in fused.parts))
        return found


def _num_rows(part: str, config: ModelConfig) -> int:
    heads = {"q": config.num_heads, "k": config.num_kv_heads, "v": config.num_kv_heads}.get(part)
    return config.intermediate_size if heads is None else heads * config.head_dim


def _rows(matrix: QuantizedMatrix, row_N: Tensor) -> QuantizedMatrix:
    """These rows: a view where they follow one another."""
    first, last = int(row_N[0]), int(row_N[-1])
    in_order = torch.equal(row_N, torch.arange(first, first + len(row_N)))
    return matrix.rows(slice(first, last + 1) if in_order else row_N)


def is_transposed(ours: str) -> bool:
    match = LAYER_NAME.fullmatch(ours)
    return match is not None and match[2] in TRANSPOSED_MODULES and match[3] == "weight"


def is_norm_weight(ours: str) -> bool:
    module, _, kind = ours.rpartition(".")
    return kind == "weight" and module.rpartition(".")[2] in NORMS
