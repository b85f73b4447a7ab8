"""Kernels of the cuda engine compile without a GPU, for cards with the least shared memory too."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from conftest import Tiny
from dejavu.engine.cuda.engine import CudaEngine
from dejavu.engine.options import EngineOptions
from dejavu.kernels.cuda import mlp_rows
from dejavu.kernels.cuda.common import LEAST_SHARED
from dejavu.kernels.cuda.linear_rows import padded_rows
from dejavu.kernels.cuda.mlp_rows import DownShape, UpShape, down_shape_for, up_shape_for
from helpers.cuda import on
from helpers.engines import ids_of, random_layers

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("rows", [2, 32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("matrices", [1, 2])
def test_stages_are_as_many_as_shared_memory_holds(rows: int, dtype: torch.dtype, matrices: int) -> None:
    shape = up_shape_for(torch.zeros(rows, 4096, dtype=dtype, device="meta"), matrices)
    tile = (padded_rows(rows) + matrices * shape.rows) * shape.columns * dtype.itemsize
    assert (shape.stages - 1) * tile <= LEAST_SHARED and 1 < shape.stages <= UpShape().stages
    assert shape.stages == UpShape().stages or shape.stages * tile > LEAST_SHARED, "one more would not fit"
    down = down_shape_for(torch.zeros(7, padded_rows(rows), dtype=dtype, device="meta"))
    tile = down.rows * (padded_rows(rows) + down.columns) * dtype.itemsize
    assert down.stages * tile <= LEAST_SHARED and 1 < down.stages <= DownShape().stages
    assert down.stages == DownShape().stages or (down.stages + 1) * tile > LEAST_SHARED, "one more would not fit"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_shapes_for_the_least_shared_memory_give_the_same_tokens(tiny: Tiny, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """32 rows, whose tiles are the largest, over the union of what they select."""
    model = on(tiny("llama"), "cuda", dtype)
    layers = random_layers(model, mlp=1, heads=None)
    found, used = [], set()
    for least in (False, True):
        if least:
            monkeypatch.setattr(mlp_rows, "shared_memory", lambda device: LEAST_SHARED)
        used.add(up_shape_for(torch.zeros(32, 64, dtype=dtype, device="cuda"), 1 + model.config.gated))
        engine = CudaEngine(model, layers, EngineOptions(num_slots=32, page_size=4, cache_tokens=32 * 16), crossover=False)
        for slot in range(32):
            engine.prefill(slot, ids_of(slot, 5))
        found.append([engine.step([3 + slot for slot in range(32)], list(range(32))).logits_BV.clone() for _ in range(3)])
    assert len(used) == 2, "the same shapes"
    for plain_BV, least_BV in zip(*found, strict=True):
        torch.testing.assert_close(least_BV, plain_BV, rtol=0, atol=2e-5 if dtype == torch.float32 else 5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
def test_every_kernel_compiles(arch: int) -> None:
    """In a process of its own: here kernels are made for the interpreter."""
    command = [sys.executable, str(ROOT / "recipes" / "cuda_compiles.py"), "--arch", str(arch), "--shape", "opt-mini"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = set(re.findall(rf"\| sm_{arch} \| (\w+) \|", done.stdout))
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src" / "dejavu" / "kernels" / "cuda").glob("*.py"))
    started = set(re.findall(r"\blaunch\(\s*_(\w+),", text))
    assert started - found == {"read", "finish_logits"}, "reads for the benchmark; logits that this model leaves alone"
