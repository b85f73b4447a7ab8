"""A screened head among the candidates of `dejavu train --method auto`, or alone: trained within the budget, timed, taken where it pays.

In: a checkpoint, the TrainingText, adapters with what training measured of each (`Trained`). Out: further candidates of the same kind: the
fastest method with a screened head, and the head alone, with `screened_head`, what was measured of it, and `speedup_without`, what the
candidate is held against: the head is taken where it makes that at least MARGIN times as fast (bench/fastest.py).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

from dejavu.bench.fastest import fastest, head_cannot_pay, speeds
from dejavu.config import Progress, require
from dejavu.engine.options import EngineOptions
from dejavu.model.adapter import Adapter
from dejavu.model.adapter_config import AdapterConfig, LayerConfig, ScreenConfig
from dejavu.model.checkpoint import Checkpoint
from dejavu.model.selectors import LayerAdapter
from dejavu.model.transformer import Transformer
from dejavu.offline.calibrate import token_reads
from dejavu.offline.head import HeadFit
from dejavu.offline.train import Trained
from dejavu.offline.train_config import TrainConfig
from dejavu.offline.training_text import TrainingText


def with_screened_heads(
    checkpoint: Checkpoint,
    text: TrainingText,
    config: TrainConfig,
    found: Sequence[Trained],
    ids: Sequence[int],
    options: EngineOptions,
    *,
    text_hash: str,
    progress: Progress | None = None,
) -> tuple[list[Trained], str | None]:
    """The candidates, those with a screened head among them, and why there is none with one. found: with their speeds. ids: a text to time
    on. Method head has one, untimed where the backend has none.

    Raises ValueError with method head where no screened head keeps the budget.
    """
    model = checkpoint.model
    if config.method != "head" and (reason := head_cannot_pay(model, options)) is not None:
        return list(found), reason
    started = time.perf_counter()
    fit, base, candidates = HeadFit(text, seed=config.seed, progress=progress), fastest(found), list(found)
    dense_layers = (LayerAdapter(),) * model.config.num_layers
    for adapter, result in [(None, None)] if base is None else [(None, None), base]:
        layers = None if adapter is None else adapter.attached(model, dtype=options.dtype)
        screened = fit.within(config.budget, layers)
        if screened is None:
            continue
        screen, measured = screened
        if adapter is None:
            ppl = math.exp(float(text.dense.nll.double().mean()))
            own = _dense_result(model, config, ppl) | {"tokens": text.ids_WT.numel(), "tokens_given": text.given}
            one = Adapter(layers=dense_layers, screen=screen, config=_config(checkpoint, config, text_hash, ppl, measured))
        else:
            assert result is not None
            own = result | {"method": f"{result['method']}+head"}
            described = dataclasses.replace(adapter.config, screened_head=measured)
            one = dataclasses.replace(adapter, screen=screen, config=described)
        own |= {"screened_head": measured.to_dict(), "speedup_without": 1.0 if result is None else result["speedup"]}
        timed = speeds(model, layers or dense_layers, ids, options, name=checkpoint.name, screen=screen, progress=progress)
        candidates.append((one, {"speed_note": None} | own | {"seconds": time.perf_counter() - started} | timed))
        started = time.perf_counter()
    reason = f"none misses at most {config.budget:.2%} of the probability on this text" if len(candidates) == len(found) else None
    require(config.method != "head" or reason is None, f"no screened head: {reason}; allow more (--budget), or give a longer text")
    return candidates, reason


def _dense_result(model: Transformer, config: TrainConfig, ppl: float) -> dict[str, Any]:
    """What training says of layers that all run dense."""
    all_L = [1.0] * model.config.num_layers
    row = {"recall": None, "mass": None, "density": 1.0, "lookahead": None, "heads": None, "curve": []}
    return {
        "method": "head",
        "layers": [dict(row) for _ in all_L],
        "ppl_dense": ppl,
        "ppl_sparse": ppl,
        "rise": 0.0,
        "rise_stderr": 0.0,
        "mlp_density": 1.0,
        "head_density": 1.0,
        "reads": token_reads(model.config, [LayerAdapter()] * len(all_L), all_L, all_L, config.cached_tokens),
        "read_share": 1.0,
        "budget": config.budget,
        "within_budget": True,
    }


def _config(checkpoint: Checkpoint, config: TrainConfig, text_hash: str, ppl: float, measured: ScreenConfig) -> AdapterConfig:
    """Of an adapter that is a screened head alone."""
    return AdapterConfig(
        base_id=checkpoint.name,
        base_hashes=(checkpoint.base_hash,),
        method="head",
        budget=config.budget,
        calibration_text_hash=text_hash,
        quality={"ppl_dense": ppl, "ppl_sparse": ppl, "rise": 0.0, "rise_stderr": 0.0},
        mlp_density=1.0,
        head_density=1.0,
        seed=config.seed,
        layers=tuple(LayerConfig(layer=layer) for layer in range(checkpoint.config.num_layers)),
        screened_head=measured,
    )
