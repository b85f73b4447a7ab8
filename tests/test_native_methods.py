"""Selection by the gate and by inputs on the native engine, against the torch engine and masked passes; and what must hold bit for bit."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import Tiny
from dejavu.config import RopeConfig
from dejavu.engine.interface import LayerSelection, StepResult
from dejavu.engine.native import weights as native_weights
from dejavu.engine.options import EngineOptions
from dejavu.engine.torch_engine import TorchEngine
from dejavu.kernels import native
from dejavu.model.selectors import POINTS, AllHeads, GateThreshold, InputThresholds, LayerAdapter, column_norms
from dejavu.model.transformer import Block, Transformer
from helpers.engines import decode, ids_of, masked_forward, random_layers
from helpers.native import DTYPES, ISAS, NATIVE_MODELS, NEARNESS, engine_of, needs_library, rounded
from helpers.pairs import all_pairs
from helpers.thresholds import gate_layers, input_layers

METHOD_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: values for name, values in NATIVE_MODELS.items() if name != "opt-one"},
    "llama-odd-silu": ("llama", {"hidden_size": 70, "head_dim": 10, "num_heads": 6, "intermediate_size": 133, "num_layers": 3}),
    "qwen3": ("llama", {"qk_norm": True, "head_dim": 16}),
    "partial-rotary": ("llama", {"head_dim": 16, "norm": "layernorm", "rope": RopeConfig(partial=0.5)}),
    "opt-large": ("opt", {"hidden_size": 256, "head_dim": 64, "intermediate_size": 1029}),
}
Layers = tuple[LayerAdapter, ...]
METHODS: dict[str, Callable[[Transformer, float], Layers]] = {"gate": gate_layers, "input": input_layers}
ROUNDED = tuple(dtype for dtype in DTYPES if dtype != "fp32")

pytestmark = needs_library


@pytest.fixture(params=METHOD_MODELS)
def model(request: pytest.FixtureRequest, tiny: Tiny) -> Transformer:
    family, overrides = METHOD_MODELS[request.param]
    return tiny(family, **overrides)


def lists(layer: LayerSelection) -> list[list[int] | None]:
    parts = (layer.neurons_A, layer.heads_A, *(layer.inputs_P or ()))
    return [None if part is None else part.tolist() for part in parts]


def same_selections(step: StepResult, other: StepResult) -> bool:
    assert step.selections is not None and other.selections is not None
    return [lists(layer) for layer in step.selections[0]] == [lists(layer) for layer in other.selections[0]]


def counts_of(step: StepResult, row: int = 0) -> list[list[int]]:
    return [part[row].flatten().tolist() for part in (step.counts.neurons, step.counts.heads, step.counts.kept_inputs) if part is not None]


# Against the torch engine and the definition


@pytest.mark.parametrize(("name", "method", "density", "isa"), all_pairs(METHOD_MODELS, METHODS, [0.3, 0.75], ISAS))
def test_native_equals_torch(tiny: Tiny, name: str, method: str, density: float, isa: str) -> None:
    """Dense prefill, then sparse steps: logits to 1e-4, the same selections and counts, on every instruction set."""
    family, overrides = METHOD_MODELS[name]
    model = tiny(family, **overrides)
    layers, ids, prompt = METHODS[method](model, density), ids_of(1, 10), ids_of(9, 13)
    torch_engine = TorchEngine(model, layers, EngineOptions(record=True))
    engine = engine_of(model, layers, record=True, instruction_set=isa)
    torch.testing.assert_close(engine.prefill(0, prompt), torch_engine.prefill(0, prompt), rtol=0, atol=1e-4)
    assert engine.info.sparse and engine.info.input_points == torch_engine.info.input_points
    for token_id in ids:
        step, expected = engine.step([token_id], [0]), torch_engine.step([token_id], [0])
        assert counts_of(step) == counts_of(expected) and same_selections(step, expected)
        torch.testing.assert_close(step.logits_BV, expected.logits_BV, rtol=0, atol=1e-4)


@pytest.mark.parametrize("without", POINTS)
def test_a_point_without_a_threshold_keeps_all(tiny: Tiny, without: str) -> None:
    model = tiny("llama")
    layers, ids = input_layers(model, 0.5, without=without), ids_of(3)
    layers = (layers[0], LayerAdapter())  # and so does a layer
    expected, torch_steps = decode(TorchEngine(model, layers, EngineOptions(record=True)), ids)
    logits, steps = decode(engine_of(model, layers, record=True), ids)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert all(same_selections(step, other) and counts_of(step) == counts_of(other) for step, other in zip(steps, torch_steps, strict=True))


@pytest.mark.parametrize(("method", "dtype", "name", "isa"), all_pairs(METHODS, ROUNDED, METHOD_MODELS, ISAS))
def test_every_dtype_equals_its_masked_evaluation(tiny: Tiny, method: str, dtype: str, name: str, isa: str) -> None:
    """What evaluation computes in one masked pass over the rounded model. Where rounded activations fall to the other side of a
    threshold the logits move, of that token and those after it: of tokens the best quarter counts, and of selections how many there are."""
    family, overrides = METHOD_MODELS[name]
    model, ids = rounded(tiny(family, **overrides), dtype), ids_of(5)
    layers = METHODS[method](model, 0.5)
    expected, selection = masked_forward(model, layers, ids)
    logits, steps = decode(engine_of(model, layers, dtype=dtype, cache_dtype="fp32", instruction_set=isa), ids)
    dense, _ = masked_forward(model, (LayerAdapter(),) * len(layers), ids)
    error = (logits - expected).abs().mean(1).quantile(0.25)
    assert error < 4 * NEARNESS[dtype] * expected.std()
    assert error < 0.3 * (logits - dense).abs().mean(), "it is the selection that is seen"
    if method == "gate":
        kept = torch.stack([step.counts.neurons[0] for step in steps]).double().mean() / model.config.intermediate_size
        assert float(kept) == pytest.approx(selection.counter.mlp_density(), abs=0.01)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["opt", "opt-post-norm", "llama-relu-wide-heads", "llama-odd", "llama-fatrelu"])
def test_exact_is_dense_bit_for_bit(tiny: Tiny, name: str, dtype: str) -> None:
    """A threshold of 0 leaves out true zeros: the same sums, of fewer rows."""
    family, overrides = METHOD_MODELS[name]
    model, ids = tiny(family, **overrides), ids_of(2)
    layers = (LayerAdapter(neurons=GateThreshold(threshold=0.0)),) * model.config.num_layers
    dense, _ = decode(engine_of(model, dtype=dtype), ids)
    exact, steps = decode(engine_of(model, layers, dtype=dtype), ids)
    assert torch.equal(exact, dense)
    kept = torch.stack([step.counts.neurons[0] for step in steps]).double().mean() / model.config.intermediate_size
    assert 0.1 < float(kept) < 0.8


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_that_are_all_kept_are_the_dense_model(model: Transformer, dtype: str) -> None:
    """Thresholds of 0 on inputs none of which is 0, but where ReLU makes them so: the dense engine of the dtype, which sums in another
    order and, of integers, rounds activations."""
    layers = (LayerAdapter(inputs=InputThresholds(attention=0.0, output=0.0, mlp=0.0, down=0.0)),) * model.config.num_layers
    ids = ids_of(13, 9)
    engines = [engine_of(model, chosen, dtype=dtype, cache_dtype="fp32", num_slots=2) for chosen in (None, layers)]
    for dense, logits in ([decode(engine, ids)[0] for engine in engines], [engine.prefill(1, ids) for engine in engines]):
        if dtype == "int4":
            assert (logits - dense).abs().mean() < 2 * NEARNESS[dtype] * dense.std()
        else:
            torch.testing.assert_close(logits, dense, rtol=0, atol=1e-2 if dtype == "int8" else 1e-4)


# Bit for bit


@pytest.mark.parametrize(("method", "dtype", "name", "isa"), all_pairs(METHODS, DTYPES, METHOD_MODELS, ISAS))
def test_a_batch_of_three_is_three_singles(tiny: Tiny, method: str, dtype: str, name: str, isa: str) -> None:
    family, overrides = METHOD_MODELS[name]
    model = tiny(family, **overrides)
    layers = METHODS[method](model, 0.5)
    prompts, continuations = [ids_of(seed, 4 + 3 * seed) for seed in range(3)], [ids_of(9 + seed, 4) for seed in range(3)]
    options: dict[str, Any] = {"record": True, "dtype": dtype, "instruction_set": isa}
    together = engine_of(model, layers, num_slots=3, threads=3, **options)
    for row in range(3):
        together.prefill(row, prompts[row])
    steps = [together.step([continuations[row][t] for row in range(3)], range(3)) for t in range(4)]
    for row in range(3):
        alone = engine_of(model, layers, page_size=4, threads=1, **options)
        alone.prefill(0, prompts[row])
        for t, both in enumerate(steps):
            step = alone.step([continuations[row][t]], [0])
            assert torch.equal(both.logits_BV[row], step.logits_BV[0]) and counts_of(both, row) == counts_of(step)
            assert both.selections is not None and step.selections is not None
            assert [lists(layer) for layer in both.selections[row]] == [lists(layer) for layer in step.selections[0]]


@pytest.mark.parametrize(("method", "dtype", "family", "density"), all_pairs(METHODS, DTYPES, ["opt", "llama"], [0.4, 0.8]))
def test_the_number_of_threads_changes_no_bit(tiny: Tiny, method: str, dtype: str, family: str, density: float) -> None:
    model = tiny(family, intermediate_size=301)
    layers = METHODS[method](model, density)
    runs = [decode(engine_of(model, layers, threads=threads, dtype=dtype), ids_of(8))[0] for threads in (1, 2, 3, 7)]
    assert all(torch.equal(runs[0], run) for run in runs[1:])


@pytest.mark.parametrize("size", [64, 127, 512])
def test_columns_are_shared_among_many_threads(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Panels of columns are as many as there are threads, and none is empty, which fetching columns in order would not survive."""
    runs = []
    for threads in (1, 16):
        monkeypatch.setattr("dejavu.engine.native.weights.default_threads", lambda threads=threads: threads)
        model = tiny("llama", intermediate_size=size)  # engines of one model share its columns
        runs.append(decode(engine_of(model, METHODS["input"](model, 0.95), threads=threads), ids_of(8))[0])
    assert torch.equal(*runs)


