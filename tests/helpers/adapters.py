"""Random adapters of tiny models."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from conftest import random_predictor
from dejavu.config import ModelConfig
from dejavu.model.adapter import Adapter, quantized
from dejavu.model.adapter_config import AdapterConfig, GateConfig, InputConfig, InputsConfig, LayerConfig, PartConfig, part_config
from dejavu.model.lora import LayerLora, LoraConfig, linear_shapes
from dejavu.model.predictor import LayerAdapter, Predictor
from dejavu.model.selectors import POINTS, GateThreshold


def make_adapter(config: ModelConfig, base_hash: str, *, threshold: float = 0.0) -> Adapter:
    """The MLP of every layer and the heads of the last one are predicted, at random."""

    def predictor(outputs: int, layer: int) -> Predictor:
        generator = torch.Generator().manual_seed(layer)
        return quantized(random_predictor(config.hidden_size, outputs, generator, rank=4, threshold=threshold))

    count = config.num_layers
    heads = {count - 1: predictor(config.num_kv_heads, 100)}
    layers = tuple(LayerAdapter(mlp=predictor(config.intermediate_size, i), heads=heads.get(i)) for i in range(count))

    def entry(index: int, layer: LayerAdapter) -> LayerConfig:
        mlp, heads = (None if part is None else part_config(part, density=0.5, recall=0.9, mass=0.9) for part in (layer.mlp, layer.heads))
        return LayerConfig(layer=index, mlp=mlp, heads=heads)

    return Adapter(
        layers=layers,
        config=AdapterConfig(
            base_id="tiny", base_hashes=(base_hash,), method="predicted", budget=0.005, calibration_text_hash="c" * 64,
            quality={"ppl_dense": 20.0}, mlp_density=0.5, head_density=0.75, seed=0,
            layers=tuple(entry(i, layer) for i, layer in enumerate(layers)),
        ),
    )  # fmt: skip


def changing_weights(adapter: Adapter, config: ModelConfig) -> Adapter:
    """The adapter with a random low-rank change of the first map and the last of every layer's MLP, and of its first norm."""
    generator, shapes = torch.Generator().manual_seed(0), linear_shapes(config)

    def factors(name: str) -> tuple[Tensor, Tensor]:
        outputs, inputs = shapes[name]
        return 0.3 * torch.randn(2, inputs, generator=generator), 0.3 * torch.randn(outputs, 2, generator=generator)

    def change() -> LayerLora:
        norm_D = 1 + 0.1 * torch.randn(config.hidden_size, generator=generator)
        return LayerLora(factors={name: factors(name) for name in ("up", "down")}, norms={"norm1": norm_D})

    changed = dataclasses.replace(adapter.config, schema_version=2, method="adapted", lora=LoraConfig(rank=2, scale=2.0))
    return dataclasses.replace(adapter, config=changed, lora=tuple(change() for _ in range(config.num_layers)))


def predictor(outputs: int, *, layer: int, lookahead: int = 0, rank: int = 5) -> Predictor:
    """Random, quantized; its biases are the layer's index."""
    generator = torch.Generator().manual_seed(layer)
    A_RD, B_OR = torch.randn(rank, 32, generator=generator), torch.randn(outputs, rank, generator=generator)
    bias_O = torch.full((outputs,), float(layer))
    return quantized(Predictor(A_RD=A_RD, B_OR=B_OR, bias_O=bias_O, threshold=0.1 * layer + 1e-9, lookahead=lookahead))


def varied_adapter(model: ModelConfig, base_hash: str) -> Adapter:
    """Layer 3 has a dense MLP, heads are predicted in odd layers; MLP predictors look ahead from layer 1 on."""
    layers = tuple(
        LayerAdapter(
            mlp=None if i == 3 else predictor(model.intermediate_size, layer=i, lookahead=min(i, 2)),
            heads=predictor(model.num_kv_heads, layer=i, lookahead=1, rank=3) if i % 2 else None,
        )
        for i in range(model.num_layers)
    )

    def part(held: Predictor | None) -> PartConfig | None:
        return None if held is None else part_config(held, density=0.125, recall=0.9, mass=0.99)

    config = AdapterConfig(
        base_id="tiny-opt",
        base_hashes=(base_hash,),
        method="predicted",
        budget=0.005,
        calibration_text_hash="c" * 64,
        calibration_max_tokens=600,
        quality={"ppl_dense": 20.0, "ppl_sparse": 20.05},
        mlp_density=0.2,
        head_density=0.75,
        seed=7,
        layers=tuple(LayerConfig(layer=i, mlp=part(layer.mlp), heads=part(layer.heads)) for i, layer in enumerate(layers)),
    )
    return Adapter(layers=layers, config=config)


def without_predictors(method: str, model: ModelConfig, base_hash: str) -> Adapter:
    """Layer 0 is dense; input leaves a point out in every other layer."""

    def layer(index: int) -> LayerConfig:
        if index == 0:
            return LayerConfig(layer=0)
        if method == "input":
            points = {point: InputConfig(threshold=0.1 * index + 1e-9, density=0.5) for at, point in enumerate(POINTS) if at != index % 8}
            return LayerConfig(layer=index, inputs=InputsConfig(**points))
        return LayerConfig(layer=index, gate=GateConfig(threshold=0.0 if method == "exact" else 0.1 * index, density=0.25, mass=0.99))

    entries = tuple(layer(index) for index in range(model.num_layers))
    layers = tuple(
        LayerAdapter(
            gate=None if entry.gate is None else GateThreshold(threshold=entry.gate.threshold),
            inputs=None if entry.inputs is None else entry.inputs.thresholds(),
        )
        for entry in entries
    )
    config = dataclasses.replace(varied_adapter(model, base_hash).config, method=method, layers=entries)
    return Adapter(layers=layers, config=config)
