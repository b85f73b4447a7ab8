"""The whole of `dejavu adapt` in a run folder: tokens, text of the model's own, training that resumes, the finished adapter.

In: a checkpoint (weights in any form; they stay as they are), documents, an AdaptConfig, a folder.
 Out: an Adapter and what was measured, or None where the run was
asked to stop. The folder keeps `run.json` (what it is for), `tokens.npy`, `chat.npy`, `lookahead.json`, `state.safetensors`,
`moments.safetensors` (which may be missing: it is twice as large as the rest) and `log.jsonl`; the same call goes on from there, another
one is refused. Of several processes the first writes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from dejavu.config import ModelConfig, Progress, require
from dejavu.damage import damaged
from dejavu.files import read_object, working_in, write_json
from dejavu.kernels.dtypes import TORCH_DTYPES
from dejavu.kernels.memory import within_gpu_memory
from dejavu.model.adapter import Adapter
from dejavu.model.checkpoint import Checkpoint
from dejavu.model.transformer import Transformer
from dejavu.offline.adapt import own_text
from dejavu.offline.adapt.base import shared_base
from dejavu.offline.adapt.corpus import Mixture, Windows, kept_ids, read_ids, tokenized
from dejavu.offline.adapt.finish import DENSITY_WINDOWS, make_adapter
from dejavu.offline.adapt.ranks import wait, world
from dejavu.offline.adapt.student import choose_lookaheads, residual_cosines
from dejavu.offline.adapt.training import AdaptConfig, StepReport, Trainer, check_run

CHAT_TOKENS = 2_000_000
LOG_EVERY = 10  # steps
SIZES = ("micro_batch", "checkpoint_layers")  # may change where a run goes on
ELSEWHERE = "end what else runs there, or take a smaller model"
LOG_FILE = "log.jsonl"


def adapt(
    checkpoint: Checkpoint,
    documents: Sequence[str],
    config: AdaptConfig,
    *,
    text_hash: str,
    folder: Path,
    device: str = "cpu",
    chat_tokens: int = CHAT_TOKENS,
    start: Adapter | None = None,
    report: Callable[[StepReport], None] | None = None,
    stop: Callable[[], bool] | None = None,
    progress: Progress | None = None,
) -> tuple[Adapter, dict[str, Any]] | None:
    """Adapt a model in the folder, going on where an earlier call stopped. None: `stop` ended it, or this process is not the first.

    device: cpu or cuda; config.dtype: what is computed and measured in, by one copy of the weights there.
    chat_tokens: how much the dense model writes where config.chat_share is positive. start: an adapter of the same
    model to begin with, of the same ranks, whose predictors look ahead where it says. Raises ValueError for a folder of another run, too
    little text, sizes that do not fit together;
    MemoryError where a GPU's memory is not enough, after which the same call goes on, with other SIZES too.
    """
    model, started = checkpoint.model, time.perf_counter()
    require(
        config.length <= model.config.max_positions, f"length {config.length} exceeds the model's context of {model.config.max_positions}"
    )
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
    first = world()[0] == 0
    with working_in(folder) if first else nullcontext():
        return _adapted(checkpoint, documents, config, text_hash, folder, device, chat_tokens, start, report, stop, progress, started)


def _adapted(
    checkpoint: Checkpoint,
    documents: Sequence[str],
    config: AdaptConfig,
    text_hash: str,
    folder: Path,
    device: str,
    chat_tokens: int,
    start: Adapter | None,
    report: Callable[[StepReport], None] | None,
    stop: Callable[[], bool] | None,
    progress: Progress | None,
    started: float,
) -> tuple[Adapter, dict[str, Any]] | None:
    first = world()[0] == 0
    if first:
        settings = {name: value for name, value in config.to_dict().items() if name not in SIZES}
        settings |= {"base_hash": checkpoint.base_hash, "text_hash": text_hash}
        settings |= {"chat_tokens": chat_tokens} if config.chat_share else {}
        check_run(folder, settings | ({} if start is None else {"start": start.digest}))
    with within_gpu_memory(ELSEWHERE):
        model = shared_base(checkpoint.model, device, TORCH_DTYPES[config.dtype])
        if first:
            _prepare(checkpoint, model, documents, config, folder, chat_tokens, progress)
    wait()
    text = Windows(read_ids(folder / "tokens.npy", model.config), config.length, config.seed)
    own = Windows(read_ids(folder / "chat.npy", model.config), config.length, config.seed, held_out=False) if config.chat_share else None
    cosine_L = _read_cosines(folder / "lookahead.json", model.config)
    lookahead_L = choose_lookaheads(cosine_L, config.lookahead_cosine) if start is None else _lookaheads(start)
    with within_gpu_memory(ELSEWHERE):
        trainer = Trainer(
            model, config, Mixture(text, own, config.chat_share), lookahead_L=lookahead_L,
            prompts=own_text.Prompts(checkpoint.tokenizer, documents, seed=config.seed) if config.own_share else None,
            eos=checkpoint.tokenizer.eos_token_ids, start=start,
        )  # fmt: skip
    trainer.resume(folder)

    def log(made: StepReport) -> None:
        if first and (made.step % LOG_EVERY == 0 or made.step == 1 or made.fraction >= 1):
            names = ("step", "fraction", "kl", "own", "density", "target", "price", "gradient_norm", "rate")
            row = {name: getattr(made, name) for name in names} | {"writing": round(made.writing, 4)}
            row |= {"tokens_per_second": round(made.tokens_per_second), "density_L": [round(d, 4) for d in made.density_L]}
            row |= {"seconds_left": made.seconds_left, "gpu_bytes": made.gpu_bytes} | {name: getattr(made, name) for name in SIZES}
            with (folder / LOG_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        if report is not None:
            report(made)

    if not trainer.run(folder, report=log, stop=stop) or not first:
        return None
    with within_gpu_memory(ELSEWHERE):
        adapter, result = make_adapter(
            checkpoint, trainer.student, config, trainer.windows.batch(range(DENSITY_WINDOWS)), text.held_out, text_hash=text_hash,
            cosine_L=cosine_L, progress=progress,
        )  # fmt: skip
    result |= {"steps": trainer.step, "tokens": trainer.step * config.batch * config.length, "training_seconds": trainer.elapsed}
    result |= {
        "micro_batch": trainer.sizes.micro_batch,
        "checkpoint_layers": trainer.sizes.checkpoint_layers,
        "gpu_bytes": trainer.gpu_bytes(),
    }
    return adapter, result | {"seconds": time.perf_counter() - started}


def _lookaheads(start: Adapter) -> tuple[int, ...]:
    """Of the adapter's predictors; 0 where it has none."""
    return tuple(layer.neurons.lookahead or 0 for layer in start.layers)


