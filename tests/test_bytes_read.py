"""Useful bytes against what the tensors of a model weigh."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from conftest import Tiny, random_predictor
from dejavu.bench.bytes_read import (
    STORAGE_FORMATS,
    Formats,
    dense_reads,
    formats_of,
    read_share,
    scoring_bytes,
    step_bytes,
    text_read_share,
    weight_bytes,
)
from dejavu.engine.backends import make_engine
from dejavu.engine.options import EngineOptions
from dejavu.generation.generation import GeneratedText, StepCounts
from dejavu.kernels.quantized import QuantizedMatrix
from dejavu.model.adapter import quantized
from dejavu.model.counts import Counts
from dejavu.model.layers import Held
from dejavu.model.predictor import Predictor
from dejavu.model.selectors import GateThreshold, InputPoints, InputThresholds, LayerAdapter, Scoring
from dejavu.model.transformer import Transformer
from helpers.adapters import predicted
from helpers.grids import ALL, blocks_of, floats_of, held_as, sizes_of
from helpers.native import NATIVE_MODELS, engine_of, needs_library

FP32 = Formats(weights="fp32", cache="fp32", vectors="fp32", int8_predictors=False)
INT8 = Formats(weights="int8", cache="fp32", vectors="fp32", int8_predictors=True)


def read_by_one_token(model: Transformer, *, int8: bool) -> int:
    """Bytes of every parameter, of the tables the one row that a token looks up: the embedding's only where it is not the head too."""
    total = 0
    for name, parameter in model.named_weights():
        rows, columns = (1, parameter.numel()) if parameter.dim() == 1 else tuple(parameter.shape)
        if name.startswith("position") or (name.startswith("embed") and model.head is not None):
            rows = 1
        matrix = parameter.dim() == 2 and not name.startswith("position")
        total += rows * columns + 4 * rows if int8 and matrix else 4 * rows * columns
        if name.startswith("embed") and model.head is None:  # the head reads all of it, and the token's row was read before
            total += columns + 4 if int8 else 4 * columns
    return total


def bytes_of_predictor(predictor: Predictor, *, may_be_int8: bool) -> float:
    values = predictor.bias_O.numel()
    return scoring_bytes(Scoring(matrices=(predictor.A_RD, predictor.B_OR), values=values), may_be_int8=may_be_int8)


@pytest.mark.parametrize("name", NATIVE_MODELS)
def test_a_dense_token_reads_every_weight_once(tiny: Tiny, name: str) -> None:
    family, overrides = NATIVE_MODELS[name]
    model = tiny(family, **overrides)
    assert weight_bytes(model.config, FP32) == read_by_one_token(model, int8=False)
    assert weight_bytes(model.config, INT8) == read_by_one_token(model, int8=True)


def test_the_cache_is_read_by_each_row_and_the_weights_once(tiny: Tiny) -> None:
    config = tiny("llama").config
    one, three = (step_bytes(config, FP32, dense_reads(config, rows=rows, tokens=50)) for rows in (1, 3))
    per_row = config.num_layers * 2 * config.num_kv_heads * config.head_dim * 50 * 4
    assert three["attention"] - one["attention"] == 2 * per_row
    assert (one["mlp"], one["head"]) == (three["mlp"], three["head"]) and one["predictor"] == 0
    assert three["other"] - one["other"] == 2 * config.hidden_size * 4


def test_of_the_cache_a_layer_reads_its_window(tiny: Tiny) -> None:
    config = tiny("llama", window=8, windowed=(1,)).config
    few, many, more = (step_bytes(config, FP32, dense_reads(config, tokens=tokens))["attention"] for tokens in (8, 9, 10))
    assert many - few == more - many == 2 * config.num_kv_heads * config.head_dim * 4


