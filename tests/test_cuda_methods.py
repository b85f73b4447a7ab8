"""The cuda engine where the gate or inputs select, against the torch engine: under Triton's interpreter, on a GPU with -m gpu."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from conftest import Tiny
from dejavu.engine.cuda.engine import CudaEngine
from dejavu.engine.interface import LayerSelection, StepResult
from dejavu.engine.options import EngineOptions
from dejavu.engine.torch_engine import TorchEngine
from dejavu.model.selectors import POINTS, GateThreshold, InputPoints, InputThresholds, LayerAdapter
from dejavu.model.transformer import Selection, Transformer
from dejavu.model.versions import weights_version
from helpers.cuda import DEVICES, Recorded, cuda_engine_of, on, slow
from helpers.engines import GEMMA, decode, ids_of, random_layers, reselect
from helpers.kernel_memory import check_rule
from helpers.thresholds import gate_layers, input_layers

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("opt", {}),
    "llama": ("llama", {}),
    "llama, relu, wide heads": ("llama", {"activation": "relu", "head_dim": 12, "num_heads": 6, "num_kv_heads": 2, "num_layers": 3}),
    "fatrelu, no biases": ("llama", {"activation": "fatrelu", "activation_threshold": 0.1, "num_layers": 1}),
    "opt, three parts": ("opt", {"hidden_size": 112, "num_heads": 4, "num_kv_heads": 4, "head_dim": 28, "intermediate_size": 70}),
    "gemma": ("llama", GEMMA),
    "llama, biased": ("llama", {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "activation": "gelu"}),
}
METHODS = {"gate": gate_layers, "input": input_layers}

STEPS = 2


def made(tiny: Tiny, name: str) -> Transformer:
    family, overrides = MODELS[name]
    return tiny(family, **overrides)


def mixed_layers(model: Transformer, density: float) -> tuple[LayerAdapter, ...]:
    """Inputs, predictors that look into that layer, the gate, predictors that look into that one."""
    assert model.config.num_layers == 4
    predicted = random_layers(model, mlp=2, heads=1)
    return input_layers(model, density)[0], predicted[1], gate_layers(model, density)[2], predicted[3]


def indices(selected: Sequence[LayerSelection]) -> list[Any]:
    """Every list of indices of a row's layers, None where there is none."""
    parts = [part for layer in selected for part in (layer.neurons_A, layer.heads_A, *(layer.inputs_P or ()))]
    return [None if part is None else part.tolist() for part in parts]


def check_numbers(want: StepResult, found: StepResult) -> None:
    """Logits to 2e-5, and the same counts."""
    torch.testing.assert_close(found.logits_BV.cpu(), want.logits_BV, rtol=0, atol=2e-5)
    assert found.counts == want.counts


def check_same(want: StepResult, found: StepResult) -> None:
    """And the same selections."""
    check_numbers(want, found)
    assert want.selections is not None and found.selections is not None
    for one, other in zip(want.selections, found.selections, strict=True):
        assert indices(one) == indices(other)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "method", "options"),
    [
        *(("llama, biased", method, {}) for method in METHODS),
        *(slow(name, method, {}) for name in MODELS for method in METHODS if name != "llama, biased"),
        *(slow("llama", method, {"deterministic": True}) for method in METHODS),
        *(slow("opt", method, {"ahead": "branch"}) for method in METHODS),
    ],
    ids=str,
)
def test_decode_equals_the_torch_engine(tiny: Tiny, name: str, method: str, options: dict[str, Any], device: str) -> None:
    """After a prefill of a few pages and with steps that begin new ones."""
    model, ids = made(tiny, name), ids_of(1, 11 + STEPS)
    layers = METHODS[method](model, 0.4)
    torch_engine = TorchEngine(model, layers, EngineOptions(record=True, page_size=3))
    cuda_engine = cuda_engine_of(on(model, device), layers, record=True, page_size=3, **options)
    assert cuda_engine.info.sparse and cuda_engine.info.input_points == torch_engine.info.input_points
    for engine in (torch_engine, cuda_engine):
        engine.prefill(0, ids[:11])
    (_, expected), (_, steps) = decode(torch_engine, ids[11:]), decode(cuda_engine, ids[11:])
    for want, step in zip(expected, steps, strict=True):
        check_same(want, step)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "method", "options"),
    [
        ("opt", "input", {}),
        slow("opt", "gate", {}),
        *(slow(name, method, {}) for name in ("llama, biased", "llama, relu, wide heads") for method in METHODS),
        *(slow("llama", method, {"deterministic": True}) for method in METHODS),
    ],
    ids=str,
)
def test_rows_of_a_batch_equal_the_torch_engine(tiny: Tiny, name: str, method: str, options: dict[str, Any], device: str) -> None:
    """Three sequences of different lengths in a bucket of four: each row selects and gives what it does alone."""
    model = made(tiny, name)
    layers, prompts = METHODS[method](model, 0.4), [ids_of(seed, length) for seed, length in ((3, 4), (4, 9), (5, 1))]
    torch_engine = TorchEngine(model, layers, EngineOptions(record=True, page_size=3, num_slots=3))
    cuda_engine = cuda_engine_of(on(model, device), layers, record=True, page_size=3, num_slots=3, crossover=False, **options)
    for engine in (torch_engine, cuda_engine):
        for slot, prompt in enumerate(prompts):
            engine.prefill(slot, prompt)
    for index in range(2):
        tokens = [index + 7, index + 20, index + 30]
        check_same(torch_engine.step(tokens, [2, 0, 1]), cuda_engine.step(tokens, [2, 0, 1]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 2])
