"""`adapt` in two processes (gloo): the same training as in one, each on its half of the windows."""

from __future__ import annotations

import dataclasses
import socket
from pathlib import Path

import pytest
import torch
from torch import multiprocessing

from conftest import Tiny
from dejavu.offline.adapt.training import AdaptConfig
from helpers.offline import random_ids
from helpers.ranks import process, trained_steps

STEPS, COUNT = 2, 2


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_two_processes_train_as_one(tiny: Tiny, tmp_path: Path) -> None:
    """A step's windows are shared out; micro-batches are of a process's own; weights stay equal to the last bit in both."""
    config = AdaptConfig(density=0.3, rank=6, lora_rank=3, steps=8, batch=8, length=16, warmup=2, learning_rate=5e-3, prompt_share=0.5)
    model, ids = tiny("llama", num_layers=3), random_ids(4000)
    torch.save(model, tmp_path / "model.pt")
    multiprocessing.spawn(process, (COUNT, free_port(), tmp_path, config, ids, STEPS), nprocs=COUNT)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(COUNT))
    alone = trained_steps(model, dataclasses.replace(config, micro_batch=4), ids, STEPS)

    assert (first["world"], second["world"], alone["world"]) == ((0, 2), (1, 2), (0, 1))
    assert first["samples"] + second["samples"] == alone["samples"] and len(first["samples"]) == 4
    assert first["sizes"].micro_batch == second["sizes"].micro_batch == 4
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]), name
    torch.testing.assert_close(first["gradient"], alone["gradient"], rtol=1e-3, atol=1e-5)
    for key in ("kl", "density"):
        assert first[key] == second[key] == pytest.approx(alone[key], rel=1e-5)
