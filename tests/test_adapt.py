"""Adapting: the student is the masked model that its adapter makes, gradients pass hard masks, densities are steered, runs resume."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import Tiny
from dejavu.engine.options import EngineOptions
from dejavu.engine.torch_engine import TorchEngine
from dejavu.files import read_metadata, read_safetensors, write_safetensors
from dejavu.kernels.dtypes import TORCH_DTYPES
from dejavu.kernels.quantized import Matrix, wide
from dejavu.model.adapter import Adapter
from dejavu.model.checkpoint import Checkpoint
from dejavu.model.fingerprint import model_hash
from dejavu.model.lora import adapted_model, linear_shapes, merged_block
from dejavu.model.masked import MaskedSelection
from dejavu.model.peft import write_peft
from dejavu.model.selectors import GateThreshold, LayerAdapter
from dejavu.model.tokenizer import Tokenizer
from dejavu.model.transformer import Block, Transformer
from dejavu.offline.adapt.base import shared_base
from dejavu.offline.adapt.corpus import Mixture, Windows, pieces, read_ids, tokenized
from dejavu.offline.adapt.density_controller import DensityController
from dejavu.offline.adapt.divergence import KINDS, mean_divergence, pair_of
from dejavu.offline.adapt.finish import moved, shift_to
from dejavu.offline.adapt.on_policy import OwnWindows, cut_at, ends
from dejavu.offline.adapt.own_text import Prompts, continued, cut, frame
from dejavu.offline.adapt.ranks import average_, world
from dejavu.offline.adapt.run import adapt
from dejavu.offline.adapt.sizes import Sizes, bytes_per_token, choose_sizes
from dejavu.offline.adapt.student import Student, choose_lookaheads, residual_cosines
from dejavu.offline.adapt.training import AdaptConfig, Trainer
from dejavu.quality.perplexity import MaskedSelections
from dejavu.quality.tasks import Request, score_requests
from helpers.adapters import mlp_of, predicted
from helpers.texts import LONG_TEXT

CONFIG = AdaptConfig(
    density=0.3, rank=6, lora_rank=3, steps=8, batch=4, micro_batch=2, length=16, warmup=2, learning_rate=5e-3, lookahead_cosine=0.5
)
OWN = {"own_rows": 4, "own_tokens": 8}


def checkpoint_of(model: Transformer, tokenizer: Tokenizer) -> Checkpoint:
    known = {"name": "tiny", "stored_dtype": "fp32", "notes": (), "path": Path()}
    return Checkpoint(model=model, tokenizer=tokenizer, config=model.config, base_hash=model_hash(model), **known)


@pytest.fixture
def checkpoint(tiny: Tiny, tokenizer: Tokenizer) -> Checkpoint:
    return checkpoint_of(tiny("llama", num_layers=3), tokenizer)


def shaken(model: Transformer, lookahead_L: tuple[int, ...], activation: str | None = None, rounded: str | None = None) -> Student:
    """A student whose B is not zero and whose norms and biases are not the base's, as after training."""
    student = Student(model, rank=6, lora_rank=3, scale=2.0, lookahead_L=lookahead_L, seed=0, activation=activation, rounded=rounded)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in student.trainable().items():
            if name.endswith(("B_OR", "bias_F")) or "norm" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return student


def layers_of(student: Student, model: Transformer) -> tuple[LayerAdapter, ...]:
    """The student as layers to run the base with, not rounded."""
    blocks = (merged_block(block, lora, 2.0) for block, lora in zip(model.blocks, student.lora(), strict=True))
    return tuple(predicted(mlp=p.predictor(), block=block) for p, block in zip(student.trained, blocks, strict=True))


def ids_of(rows: int = 2, length: int = 12) -> Tensor:
    return torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(5))


def test_thresholds_move_together_to_a_density(checkpoint: Checkpoint) -> None:
    layers, ids = layers_of(shaken(checkpoint.model, (0, 1, 1)), checkpoint.model), ids_of(rows=8, length=32)

    def density(shift: float) -> float:
        selection = MaskedSelection(moved(layers, shift))
        checkpoint.model.hidden(ids, selection)
        found = selection.counter.mlp_density()
        assert found is not None
        return found

    before = density(0.0)
    assert mlp_of(moved(layers, 0.25)[1]).threshold == 0.25
    for target in (before - 0.02, before + 0.02):
        assert density(shift_to(checkpoint.model, layers, ids, target)) == pytest.approx(target, abs=0.003)