def test_layers_of_different_methods(tiny: Tiny, rows: int, device: str) -> None:
    model = tiny("llama", num_layers=4)
    layers = mixed_layers(model, 0.4)
    torch_engine = TorchEngine(model, layers, EngineOptions(record=True, num_slots=rows))
    cuda_engine = CudaEngine(on(model, device), layers, EngineOptions(record=True, num_slots=rows), crossover=False)
    for index in range(2):
        tokens, slots = ids_of(index, rows), list(range(rows))
        check_same(torch_engine.step(tokens, slots), cuda_engine.step(tokens, slots))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("point", ["down", *(slow(point) for point in POINTS if point != "down")])
def test_a_point_without_a_threshold_keeps_everything(tiny: Tiny, point: str, device: str) -> None:
    model, ids = tiny("llama", num_layers=1), ids_of(6, 1)
    layers = input_layers(model, 0.5, without=point)
    (_, expected), (_, steps) = (
        decode(engine, ids)
        for engine in (
            TorchEngine(model, layers, EngineOptions(record=True)),
            CudaEngine(on(model, device), layers, EngineOptions(record=True)),
        )
    )
    for want, step in zip(expected, steps, strict=True):
        check_same(want, step)
        assert step.counts.kept_inputs is not None and step.selections is not None
        at = POINTS.index(point)
        assert step.counts.kept_inputs[0, 0, at] == InputPoints.of(model.config).sizes[at]
        inputs_P = step.selections[0][0].inputs_P
        assert inputs_P is not None and inputs_P[at] is None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [slow(1), 3])
@pytest.mark.parametrize("name", [slow("opt"), slow("llama, relu, wide heads"), "fatrelu, no biases"])
def test_what_a_threshold_of_zero_leaves_out_is_nothing(tiny: Tiny, name: str, rows: int, device: str) -> None:
    """The method exact: the dense engine's logits, from the neurons that fire."""
    model = on(made(tiny, name), device)
    layers = (LayerAdapter(neurons=GateThreshold(threshold=0.0)),) * model.config.num_layers
    slots, tokens = list(range(rows)), ids_of(7, rows)
    dense, exact = (CudaEngine(model, chosen, EngineOptions(num_slots=rows)).step(tokens, slots) for chosen in (None, layers))
    torch.testing.assert_close(exact.logits_BV, dense.logits_BV, rtol=0, atol=1e-5)
    share = exact.counts.neurons.double().mean() / model.config.intermediate_size
    assert 0.1 < share < 0.9, "the test must leave some out"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["llama, biased", slow("opt")])
def test_weights_by_input_are_held_once(tiny: Tiny, name: str, device: str) -> None:
    """The model's own lie where the engine reads them, with the values and the version that they had; a dense engine has rows again."""
    plain, ids = made(tiny, name), ids_of(9, 6)
    layers, model = input_layers(plain, 0.4), on(plain, device)
    tokens_BT = torch.tensor([ids], device=model.device)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    number, logits = weights_version(model), model(tokens_BT)
    assert number is not None
    engine = CudaEngine(model, layers, EngineOptions(num_slots=2))
    assert weights_version(model) == number
    for block, layer in zip(model.blocks, engine._model.inputs, strict=True):
        assert layer is not None and block.qkv.weight.data_ptr() == layer.qkv.data_ptr()
        activated = block.up if block.gate is None else block.gate
        assert activated.weight.data_ptr() == layer.up.data_ptr()
    for key, weight in model.state_dict().items():
        assert torch.equal(weight, before[key]), key
    torch.testing.assert_close(model(tokens_BT), logits, rtol=0, atol=2e-5)
    dense = CudaEngine(model, None, EngineOptions(num_slots=2))
    for rows in (1, 2):
        tokens, slots = ids[:rows], list(range(rows))
        (one, other) = (engine.step(tokens, slots, sparse=False), dense.step(tokens, slots))
        torch.testing.assert_close(one.logits_BV, other.logits_BV, rtol=0, atol=2e-5)
        kept = one.counts.kept_inputs
        assert kept is not None and kept.tolist() == [[list(InputPoints.of(model.config).sizes)] * model.config.num_layers] * rows


