"""Offline work on another device than the CPU: the same results, and no tensor of the CPU in between (helpers/elsewhere.py)."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conftest import Tiny
from dejavu.model.checkpoint import Checkpoint
from dejavu.model.tokenizer import Tokenizer
from dejavu.model.transformer import Transformer
from dejavu.offline import memory
from dejavu.offline.collect import LayerData, mean_input, sweep_layers
from dejavu.offline.curves import perplexity_curves, recall_curves
from dejavu.offline.head import HeadFit
from dejavu.offline.profile import profile
from dejavu.offline.split import Split
from dejavu.offline.train import train_adapter, train_adapters
from dejavu.offline.train_config import TrainConfig
from dejavu.offline.train_predicted import TrainedLayer, train_layer
from dejavu.offline.training_text import TrainingText
from dejavu.quality.evaluate import evaluate
from helpers.elsewhere import DEVICE, elsewhere
from helpers.offline import random_ids, skewed

PLACES = ["elsewhere", pytest.param("cuda", marks=pytest.mark.gpu)]


def device_of(place: str) -> torch.device:
    return DEVICE if place == "elsewhere" else torch.device(place, 0)


def existing(place: str) -> AbstractContextManager[None]:
    return elsewhere() if place == "elsewhere" else nullcontext()


def both(model: Transformer, work: Callable[[Transformer], Any], place: str) -> tuple[Any, Any]:
    """What work gives on the CPU and in the other place."""
    here = work(copy.deepcopy(model))
    with existing(place):
        there = work(copy.deepcopy(model).to(device_of(place)))
    return here, there


def numbers(value: Any) -> list[float]:
    """All numbers of lists and objects."""
    if isinstance(value, dict | list):
        return [number for part in (value.values() if isinstance(value, dict) else value) for number in numbers(part)]
    return [value] if isinstance(value, int | float) else []


def test_operations_of_two_devices_are_refused() -> None:
    with elsewhere():
        there = torch.ones(3, device=DEVICE)
        assert (there + 1).device == DEVICE and (there.cpu() + torch.ones(3)).tolist() == [2, 2, 2]
        with pytest.raises(RuntimeError, match="aten::add: tensors of meta and of the CPU"):
            there + torch.ones(3)


@pytest.mark.parametrize("place", PLACES)
def test_a_profile_is_the_same_elsewhere(tiny: Tiny, place: str) -> None:
    here, there = both(skewed(tiny), lambda model: profile(model, {"a": random_ids(100)}, bos=2, oracle_tokens=60), place)
    assert numbers(there) == pytest.approx(numbers(here), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("place", PLACES)
def test_adapters_of_every_method_and_their_curves_are_the_same_elsewhere(
    tiny: Tiny, tokenizer: Tokenizer, tmp_path: Path, place: str
) -> None:
    budget = 0.05

    def work(model: Transformer) -> list[list[Any]]:
        checkpoint = Checkpoint(
            model=model, tokenizer=tokenizer, config=model.config, name="tiny", base_hash="x", stored_dtype="fp32", notes=(), path=tmp_path
        )  # fmt: skip
        config, folder = TrainConfig(method="auto", budget=budget, rank=4, epochs=1), tmp_path / str(model.device)
        text = TrainingText.of(checkpoint, [random_ids(700)])
        found = train_adapters(checkpoint, text, config, text_hash="x", work_folder=folder)
        again = train_adapters(checkpoint, text, config, text_hash="x", work_folder=folder)
        layers = found[0][0].attached(model)
        texts = {"a": "the cat sat on the mat " * 20}
        tasks = {"t": [{"context": "the cat", "choices": [" sat on", " dog"], "label": 0}]}
        quality = evaluate(model, tokenizer, layers, texts=texts, tasks=tasks)
        ids = random_ids(250, 5)
        recall, ppl = recall_curves(model, layers, ids, bos=2), perplexity_curves(model, layers, ids, bos=2)
        assert len(recall) == 3 and len(ppl["heads"]) > 5
        dense, sparse = ([result[side] for _, result in (*found, *again)] for side in ("ppl_dense", "ppl_sparse"))
        return [[*dense, quality["dense"]["ppl"], ppl["ppl_dense"]], sparse]

    (dense_here, sparse_here), (dense, sparse) = both(skewed(tiny), work, place)
    assert dense == pytest.approx(dense_here, rel=1e-3)
    if place == "elsewhere":  # the CPU's products, in passes of other sizes
        assert sparse == pytest.approx(sparse_here, rel=0.03)
    assert max(*sparse, *sparse_here) <= (1 + budget) * dense_here[0], "a GPU's rounding may choose otherwise, within the budget"


@pytest.mark.parametrize("place", PLACES)
def test_a_screened_head_is_fitted_to_a_model_elsewhere(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setattr("dejavu.kernels.screen.CLUSTER_TOKENS", 4)
    ids_WT = torch.tensor([random_ids(40, seed) for seed in range(5)])

    def work(model: Transformer) -> tuple[int, float]:
        there_WT = ids_WT.to(model.device)
        split = Split(there_WT[2:], there_WT[:1], there_WT[1:2])
        text = TrainingText(model=model, given=200, ids_WT=there_WT, split=split, measured=split)
        found = HeadFit(text, seed=0).within(0.3)
        assert found is not None and {tensor.device.type for tensor in found[0].tensors} == {"cpu"}
        return found[1].clusters, found[1].missed + found[1].missed_stderr

    (clusters_here, missed_here), (clusters, missed) = both(tiny("opt"), work, place)
    assert max(missed, missed_here) <= 0.3
    if place == "elsewhere":
        assert (clusters, missed) == pytest.approx((clusters_here, missed_here), rel=1e-3)


@pytest.mark.parametrize("place", PLACES)
def test_what_does_not_fit_is_kept_on_the_host_and_trains_the_same(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """The stream and the inputs of layers there, of the active neurons some; a pass takes as many tokens as fit."""
    ids_WT, config = torch.tensor([random_ids(60, seed) for seed in range(10)]), TrainConfig(rank=4, epochs=1)

    def trained(model: Transformer) -> tuple[list[LayerData], TrainedLayer]:
        found = list(sweep_layers(model, ids_WT.to(model.device)))
        return found, train_layer(found[1], model, config, 480)

    model, device = skewed(tiny), device_of(place)
    with existing(place):
        model.to(device)
        whole, expected = trained(model)
        stream, per_token = 4 * ids_WT.numel() * 32, 24 * 128 + 48 * 32
        monkeypatch.setattr(memory, "SPARE", 60 * per_token * 2)
        monkeypatch.setattr(memory, "free_gpu_bytes", lambda device: memory.SPARE + stream + 50_000)
        split, found = trained(model)
        for data in split:
            assert data.attention_ND.device == data.mlp_ND.device == memory.CPU
        assert {value.device for data in split for _, _, value in data.active.runs} == {memory.CPU, device}
        assert all(data.attention_ND.device == device for data in whole)
    assert len(whole[0].active.runs) < len(split[0].active.runs), "with less memory more passes, of fewer windows"
    for kind, options in expected.options.items():
        for (_, quality), (_, same) in zip(options, found.options[kind], strict=True):
            assert (same.density, same.mass) == pytest.approx((quality.density, quality.mass), abs=1e-2)


@pytest.mark.parametrize("place", ["cpu", *PLACES[1:]])
def test_a_training_that_was_interrupted_goes_on_to_the_same_bits_wherever_activations_lie(
    tiny: Tiny, tokenizer: Tokenizer, tmp_path: Path, place: str
) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if what.startswith("layer 1"):
            raise KeyboardInterrupt

    config = TrainConfig(budget=0.05, rank=4, epochs=1)
    model = skewed(tiny).to(place)
    checkpoint = Checkpoint(
        model=model, tokenizer=tokenizer, config=model.config, name="tiny", base_hash="x", stored_dtype="fp32", notes=(), path=tmp_path
    )  # fmt: skip
    ids = [random_ids(700)]
    whole, _ = train_adapter(checkpoint, ids, config, text_hash="x", work_folder=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train_adapter(checkpoint, ids, config, text_hash="x", work_folder=tmp_path / "parts", progress=interrupt)
    assert [path.name for path in (tmp_path / "parts").glob("*.safetensors")] == ["layer_0.safetensors"]
    beside = dataclasses.replace(config, work_memory=0)  # in files, on a GPU in page-locked memory
    resumed, _ = train_adapter(checkpoint, ids, beside, text_hash="x", work_folder=tmp_path / "parts")
    assert any(layer.sparse for layer in whole.layers) and whole.config == resumed.config
    assert all(torch.equal(one, other) for one, other in zip(whole.tensors(), resumed.tensors(), strict=True))


def test_what_is_kept_goes_to_the_device_the_host_and_the_disk_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Page-locked memory is counted as torch takes it: in powers of two."""
    monkeypatch.setattr(memory, "free_gpu_bytes", lambda device: memory.SPARE + 1000)
    monkeypatch.setattr(memory, "available_bytes", lambda root: 3000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=5000))
    work = memory.WorkMemory.of(None, tmp_path)

    def places(*groups: list[int]) -> tuple[memory.Place, ...]:
        return memory.Room.on(torch.device("cuda"), work).places(*groups, tokens=1000)

    assert places([1000], [1025]) == ("device", "host") and places([600], [500, 500]) == ("device", "host")
    assert places([1001], [1025, 1025]) == ("host", "disk") and places([2049], [1]) == ("disk", "device")
    with pytest.raises(MemoryError, match=r"kept of 1,000 tokens .* at most --max-tokens 450$"):
        places([10_000], [10_000])
    with pytest.raises(ValueError, match="--work-memory is a number of GB, 0 or more, not -1"):
        TrainConfig(work_memory=-1)


def test_a_tensor_in_a_file_leaves_no_file_behind(tmp_path: Path) -> None:
    held = memory.in_file(tmp_path, 3, 5, dtype=torch.float16)
    assert held.shape == (3, 5) and not any(tmp_path.iterdir())
    assert torch.equal(held.fill_(2), torch.full((3, 5), 2, dtype=torch.float16))


def test_a_mean_is_summed_up_on_the_device_wherever_the_inputs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dejavu.offline.collect.MOMENT_CHUNK", 64)
    x_ND = torch.randn(150, 7, generator=torch.Generator().manual_seed(0)).half()
    with elsewhere():
        beside, there = mean_input(x_ND, DEVICE), mean_input(x_ND.to(DEVICE), DEVICE)
        assert beside.device == there.device == DEVICE and torch.equal(beside.cpu(), there.cpu())
    assert torch.allclose(mean_input(x_ND, memory.CPU), x_ND.float().mean(0), atol=1e-6)