def _read_cosines(path: Path, config: ModelConfig) -> list[float]:
    cosine_L = read_object(path).get("cosine")
    numbers = isinstance(cosine_L, list) and len(cosine_L) == config.num_layers and all(isinstance(each, float) for each in cosine_L)
    if not numbers:
        raise damaged(path, f"it has no cosine for each of {config.num_layers} layers", f"remove {path.parent} to begin anew")
    return cosine_L


def _prepare(
    checkpoint: Checkpoint,
    model: Transformer,
    documents: Sequence[str],
    config: AdaptConfig,
    folder: Path,
    chat_tokens: int,
    progress: Progress | None,
) -> None:
    """What is made once: the ids of the text, text of the model's own, the cosines that decide on lookahead."""
    kept_ids(folder / "tokens.npy", lambda: tokenized(checkpoint.tokenizer, documents))
    windows = Windows(read_ids(folder / "tokens.npy", checkpoint.config), config.length, config.seed)
    if config.chat_share:
        kept_ids(
            folder / "chat.npy",
            lambda: own_text.written(model, checkpoint.tokenizer, documents, tokens=chat_tokens, seed=config.seed, progress=progress),
        )
    if not (folder / "lookahead.json").exists():
        write_json(folder / "lookahead.json", {"cosine": residual_cosines(model, windows.held_out)})
