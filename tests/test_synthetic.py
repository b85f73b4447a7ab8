"""Made-up models: the shapes are the public ones, the density is the one asked for, and the selections are of their kind."""

from __future__ import annotations

import math
import mmap
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dejavu.bench.bytes_read import scoring_bytes
from dejavu.bench.decode import bench
from dejavu.bench.memory import sequential_buffer
from dejavu.bench.models import random as synthetic
from dejavu.bench.models.density import rethresholded
from dejavu.bench.models.random import RUN, SELECTIONS, SHAPES, check_memory, planted_layers, random_ids, shape_of, synthetic_model
from dejavu.bench.rows import Shape
from dejavu.bench.variants import DENSE_VARIANT, Variant, variants_at
from dejavu.config import ModelConfig
from dejavu.engine.backends import make_engine
from dejavu.engine.native.engine import NativeEngine
from dejavu.engine.options import EngineOptions
from dejavu.kernels.memory import available_bytes
from dejavu.model.families import parameter_shapes
from helpers.adapters import mlp_of
from helpers.native import needs_library

MILLIONS = {
    "smollm2-135m": 134.5, "opt-mini": 21.3, "opt-125m": 125.2, "opt-1.3b": 1315.8, "opt-2.7b": 2651.6,
    "opt-6.7b": 6658.5, "opt-13b": 12853.5, "opt-30b": 29974.5, "opt-66b": 65719.7,
    "llama-2-7b-relu": 6739.3, "llama-2-13b-relu": 13017.2, "llama-3.2-1b": 1235.8, "llama-2-7b": 6738.4, "mistral-7b": 7248.0,
    "llama-3.1-8b": 8030.3, "llama-3.3-70b": 70553.7, "qwen3-8b": 8190.7, "minitron-4b": 4190.5, "opt-175b": 174604.5,
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    def opt() -> ModelConfig:
        return ModelConfig.from_dict(synthetic._opt(256, 4, 4).to_dict() | {"vocab_size": 2000})

    def llama() -> ModelConfig:
        sizes = {"vocab_size": 2000, "num_layers": 4, "hidden_size": 192, "intermediate_size": 600, "num_heads": 6, "head_dim": 32}
        return ModelConfig.from_dict(synthetic._smollm2().to_dict() | sizes)

    monkeypatch.setitem(SHAPES, "opt-small", opt)

    def llama_relu() -> ModelConfig:
        return ModelConfig.from_dict(synthetic._llama_relu(192, 600, 4, 6).to_dict() | {"vocab_size": 2000})

    monkeypatch.setitem(SHAPES, "llama-small", llama)
    monkeypatch.setitem(SHAPES, "llama-relu-small", llama_relu)


@pytest.mark.parametrize("name", MILLIONS)
def test_the_shapes_have_the_public_number_of_parameters(name: str) -> None:
    total = sum(math.prod(shape) for shape in parameter_shapes(shape_of(name)).values())
    assert total / 1e6 == pytest.approx(MILLIONS[name], abs=0.06)


def selected(engine: NativeEngine, ids: list[int], prompt: int) -> list[list[Tensor]]:
    """By step and layer, the neurons that ran."""
    engine.prefill(0, ids[:prompt])
    found = []
    for token in ids[prompt:]:
        step = engine.step([token], [0])
        assert step.selections is not None
        found.append([layer.neurons_A for layer in step.selections[0] if layer.neurons_A is not None])
    return found


@needs_library
@pytest.mark.parametrize("name", ["opt-small", "llama-small"])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_each_selection_is_of_its_kind(name: str, selection: str) -> None:
    density = 0.12
    made = synthetic_model(name, backend="native", dtype="int8")
    ids = random_ids(made.config, 80)
    layers = planted_layers(made.config, selection=selection, density=density, heads=False)
    assert [mlp_of(layer).lookahead for layer in layers] == [0, 1, 1, 1]
    layers = rethresholded(made.model, layers, ids, mlp_density=density)
    steps = selected(NativeEngine(made.model, layers, EngineOptions(record=True, dtype="int8", threads=2)), ids, 20)
    neurons = made.config.intermediate_size
    for layer in range(made.config.num_layers):
        chosen = [step[layer] for step in steps]
        assert sum(map(len, chosen)) / (len(chosen) * neurons) == pytest.approx(density, rel=0.1)
        shared = [len(set(a.tolist()) & set(b.tolist())) / max(1, len(a)) for a, b in pairwise(chosen)]
        adjacent = [float((a[1:] - a[:-1] == 1).double().mean()) for a in chosen if len(a) > 1]
        overlap, neighbours = sum(shared) / len(shared), sum(adjacent) / len(adjacent)
        # Independent choices: a token shares `density` of its neurons with the one before, and so many have a neighbour.
        assert overlap > 0.7 if selection == "hot-set" else overlap < density + 0.15
        assert neighbours > 1 - 2 / RUN if selection == "clustered" else neighbours < 2 * density


@needs_library
@pytest.mark.parametrize("name", ["opt-small", "llama-small"])
def test_rows_of_a_synthetic_benchmark(name: str) -> None:
    """The measured densities are the target ones; unions lie between one row's and all rows'; every neuron of a ReLU model fires."""
    made = synthetic_model(name, backend="native", dtype="int8", seed=3)
    ids = random_ids(made.config, 400, seed=3)

    def layers_for(selection: str | None, density: float | None) -> tuple[synthetic.LayerAdapter, ...]:
        assert selection is not None and density is not None
        return planted_layers(made.config, selection=selection, density=density, heads=True, rank=32)

    variants = variants_at(made.model, layers_for, ids, densities=[0.1, 0.3], head_densities=[0.75], selections=["uniform", "hot-set"])
    found = bench(
        made.model,
        variants,
        ids,
        EngineOptions(backend="native", dtype="int8", threads=2),
        name=name,
        batch=4,
        context=16,
        steps=12,
        shape=Shape(name=name, layers=made.config.num_layers),
    )
    decodes = [row for row in found.rows if row.op == "decode"]
    assert [row.mode for row in decodes] == ["dense", *(["sparse", "sparse+heads"] * 4)] and all(row.synthetic for row in found.rows)
    assert [row.selection for row in decodes] == [None, *(["uniform"] * 4), *(["hot-set"] * 4)]
    unions = {}
    for row, target in zip(decodes[1:], [0.1, 0.1, 0.3, 0.3] * 2, strict=True):
        assert row.mlp_density == pytest.approx(target, rel=0.1) and row.union_density is not None
        assert row.head_density == pytest.approx(1.0 if row.mode == "sparse" else 0.75, rel=0.1)
        unions[row.selection, row.mode, target] = row.union_density
        assert target < row.union_density < 4 * target
    assert unions["uniform", "sparse", 0.1] == pytest.approx(1 - 0.9**4, rel=0.2), "four rows that choose independently"
    assert unions["hot-set", "sparse", 0.1] < 0.2
    ops = {(row.mode, row.op) for row in found.rows}
    assert {("sparse", op) for op in ("predictor", "attention", "mlp", "head", "other")} <= ops and ("dense", "predictor") not in ops
    assert all(row.gbs is not None and row.pct_ceiling is not None and row.gbs > 0 for row in found.rows if row.op != "prefill")
    ceilings = [100 * row.gbs / row.pct_ceiling for row in found.rows if row.gbs and row.pct_ceiling]
    read = next(row for row in found.rows if row.op == "read")
    assert ceilings == pytest.approx([read.gbs] * len(ceilings)) and read.pct_ceiling == pytest.approx(100), "one ceiling for all"


@needs_library
@pytest.mark.parametrize("name", ["opt-small", "llama-relu-small"])
def test_planted_relu_neurons_all_fire_and_predictors_are_int8(name: str) -> None:
    made = synthetic_model(name, backend="native", dtype="int8")
    layers = planted_layers(made.config, density=0.2, heads=True)
    layers = rethresholded(made.model, layers, random_ids(made.config, 64), mlp_density=0.2, head_density=0.5)
    engine = NativeEngine(made.model, layers, EngineOptions(dtype="int8", threads=1))
    for token in random_ids(made.config, 10, seed=1):
        _, profile = engine.profiled_step([token], [0])
        assert torch.equal(profile.fired_L, profile.counts.neurons) and int(profile.counts.neurons.min()) > 0
    for layer in layers:
        assert layer.neurons.selects and layer.heads.selects
        for selector in layer.stored.values():
            scoring = selector.scoring(made.config)
            values = sum(matrix.numel() for matrix in scoring.matrices)
            assert scoring_bytes(scoring, may_be_int8=True) < 2 * values + 8 * scoring.values + 4 * 64


@needs_library
@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_layers_that_share_memory_are_packed_as_if_they_did_not(dtype: str) -> None:
    made = synthetic_model("opt-small", backend="native", dtype=dtype)
    pointers = {block.up.weight.data_ptr() for block in made.model.blocks}
    assert len(pointers) == 1
    ids = random_ids(made.config, 12)
    logits = [make_engine(made.model, None, EngineOptions(backend="native", dtype=dtype, threads=1)).prefill(0, ids)]
    for block in made.model.blocks:
        for key, parameter in list(block.named_parameters()):
            owner, _, last = key.rpartition(".")
            setattr(block.get_submodule(owner), last, nn.Parameter(parameter.clone(), requires_grad=False))
    assert len({block.up.weight.data_ptr() for block in made.model.blocks}) == 4
    logits.append(make_engine(made.model, None, EngineOptions(backend="native", dtype=dtype, threads=1)).prefill(0, ids))
    assert torch.equal(*logits)


def test_where_nothing_is_packed_each_layer_has_its_own_memory() -> None:
    made = synthetic_model("llama-small", backend="torch", dtype="fp32")
    assert len({block.up.weight.data_ptr() for block in made.model.blocks}) == 4
    assert made.num_parameters == sum(parameter.numel() for parameter in made.model.parameters())
    same = synthetic_model("llama-small", backend="torch", dtype="fp32")
    assert torch.equal(made.model.blocks[3].down.weight, same.model.blocks[3].down.weight)


def test_a_wrong_mlp_of_a_synthetic_model_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    made = synthetic_model("opt-small", backend="torch", dtype="fp32")
    ids = random_ids(made.config, 100)
    layers = rethresholded(made.model, planted_layers(made.config, density=0.1, heads=False), ids, mlp_density=0.1)
    variants = [DENSE_VARIANT, Variant(mode="sparse", layers=layers)]
    options: dict[str, Any] = {
        "name": "opt-small",
        "options": EngineOptions(backend="torch"),
        "context": 8,
        "steps": 5,
        "shape": Shape(name="opt-small", layers=3),
    }
    assert bench(made.model, variants, ids, **options).rows
    monkeypatch.setattr("dejavu.engine.torch_engine.sparse_mlp", lambda x_D, weights, idx_A: torch.zeros_like(x_D))
    with pytest.raises(ValueError, match="not timed"):
        bench(made.model, variants, ids, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selection": "random"}, "unknown selection 'random'; choose one of uniform, clustered, hot-set"),
        ({"density": 0.0}, r"density must lie in \(0, 1\], not 0"),
        ({"rank": 0}, "rank must lie between 1 and 256 .*, not 0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        values: dict[str, Any] = {"density": 0.1, "heads": False, **options}
        planted_layers(shape_of("opt-small"), **values)
    with pytest.raises(ValueError, match="no shape is called 'opt-1t'; choose one of smollm2-135m"):
        synthetic_model("opt-1t", backend="native", dtype="int8")


def test_memory_is_checked_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    config = shape_of("opt-66b")
    with pytest.raises(ValueError, match=r"opt-66b in int8 needs about 7\d\.\d GB of memory and 20\.0 GB are free"):
        check_memory("opt-66b", config, backend="native", dtype="int8", available=20 * 10**9)
    with pytest.raises(ValueError, match=r"opt-66b in fp32 needs about 29\d\.\d GB"):
        check_memory("opt-66b", config, backend="native", dtype="fp32", available=100 * 10**9)
    check_memory("opt-66b", config, backend="native", dtype="int8", available=100 * 10**9)
    check_memory("opt-66b", config, backend="native", dtype="int8", available=None)
    monkeypatch.setattr(synthetic, "available_bytes", lambda root: 10**6)
    with pytest.raises(ValueError, match="GB are free"):
        synthetic_model("opt-small", backend="native", dtype="int8")


def test_available_memory_is_the_least_that_is_said(tmp_path: Path) -> None:
    assert available_bytes(tmp_path) is None

    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="ascii")

    write("proc/meminfo", "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    assert available_bytes(tmp_path) == 8000 * 1024
    write("proc/self/cgroup", "no line of the kernel's\n0::/a/b\n")
    write("sys/fs/cgroup/a/b/memory.max", "max\n")
    write("sys/fs/cgroup/a/memory.max", "5000000\n")
    for folder in ("a/b", "a"):
        write(f"sys/fs/cgroup/{folder}/memory.current", "3000000\n")
        write(f"sys/fs/cgroup/{folder}/memory.stat", "anon 1\ninactive_file 500000\n")
    assert available_bytes(tmp_path) == 2_500_000
    write("sys/fs/cgroup/a/memory.max", "many\n")
    assert available_bytes(tmp_path) == 8000 * 1024
    write("sys/fs/cgroup/a/memory.max", "1000\n")
    assert available_bytes(tmp_path) == 0


def test_a_kernel_without_huge_pages_still_has_a_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 9999, raising=False)  # advice that no kernel takes
    assert torch.equal(sequential_buffer(1001, "cpu"), torch.ones(1001))
