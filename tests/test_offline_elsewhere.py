"""Offline work on another device than the CPU: the same results, and no tensor of the CPU in between (helpers/elsewhere.py)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from conftest import Tiny
from dejavu.model.checkpoint import Checkpoint
from dejavu.model.tokenizer import Tokenizer
from dejavu.model.transformer import Transformer
from dejavu.offline.curves import perplexity_curves, recall_curves
from dejavu.offline.profile import profile
from dejavu.offline.train import train_adapters
from dejavu.offline.train_config import TrainConfig
from dejavu.quality.evaluate import evaluate
from helpers.elsewhere import DEVICE, elsewhere
from helpers.offline import random_ids, skewed


def both(model: Transformer, work: Callable[[Transformer], Any]) -> tuple[Any, Any]:
    """What work gives on the CPU and elsewhere."""
    here = work(copy.deepcopy(model))
    with elsewhere():
        there = work(copy.deepcopy(model).to(DEVICE))
    return here, there


def test_a_profile_is_the_same_elsewhere(tiny: Tiny) -> None:
    here, there = both(skewed(tiny), lambda model: profile(model, {"a": random_ids(100)}, bos=2, oracle_tokens=60))
    assert here == there


def test_adapters_of_every_method_and_their_curves_are_the_same_elsewhere(tiny: Tiny, tokenizer: Tokenizer, tmp_path: Path) -> None:
    def work(model: Transformer) -> tuple[list[list[float]], list[Any]]:
        checkpoint = Checkpoint(
            model=model, tokenizer=tokenizer, config=model.config, name="tiny", base_hash="x", stored_dtype="fp32", notes=(), path=tmp_path
        )  # fmt: skip
        config, folder = TrainConfig(method="auto", budget=0.05, rank=4, epochs=1), tmp_path / str(model.device)
        found = train_adapters(checkpoint, [random_ids(700)], config, text_hash="x", work_folder=folder)
        again = train_adapters(checkpoint, [random_ids(700)], config, text_hash="x", work_folder=folder)
        layers = found[0][0].attached(model)
        texts = {"a": "the cat sat on the mat " * 20}
        tasks = {"t": [{"context": "the cat", "choices": [" sat on", " dog"], "label": 0}]}
        quality = evaluate(model, tokenizer, layers, texts=texts, tasks=tasks)
        ids, keys = random_ids(250, 5), ("ppl_dense", "ppl_sparse", "mlp_density", "head_density")
        recall, ppl = recall_curves(model, layers, ids, bos=2), perplexity_curves(model, layers, ids, bos=2)
        points = [row[part] for row in recall for part in ("mlp", "heads") if row[part]]
        return [[result[key] for key in keys] for _, result in (*found, *again)], [quality["dense"]["ppl"], ppl["ppl_dense"], *points]

    here, there = both(skewed(tiny), work)
    torch.testing.assert_close(there, here, rtol=1e-2, atol=5e-3)
