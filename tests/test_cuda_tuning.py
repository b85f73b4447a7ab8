"""Shapes of kernels on devices that the table does not have: which is taken, what is kept, and that results are the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from conftest import Tiny
from dejavu.engine.cuda import tuning
from dejavu.engine.cuda.engine import CudaEngine
from dejavu.engine.options import EngineOptions
from dejavu.kernels.cuda import shapes
from dejavu.kernels.cuda.common import GridShape
from dejavu.kernels.cuda.gate import mlp_by_gate_definition
from helpers.cuda import DEVICES, on
from helpers.engines import ids_of
from helpers.thresholds import gate_layers, input_layers


def test_the_fastest_shape_is_taken_and_one_without_room_is_not() -> None:
    def timed(shape: GridShape) -> float:
        if shape.warps == 16:
            raise OutOfResources(300, 200, "registers")
        return {(1, 8, 2): 0.5, (2, 4, 2): 0.2}.get((shape.rows, shape.warps, shape.programs), 1.0)

    assert tuning.fastest("mlp", 4096, timed) == (2, 4, 2)


def test_what_is_hardly_faster_changes_nothing() -> None:
    known = shapes.measured_shape("project", 4096)
    assert tuning.fastest("project", 4096, lambda shape: 1.0 if shape == known else 0.995) == (known.rows, known.warps, known.programs)


def test_a_damaged_file_is_none(tmp_path: Path) -> None:
    path = tmp_path / "shapes.json"
    path.write_text(json.dumps({"mlp, 64": [1, 4, 2]}))
    assert tuning.read(str(path)) == {"mlp, 64": (1, 4, 2)}
    for damaged in (
        path.read_text()[:-4],
        "[]",
        "null",
        '{"k": 3}',
        '{"k": null}',
        '{"k": [1, 4]}',
        '{"k": [3, 4, 2]}',
        '{"k": [[1], 4, 2]}',
    ):
        path.write_text(damaged)
        assert tuning.read(str(path)) == tuning.read(None) == {}, damaged


def test_devices_of_the_table_are_known_by_their_names() -> None:
    assert shapes.is_known("NVIDIA H100 80GB HBM3") and shapes.is_known("NVIDIA H200")
    assert not shapes.is_known("NVIDIA GeForce RTX 4090")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("method", "kernels"), [("gate", {"project", "gated mlp", "mlp by gate"}), ("input", set()), (None, {"project", "gated mlp"})]
)
def test_what_is_timed_runs(tiny: Tiny, method: str | None, kernels: set[str], device: str) -> None:
    """In every shape that is tried, of a model that selects by gates, by inputs, which has no such kernel, and not at all."""
    model = on(tiny("llama"), device)
    layers = None if method is None else {"gate": gate_layers, "input": input_layers}[method](model, 0.5)
    engine = CudaEngine(model, layers, EngineOptions(num_slots=1))
    works = tuning.works(engine._model)
    assert works.keys() == kernels
    for numbers in shapes.CANDIDATES if device == "cuda" else shapes.CANDIDATES[:2]:
        for work in works.values():
            work(shapes.shape_of(numbers))


def test_a_gate_is_timed_with_half_of_its_neurons(tiny: Tiny) -> None:
    model = tiny("llama")
    engine = CudaEngine(model, gate_layers(model, 0.5), EngineOptions(num_slots=1))
    layer, y_D = engine._model.weights[0], torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    _, keep_F = mlp_by_gate_definition(y_D, torch.zeros_like(y_D), layer.norm2, layer.mlp, float(tuning._half(y_D, layer)))
    assert keep_F.float().mean() == pytest.approx(0.5, abs=2 / len(keep_F))


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [True, False])
def test_an_unknown_device_is_timed_once(
    tiny: Tiny, gated: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It says so; the second engine says nothing, and tokens are those of the shapes of the table."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(shapes, "_used", {})
    model, options = on(tiny("llama" if gated else "opt"), "cuda"), EngineOptions(num_slots=1)
    monkeypatch.setattr(tuning, "is_known", lambda name: True)
    plain_V = CudaEngine(model, None, options).prefill(0, ids_of(1, 9))
    assert not caplog.records
    monkeypatch.setattr(tuning, "is_known", lambda name: False)
    found = []
    for _ in range(2):
        engine = CudaEngine(model, None, options)
        engine.prefill(0, ids_of(1, 9))
        found.append(engine.step([3], [0]).logits_BV[0])
    assert len(caplog.records) == 2 and torch.cuda.get_device_name() in caplog.records[0].getMessage()
    assert {kernel for _, kernel, _ in shapes._used} == {"project", "gated mlp" if gated else "mlp"}
    kept = json.loads(next(tmp_path.rglob("shapes.json")).read_text())
    assert {key: tuple(value) for key, value in kept.items()} == {
        f"{kernel}, {size}": (shape.rows, shape.warps, shape.programs) for (_, kernel, size), shape in shapes._used.items()
    }
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=2e-5)
    monkeypatch.setattr(shapes, "_used", {})
    monkeypatch.setattr(tuning, "is_known", lambda name: True)
    engine = CudaEngine(model, None, options)
    assert torch.equal(engine.prefill(0, ids_of(1, 9)), plain_V)
    torch.testing.assert_close(engine.step([3], [0]).logits_BV[0], found[0], rtol=0, atol=2e-5)
