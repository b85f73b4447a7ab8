"""Models that are made up: a known shape, random weights, and sparsity planted by predictors. For speed, never for quality.

In: a shape's name, a backend and dtype, densities. Out: a model of that shape and predictors that every engine runs as it
runs trained ones: scores, thresholds, lists and gathered rows are computed, nothing is pretended.

Weights are int8 values times one scale for each matrix, so that fp32 and int8 have the same model; bf16 and int4 have them
rounded. What the MLPs add to the residual stream is as large as the embedding: predictors see inputs that differ from token to
token, and a wrong MLP shows in the logits. ReLU neurons get a bias that makes all of them fire, so that no selected neuron's
row of down is spared. Layers share the memory of their weights where the engine packs its own copy of each (native); elsewhere
each has its own.

A predictor is A random and, by selection,
    uniform     B random: each token selects its own neurons, independently of their neighbours
    clustered   B random, the same for RUN neighbours: neurons are selected in runs
    hot-set     B random, and a bias that selects the same HOT_SHARE of the density for every token
with lookahead 1, in layer 0 0. `density.rethresholded` then gives them the target density. By gates or inputs nothing is planted:
thresholds at quantiles of random gates or inputs select uniformly by themselves.

Letters: D model  F neurons  R rank  O outputs
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dejavu.bench.bytes_read import Formats, weight_bytes
from dejavu.config import EXACT_ZERO_ACTIVATIONS, ModelConfig, RopeConfig, require
from dejavu.files import read_json
from dejavu.kernels.memory import available_bytes
from dejavu.kernels.quantize import rounded
from dejavu.model.adapter import quantized
from dejavu.model.bundle import bundled_folder
from dejavu.model.families import config_from_hf, empty_model, parameter_shapes
from dejavu.model.predictor import Predictor
from dejavu.model.selectors import POINTS, AllHeads, GateThreshold, InputThresholds, LayerAdapter, PredictedHeads, PredictedNeurons
from dejavu.model.transformer import Transformer

SELECTIONS = ("uniform", "clustered", "hot-set")
RANK, RUN, HOT_SHARE = 64, 16, 0.8
FIRING_BIAS = 5.0  # standard deviations of what it is added to: fewer than one neuron in a million does not fire


def _opt(hidden: int, layers: int, heads: int) -> ModelConfig:
    """The shapes of facebook/opt-*: public config.json files."""
    return ModelConfig(
        family="opt",
        vocab_size=50272,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        max_positions=2048,
        activation="relu",
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
    )


def _smollm2() -> ModelConfig:
    """HuggingFaceTB/SmolLM2-135M: public config.json."""
    return ModelConfig(
        family="llama",
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        max_positions=8192,
        activation="silu",
        gated=True,
        norm="rmsnorm",
        positions="rope",
        position_offset=0,
        rope=RopeConfig(theta=100000.0),
    )


def _llama_relu(hidden: int, intermediate: int, layers: int, heads: int) -> ModelConfig:
    """The shapes of Llama 2, with ReLU and with biases in the MLPs, which set how many neurons fire: no public model has these."""
    return ModelConfig(
        family="llama",
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        max_positions=4096,
        activation="relu",
        gated=True,
        norm="rmsnorm",
        positions="rope",
        position_offset=0,
        rope=RopeConfig(theta=10000.0),
        mlp_bias=True,
        tied_head=False,
    )


def _silu(kind: str, sizes: tuple[int, int, int, int, int], *, vocab: int, head_dim: int, positions: int, **fields: Any) -> ModelConfig:
    """Public config.json files, SiLU unless fields say otherwise. sizes: hidden, intermediate, layers, heads, those of keys and values."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    given = {"model_type": kind, "hidden_act": "silu", "vocab_size": vocab, "head_dim": head_dim, "max_position_embeddings": positions}
    return config_from_hf(given | dict(zip(names, sizes, strict=True)) | {"tie_word_embeddings": False} | fields)


def _llama3_rope(factor: float) -> dict[str, Any]:
    """The stretched positions of Llama 3.1 and 3.2."""
    stretched = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {"rope_parameters": stretched | {"original_max_position_embeddings": 8192}}


def _llama_3_2_1b() -> ModelConfig:
    sizes = (2048, 8192, 16, 32, 8)
    return _silu("llama", sizes, vocab=128256, head_dim=64, positions=131072, tie_word_embeddings=True, **_llama3_rope(32.0))


def _qwen3_8b() -> ModelConfig:
    return _silu("qwen3", (4096, 12288, 36, 32, 8), vocab=151936, head_dim=128, positions=40960, rope_theta=1e6)


def _llama_3_3_70b() -> ModelConfig:
    return _silu("llama", (8192, 28672, 80, 64, 8), vocab=128256, head_dim=128, positions=131072, **_llama3_rope(8.0))


