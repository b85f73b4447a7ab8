"""Selection without predictors: by the gate's values and by the inputs of every map, decoded against the masked forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import dejavu
from conftest import Tiny
from dejavu.config import RopeConfig
from dejavu.engine.backends import pick_backend
from dejavu.engine.interface import StepResult
from dejavu.engine.options import EngineOptions
from dejavu.engine.torch_engine import TorchEngine
from dejavu.generation.generation import generate_tokens
from dejavu.model.bundle import export
from dejavu.model.masked import MaskedSelection
from dejavu.model.selectors import POINTS, GateThreshold, InputPoints, InputThresholds, LayerAdapter, column_norms
from dejavu.model.tokenizer import Tokenizer
from dejavu.model.transformer import Transformer
from helpers.adapters import without_predictors
from helpers.engines import TOKENS, decode, ids_of, masked_forward
from helpers.thresholds import gate_layers, input_layers

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("opt", {}),
    "opt, post-norm": ("opt", {"pre_norm": False, "final_norm": False, "embed_size": 16}),
    "llama": ("llama", {}),
    "llama, relu, wide heads": ("llama", {"activation": "relu", "head_dim": 12, "num_heads": 6, "num_kv_heads": 2, "num_layers": 3}),
    "llama, drelu": ("llama", {"activation": "relu", "up_activation": "relu"}),
    "fatrelu": ("llama", {"activation": "fatrelu", "activation_threshold": 0.1}),
    "falcon": ("opt", {"activation": "gelu", "parallel": True, "shared_norm": True, "num_kv_heads": 1, "positions": "rope",
                       "position_offset": 0, "rope": RopeConfig()}),
    "gemma": ("llama", {"activation": "gelu_tanh", "block_norms": True, "qk_norm": True, "window": 4, "windowed": (0,),
                        "attention_cap": 2.0, "logit_cap": 3.0, "embed_scale": 5.0}),
}  # fmt: skip
RELU = ("opt", "opt, post-norm", "llama, relu, wide heads", "llama, drelu", "fatrelu")


def model_of(name: str, tiny: Tiny) -> Transformer:
    family, overrides = MODELS[name]
    return tiny(family, **overrides)


def counted(steps: list[StepResult], engine: TorchEngine) -> tuple[float, float]:
    """Densities of the MLP and of attention over all steps and layers."""
    found = [step.counts.densities(engine.info) for step in steps]
    mlp, attention = (float(torch.cat(parts).mean()) for parts in zip(*found, strict=True))
    return mlp, attention


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("density", [0.3, 0.7])
def test_decode_by_the_gate_equals_the_masked_forward(name: str, density: float, tiny: Tiny) -> None:
    model = model_of(name, tiny)
    layers, ids = gate_layers(model, density), ids_of(1)
    expected, selection = masked_forward(model, layers, ids)
    engine = TorchEngine(model, layers, EngineOptions(record=True, page_size=3))
    logits, steps = decode(engine, ids)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert engine.info.sparse and engine.info.input_points is None
    mlp, heads = counted(steps, engine)
    assert mlp == pytest.approx(selection.counter.mlp_density()) and heads == pytest.approx(selection.counter.head_density())
    assert 0.1 < mlp < 0.9, "the test must select some"
    for step in steps:
        assert step.selections is not None and step.counts.kept_inputs is None
        for layer, chosen in enumerate(step.selections[0]):
            assert chosen.neurons_A is not None and len(chosen.neurons_A) == step.counts.neurons[0, layer]
            assert chosen.inputs_P is None


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("density", "without"), [(0.4, None), (0.7, None), *((0.5, point) for point in POINTS)])
def test_decode_by_inputs_equals_the_masked_forward(name: str, density: float, without: str | None, tiny: Tiny) -> None:
    model = model_of(name, tiny)
    layers, ids = input_layers(model, density, without=without), ids_of(1)
    expected, selection = masked_forward(model, layers, ids)
    engine = TorchEngine(model, layers, EngineOptions(record=True, page_size=3))
    logits, steps = decode(engine, ids)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    mlp, attention = counted(steps, engine)
    assert mlp == pytest.approx(selection.counter.mlp_density()) and attention == pytest.approx(selection.counter.head_density())
    assert mlp < 0.95 and attention < 0.95, "the test must select some"
    points = engine.info.input_points
    assert points is not None
    for step in steps:
        assert step.counts.kept_inputs is not None and step.selections is not None
        assert (step.counts.neurons == model.config.intermediate_size).all() and (step.counts.heads == model.config.num_heads).all()
        for layer, chosen in enumerate(step.selections[0]):
            assert chosen.inputs_P is not None and chosen.neurons_A is None
            for at, point in enumerate(POINTS):
                indices, count = chosen.inputs_P[at], int(step.counts.kept_inputs[0, layer, at])
                assert (indices is None) == (point == without)
                assert count == (points.sizes[at] if indices is None else len(indices))


@pytest.mark.parametrize("name", RELU)
def test_what_a_threshold_of_zero_leaves_out_is_nothing(name: str, tiny: Tiny) -> None:
    """The method exact: the dense logits, from the neurons that fire."""
    model, ids = model_of(name, tiny), ids_of(2)
    layers = (LayerAdapter(neurons=GateThreshold(threshold=0.0)),) * model.config.num_layers
    engine = TorchEngine(model, layers)
    logits, steps = decode(engine, ids)
    dense, _ = decode(TorchEngine(model), ids)
    torch.testing.assert_close(logits, dense, rtol=1e-6, atol=2e-6)
    assert 0 < counted(steps, engine)[0] < 0.8


def test_a_threshold_above_all_leaves_the_biases(tiny: Tiny) -> None:
    model, ids = tiny("opt"), ids_of(3)
    nothing = InputThresholds(attention=1e9, output=1e9, mlp=1e9, down=1e9)
    for chosen in (LayerAdapter(neurons=GateThreshold(threshold=1e9)), LayerAdapter(inputs=nothing)):
        layers = (chosen,) * model.config.num_layers
        engine = TorchEngine(model, layers)
        logits, steps = decode(engine, ids)
        torch.testing.assert_close(logits, masked_forward(model, layers, ids)[0], rtol=0, atol=1e-5)
        assert counted(steps, engine) == (0.0, 1.0 if chosen.neurons.selects else 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", [gate_layers, input_layers])
@pytest.mark.parametrize("family", ["opt", "llama"])
def test_a_row_is_bit_identical_whatever_its_batch_mates(family: str, way: Any, dtype: torch.dtype, tiny: Tiny) -> None:
    model = tiny(family)
    layers = way(model, 0.5)
    model = model.to(dtype)
    prompts, continuations = [ids_of(seed, 4 + 3 * seed) for seed in range(3)], [ids_of(9 + seed, 4) for seed in range(3)]
    together = TorchEngine(model, layers, EngineOptions(num_slots=3, page_size=4))
    for row in range(3):
        together.prefill(row, prompts[row])
    steps = [together.step([continuations[row][t] for row in (2, 0, 1)], (2, 0, 1)) for t in range(4)]
    for place, row in enumerate((2, 0, 1)):
        alone = TorchEngine(model, layers, EngineOptions(page_size=4))
        alone.prefill(0, prompts[row])
        for t in range(4):
            step = alone.step([continuations[row][t]], [0])
            assert torch.equal(steps[t].logits_BV[place], step.logits_BV[0])
            assert torch.equal(steps[t].counts.neurons[place], step.counts.neurons[0])
            mine, other = steps[t].counts.kept_inputs, step.counts.kept_inputs
            assert (mine is None) == (other is None) == (way is gate_layers)
            assert mine is None or other is None or torch.equal(mine[place], other[0])


def test_prefill_is_dense_and_rows_and_columns_left_out_are_not_read(tiny: Tiny) -> None:
    """A prompt, then sparse steps, equals one pass that masks the later tokens only; NaN where nothing may be read changes no bit."""
    model, ids = tiny("llama"), ids_of(4)
    sparse_BT = (torch.arange(TOKENS) >= 12)[None]
    for layers in (gate_layers(model, 0.4), input_layers(model, 0.4)):
        with torch.inference_mode():
            expected = model(torch.tensor([ids]), MaskedSelection(layers, sparse_BT))[0]
        engine = TorchEngine(model, layers, EngineOptions(record=True))
        torch.testing.assert_close(engine.prefill(0, ids[:12]), expected[11], rtol=0, atol=1e-5)
        logits, steps = decode(engine, ids[12:])
        torch.testing.assert_close(logits, expected[12:], rtol=0, atol=1e-5)
        model_of_token = tiny("llama")
        again = TorchEngine(model_of_token, layers)
        again.prefill(0, ids[:12])
        assert steps[0].selections is not None
        with torch.no_grad():
            for block, chosen in zip(model_of_token.blocks, steps[0].selections[0], strict=True):
                _poison(block, chosen)
        assert torch.equal(again.step([ids[12]], [0]).logits_BV, steps[0].logits_BV)


def _poison(block: Any, chosen: Any) -> None:
    if chosen.neurons_A is not None:
        out = torch.ones(block.config.intermediate_size, dtype=torch.bool).index_fill(0, chosen.neurons_A, False)
        block.up.weight[out] = block.down.weight[out] = torch.nan
    for point, kept in zip(POINTS, chosen.inputs_P or (None,) * 4, strict=True):
        if kept is None:
            continue
        for of in {"attention": (block.q, block.k, block.v), "output": (), "mlp": (block.gate, block.up), "down": ()}[point]:
            of.weight[:, torch.ones(of.weight.shape[1], dtype=torch.bool).index_fill(0, kept, False)] = torch.nan
        if point in ("output", "down"):
            of = block.o if point == "output" else block.down
            of.weight[torch.ones(of.weight.shape[0], dtype=torch.bool).index_fill(0, kept, False)] = torch.nan


def test_a_text_has_the_densities_of_its_steps(tiny: Tiny, tokenizer: Tokenizer) -> None:
    model = tiny("llama")
    layers = input_layers(model, 0.5, without="down")
    text = generate_tokens(TorchEngine(model, layers), tokenizer, [2, 5, 9], max_new_tokens=6, ignore_eos=True).result()
    engine = TorchEngine(model, layers)
    engine.prefill(0, [2, 5, 9])
    steps = [engine.step([token], [0]) for token in text.token_ids[:-1]]
    assert (text.mlp_density, text.head_density) == pytest.approx(counted(steps, engine))
    assert text.mlp_density is not None and 1 / 3 < text.mlp_density < 0.95, "down is a third of the MLP, and read whole"


def test_shares_are_those_of_the_weights(tiny: Tiny) -> None:
    for name in MODELS:
        block = model_of(name, tiny).blocks[0]
        points = InputPoints.of(block.config)
        read = {"attention": (block.q, block.k, block.v), "output": (block.o,), "mlp": (block.gate, block.up), "down": (block.down,)}
        sizes = {point: sum(of.weight.numel() for of in maps if of is not None) for point, maps in read.items()}
        attention, mlp = sizes["attention"] + sizes["output"], sizes["mlp"] + sizes["down"]
        expected = (sizes["attention"] / attention, sizes["output"] / attention, sizes["mlp"] / mlp, sizes["down"] / mlp)
        assert points.shares == pytest.approx(expected)
        assert points.sizes == tuple(len(norm_I) for norm_I in (column_norms(block)[point] for point in POINTS))


def test_thresholds_that_cannot_be(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match="a gate's threshold must be 0 or more, not -1"):
        GateThreshold(threshold=-1)
    with pytest.raises(ValueError, match="the threshold of the down inputs must be 0 or more, not nan"):
        InputThresholds(down=float("nan"))
    with pytest.raises(ValueError, match="layer 1 selects inputs and has a threshold at none of its points"):
        TorchEngine(tiny("opt"), (LayerAdapter(), LayerAdapter(inputs=InputThresholds())))


@pytest.mark.parametrize("method", ["gate", "input"])
def test_loading_and_attaching_decode_by_the_adapters_method(method: str, tiny: Tiny, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """However it is given, on every backend that is here."""
    export(tiny("llama", num_layers=2), tokenizer, tmp_path / "model")
    plain = dejavu.load(tmp_path / "model")
    folder = tmp_path / "adapter"
    made = without_predictors(method, plain.config, plain.base_hash)
    made.save(folder)
    for backend in ("auto", "torch", *(["native"] if pick_backend() == "native" else [])):
        for adapter in (folder, str(folder), made):
            lm = dejavu.load(tmp_path / "model", adapter=adapter, backend=backend)
            assert (backend == "auto" and lm.backend == plain.backend) or lm.backend == backend
            assert lm.notes == plain.notes and (lm.generate("the cat", max_new_tokens=3).head_density == 1) == (method == "gate")
    net = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    dejavu.attach(net, folder)
    ids = torch.tensor([[2, 5, 9]])
    engine = TorchEngine(plain.model, made.layers)
    token, expected = int(engine.prefill(0, ids[0].tolist()).argmax()), []
    for _ in range(4):
        expected.append(token)
        token = int(engine.step([token], [0]).logits_BV.argmax())
    assert net.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)[0, 3:].tolist() == expected