def test_a_price_moves_no_faster_than_weights() -> None:
    quick, slow, still = DensityController(2), DensityController(2), DensityController(2)
    for controller, pace in ((quick, 1.0), (slow, 0.1), (still, 0.0)):
        controller.update(torch.tensor([0.4, 0.2]), 0.15, pace)
    assert quick.price > slow.price > still.price == DensityController(2).price


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_student_is_the_masked_model_of_its_adapter(tiny: Tiny, family: str) -> None:
    model = tiny(family, num_layers=3)
    student, ids = shaken(model, (0, 1, 1)), ids_of()
    dense_BT = torch.zeros(ids.shape, dtype=torch.bool)
    dense_BT[1, :5] = True
    hidden, soft_L, hard_L = student(ids, dense_BT)
    selection = MaskedSelection(layers_of(student, model), ~dense_BT)
    expected = model.hidden(ids, selection)
    torch.testing.assert_close(hidden, expected.flatten(0, 1), atol=1e-5, rtol=1e-5)
    assert hard_L.tolist() == pytest.approx(selection.counter.mlp_per_layer(), abs=1e-6)
    assert float(hard_L.min()) > 0.1 and float(hard_L.max()) < 0.9 and not torch.equal(soft_L, hard_L)
    torch.testing.assert_close(student.taught(ids), model.hidden(ids).flatten(0, 1))
    assert (hidden - student.taught(ids)).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_student_that_is_rounded_is_what_an_engine_of_the_dtype_holds(tiny: Tiny, family: str, dtype: str) -> None:
    """And what writes; gradients are those of the changes. Rounded again once they have moved."""
    model, ids = tiny(family, num_layers=2), ids_of()
    plain, student = (shaken(model, (0, 1), rounded=each) for each in (None, dtype))
    dense_BT = torch.zeros(ids.shape, dtype=torch.bool)
    for _ in range(2):
        student.round_weights()
        changes = list(zip(model.blocks, student.lora(), strict=True))
        held = [merged_block(block, lora, 2.0, dtype=dtype) for block, lora in changes]
        layers = [predicted(mlp=p.predictor(), block=block) for p, block in zip(student.trained, held, strict=True)]
        expected = adapted_model(model, layers).hidden(ids, MaskedSelection(tuple(layers))).flatten(0, 1)
        found = student(ids, dense_BT)[0]
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
        assert not torch.allclose(found, plain(ids, dense_BT)[0], atol=1e-3)
        found.square().sum().backward()
        for block, own in zip(student.merged().blocks, held, strict=True):
            assert all(torch.equal(wide(one), wide(other)) for one, other in zip(weights_of(block), weights_of(own), strict=True))
        gradients = {name: parameter.grad for name, parameter in student.trainable().items()}
        assert all(gradients[name] is not None for name in gradients if "down" in name)
        with torch.no_grad():
            for each in (plain, student):
                for parameter in each.trainable().values():
                    parameter.mul_(1.1)


def weights_of(block: Block) -> list[Matrix]:
    return [getattr(block, name).matrix for name in linear_shapes(block.config)]


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_student_with_an_activation_is_masked_by_its_zeros(tiny: Tiny, family: str) -> None:
    model = tiny(family, num_layers=3)
    student, ids = shaken(model, (0, 1, 1), activation="relu2"), ids_of()
    assert not student.trained
    hidden, soft_L, hard_L = student(ids, torch.zeros(ids.shape, dtype=torch.bool))
    blocks = (merged_block(block, lora, 2.0, activation="relu2") for block, lora in zip(model.blocks, student.lora(), strict=True))
    selection = MaskedSelection(tuple(LayerAdapter(neurons=GateThreshold(threshold=0.0), block=block) for block in blocks))
    torch.testing.assert_close(hidden, model.hidden(ids, selection).flatten(0, 1), atol=1e-5, rtol=1e-5)
    assert hard_L.tolist() == pytest.approx(selection.counter.mlp_per_layer(), abs=1e-6)
    assert not torch.equal(soft_L, hard_L) and (hidden - student.taught(ids)).abs().max() > 1e-2
    (hidden.square().sum() + soft_L.sum()).backward()
    for name, parameter in student.trainable().items():
        assert parameter.grad is not None and float(parameter.grad.abs().max()) > 0, name


def test_an_activation_is_steered_stored_and_used(checkpoint: Checkpoint, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, activation="relu", density=0.25, steps=120, learning_rate=1e-2)
    found = adapt(checkpoint, [LONG_TEXT], config, text_hash="t" * 64, folder=tmp_path / "run")
    assert found is not None
    adapter, result = found
    assert result["mlp_density"] == pytest.approx(0.25, abs=0.08) and all(layer["lookahead"] is None for layer in result["layers"])
    assert result["ppl_sparse"] == result["ppl_unmasked"] and all(layer["mass"] == 1 for layer in result["layers"])
    adapter.save(tmp_path / "adapter")
    loaded = Adapter.load(tmp_path / "adapter", model=checkpoint.config, base_hash=checkpoint.base_hash)
    assert loaded.config == adapter.config and loaded.config.lora is not None and loaded.config.lora.activation == "relu"
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "sparse by zeros of its own: its MLPs get relu" in card and "Predictors" not in card
    model, ids = checkpoint.model, ids_of(1, 14)
    layers = loaded.attached(model)
    changed = adapted_model(model, layers)
    assert changed.config.activation == "relu" and model.config.activation == "silu"
    torch.testing.assert_close(model(ids, MaskedSelection(layers)), changed(ids))
    with pytest.raises(ValueError, match="silu"):
        edited(tmp_path / "adapter", lambda config: config["lora"].update(activation="silu"), checkpoint)
    with pytest.raises(ValueError, match="export --merge"):
        write_peft(loaded, checkpoint.config, tmp_path / "peft")