@pytest.mark.parametrize(("family", "matrices", "biases"), [("opt", 1, 1), ("llama", 2, 0)])
def test_what_is_not_selected_is_not_counted(tiny: Tiny, family: str, matrices: int, biases: int) -> None:
    """One neuron less: its rows, one down row less with it, and one head less: its rows of q and o and its cache."""
    config = tiny(family).config
    row, all_of = config.hidden_size + 4, dense_reads(config)

    def bytes_of(**changes: Any) -> dict[str, float]:
        return step_bytes(config, INT8, dataclasses.replace(all_of, **changes))

    def counting(**changes: list[int]) -> Counts:
        return dataclasses.replace(all_of.counts, **{part: torch.tensor(count_L) for part, count_L in changes.items()})

    full = bytes_of()
    fewer = [config.intermediate_size - 1] * config.num_layers
    assert full["mlp"] - bytes_of(counts=counting(neurons=fewer))["mlp"] == config.num_layers * (matrices * row + 4 * biases)
    assert full["mlp"] - bytes_of(fired_L=fewer)["mlp"] == config.num_layers * row
    heads = counting(heads=[config.num_heads - 1] * config.num_layers)
    assert full["attention"] - bytes_of(counts=heads)["attention"] == config.num_layers * config.head_dim * (2 * row + 4 * biases)
    cached = bytes_of(cached_L=[7.5] * config.num_layers)["attention"] - full["attention"]
    assert cached == config.num_layers * 2 * 7.5 * config.head_dim * 4


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_a_gate_is_read_for_all_neurons_and_inputs_are_columns(tiny: Tiny, family: str) -> None:
    """Half of the neurons, and one input less at every point: a value of each row of q, k, v, gate and up, and a row of o and of down."""
    config = tiny(family).config
    layers, size, row, biases = config.num_layers, config.hidden_size, config.hidden_size + 4, 4 * config.mlp_bias
    dense = dense_reads(config)
    half = [config.intermediate_size // 2] * layers
    gate = (LayerAdapter(neurons=GateThreshold(threshold=0.0)),) * layers
    full = step_bytes(config, INT8, dense)
    counts = dataclasses.replace(dense.counts, neurons=torch.tensor(half))
    found = step_bytes(config, INT8, dataclasses.replace(dense, counts=counts, fired_L=half), gate)
    rows_less = half[0] * (2 if config.gated else 1)
    assert full["mlp"] - found["mlp"] == layers * (rows_less * row + (half[0] * biases if config.gated else 0))
    assert found["attention"] == full["attention"] and found["predictor"] == 0
    points = InputPoints.of(config).sizes
    kept = torch.tensor([[count - 1 for count in points]] * layers)
    one_less = dataclasses.replace(dense, counts=dataclasses.replace(dense.counts, kept_inputs=kept))
    inputs = (LayerAdapter(inputs=InputThresholds(attention=1.0, output=1.0, mlp=1.0)),) * layers
    found = step_bytes(config, INT8, one_less, inputs)
    outputs = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    assert full["attention"] - found["attention"] == pytest.approx(layers * (outputs + row))
    assert full["mlp"] - found["mlp"] == layers * (config.intermediate_size * (2 if config.gated else 1) + row)
    assert found["predictor"] == layers * 4 * (2 * size + config.num_heads * config.head_dim), "norms of the points that select"


def test_predictors_count_as_they_are_stored() -> None:
    predictor = random_predictor(32, 64, torch.Generator().manual_seed(0), rank=5)
    rounded = quantized(predictor)
    wide = (5 * 32 + 64 * 5 + 64) * 4
    assert bytes_of_predictor(predictor, may_be_int8=True) == bytes_of_predictor(rounded, may_be_int8=False) == wide
    assert bytes_of_predictor(rounded, may_be_int8=True) == 5 * 32 + 64 * 5 + 4 * (5 + 64) + 4 * 64


def test_rows_of_the_small_formats() -> None:
    assert [STORAGE_FORMATS[dtype].row(33) for dtype in ("fp32", "bf16", "int8", "int4")] == [132, 66, 37, 16.5 + 2 * 2]


@needs_library
def test_each_matrix_counts_in_its_own_grid(tiny: Tiny) -> None:
    """A dense token of a model of many grids reads as many bytes as they are, and one row of the embedding."""
    parts = dict(zip(ALL, ("q4_1", "q8_0", "q5_0", "fp16", "q8_0", "bf16", "q5_1", "q4_0", "q4_1"), strict=True))
    sizes = sizes_of("q4_0") | {"num_kv_heads": 1}
    model = held_as(tiny("llama", **sizes), parts, lambda grid, *shape: blocks_of(grid, *shape) if "q" in grid else floats_of(grid, *shape))
    total = sum(4 * parameter.numel() for _, parameter in model.named_weights() if parameter.dim() == 1)
    table = model.embed.matrix
    assert isinstance(table, QuantizedMatrix)
    total += table.values[0].nbytes
    for module in model.modules():
        if isinstance(module, Held) and module is not model.embed:
            total += sum(tensor.nbytes for tensor in module.held.tensors) if not isinstance(module.held, torch.Tensor) else 0
    info = engine_of(model, dtype="stored").info
    assert weight_bytes(model.config, formats_of(info)) == total


@needs_library
def test_formats_are_those_of_the_engine(tiny: Tiny) -> None:
    model = tiny("opt")
    assert formats_of(make_engine(model, None, EngineOptions(backend="native", dtype="int8", cache_dtype="fp32")).info) == INT8
    assert formats_of(make_engine(model, None, EngineOptions(backend="native", dtype="int8")).info) == dataclasses.replace(
        INT8, cache="fp16"
    )
    assert formats_of(make_engine(model, None, EngineOptions(backend="torch")).info) == FP32


def test_predictors_of_every_layer_are_added(tiny: Tiny) -> None:
    config = tiny("opt").config
    predictor = random_predictor(config.hidden_size, config.intermediate_size, torch.Generator().manual_seed(1))
    layers = (predicted(mlp=predictor), LayerAdapter())
    found = step_bytes(config, FP32, dense_reads(config), layers)["predictor"]
    assert found == bytes_of_predictor(predictor, may_be_int8=False)


def test_the_share_that_is_read_counts_predictors_and_head(tiny: Tiny) -> None:
    """Of a dense step 1; with no neuron selected what is left is attention, the head and the predictors, not nothing."""
    config = tiny("opt").config
    dense = dense_reads(config, rows=2, tokens=7)
    assert read_share(config, FP32, dense, None) == 1.0
    none = dataclasses.replace(
        dense, counts=Counts(neurons=torch.zeros(config.num_layers), heads=dense.counts.heads), fired_L=[0.0] * config.num_layers
    )
    generator = torch.Generator().manual_seed(0)
    layers = (predicted(mlp=random_predictor(config.hidden_size, config.intermediate_size, generator)),) * config.num_layers
    bare, with_predictors = (read_share(config, FP32, none, chosen) for chosen in (None, layers))
    whole, mlp = sum(step_bytes(config, FP32, dense).values()), step_bytes(config, FP32, none)["mlp"]
    assert bare == pytest.approx(1 - (step_bytes(config, FP32, dense)["mlp"] - mlp) / whole) and bare < with_predictors


def test_a_share_is_of_the_same_step_dense(tiny: Tiny) -> None:
    """Dense it is 1, also where every layer leaves heads out; predictors that select everything cost what they weigh."""
    config = tiny("llama").config
    text = GeneratedText("the cat")
    text.engine = make_engine(tiny("llama"), None, EngineOptions(backend="torch")).info

    def share(neurons: float, heads: float, layers: tuple[LayerAdapter, ...] | None = None) -> float:
        text.counts = StepCounts(mean=Counts(neurons=torch.tensor([neurons] * 2), heads=torch.tensor([heads] * 2)), tokens=20.5)
        found = text_read_share(config, text, layers)
        assert found is not None
        return found

    dense = sum(step_bytes(config, FP32, dense_reads(config, tokens=20.5)).values())
    row, head_dim = 4 * config.hidden_size, config.head_dim
    assert share(64, 4) == 1.0
    assert share(63.5, 4) == pytest.approx(1 - 2 * 0.5 * 3 * row / dense)
    saved = 2 * (2 * 2 * head_dim * row + 2 * 20.5 * head_dim * 4)  # of q and o two heads, of the cache one group of two heads
    assert share(64, 2) == pytest.approx(1 - saved / dense)
    predictor = random_predictor(config.hidden_size, 64, torch.Generator().manual_seed(2))
    assert share(64, 4, (predicted(mlp=predictor), LayerAdapter())) == pytest.approx(
        1 + bytes_of_predictor(predictor, may_be_int8=False) / dense
    )
    text.counts = None
    assert text_read_share(config, text, None) is None


def test_a_share_without_the_tokens_takes_those_of_the_layer_that_reads_most(tiny: Tiny) -> None:
    config = tiny("opt").config
    assert read_share(config, FP32, dense_reads(config, rows=3, tokens=7), None) == 1.0