THRESHOLDS = (1e9, 0.3, -1.0, 0.1)  # nothing, some, everything, more


def set_threshold(engine: CudaEngine, threshold: float) -> None:
    """In the memory that the engine's graphs read."""
    for own, inputs in zip(engine._model.predictors, engine._model.inputs, strict=True):
        selectors = [own.gate_neurons] if own.gate_neurons is not None else []
        for selector in selectors + ([] if inputs is None else list(inputs.points.values())):
            selector.threshold.fill_(threshold)


def with_threshold(layers: Sequence[LayerAdapter], threshold: float) -> tuple[LayerAdapter, ...]:
    """What cannot be (below 0) keeps everything here too, so the checks of a user's values are gone around."""
    found = []
    for layer in copy.deepcopy(tuple(layers)):
        if layer.neurons.selects:
            object.__setattr__(layer.neurons, "threshold", threshold)
        if layer.inputs.selects:
            for point in POINTS:
                object.__setattr__(layer.inputs, point, threshold)
        found.append(layer)
    return tuple(found)


@pytest.mark.slow
@pytest.mark.parametrize(("device", "steps"), [("cpu", 4), pytest.param("cuda", 50, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("rows", "options"), [(1, {}), (1, {"deterministic": True}), (3, {})], ids=str)
def test_counts_that_change_from_step_to_step(tiny: Tiny, method: str, rows: int, options: dict[str, Any], device: str, steps: int) -> None:
    """Nothing, some and everything selected in turn, over the same memory."""
    model = tiny("llama", activation="relu", intermediate_size=70, num_layers=1)
    layers = METHODS[method](model, 0.5)
    torch_engine = TorchEngine(model, layers, EngineOptions(num_slots=rows))
    cuda_engine = cuda_engine_of(on(model, device), layers, num_slots=rows, crossover=False, **options)
    seen = set()
    for index in range(steps):
        threshold = THRESHOLDS[index % len(THRESHOLDS)]
        reselect(torch_engine, with_threshold(layers, threshold))
        set_threshold(cuda_engine, threshold)
        tokens, slots = ids_of(50 + index, rows), list(range(rows))
        want, found = torch_engine.step(tokens, slots), cuda_engine.step(tokens, slots)
        check_numbers(want, found)
        seen |= set((want.counts.neurons if want.counts.kept_inputs is None else want.counts.kept_inputs[..., 3]).flatten().tolist())
    assert {0, 70} < seen, "the test must select nothing, some and everything"


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_a_deterministic_engine_repeats_bit_for_bit(tiny: Tiny, method: str, rows: int, device: str) -> None:
    model = tiny("llama", num_layers=1)
    layers = METHODS[method](model, 0.5)
    engines = [CudaEngine(on(model, device), layers, EngineOptions(num_slots=rows), deterministic=True) for _ in range(2)]
    for index in range(2 if device == "cpu" else 20):
        tokens = ids_of(60 + index, rows)
        one, other = (engine.step(tokens, list(range(rows))).logits_BV for engine in engines)
        assert torch.equal(one, other)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rows", "method"), [(1, "gate"), slow(1, "input"), slow(3, "gate"), slow(3, "input")])
def test_decoded_tokens_have_the_counts_of_their_steps(tiny: Tiny, method: str, rows: int, device: str) -> None:
    model = tiny("llama", num_layers=1)
    layers, slots, tokens = METHODS[method](model, 0.5), list(range(rows)), ids_of(8, rows)
    reference = TorchEngine(model, layers, EngineOptions(num_slots=rows))
    found = CudaEngine(on(model, device), layers, EngineOptions(num_slots=rows), crossover=False).decode(tokens, slots, 2).cpu()
    for index in range(2):
        step = reference.step(tokens, slots)
        tokens = step.logits_BV.argmax(-1).tolist()
        assert found.token_NB[index].tolist() == tokens
        assert found.counts[index] == step.counts
        assert (step.counts.kept_inputs is None) == (method == "gate")


@pytest.mark.parametrize("device", DEVICES)
def test_what_a_step_read(tiny: Tiny, device: str) -> None:
    """One row reads what it keeps; of several rows' inputs the matrices are read whole, and of neurons the union."""
    model = tiny("opt", num_layers=1)
    sizes = InputPoints.of(model.config).sizes
    engine = CudaEngine(on(model, device), input_layers(model, 0.4), EngineOptions(num_slots=3))
    result, profile = engine.profiled_step([5], [0])
    assert result.counts.kept_inputs is not None and profile.counts.kept_inputs is not None
    assert torch.equal(profile.counts.kept_inputs, result.counts.kept_inputs[0])
    assert all(0 < int(kept) < size for kept, size in zip(profile.counts.kept_inputs[0], sizes, strict=True))
    result, profile = engine.profiled_step([6, 7], [1, 2])
    assert (
        result.counts.kept_inputs is not None
        and profile.counts.kept_inputs is not None
        and profile.counts.kept_inputs.tolist() == [list(sizes)]
    )
    assert (result.counts.kept_inputs < torch.tensor(sizes, device=device)).all()
    engine = CudaEngine(on(model, device), gate_layers(model, 0.4), EngineOptions(num_slots=2), crossover=False)
    result, profile = engine.profiled_step([6, 7], [0, 1])
    assert profile.counts.kept_inputs is None and result.counts.neurons.amax() < profile.counts.neurons[0] <= result.counts.neurons.sum()


class RecordedInputs(Selection):
    """As `Recorded`, of the inputs kept at every point."""

    def __init__(self, tokens: Sequence[Sequence[LayerSelection]]) -> None:
        self.layers = list(zip(*tokens, strict=True))

    def inputs(self, layer: int, point: str, x: Tensor) -> Tensor:
        keep = torch.zeros_like(x, dtype=torch.bool)
        for position, chosen in enumerate(self.layers[layer]):
            assert chosen.inputs_P is not None
            kept = chosen.inputs_P[POINTS.index(point)]
            keep[0, position, slice(None) if kept is None else kept.to(x.device)] = True
        return torch.where(keep, x, 0)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("name", "dtype"), [("opt", torch.float16), ("llama", torch.bfloat16), ("llama", torch.float16)], ids=str)
def test_low_precision_is_as_good_as_the_plain_one(tiny: Tiny, name: str, dtype: torch.dtype, method: str, rows: int, device: str) -> None:
    """Every logit held to the rule: fp64, and the plain forward pass in the dtype, select what the engine selected."""
    if device == "cpu" and rows > 1 and method == "gate" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies the bits of bf16 matrices as integers")
    model = made(tiny, name)
    layers = METHODS[method](model, 0.5)
    low = on(model, device, dtype)
    wide = copy.deepcopy(low).double()
    engine = CudaEngine(low, layers, EngineOptions(num_slots=rows, record=True), crossover=False)
    ids_BT = [ids_of(70 + row, 3) for row in range(rows)]
    steps = [engine.step(list(tokens), list(range(rows))) for tokens in zip(*ids_BT, strict=True)]
    for row, ids in enumerate(ids_BT):
        recorded = [step.selections[row] for step in steps if step.selections is not None]
        selection = Recorded(recorded, model.config, low.embed.weight.device) if method == "gate" else RecordedInputs(recorded)
        with torch.inference_mode():
            plain, truth = (each(torch.tensor([ids], device=device), selection)[0].cpu() for each in (low, wide))
        check_rule(torch.stack([step.logits_BV[row] for step in steps]), plain, truth.double(), dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("method", "rows"), [("gate", 2), ("input", 1), slow("gate", 1), slow("input", 2)])
def test_a_number_that_is_none_reaches_the_logits(tiny: Tiny, method: str, rows: int, device: str) -> None:
    """NaN exceeds no threshold, and is not left out for that: a mask would leave it NaN."""
    model = tiny("llama", num_layers=1)
    layers = METHODS[method](model, 0.5)
    with torch.no_grad():
        gate = model.blocks[0].gate
        assert gate is not None
        gate.weight[5] = torch.nan
    result = CudaEngine(on(model, device), layers, EngineOptions(num_slots=rows)).step(ids_of(9, rows), list(range(rows)))
    assert result.logits_BV.isnan().all()


def test_only_layers_that_select_inputs_hold_copies(tiny: Tiny) -> None:
    model = tiny("llama")
    layers = (input_layers(model, 0.5)[0], LayerAdapter())
    first, second = CudaEngine(on(model, "cpu"), layers)._model.inputs
    assert first is not None and second is None
    block = model.blocks[0]
    assert block.gate is not None
    assert torch.equal(first.qkv, torch.cat([block.q.weight, block.k.weight, block.v.weight]).T)
    assert torch.equal(first.up, torch.cat([block.gate.weight, block.up.weight]).T)
    assert first.qkv.is_contiguous() and first.up.is_contiguous()


def test_inputs_without_a_threshold_are_refused(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match="layer 1 selects inputs and has a threshold at none of its points"):
        CudaEngine(tiny("opt"), (LayerAdapter(), LayerAdapter(inputs=InputThresholds())))
