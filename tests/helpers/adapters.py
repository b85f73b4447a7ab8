"""Random adapters of tiny models."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from conftest import random_predictor
from dejavu.config import ModelConfig
from dejavu.model.adapter import Adapter, quantized, read_layer
from dejavu.model.adapter_config import AdapterConfig, LayerConfig
from dejavu.model.lora import LayerLora, LoraConfig, linear_shapes
from dejavu.model.predictor import Predictor
from dejavu.model.selectors import (
    POINTS,
    AllHeads,
    AllNeurons,
    GateConfig,
    InputConfig,
    InputsConfig,
    LayerAdapter,
    PredictedHeads,
    PredictedNeurons,
)
from dejavu.model.transformer import Block


def make_adapter(config: ModelConfig, base_hash: str, *, threshold: float = 0.0) -> Adapter:
    """The MLP of every layer and the heads of the last one are predicted, at random."""

    def predictor(outputs: int, layer: int) -> Predictor:
        generator = torch.Generator().manual_seed(layer)
        return quantized(random_predictor(config.hidden_size, outputs, generator, rank=4, threshold=threshold))

    count = config.num_layers
    heads = {count - 1: predictor(config.num_kv_heads, 100)}
    layers = tuple(predicted(mlp=predictor(config.intermediate_size, i), heads=heads.get(i)) for i in range(count))
    return Adapter(
        layers=layers,
        config=AdapterConfig(
            base_id="tiny", base_hashes=(base_hash,), method="predicted", budget=0.005, calibration_text_hash="c" * 64,
            quality={"ppl_dense": 20.0}, mlp_density=0.5, head_density=0.75, seed=0,
            layers=tuple(LayerConfig.of(i, layer, density=0.5, recall=0.9, mass=0.9) for i, layer in enumerate(layers)),
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


def predicted(*, mlp: Predictor | None = None, heads: Predictor | None = None, block: Block | None = None) -> LayerAdapter:
    """A layer with these predictors, dense where there is none."""
    neurons = AllNeurons() if mlp is None else PredictedNeurons(mlp)
    return LayerAdapter(neurons=neurons, heads=AllHeads() if heads is None else PredictedHeads(heads), block=block)


def mlp_of(layer: LayerAdapter) -> Predictor:
    """The predictor of its neurons."""
    assert isinstance(layer.neurons, PredictedNeurons)
    return layer.neurons.predictor


def heads_of(layer: LayerAdapter) -> Predictor:
    assert isinstance(layer.heads, PredictedHeads)
    return layer.heads.predictor


def predictors_of(layer: LayerAdapter) -> list[Predictor]:
    """Of neurons and of heads, those that there are."""
    return [each.predictor for each in layer.selectors if isinstance(each, PredictedNeurons | PredictedHeads)]


def predictor(outputs: int, *, layer: int, lookahead: int = 0, rank: int = 5) -> Predictor:
    """Random, quantized; its biases are the layer's index."""
    generator = torch.Generator().manual_seed(layer)
    A_RD, B_OR = torch.randn(rank, 32, generator=generator), torch.randn(outputs, rank, generator=generator)
    bias_O = torch.full((outputs,), float(layer))
    return quantized(Predictor(A_RD=A_RD, B_OR=B_OR, bias_O=bias_O, threshold=0.1 * layer + 1e-9, lookahead=lookahead))


def varied_adapter(model: ModelConfig, base_hash: str) -> Adapter:
    """Layer 3 has a dense MLP, heads are predicted in odd layers; MLP predictors look ahead from layer 1 on."""
    layers = tuple(
        predicted(
            mlp=None if i == 3 else predictor(model.intermediate_size, layer=i, lookahead=min(i, 2)),
            heads=predictor(model.num_kv_heads, layer=i, lookahead=1, rank=3) if i % 2 else None,
        )
        for i in range(model.num_layers)
    )

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
        layers=tuple(LayerConfig.of(i, layer, density=0.125, recall=0.9, mass=0.99) for i, layer in enumerate(layers)),
    )
    return Adapter(layers=layers, config=config)


def without_predictors(method: str, model: ModelConfig, base_hash: str) -> Adapter:
    """Layer 0 is dense; input leaves a point out in every other layer."""

    def layer(index: int) -> LayerConfig:
        if index == 0:
            return LayerConfig(layer=0)
        if method == "input":
            points = {point: InputConfig(threshold=0.1 * index + 1e-9, density=0.5) for at, point in enumerate(POINTS) if at != index % 8}
            return LayerConfig(layer=index, entries={"inputs": InputsConfig(**points)})
        gate = GateConfig(threshold=0.0 if method == "exact" else 0.1 * index, density=0.25, mass=0.99)
        return LayerConfig(layer=index, entries={"gate": gate})

    entries = tuple(layer(index) for index in range(model.num_layers))
    layers = tuple(read_layer(entry, {}, model, Path()) for entry in entries)
    config = dataclasses.replace(varied_adapter(model, base_hash).config, method=method, layers=entries)
    return Adapter(layers=layers, config=config)