@pytest.mark.parametrize("batch", [5, 33])
@pytest.mark.parametrize("method", METHODS)
def test_a_batch_of_any_size(tiny: Tiny, method: str, batch: int) -> None:
    model = tiny("llama", intermediate_size=127)
    layers, tokens = METHODS[method](model, 0.4), ids_of(21, batch)
    step = engine_of(model, layers, num_slots=batch).step(tokens, list(range(batch)))
    for row, token_id in enumerate(tokens):
        alone = engine_of(model, layers, threads=1).step([token_id], [0])
        assert torch.equal(step.logits_BV[row], alone.logits_BV[0]) and counts_of(step, row) == counts_of(alone)


# What is read, and what it is called


def test_rows_of_neurons_left_out_are_not_read(tiny: Tiny) -> None:
    """NaN in the rows of up and down of neurons whose gate never passes changes no bit."""
    model, ids = tiny("llama", mlp_bias=True), ids_of(15)
    gone = torch.arange(model.config.intermediate_size) % 2 == 0
    for block in model.blocks:
        assert block.gate is not None
        block.gate.weight[gone], block.gate.bias[gone] = 0.0, 0.0  # silu(0) = 0
    layers = (LayerAdapter(neurons=GateThreshold(threshold=0.01)),) * model.config.num_layers
    expected, steps = decode(engine_of(model, layers), ids)
    assert 0.1 < float(torch.stack([step.counts.neurons for step in steps]).double().mean()) / len(gone) <= 0.5
    for block in model.blocks:
        block.up.weight[gone] = block.down.weight[gone] = torch.nan
    assert torch.equal(decode(engine_of(model, layers), ids)[0], expected)