def test_gradients_pass_through_hard_masks(tiny: Tiny) -> None:
    model = tiny("llama", num_layers=2)
    student, ids = shaken(model, (0, 1)), ids_of()
    hidden, _, _ = student(ids, torch.zeros(ids.shape, dtype=torch.bool))
    hidden.square().sum().backward()
    for name, parameter in student.trainable().items():
        assert parameter.grad is not None and float(parameter.grad.abs().max()) > 0, name
    assert len(student.trainable()) == 2 * (2 * len(linear_shapes(model.config)) + 2 + 3)
    student.zero_grad()
    student(ids, torch.ones(ids.shape, dtype=torch.bool))[0].square().sum().backward()
    assert all(float(p.grad.abs().max()) == 0 for n, p in student.trainable().items() if n.startswith("predictors") and p.grad is not None)


@pytest.mark.parametrize("kind", KINDS)
def test_a_divergence_has_its_value_and_gradient(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr("dejavu.offline.adapt.divergence.CHUNK", 3 * 11)
    generator = torch.Generator().manual_seed(0)
    student, teacher, head = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (7, 7, 11))
    own_N = torch.tensor([0, 0, 1, 1, 0, 1, 1])
    found = student.clone().requires_grad_()
    value, sums_2 = mean_divergence(found.float(), teacher.float(), head.float(), own_N.float(), pair_of(kind))
    (3 * value).backward()
    reference = student.clone().requires_grad_()
    p, q = (teacher @ head.T).log_softmax(-1), (reference @ head.T).log_softmax(-1)
    m = torch.logaddexp(p, q) - math.log(2)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a.exp() * (a - b)).sum(-1)

    of_kind = {"forward": kl(p, q), "reverse": kl(q, p), "js": 2 * (kl(p, m) + kl(q, m))}[kind]
    expected_N = torch.where(own_N > 0, of_kind, kl(p, q))
    (3 * expected_N.mean()).backward()
    assert value.item() == pytest.approx(expected_N.mean().item(), rel=1e-5) and value.item() > 0.3
    by_text = [(expected_N.detach() * marked).sum().item() for marked in (1 - own_N, own_N)]
    assert sums_2.tolist() == pytest.approx(by_text, rel=1e-5)
    torch.testing.assert_close(found.grad, reference.grad, rtol=1e-4, atol=1e-6)
    everywhere, _ = mean_divergence(student.float(), teacher.float(), head.float())
    assert everywhere.item() == pytest.approx(kl(p, q).mean().item(), rel=1e-5)


def windows_of(config: AdaptConfig, tokenizer: Tokenizer) -> Mixture:
    return Mixture(Windows(tokenized(tokenizer, [LONG_TEXT]), config.length, config.seed))


def trainer_of(checkpoint: Checkpoint, config: AdaptConfig, lookahead_L: tuple[int, ...] = (0, 1, 1), **options: Any) -> Trainer:
    prompts = Prompts(checkpoint.tokenizer, [LONG_TEXT], seed=config.seed)
    windows = windows_of(config, checkpoint.tokenizer)
    return Trainer(checkpoint.model, config, windows, lookahead_L=lookahead_L, prompts=prompts, eos=(2,), **options)