def _minitron_4b() -> ModelConfig:
    """nvidia/Minitron-4B-Base, a Nemotron: squared ReLU, ungated, no biases."""
    fields: dict[str, Any] = {"hidden_act": "relu2", "norm_eps": 1e-5, "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    return _silu("nemotron", (3072, 9216, 32, 24, 8), vocab=256000, head_dim=128, positions=4096, **fields)


SHAPES: dict[str, Callable[[], ModelConfig]] = {
    "smollm2-135m": _smollm2,
    "llama-3.2-1b": _llama_3_2_1b,
    "llama-2-7b": lambda: _silu("llama", (4096, 11008, 32, 32, 32), vocab=32000, head_dim=128, positions=4096, rope_theta=1e4),
    "mistral-7b": lambda: _silu(
        "mistral", (4096, 14336, 32, 32, 8), vocab=32768, head_dim=128, positions=32768, rope_theta=1e6, sliding_window=None
    ),
    "llama-3.1-8b": lambda: _silu("llama", (4096, 14336, 32, 32, 8), vocab=128256, head_dim=128, positions=131072, **_llama3_rope(8.0)),
    "llama-3.3-70b": _llama_3_3_70b,
    "qwen3-8b": _qwen3_8b,
    "minitron-4b": _minitron_4b,
    "opt-mini": lambda: config_from_hf(read_json(bundled_folder("opt-mini") / "config.json")),
    "opt-125m": lambda: _opt(768, 12, 12),
    "opt-1.3b": lambda: _opt(2048, 24, 32),
    "opt-2.7b": lambda: _opt(2560, 32, 32),
    "opt-6.7b": lambda: _opt(4096, 32, 32),
    "opt-13b": lambda: _opt(5120, 40, 40),
    "opt-30b": lambda: _opt(7168, 48, 56),
    "opt-66b": lambda: _opt(9216, 64, 72),
    "opt-175b": lambda: _opt(12288, 96, 96),
    "llama-2-7b-relu": lambda: _llama_relu(4096, 11008, 32, 32),
    "llama-2-13b-relu": lambda: _llama_relu(5120, 13824, 40, 40),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticModel:
    """A made-up model. dtype: what its engines compute in. num_parameters counts each layer's own."""

    name: str
    model: Transformer
    config: ModelConfig
    backend: str
    dtype: str
    num_parameters: int


def shape_of(name: str) -> ModelConfig:
    """The architecture by that name. Raises ValueError listing the names."""
    require(name in SHAPES, f"no shape is called {name!r}; choose one of {', '.join(SHAPES)}")
    return SHAPES[name]()


def check_memory(name: str, config: ModelConfig, *, backend: str, dtype: str, available: int | None) -> None:
    """Raise ValueError where a model of that shape would not fit into so many bytes (None: not known), with what it needs."""
    shared = backend == "native"
    kept = weight_bytes(config, Formats(weights=dtype, cache=dtype, vectors="fp32", int8_predictors=True))
    wide = sum(math.prod(shape) for shape in _distinct_shapes(config, shared=shared).values()) * 4
    needed = (kept + wide if shared else max(kept, wide)) * 1.1
    require(
        available is None or needed <= available,
        f"{name} in {dtype} needs about {needed / 1e9:.1f} GB of memory and {(available or 0) / 1e9:.1f} GB are free; "
        "take a smaller shape, or a dtype of fewer bytes",
    )


def synthetic_model(name: str, *, backend: str, dtype: str, seed: int = 0) -> SyntheticModel:
    """A model of that shape for engines of that backend and dtype. The same for one seed.

    Raises ValueError for an unknown name, and where the memory is not there, before any is taken.
    """
    config = shape_of(name)
    check_memory(name, config, backend=backend, dtype=dtype, available=available_bytes(Path("/")))
    shared = backend == "native"
    made = _Made(config, seed)
    tensors = {key: _held(key, made.parameter(key, shape), dtype) for key, shape in _distinct_shapes(config, shared=shared).items()}
    stored = torch.bfloat16 if backend == "torch" and dtype == "bf16" else torch.float32
    for key in [key for key in tensors if ".q." in key]:
        parts = [tensors.pop(key.replace(".q.", f".{part}.")) for part in ("q", "k", "v")]
        tensors[key.replace(".q.", ".qkv.")] = torch.cat(parts)
    model, total = empty_model(config), 0
    for key, parameter in list(model.named_parameters()):
        total += parameter.numel()
        owner, _, last = key.rpartition(".")
        value = tensors[_first_layer(key) if shared else key].to(stored)
        setattr(model.get_submodule(owner), last, nn.Parameter(value, requires_grad=False))
    model.fill_frequencies("cpu")
    return SyntheticModel(name=name, model=model.eval(), config=config, backend=backend, dtype=dtype, num_parameters=total)


def _held(key: str, value: Tensor, dtype: str) -> Tensor:
    """The parameter as engines of that dtype hold it."""
    return rounded(value, dtype) if value.dim() == 2 and dtype in ("bf16", "int4") and not key.startswith("position") else value


def _first_layer(key: str) -> str:
    """The parameter of layer 0 that stands for this one."""
    return "layers.0." + key.split(".", 2)[2] if key.startswith("layers.") else key


def _distinct_shapes(config: ModelConfig, *, shared: bool) -> dict[str, tuple[int, ...]]:
    return {key: shape for key, shape in parameter_shapes(config).items() if not shared or key == _first_layer(key)}


class _Made:
    """Parameters at a scale that keeps every activation near 1."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self.config, self.random = config, np.random.default_rng(seed)

    def parameter(self, key: str, shape: tuple[int, ...]) -> Tensor:
        config = self.config
        if len(shape) == 1:
            if key.endswith("norm1.weight") or key.endswith("norm2.weight") or key.endswith("norm.weight"):
                return torch.ones(shape)
            # Neurons that fire at FIRING_BIAS on average would add the same to every token, were the rows of down not in pairs.
            return torch.full(shape, FIRING_BIAS if key.endswith("gate.bias" if config.gated else "up.bias") else 0.0)
        # Each of 2 x layers additions to the residual stream brings its share of the embedding's variance, 1. A quarter of the
        # neurons is taken for what an MLP adds up: fewer than dense, more than sparse.
        part = (2 * config.num_layers) ** -0.5
        if key.startswith("position"):
            spread = 0.1
        elif key.endswith("down.weight"):
            spread = part / math.sqrt(shape[0] / 4) / (FIRING_BIAS if config.mlp_bias or not config.gated else 0.6)
        elif key.endswith(".o.weight"):
            spread = part / math.sqrt(shape[0])
        elif key.startswith("embed"):
            spread = 1.0
        else:
            spread = shape[1] ** -0.5
        return self._matrix(shape, spread, paired=key.endswith("down.weight"))

    def _matrix(self, shape: tuple[int, ...], spread: float, *, paired: bool) -> Tensor:
        """int8 values, evenly spread, whose largest of each row is 127, times a scale of 8 bits: exact in fp32 and int8.
        paired: the second half of the rows is the first one's negative, so that all rows add up to nothing."""
        rows, columns = shape
        values = np.frombuffer(self.random.bytes(rows * columns), dtype=np.int8).reshape(shape).astype(np.float32)
        np.maximum(values, -127.0, out=values)
        values[np.arange(rows), np.arange(rows) % columns] = 127.0
        if paired:
            half = rows // 2
            np.negative(values[:half], out=values[half : 2 * half])
        mantissa, exponent = math.frexp(spread / (127 / math.sqrt(3)))
        values *= np.float32(math.ldexp(round(mantissa * 2**8) / 2**8, exponent))
        return torch.from_numpy(values)


def planted_layers(
    config: ModelConfig, *, selection: str = "uniform", density: float, heads: bool, rank: int = RANK, seed: int = 0
) -> tuple[LayerAdapter, ...]:
    """Predictors for every layer's MLP, and its heads if requested; thresholds are yet to be set.

    density: the share of neurons to be selected, which a hot set depends on. Raises ValueError for an unknown selection.
    """
    require(selection in SELECTIONS, f"unknown selection {selection!r}; choose one of {', '.join(SELECTIONS)}")
    require(0 < density <= 1, f"density must lie in (0, 1], not {density:g}")
    require(1 <= rank <= config.hidden_size, f"rank must lie between 1 and {config.hidden_size} (the hidden size), not {rank}")
    generator = torch.Generator().manual_seed(seed)
    size, neurons = config.hidden_size, config.intermediate_size

    def predictor(outputs: int, layer: int, run: int, hot: int) -> Predictor:
        A_RD = torch.randn(rank, size, generator=generator) * size**-0.5
        B_OR = torch.randn(-(-outputs // run), rank, generator=generator).repeat_interleave(run, 0)[:outputs] * rank**-0.5
        bias_O = torch.zeros(outputs)
        bias_O[torch.randperm(outputs, generator=generator)[:hot]] = 1e4  # above every other score
        return quantized(Predictor(A_RD=A_RD, B_OR=B_OR, bias_O=bias_O, threshold=0.0, lookahead=min(layer, 1)))

    run = RUN if selection == "clustered" else 1
    hot = round(HOT_SHARE * density * neurons) if selection == "hot-set" else 0
    return tuple(
        LayerAdapter(
            neurons=PredictedNeurons(predictor(neurons, layer, run, hot)),
            heads=PredictedHeads(predictor(config.num_kv_heads, layer, 1, 0)) if heads else AllHeads(),
        )
        for layer in range(config.num_layers)
    )


def usual_method(config: ModelConfig) -> str:
    """What selects in a model of that shape where nobody says: predictors where activations are zero, else gates."""
    return "predicted" if config.activation in EXACT_ZERO_ACTIVATIONS else "gate"


def plain_layers(config: ModelConfig, *, method: str) -> tuple[LayerAdapter, ...]:
    """Gates, or inputs at every point, in every layer; thresholds are yet to be set."""
    if method == "gate":
        return (LayerAdapter(neurons=GateThreshold(threshold=0.0)),) * config.num_layers
    assert method == "input", method
    return (LayerAdapter(inputs=InputThresholds(**dict.fromkeys(POINTS, 0.0))),) * config.num_layers


def random_ids(config: ModelConfig, count: int, *, seed: int = 0) -> list[int]:
    """Token ids for a model without a tokenizer."""
    return np.random.default_rng(seed).integers(0, config.vocab_size, count).tolist()
