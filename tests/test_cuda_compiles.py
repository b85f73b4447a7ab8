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

from dejavu.kernels.cuda.common import LEAST_SHARED
from dejavu.kernels.cuda.mlp_rows import UpShape, padded_rows, up_shape_for

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("rows", [2, 32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("matrices", [1, 2])
def test_stages_are_as_many_as_shared_memory_holds(rows: int, dtype: torch.dtype, matrices: int) -> None:
    shape = up_shape_for(torch.zeros(rows, 4096, dtype=dtype, device="meta"), matrices)
    tile = (padded_rows(rows) + matrices * shape.rows) * shape.columns * dtype.itemsize
    assert (shape.stages - 1) * tile <= LEAST_SHARED and 1 < shape.stages <= UpShape().stages
    assert shape.stages == UpShape().stages or shape.stages * tile > LEAST_SHARED, "one more would not fit"


@pytest.mark.slow
@pytest.mark.parametrize("arch", [86, 90])
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