def spoil(block: Block, kept_P: Sequence[Tensor | None]) -> None:
    """NaN in every weight of the inputs that are not kept."""
    maps = ((block.q, block.k, block.v), (block.o,), (block.gate, block.up), (block.down,))
    for modules, kept_A in zip(maps, kept_P, strict=True):
        for weight in (module.weight for module in modules if module is not None):
            assert kept_A is not None
            weight_IO = weight if modules[0] in (block.o, block.down) else weight.T
            weight_IO[torch.ones(len(weight_IO), dtype=torch.bool).index_fill(0, kept_A, False)] = torch.nan


def test_weights_of_inputs_left_out_are_not_read(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in the columns (of o and down: rows) of what a step left out changes no bit; a dense one says that it read them."""
    layers = input_layers(model, 0.15)  # below the crossover, above which rows of down are read in order
    norms = {block: column_norms(block) for block in model.blocks}
    monkeypatch.setattr(native_weights, "column_norms", norms.__getitem__)  # of the weights before they are spoilt
    step = engine_of(model, layers, record=True).step([7], [0])
    assert step.selections is not None
    for block, chosen in zip(model.blocks, step.selections[0], strict=True):
        assert chosen.inputs_P is not None
        spoil(block, chosen.inputs_P)
    engine = engine_of(model, layers)
    assert torch.equal(engine.step([7], [0]).logits_BV, step.logits_BV)
    with pytest.raises(ValueError, match="not finite"):
        engine.prefill(0, [7])


@pytest.mark.parametrize("family", ["opt", "llama"])
@pytest.mark.parametrize("method", METHODS)
def test_a_profile_counts_unions(tiny: Tiny, method: str, family: str) -> None:
    """Over the rows together, what some row selected; and the same logits as without a profile."""
    model = tiny(family, intermediate_size=131)
    layers, tokens, config = METHODS[method](model, 0.4), ids_of(40, 3), model.config
    profiled, plain = (engine_of(model, layers, num_slots=3, record=True) for _ in range(2))
    result, profile = profiled.profiled_step(tokens, range(3))
    assert torch.equal(result.logits_BV, plain.step(tokens, range(3)).logits_BV)
    assert result.selections is not None and (profile.counts.kept_inputs is None) == (method == "gate")

    def union(found: Sequence[Tensor | None], total: int) -> int:
        return total if found[0] is None else len({value for each in found if each is not None for value in each.tolist()})

    for index in range(config.num_layers):
        rows = [row[index] for row in result.selections]
        assert profile.counts.neurons[index] == union([row.neurons_A for row in rows], config.intermediate_size)
        assert profile.counts.heads[index] == union([row.heads_A for row in rows], config.num_heads)
        if profile.counts.kept_inputs is None:
            assert 0 < profile.fired_L[index] <= profile.counts.neurons[index]
            continue
        points = profiled.info.input_points
        assert points is not None
        kept = [union([row.inputs_P[at] for row in rows if row.inputs_P], size) for at, size in enumerate(points.sizes)]
        assert profile.counts.kept_inputs[index].tolist() == kept and profile.fired_L[index] == kept[POINTS.index("down")]


@pytest.mark.parametrize("method", METHODS)
def test_values_that_are_not_finite_are_an_error(tiny: Tiny, method: str) -> None:
    """A NaN is not left out as if it were small."""
    model = tiny("llama")
    layers = METHODS[method](model, 0.3)
    model.embed.weight[5] = torch.nan
    with pytest.raises(ValueError, match="logits are not finite"):
        engine_of(model, layers).step([5], [0])


def test_what_native_does_not_compute_is_refused(tiny: Tiny) -> None:
    model = tiny("llama")
    inputs, gates = input_layers(model, 0.5), gate_layers(model, 0.5)
    with pytest.raises(ValueError, match=r"layers \[1\] select by other methods than input: .*use --backend torch"):
        engine_of(model, (inputs[0], gates[1]))


def test_the_library_checks_what_it_is_given(tiny: Tiny) -> None:
    model = tiny("llama")
    inputs, gates = engine_of(model, input_layers(model, 0.5)), engine_of(model, gate_layers(model, 0.5))
    library = native.library()

    def at(engine: Any, layer: int, point: int, norms: list[float], threshold: float) -> None:
        values = (ctypes.c_float * len(norms))(*norms)
        native.check(library.dejavu_engine_inputs(engine._handle, layer, point, ctypes.addressof(values), len(norms), threshold))

    size = model.config.hidden_size
    for wrong in (-1.0, torch.nan, torch.inf):
        with pytest.raises(ValueError, match="a gate's threshold must be 0 or more"):
            native.check(library.dejavu_engine_gate(gates._handle, 0, wrong))
        with pytest.raises(ValueError, match="a threshold of inputs must be 0 or more"):
            at(inputs, 0, 0, [1.0] * size, wrong)
        with pytest.raises(ValueError, match="norm 2 of inputs must be 0 or more"):
            at(inputs, 0, 0, [1.0, 1.0, wrong, *[1.0] * (size - 3)], 0.1)
    with pytest.raises(ValueError, match="layer 2 is none of 2"):
        native.check(library.dejavu_engine_gate(gates._handle, 2, 0.1))
    with pytest.raises(ValueError, match="layer -1 is none of 2"):
        at(inputs, -1, 0, [1.0] * size, 0.1)
    with pytest.raises(ValueError, match="unknown point 4"):
        at(inputs, 0, 4, [1.0] * size, 0.1)
    with pytest.raises(ValueError, match=f"there are 3 norms, expected {model.config.intermediate_size}"):
        at(inputs, 0, 3, [1.0] * 3, 0.1)
    with pytest.raises(ValueError, match="the model has another layout"):
        at(gates, 0, 0, [1.0] * size, 0.1)
    with pytest.raises(ValueError, match="the model has another layout"):
        native.check(library.dejavu_engine_gate(inputs._handle, 0, 0.1))


def test_each_layout_is_packed_once(tiny: Tiny) -> None:
    model = tiny("llama")
    dense, first, second = (engine_of(model, layers)._model for layers in (None, gate_layers(model, 0.3), gate_layers(model, 0.6)))
    assert first is second and first is not dense
    mixed = tuple(dataclasses.replace(layer, heads=AllHeads()) for layer in random_layers(model, mlp=0, heads=0))
    assert engine_of(model, mixed)._model is dense
