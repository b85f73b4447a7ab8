"""Stand-ins for what needs a GPU: an engine that says it is cuda's and computes as torch's, on the CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dejavu.engine import backends
from dejavu.engine.interface import StepProfile, StepResult
from dejavu.engine.options import EngineOptions
from dejavu.engine.torch_engine import TorchEngine
from dejavu.model.counts import Counts
from dejavu.model.selectors import LayerAdapter
from dejavu.model.transformer import Transformer

GPU_NAME = "NVIDIA Test 80GB"


class CudaStandIn(TorchEngine):
    """Offers what the cuda engine does besides decoding. made: how each was built; buffers: what each was asked to read, in bytes."""

    made: list[EngineOptions]
    buffers: list[int]

    def __init__(self, model: Transformer, layers: Sequence[LayerAdapter] | None, device: str, options: EngineOptions) -> None:
        super().__init__(model, layers, dataclasses.replace(options, record=True))
        self._info = dataclasses.replace(self._info, backend="cuda", device=device)

    def step(self, token_ids_B: Sequence[int], slots_B: Sequence[int], **options: Any) -> StepResult:
        return dataclasses.replace(super().step(token_ids_B, slots_B, **options), selections=None)

    def profiled_step(self, token_ids_B: Sequence[int], slots_B: Sequence[int]) -> tuple[StepResult, StepProfile]:
        result = super().step(token_ids_B, slots_B)
        assert result.selections is not None

        def union(layer: int, part: str, total: int) -> int:
            chosen = [getattr(row[layer], part) for row in result.selections or ()]
            return total if any(indices is None for indices in chosen) else len({int(i) for indices in chosen for i in indices})

        layers = range(self.info.num_layers)
        neurons_L = torch.tensor([union(layer, "neurons_A", self.info.num_neurons) for layer in layers])
        heads_L = torch.tensor([union(layer, "heads_A", self.info.num_heads) for layer in layers])
        profile = StepProfile(seconds={}, counts=Counts(neurons=neurons_L, heads=heads_L), fired_L=neurons_L // 2)
        return dataclasses.replace(result, selections=None), profile

    def graph(self, rows: int) -> Any:
        return rows

    def read(self, buffer: Tensor) -> None:
        self.buffers.append(buffer.nbytes)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> type[CudaStandIn]:
    """From now on `make_engine(backend="cuda")` builds a CudaStandIn that says it is on cuda:0, and this machine has a GPU to name."""
    make_engine = backends.make_engine
    CudaStandIn.made, CudaStandIn.buffers = [], []

    def make(model: Transformer, layers: Any = None, options: EngineOptions = EngineOptions()) -> Any:
        if options.backend != "cuda":
            return make_engine(model, layers, options)
        CudaStandIn.made.append(options)
        return CudaStandIn(model, layers, "cuda:0", EngineOptions(num_slots=options.num_slots, cache_tokens=options.cache_tokens))

    for module in ("engine.backends", "bench.decode", "bench.variants"):
        monkeypatch.setattr(f"dejavu.{module}.make_engine", make)
    offered = backends.BackendStatus(name="cuda")
    monkeypatch.setattr(backends, "backends", lambda: (offered, backends.BackendStatus(name="torch")))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: GPU_NAME)
    monkeypatch.setattr("dejavu.bench.decode.node_count", lambda rows: 100 + rows)
    monkeypatch.setattr("dejavu.bench.decode.free_gpu_bytes", lambda device: 4096 if device == "cuda:0" else None)
    monkeypatch.setattr("dejavu.bench.decode.sequential_buffer", lambda count, device: torch.ones(count))
    return CudaStandIn