@pytest.mark.slow
def test_densities_reach_the_target_and_no_layer_dies(checkpoint: Checkpoint) -> None:
    config = dataclasses.replace(CONFIG, density=0.25, steps=150, learning_rate=1e-2)
    trainer, reports = trainer_of(checkpoint, config), []
    while trainer.fraction < 1:
        reports.append(trainer.train_step())
    last = [report.density for report in reports[-20:]]
    assert sum(last) / 20 == pytest.approx(0.25, abs=0.05)
    assert all(0.25 / 3 * 0.8 < density < 1.0 for density in np.mean([r.density_L for r in reports[-20:]], axis=0))
    assert reports[0].target == 0.5 and reports[-1].target == 0.25 and reports[0].density == pytest.approx(0.5, abs=0.1)
    half = reports[len(reports) // 2 :]
    assert np.mean([r.kl for r in half[-15:]]) < np.mean([r.kl for r in half[:15]])


def test_a_layer_out_of_bounds_is_pushed_back() -> None:
    controller = DensityController(3, floor=1 / 3, ceiling=3.0)
    for _ in range(3):
        controller.update(torch.tensor([0.01, 0.2, 0.9]), 0.15)
    low, middle, high = controller.prices().tolist()
    assert low < 0 < middle < high and middle == pytest.approx(controller.price)
    other = DensityController(3)
    other.restore(controller.state())
    assert torch.equal(other.prices(), controller.prices())
    for _ in range(200):
        controller.update(torch.tensor([0.15, 0.15, 0.15]), 0.15)
    assert controller.prices().tolist() == pytest.approx([controller.price] * 3)
    assert DensityController(2, price=0.07).prices().tolist() == [0.07, 0.07]
    assert controller.bounds(0.015) == (0.015, 0.045) and DensityController(1).bounds(0.5)[1] == 1.0


@pytest.mark.parametrize("change", [{}, {"own_share": 0.5}, {"own_share": 0.5, "short_length": 8, "short_share": 0.5}], ids=str)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(checkpoint: Checkpoint, tmp_path: Path, change: dict[str, Any]) -> None:
    config = dataclasses.replace(CONFIG, **change, **OWN)
    whole = trainer_of(checkpoint, config)
    assert whole.run(tmp_path)
    (tmp_path / "part").mkdir()
    stops = iter([False] * 3 + [True])
    assert not trainer_of(checkpoint, config).run(tmp_path / "part", stop=lambda: next(stops))
    resumed, cold = trainer_of(checkpoint, config), trainer_of(checkpoint, config)
    assert resumed.resume(tmp_path / "part") and resumed.step == 3
    (tmp_path / "part" / "moments.safetensors").rename(tmp_path / "moments")
    assert cold.resume(tmp_path / "part") and cold.step == cold.warmed_from == 3
    assert all(torch.equal(cold.parameters[name], parameter) for name, parameter in resumed.parameters.items())
    assert cold.learning_rate() < resumed.learning_rate()
    assert resumed.run(tmp_path / "part") and resumed.step == 8
    for name, parameter in whole.parameters.items():
        assert torch.equal(parameter, resumed.parameters[name]), name
    assert torch.equal(whole.controller.state(), resumed.controller.state())
    assert not trainer_of(checkpoint, config).resume(tmp_path / "nothing")
    if whole.own is not None and resumed.own is not None:
        assert whole.own.round > 1 and torch.equal(whole.own.ids_WT, resumed.own.ids_WT)


def test_the_student_writes_as_its_adapter_decodes(tiny: Tiny) -> None:
    """Cold enough to be greedy: the prompt dense, then what the masked model would write, of the weights of now."""
    model = tiny("llama", num_layers=3)
    student, prompt = shaken(model, (0, 1, 1)), ids_of(3, 5)
    for _ in range(2):
        settings = {"generator": torch.Generator().manual_seed(2), "temperature_B": torch.full((3,), 1e-6), "scorers": student.trained}
        rows = continued(student.merged(), prompt, new_tokens=9, **settings)
        sparse_BT = torch.arange(14).expand(3, 14) >= 5
        logits = model(rows, MaskedSelection(layers_of(student, model), sparse_BT))
        assert torch.equal(rows[:, 5:], logits[:, 4:-1].argmax(-1)) and not torch.equal(rows[:, 5:], model(rows)[:, 4:-1].argmax(-1))
        with torch.no_grad():
            for parameter in student.trainable().values():
                parameter.add_(0.05)


def test_windows_of_its_own_are_prompts_and_answers_end_to_end(tiny: Tiny, tokenizer: Tokenizer) -> None:
    student = shaken(tiny("llama", num_layers=2), (0, 1))
    settings: dict[str, Any] = {"length": 60, "rows": 12, "new_tokens": 6, "temperatures": (0.7, 1.0), "eos": (2,), "seed": 0}
    own, again = (OwnWindows(student, Prompts(tokenizer, [LONG_TEXT], seed=0), **settings) for _ in range(2))
    ids, dense = own.take(3)
    assert ids.shape == dense.shape == (3, 60) and torch.equal(again.take(3)[0], ids)
    assert own.round == 1 and own.written > 0 and own.seconds > 0
    starts = {tuple(row) for number in (0, 1) for row in own.prompts.batch(number, 12).tolist()}
    whole = 0
    for row, flags in zip(ids.tolist(), dense.tolist(), strict=True):
        runs = [list(run) for flag, run in itertools.groupby(range(60), flags.__getitem__) if flag]
        for run in runs:
            if run[0] > 0 and run[-1] < 59:  # not cut by the window
                whole += 1
                assert tuple(row[i] for i in run) in starts
    assert whole > 2
    again.restore(own.state())
    assert torch.equal(again.take(2)[0], own.take(2)[0])
    assert torch.equal(again.rest_T, own.rest_T) and len(own.rest_T) < 60
    settings["rows"] = 1
    short = OwnWindows(student, Prompts(tokenizer, [LONG_TEXT], seed=0), **settings)
    assert short.take(1)[0].shape == (1, 60) and short.round > 1, "rounds of less than a window add up to one"
    with pytest.raises(ValueError, match="windows have 60 tokens"):
        again.restore(own.state() | {"own.ids": ids[:, :3].int()})
    rows = np.array([[5, 2, 7, 7, 2, 9], [5, 6, 7, 8, 9, 9]])
    assert ends(rows, 2, (2,)).tolist() == [5, 6]


def test_windows_of_its_own_can_each_begin_with_a_prompt(tiny: Tiny, tokenizer: Tokenizer) -> None:
    student = shaken(tiny("llama", num_layers=2), (0, 1))
    settings: dict[str, Any] = {"rows": 12, "new_tokens": 6, "temperatures": (0.7, 1.0), "eos": (2,), "seed": 0}
    own, again = (OwnWindows(student, Prompts(tokenizer, [LONG_TEXT], seed=0), length=40, anew=True, **settings) for _ in range(2))
    ids, dense = own.take(3)
    starts = {tuple(row) for number in range(2 * own.round) for row in own.prompts.batch(number, 12).tolist()}
    for row, flags in zip(ids.tolist(), dense.tolist(), strict=True):
        assert tuple(row[: flags.index(False)]) in starts
    assert torch.equal(again.take(3)[0], ids)
    again.restore(own.state())
    assert torch.equal(again.take(2)[0], own.take(2)[0])


def test_windows_that_begin_anew() -> None:
    """Each holds rows as far as there is room; what is left begins with a row, too."""
    rows = [np.array(row, dtype=np.int32) for row in ([1, 2, 3], [4, 5, 6], [7, 8, 9, 10, 11], [12], [13, 14])]
    windows, rest = cut_at(rows, 4)
    assert windows.tolist() == [[1, 2, 3, 4], [7, 8, 9, 10]] and rest.tolist() == [12, 13, 14]
    windows, rest = cut_at(rows[3:], 4)
    assert windows.shape == (0, 4) and rest.tolist() == [12, 13, 14] and windows.dtype == rest.dtype == np.int32


def test_short_windows_are_read_on_their_own(checkpoint: Checkpoint) -> None:
    """The same tokens in all, a share of the text's windows in pieces, the student's own in pieces that begin with a prompt."""
    config = dataclasses.replace(CONFIG, batch=8, own_share=0.25, short_length=4, short_share=0.5, prompt_share=0.9, **OWN)
    trainer = trainer_of(checkpoint, config)
    text = trainer.windows.batch(range(6))
    (long, long_dense, long_own), (short, short_dense, short_own) = trainer.windows_read()
    assert long.shape == (3, 16) and short.shape == (3 * 4 + 2 * 4, 4)
    assert torch.equal(long, text[:3]) and torch.equal(short[:12].reshape(3, 16), text[3:])
    assert not long_own.any() and not short_own[:12].any() and torch.equal(short_own[12:], ~short_dense[12:])
    assert short_dense[12:, 0].all(), "a window of the student's begins with a prompt"
    assert 0 < int(long_dense.sum()) < long_dense.numel() and int(short_dense[:12].sum()) > 0
    whole = trainer_of(checkpoint, dataclasses.replace(config, short_length=None, short_share=0.0))
    assert [ids.shape for ids, _, _ in whole.windows_read()] == [(8, 16)]
    assert trainer.train_step().density > 0


def test_a_run_starts_from_an_adapter(checkpoint: Checkpoint, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, steps=3, own_share=0.5, **OWN)
    found = adapt(checkpoint, [LONG_TEXT], config, text_hash="t" * 64, folder=tmp_path / "run")
    assert found is not None
    adapter = found[0]
    lookahead_L = tuple(layer.neurons.lookahead or 0 for layer in adapter.layers)
    held = dataclasses.replace(CONFIG, first_density=CONFIG.density)
    trainer = trainer_of(checkpoint, held, lookahead_L, start=adapter)
    ids, model = ids_of(), checkpoint.model
    hidden, _, _ = trainer.student(ids, torch.zeros(ids.shape, dtype=torch.bool))
    torch.testing.assert_close(hidden, model.hidden(ids, MaskedSelection(adapter.attached(model))).flatten(0, 1), atol=1e-5, rtol=1e-5)
    assert trainer.target() == CONFIG.density
    with pytest.raises(ValueError, match=r"has activation, scale, rank .* \(None, 2.0, 3, .* this run \(None, 2.0, 2,"):
        trainer_of(checkpoint, dataclasses.replace(held, lora_rank=2), lookahead_L, start=adapter)
    with pytest.raises(ValueError, match="give --rank 6"):
        trainer_of(checkpoint, dataclasses.replace(held, rank=5), lookahead_L, start=adapter)
    again = adapt(checkpoint, [LONG_TEXT], config, text_hash="t" * 64, folder=tmp_path / "other", start=adapter)
    assert again is not None and (tmp_path / "other" / "run.json").read_text().count(adapter.digest) == 1
    with pytest.raises(ValueError, match="start is"):
        adapt(checkpoint, [LONG_TEXT], config, text_hash="t" * 64, folder=tmp_path / "other")


def test_a_damaged_state_names_the_file_and_how_to_begin_anew(checkpoint: Checkpoint, tmp_path: Path) -> None:
    stops = iter([False, True])
    assert not trainer_of(checkpoint, CONFIG).run(tmp_path, stop=lambda: next(stops))
    path = tmp_path / "state.safetensors"
    tensors, state = read_safetensors(path), read_metadata(path)
    name = next(name for name in tensors if name.startswith("parameter."))
    damages = (
        (tensors | {name: tensors[name][:-1].contiguous()}, state, rf"{name} is torch\.float32 .*, not torch\.float32"),
        (tensors | {name: torch.full_like(tensors[name], torch.nan)}, state, rf"{name} has NaN"),
        ({key: value for key, value in tensors.items() if key != name}, state, f"there is no '{name}'"),
        (tensors, {"elapsed": "1"}, "there is no 'step'"),
        (tensors, state | {"step": "-3"}, "step -3"),
        (tensors, state | {"warmed_from": "9"}, "step 1"),
    )
    for damaged, said, message in damages:
        write_safetensors(path, damaged, said)
        with pytest.raises(ValueError, match=rf"state\.safetensors is damaged: {message}.*; remove {tmp_path} to begin anew"):
            trainer_of(checkpoint, CONFIG).resume(tmp_path)
    np.save(tmp_path / "tokens.npy", np.array([1, 96], dtype=np.uint16))
    with pytest.raises(ValueError, match=r"tokens\.npy is damaged: id 96 is beyond the 96 of the model"):
        read_ids(tmp_path / "tokens.npy", checkpoint.config)


def test_the_whole_road(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """What is saved loads, decodes as the masked forward, leaves the base alone, and another run in the folder is refused."""
    model, before = checkpoint.model, {n: p.clone() for n, p in checkpoint.model.named_parameters()}
    config = dataclasses.replace(CONFIG, chat_share=0.3)
    options = {"text_hash": "t" * 64, "folder": tmp_path / "run", "chat_tokens": 300}
    found = adapt(checkpoint, [LONG_TEXT], config, **options)
    assert found is not None
    adapter, result = found
    adapter.save(tmp_path / "adapter")
    loaded = Adapter.load(tmp_path / "adapter", model=checkpoint.config, base_hash=checkpoint.base_hash)
    assert loaded.config == adapter.config and loaded.config.method == "adapted" and loaded.config.schema_version == 2
    with pytest.raises(ValueError, match=r"schema_version 1 is not supported .* reads 2 for adapted"):
        edited(tmp_path / "adapter", lambda config: config.update(schema_version=1), checkpoint)
    with pytest.raises(ValueError, match="only that"):
        edited(tmp_path / "adapter", lambda config: config.update(lora=None), checkpoint)
    with pytest.raises(ValueError, match=r"layers\.0\.lora\.q\.A"):
        edited(tmp_path / "adapter", lambda config: config["lora"].update(rank=2), checkpoint)
    layers = loaded.attached(model)
    ids = ids_of(1, 14)
    selection = MaskedSelection(layers)
    masked = model(ids, selection)[0]
    engine = TorchEngine(adapted_model(model, layers), layers, EngineOptions(record=True))
    slot, row = 0, ids[0].tolist()
    sparse_BT = torch.arange(len(row))[None] >= 4
    expected = model(ids, MaskedSelection(layers, sparse_BT))[0]
    torch.testing.assert_close(engine.prefill(slot, row[:4]), expected[3], atol=1e-4, rtol=1e-4)
    for position in range(4, len(row)):
        torch.testing.assert_close(engine.step([row[position]], [slot]).logits_BV[0], expected[position], atol=1e-4, rtol=1e-4)
    assert (masked - model(ids)[0]).abs().max() > 1e-2
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert result["kl"] > 0 and result["ppl_dense"] > 1 and loaded.config.quality["ppl_sparse"] == result["ppl_sparse"]
    assert result["mlp_density"] == pytest.approx(np.mean([layer["density"] for layer in result["layers"]]))
    again = adapt(checkpoint, [LONG_TEXT], config, **options)  # finished: only measured again
    assert again is not None and again[1]["kl"] == result["kl"] and again[1]["steps"] == 8
    with pytest.raises(ValueError, match="density is 0.3 there and 0.2 here"):
        adapt(checkpoint, [LONG_TEXT], dataclasses.replace(config, density=0.2), **options)


def edited(folder: Path, edit: Callable[[dict[str, Any]], object], checkpoint: Checkpoint) -> Adapter:
    """The adapter of a folder whose config.json was changed meanwhile."""
    path = folder / "config.json"
    text = path.read_text()
    config = json.loads(text)
    edit(config)
    try:
        path.write_text(json.dumps(config))
        return Adapter.load(folder, model=checkpoint.config, base_hash=checkpoint.base_hash)
    finally:
        path.write_text(text)


def test_merged_weights_are_the_sum(tiny: Tiny) -> None:
    model = tiny("llama")
    student = shaken(model, (0, 1))
    lora = student.lora()[1]
    block, merged = model.blocks[1], merged_block(model.blocks[1], lora, 2.0)
    for name in linear_shapes(model.config):
        A, B = lora.factors[name]
        change = 2.0 * wide(B) @ wide(A)
        change = change.T if name in ("o", "down") else change
        torch.testing.assert_close(getattr(merged, name).weight, getattr(block, name).weight + change)
        assert float(change.abs().max()) > 1e-3
    for name in ("norm1", "norm2"):
        changed, own = (getattr(each, name).weight for each in (merged, block))
        assert torch.equal(changed, lora.norms[name]) and not torch.equal(changed, own)


def test_lookahead_follows_the_measured_cosine(tiny: Tiny) -> None:
    model, seen = tiny("llama", num_layers=3), {}
    ids = ids_of(2, 10)
    found = residual_cosines(model, ids)
    x = model.embedded(ids, torch.arange(10))
    block = model.blocks[0]
    mixed = block.attend(block.attention_input(x), torch.arange(10), model.inv_freq)
    after, _ = block.after_attention(x, block.o(mixed.flatten(-2)))
    seen[0] = float(torch.nn.functional.cosine_similarity(x, after, dim=-1).mean())
    assert len(found) == 3 and found[0] == pytest.approx(seen[0], abs=1e-5)
    assert choose_lookaheads([0.99, 0.95, 0.8, 0.9], 0.9) == (0, 1, 0, 1)


def test_windows_come_once_a_pass_and_never_from_the_held_out() -> None:
    windows = Windows(np.arange(400, dtype=np.uint16), 10, seed=3)
    held = {row[0] for row in windows.held_out.tolist()}
    count = 40 - len(held)
    passes = [[int(windows.window(i)[0]) for i in range(first, first + count)] for first in (0, count)]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(set(range(0, 400, 10)) - held) and passes[0] != passes[1]
    own = Windows(np.full(100, 7, dtype=np.uint16), 10, seed=3, held_out=False)
    batch = Mixture(windows, own, 0.25).batch(range(40))
    assert int((batch == 7).all(1).sum()) == 10
    with pytest.raises(ValueError, match="too few"):
        Windows(np.arange(15, dtype=np.uint16), 10, seed=0)


def test_tokens_of_pieces_are_those_of_documents(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dejavu.offline.adapt.corpus.PIECE", 30)
    assert "".join(pieces(LONG_TEXT)) == LONG_TEXT and len(list(pieces(LONG_TEXT))) > 10
    lines = LONG_TEXT.splitlines(keepends=True)[:6]
    expected = [token for line in lines for token in tokenizer.encode(line)]
    assert tokenized(tokenizer, lines).tolist() == expected


def test_the_model_writes_what_its_own_steps_would(tiny: Tiny, tokenizer: Tokenizer) -> None:
    model = tiny("llama", num_layers=2)
    prompt = ids_of(3, 5)
    rows = continued(model, prompt, new_tokens=6, generator=torch.Generator().manual_seed(2))
    assert rows.shape == (3, 11) and torch.equal(rows[:, :5], prompt)
    generator, ids = torch.Generator().manual_seed(2), prompt
    for _ in range(6):
        ids = torch.cat([ids, torch.multinomial(model(ids)[:, -1].softmax(-1), 1, generator=generator)], 1)
    assert torch.equal(rows, ids)
    assert cut([5, 6, 2, 7, 2, 9], 3, (2,)) == [5, 6, 2, 7, 2] and cut([5, 6], 1, (2,)) == [5, 6]
    template = "{% for m in messages %}a {{ m['content'] }} b{% endfor %}{% if add_generation_prompt %}c{% endif %}"
    assert frame(tokenizer) == ([2], [])
    before, after = frame(dataclasses.replace(tokenizer, chat_template=template))
    assert tokenizer.decode(before) == "a " and tokenizer.decode(after) == " bc"


def test_alone_an_average_is_the_value_and_parts_of_a_batch_add_up(checkpoint: Checkpoint) -> None:
    values = torch.tensor([1.0, 2.0])
    assert world() == (0, 1) and average_(values).tolist() == [1.0, 2.0]
    by_two, by_four = (trainer_of(checkpoint, dataclasses.replace(CONFIG, prompt_share=0.0, micro_batch=size)) for size in (2, 4))
    for trainer in (by_two, by_four):
        trainer.train_step()
    torch.testing.assert_close(by_two.gradient_P, by_four.gradient_P, rtol=1e-3, atol=1e-5)


def test_layers_computed_again_give_the_same_gradients(checkpoint: Checkpoint) -> None:
    kept, again = (trainer_of(checkpoint, dataclasses.replace(CONFIG, checkpoint_layers=flag)) for flag in (False, True))
    assert again.student.checkpoint_layers and not kept.student.checkpoint_layers
    for trainer in (kept, again):
        trainer.train_step()
    assert torch.equal(kept.gradient_P, again.gradient_P) and float(kept.gradient_P.abs().max()) > 0


def test_teacher_and_student_share_one_copy_of_the_weights(checkpoint: Checkpoint) -> None:
    base = shared_base(checkpoint.model, "cpu", torch.float32)
    student = shaken(base, (0, 1, 1))
    for own, ours, theirs in zip(checkpoint.model.blocks, base.blocks, student.blocks, strict=True):
        assert own.down.weight.data_ptr() == ours.down.weight.data_ptr() == theirs.down.weight.data_ptr()
        assert ours.q.weight.data_ptr() == theirs.q.weight.data_ptr() and not ours.up.weight.requires_grad
    assert shared_base(checkpoint.model, "cpu", torch.bfloat16).dtype == torch.bfloat16 and checkpoint.model.dtype == torch.float32


def test_micro_batches_follow_free_memory(tiny: Tiny) -> None:
    config = tiny("llama").config
    window = 1024 * bytes_per_token(config, value_bytes=2, checkpoint_layers=False)

    def chosen(windows_of_memory: float, **given: Any) -> Sizes:
        free = int((windows_of_memory * window + 24 * 2**26) / 0.9) + 9
        return choose_sizes(config, windows=64, length=1024, value_bytes=2, free=free, **given)

    assert chosen(100) == Sizes(micro_batch=16, checkpoint_layers=False)
    assert chosen(9) == Sizes(micro_batch=8, checkpoint_layers=False)
    assert chosen(3.5).checkpoint_layers and chosen(3.5).micro_batch >= 2 and chosen(0).micro_batch == 1
    assert chosen(3.5, checkpoint_layers=False) == Sizes(micro_batch=2, checkpoint_layers=False)
    assert "--micro-batch 4 (it is 8) or --checkpoint-layers on" in chosen(9).smaller()
    with pytest.raises(ValueError, match="no multiple of micro_batch 3"):
        chosen(9, micro_batch=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"density": 0.0}, "density"),
        ({"batch": 5}, "multiple of micro_batch"),
        ({"steps": None}, "steps or minutes"),
        ({"dtype": "fp16"}, "dtype 'fp16'"),
        ({"chat_share": 1.0}, "chat_share"),
        ({"own_share": 0.1}, "own_share 0.1 of the 4 windows of a step is 0"),
        ({"short_length": 5}, "short_length 5 does not divide length 16"),
        ({"short_share": 0.5}, "short_share needs a short_length"),
        ({"rounded": "fp16"}, "rounded to int8 or int4, not 'fp16'"),
        ({"price": 0.0}, "price must lie in"),
        ({"coldest": 1.5}, "temperatures must be positive and in order"),
        ({"divergence": "kl"}, "divergence 'kl' is not known; choose one of forward"),
    ],
)
def test_impossible_settings(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_a_task_of_which_nothing_runs_sparse_is_scored_with_the_changed_weights(tiny: Tiny) -> None:
    model = tiny("llama")
    layers = layers_of(shaken(model, (0, 1)), model)
    requests = [Request(inputs=tuple(row), targets=(7,)) for row in ids_of(3, 6).tolist()]
    dense, sparse = score_requests(model, requests, masked=MaskedSelections(layers))
    changed, _ = score_requests(adapted_model(model, layers), requests)
    assert sparse is not None and [score.log_prob for score in sparse] == pytest.approx([score.log_prob for score in changed])
    assert max(abs(a.log_prob - b.log_prob) for a, b in zip(dense, sparse, strict=True)) > 1e-3


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize(("dtype", "limit"), [("fp32", 0.02), ("bf16", 0.15)])
def test_on_a_gpu_training_is_that_of_the_cpu(checkpoint: Checkpoint, tmp_path: Path, dtype: str, limit: float) -> None:
    """Compiled, fused and resumed: losses and densities as on the CPU, within what the dtype and flipped neurons make of it."""
    config = dataclasses.replace(CONFIG, dtype=dtype)
    windows = windows_of(config, checkpoint.tokenizer)
    usual, base = trainer_of(checkpoint, CONFIG), shared_base(checkpoint.model, "cuda", TORCH_DTYPES[dtype])
    first, second = (Trainer(base, config, windows, lookahead_L=(0, 1, 1)) for _ in range(2))
    for step in range(6):
        if step == 3:
            first.save(tmp_path)
            assert second.resume(tmp_path)
            for name, parameter in first.parameters.items():
                assert torch.equal(parameter, second.parameters[name]), name
        here, there = usual.train_step(), (first if step < 3 else second).train_step()
        assert there.kl == pytest.approx(here.kl, rel=limit) and there.density == pytest.approx(here.density, abs=limit)
    options = {"text_hash": "t" * 64, "folder": tmp_path / "run", "device": "cuda", "chat_tokens": 300}
    found = adapt(checkpoint, [LONG_TEXT], dataclasses.replace(config, chat_share=0.3, own_share=0.5, **OWN), **options)
    assert found is not None and found[1]["kl"] > 0 and next(checkpoint.model.parameters()).device.type == "cpu"
