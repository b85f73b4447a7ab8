"""Steps of `adapt` in one of several processes, for tests of training in parallel: what a process that is spawned imports."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from dejavu.model.transformer import Transformer
from dejavu.offline.adapt.corpus import Mixture, Windows
from dejavu.offline.adapt.ranks import joined_ranks, wait, world
from dejavu.offline.adapt.training import AdaptConfig, Trainer


def trained_steps(model: Transformer, config: AdaptConfig, ids: Sequence[int], steps: int) -> dict[str, object]:
    """What training is after so many steps in this process."""
    windows = Windows(torch.tensor(ids, dtype=torch.int32).numpy(), config.length, config.seed)
    trainer = Trainer(model, config, Mixture(windows, None, 0.0), lookahead_L=(0, 1, 1))
    reports = [trainer.train_step() for _ in range(steps)]
    return {
        "world": world(), "sizes": trainer.sizes, "gradient": trainer.gradient_P, "kl": [report.kl for report in reports],
        "density": [report.density for report in reports], "price": reports[-1].price, "samples": list(trainer.samples()),
        "weights": {name: weight.detach().clone() for name, weight in trainer.parameters.items()},
    }  # fmt: skip


def process(rank: int, count: int, port: int, folder: Path, config: AdaptConfig, ids: Sequence[int], steps: int) -> None:
    """As torchrun starts it: by the variables that it sets. The model is in model.pt of the folder, and what was found goes there."""
    place = {"WORLD_SIZE": count, "RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)
    model = torch.load(folder / "model.pt", weights_only=False)
    with joined_ranks("cpu"):
        torch.save(trained_steps(model, config, ids, steps), folder / f"{rank}.pt")
        wait()
