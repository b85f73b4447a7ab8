"""Low-rank changes of a model's weights that come with an adapter, and the layers in which they are merged.

A linear map W [O, I] (outputs x inputs, whatever layout the model keeps it in) becomes

    W' = W + scale * B A        A [R, I], B [O, R], the sum in fp32, then in the dtype of W

and a norm's weight is replaced; the activation may be another one, too. On disk, next to the predictors of layer 3:
`layers.3.lora.q.A` int8 [R, I] with
`layers.3.lora.q.A.scale` fp32 [R], `layers.3.lora.q.B` int8 [O, R] with its scale [O], the same for k, v, o, up, gate and
down, and `layers.3.norm1`, `layers.3.norm2` fp32 [D]. In memory factors stay int8.

The base stays as it is: a merged layer is a copy, which a LayerAdapter carries, so that a dense run of the same model
object has the base's weights and a sparse one the merged ones.

Letters: R rank of the change  I inputs  O outputs  D model
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dejavu.config import Config, ModelConfig, require
from dejavu.kernels.quantized import Matrix, QuantizedMatrix, joined, rounded_to, wide
from dejavu.model.layers import InputMajorLinear, Linear, Rows
from dejavu.model.selectors import LayerAdapter
from dejavu.model.transformer import Block, Transformer, sharing

GIVEN_ACTIVATIONS = ("relu", "relu2")  # without a threshold of their own
ROUNDED = ("fp16", "bf16", "int8", "int4")  # dtypes whose values a model on the CPU may hold, see Transformer.rounded


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig(Config):
    """rank R of every change, and the scale of B A (PEFT's lora_alpha / r). activation: what the MLPs get in the place of their own.

    With an activation, neurons are selected by its zeros, and layers have no predictor of neurons.
    """

    rank: int
    scale: float
    activation: str | None = None

    def __post_init__(self) -> None:
        require(self.rank >= 1, f"lora rank must be at least 1, not {self.rank}")
        require(math.isfinite(self.scale), f"lora scale must be finite, not {self.scale}")
        check_activation(self.activation)


def check_activation(name: str | None) -> None:
    """Raise ValueError for an activation that a model cannot be given: one without exact zeros."""
    supported = ", ".join(GIVEN_ACTIVATIONS)
    require(name in (None, *GIVEN_ACTIVATIONS), f"activation {name!r} cannot be given to a model; choose one of {supported}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerLora:
    """The changes of one layer. factors: our module name (q, ..., down) -> (A_RI, B_OR); norms: name -> the weight [D] that it gets."""

    factors: Mapping[str, tuple[Matrix, Matrix]]
    norms: Mapping[str, Tensor]

    def __repr__(self) -> str:
        ranks = sorted({A_RI.shape[0] for A_RI, _ in self.factors.values()})
        return f"LayerLora({', '.join([*self.factors, *self.norms])}, rank={'/'.join(map(str, ranks))})"


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of every linear map of a layer, by our module name."""
    size, heads, groups = config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes = {"q": (heads, size), "k": (groups, size), "v": (groups, size), "o": (size, heads), "up": (config.intermediate_size, size)}
    if config.gated:
        shapes["gate"] = (config.intermediate_size, size)
    return shapes | {"down": (size, config.intermediate_size)}


def changed_norms(config: ModelConfig) -> tuple[str, ...]:
    """The norms of a layer whose weights change: those of the inputs of its two blocks."""
    return () if not config.norm_affine else ("norm1",) if config.shared_norm else ("norm1", "norm2")


def merged_weight(module: Linear | InputMajorLinear | Rows, A_RI: Matrix, B_OR: Matrix, scale: float) -> Tensor:
    """W + scale * B A in fp32, in the layout of the module's weight."""
    base = wide(module.matrix).float()
    A_RI, B_OR = (wide(factor).to(base.device).float() for factor in (A_RI, B_OR))
    change_OI = scale * (B_OR @ A_RI)
    return base + (change_OI.T if isinstance(module, InputMajorLinear) else change_OI)


@torch.no_grad()
def merged_block(block: Block, lora: LayerLora, scale: float, *, dtype: str | None = None, activation: str | None = None) -> Block:
    """The layer with its changes, sharing the rest. dtype: of the engine, to which its matrices are rounded as those of the base are;
    stored: that of the base's matrix, and bf16 where it has a grid of a GGUF file, in which a sum has no place."""
    merged = sharing(block, lambda module: module.held)
    merged.config = with_activation(block.config, activation)

    def changed(name: str) -> Matrix:
        if name not in lora.factors:
            return getattr(block, name).matrix
        base = getattr(block, name).matrix
        values = merged_weight(getattr(block, name), *lora.factors[name], scale)
        if isinstance(base, QuantizedMatrix):
            held = "fp32" if dtype is None else dtype if dtype != "stored" else base.grid if base.grid in ROUNDED else "bf16"
            return rounded_to(values, held)
        return rounded_to(values, dtype) if dtype in ROUNDED and base.dtype == torch.float32 else values.to(base.dtype)

    joint = ("q", "k", "v")
    if lora.factors.keys() & set(joint):
        merged.qkv.hold(joined([changed(name) for name in joint]))
    for name in lora.factors.keys() - set(joint):
        getattr(merged, name).hold(changed(name))
    for name, weight_D in lora.norms.items():
        norm = getattr(merged, name)
        norm.weight = nn.Parameter(weight_D.to(norm.weight).clone(), requires_grad=False)
    return merged


def with_activation(config: ModelConfig, activation: str | None) -> ModelConfig:
    """The architecture with that activation; itself where it is None."""
    return config if activation is None else dataclasses.replace(config, activation=activation)


def adapted_model(model: Transformer, layers: Sequence[LayerAdapter]) -> Transformer:
    """The model that runs sparse with these layers: itself, or one with the layers that they carry, which shares the rest."""
    changed = [layer.block for layer in layers if layer.block is not None]
    if not changed or all(layer.block in (None, own) for layer, own in zip(layers, model.blocks, strict=True)):
        return model
    adapted = sharing(model, lambda module: module.held)
    adapted.config = changed[0].config
    adapted.label = None  # what the base's file calls its form is no longer that of most matrices
    adapted.layers = nn.ModuleList(layer.block or own for layer, own in zip(layers, adapted.blocks, strict=True))
    return adapted


def quantized_lora(lora: LayerLora) -> LayerLora:
    """The changes rounded to what an adapter stores: factors int8 per row, norms fp32."""
    factors = {name: (_int8(A), _int8(B)) for name, (A, B) in lora.factors.items()}
    return LayerLora(factors=factors, norms={name: weight.detach().float().cpu() for name, weight in lora.norms.items()})


def _int8(matrix: Matrix) -> QuantizedMatrix:
    return QuantizedMatrix.of(wide(matrix).detach().cpu(), "int8")


def lora_tensors(index: int, lora: LayerLora) -> dict[str, Tensor]:
    """What an adapter's file holds of the changes of a layer, which must be `quantized_lora`."""
    tensors: dict[str, Tensor] = {}
    for name, factors in lora.factors.items():
        for letter, matrix in zip("AB", factors, strict=True):
            key = f"layers.{index}.lora.{name}.{letter}"
            assert isinstance(matrix, QuantizedMatrix), f"{key} is not quantized: calibrate quantized_lora"
            tensors |= matrix.int8_tensors(key)
    return tensors | {f"layers.{index}.{name}": weight.contiguous() for name, weight in lora.norms.items()}


def read_lora(index: int, config: LoraConfig, tensors: dict[str, Tensor], model: ModelConfig, path: Path) -> LayerLora:
    """Take the changes of a layer out of `tensors`, checked for presence, type, shape and finite values."""

    def take(key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        require(key in tensors, f"change of layer {index} not found: {key} in {path}")
        tensor = tensors.pop(key)
        found = (tuple(tensor.shape), tensor.dtype)
        require(found == (shape, dtype), f"{key} in {path} is {found[1]} {list(found[0])}; this model needs {dtype} {list(shape)}")
        require(bool(torch.isfinite(tensor).all()), f"{key} in {path} has NaN or infinite values; make the adapter again")
        return tensor

    factors = {}
    for name, (outputs, inputs) in linear_shapes(model).items():
        key = f"layers.{index}.lora.{name}"
        A, B = (
            QuantizedMatrix(
                "int8", take(f"{key}.{letter}", shape, torch.int8), take(f"{key}.{letter}.scale", shape[:1], torch.float32), shape[1]
            )
            for letter, shape in (("A", (config.rank, inputs)), ("B", (outputs, config.rank)))
        )
        factors[name] = (A, B)
    norms = {name: take(f"layers.{index}.{name}", (model.hidden_size,), torch.float32) for name in changed_norms(model)}
    return LayerLora(factors=factors, norms=norms)
