"""What a loaded model does with whole texts, before it generates or in between: profile, train an adapter, evaluate.

In: texts, and options that are checked once. Out: an Adapter, and what was measured as typed dicts (figures.py). `LanguageModel` has
these methods, and all of them run where the model is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from dejavu.config import ModelConfig, Progress
from dejavu.engine.options import EngineOptions
from dejavu.figures import Evaluation, Profile, Training
from dejavu.generation.engine_cache import EngineCache
from dejavu.kernels.memory import keeping_freed, within_gpu_memory
from dejavu.model.adapter import Adapter
from dejavu.model.checkpoint import Checkpoint
from dejavu.model.selectors import LayerAdapter
from dejavu.model.texts import corpus_hash, document_ids, spread_windows
from dejavu.model.tokenizer import Tokenizer
from dejavu.model.transformer import Transformer
from dejavu.quality.evaluate import evaluate

OUT_OF_MEMORY = "end what else runs there, or take --backend native or torch, which works on the CPU"


class OfflineMethods:
    """The part of LanguageModel that reads whole texts; it has what is declared here."""

    checkpoint: Checkpoint
    model: Transformer
    tokenizer: Tokenizer
    config: ModelConfig
    name: str
    options: EngineOptions
    _engines: EngineCache

    def layers(self, *, adapter: Adapter | None = None, dense: bool = False) -> tuple[LayerAdapter, ...] | None:
        raise NotImplementedError

    @contextlib.contextmanager
    def _offline(self, lower: str = "") -> Generator[None]:
        """Work where the model is, whose memory is free of cached engines meanwhile. lower: what takes less of it."""
        self.model.require_weights()
        self._engines.clear()
        with within_gpu_memory(lower + OUT_OF_MEMORY), keeping_freed():
            yield

    def profile(self, text: str | Mapping[str, str], *, max_tokens: int = 60_000, progress: Progress | None = None) -> Profile:
        """Where the dense model is sparse by nature (Deja Vu, section 3).

        text: one text, or several by name, of each of which the first max_tokens tokens are read. A line `<|endoftext|>`
        ends a document. Runs where the model is. Raises ValueError for an empty text, MemoryError where a GPU is full.
        """
        from dejavu.offline.profile import profile

        texts = {"text": text} if isinstance(text, str) else text
        ids = document_ids(self.tokenizer, texts, max_tokens=max_tokens)
        with self._offline():
            return cast(Profile, profile(self.model, ids, bos=self.tokenizer.document_bos, progress=progress))

    def train(
        self,
        text: str | Sequence[str],
        *,
        method: Literal["predicted", "exact", "gate", "input", "head", "auto"] = "predicted",
        budget: float = 0.005,
        rank: int | None = None,
        loss: Literal["contribution", "bce"] = "contribution",
        epochs: float = 4.0,
        learning_rate: float = 5e-3,
        max_tokens: int = 200_000,
        lookahead: Literal["auto", "0", "1"] = "auto",
        lookahead_tolerance: float = 0.2,
        heads: bool = True,
        cached_tokens: int = 256,
        seed: int = 0,
        work_folder: str | Path | None = None,
        work_memory: float | None = None,
        progress: Progress | None = None,
    ) -> Adapter | None:
        """Train an adapter and calibrate it to a loss budget (allowed relative rise of perplexity on held-out text).

        method: predicted, exact, gate, input, head (a screened head alone), or auto, which trains each that the model can have, times it
        here against the dense model, with and without a screened head, and takes the fastest within the budget: None where dense is as
        fast. The budget of a screened head is of the probability that it misses.
        max_tokens are spread evenly over the text; a line `<|endoftext|>` ends a document. work_folder keeps finished
        layers, so that the same call goes on after an interruption. work_memory: GB of a layer's
        activations that a GPU holds at most (None: 10), and the CPU's memory (None: all that is free); what is over lies in page-locked
        memory beside the GPU, or in files of work_folder. The other options: see TrainConfig. The model goes on as it is:
        set `lm.adapter`, or give the adapter to `generate`. Runs where the model is, on a GPU too. Raises ValueError for an empty text or
        an option out of range, MemoryError where a GPU is full.
        """
        return self.train_measured(
            text, method=method, budget=budget, rank=rank, loss=loss, epochs=epochs, learning_rate=learning_rate, max_tokens=max_tokens,
            lookahead=lookahead, lookahead_tolerance=lookahead_tolerance, heads=heads, cached_tokens=cached_tokens, seed=seed,
            work_memory=work_memory, work_folder=work_folder, progress=progress,
        )[0]  # fmt: skip

    def train_measured(
        self,
        text: str | Sequence[str],
        *,
        method: Literal["predicted", "exact", "gate", "input", "head", "auto"] = "predicted",
        budget: float = 0.005,
        rank: int | None = None,
        loss: Literal["contribution", "bce"] = "contribution",
        epochs: float = 4.0,
        learning_rate: float = 5e-3,
        max_tokens: int = 200_000,
        lookahead: Literal["auto", "0", "1"] = "auto",
        lookahead_tolerance: float = 0.2,
        heads: bool = True,
        cached_tokens: int = 256,
        seed: int = 0,
        work_folder: str | Path | None = None,
        work_memory: float | None = None,
        progress: Progress | None = None,
    ) -> tuple[Adapter | None, Training]:
        """As `train`, with what was measured on the way."""
        from dejavu.bench.fastest import chosen, speeds
        from dejavu.bench.fastest_head import with_screened_heads
        from dejavu.offline.train import train_adapters
        from dejavu.offline.train_config import TrainConfig
        from dejavu.offline.training_text import TrainingText

        config = TrainConfig(
            method=method, budget=budget, rank=rank, loss=loss, epochs=epochs, learning_rate=learning_rate, max_tokens=max_tokens,
            lookahead=lookahead, lookahead_tolerance=lookahead_tolerance, heads=heads, cached_tokens=cached_tokens, seed=seed,
            work_memory=work_memory,
        )  # fmt: skip
        texts = [text] if isinstance(text, str) else list(text)
        windows = self.training_windows(texts, max_tokens=config.max_tokens)
        hashed = corpus_hash(texts)
        lower = "lower --work-memory, --rank or --max-tokens (what is finished is kept), "
        with self._offline(lower):
            words = TrainingText.of(self.checkpoint, windows)
            found = (
                []
                if method == "head"
                else train_adapters(
                    self.checkpoint,
                    words,
                    config,
                    text_hash=hashed,
                    work_folder=None if work_folder is None else Path(work_folder),
                    progress=progress,
                )
            )
        ids = [token for window in windows for token in window]
        for adapter, result in found:
            layers = adapter.attached(self.model, dtype=self.options.dtype)
            timed = speeds(self.model, layers, ids, self.options, name=self.name, progress=progress)
            result |= timed | result  # why a method was not tried is its note, not that it selects nothing
        no_head = None
        if method in ("head", "auto"):
            with self._offline(lower):
                found, no_head = with_screened_heads(
                    self.checkpoint, words, config, found, ids, self.options, text_hash=hashed, progress=progress
                )
        taken, measured = chosen(found, no_head) if method == "auto" else (found[0], found[0][1])
        if taken is None:
            return None, cast(Training, measured)
        described = dataclasses.replace(taken[0].config, calibration_max_tokens=config.max_tokens)
        return dataclasses.replace(taken[0], config=described), cast(Training, measured)

    def calibration_perplexity(self, texts: Sequence[str], adapter: Adapter) -> float:
        """Dense perplexity of this model on the tokens that the adapter's `ppl_dense` was measured on.

        texts: those that the adapter was trained on. Raises ValueError where the adapter does not say how they were cut.
        """
        from dejavu.offline.fidelity import token_nll
        from dejavu.offline.training_text import TrainingText

        max_tokens = adapter.config.calibration_max_tokens
        if max_tokens is None:
            raise ValueError("the adapter's config.json has no calibration_max_tokens; train the adapter again")
        windows = self.training_windows(texts, max_tokens=max_tokens)
        with self._offline():
            words = TrainingText.of(self.checkpoint, windows)
            return math.exp(float(token_nll(self.model, words.measured.check).double().mean()))

    def training_windows(self, texts: Sequence[str], *, max_tokens: int) -> list[list[int]]:
        """The windows of a text that training reads: as long as `training_context`, BOS included, but ids without BOS."""
        from dejavu.offline.split import training_context

        length = training_context(self.config) - (self.tokenizer.document_bos is not None)
        return spread_windows(self.tokenizer, texts, max_tokens=max_tokens, length=length)

    def evaluate(
        self,
        *,
        texts: Mapping[str, str] | None = None,
        tasks: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
        max_tokens: int = 100_000,
        limit: int = 250,
        stride: int | None = None,
        strict: bool = False,
        adapter: Adapter | None = None,
        dense: bool = False,
        progress: Progress | None = None,
    ) -> Evaluation:
        """Perplexity of texts and accuracy on tasks, dense and sparse.

        texts: name -> text; tasks: name -> records as `dejavu.quality.tasks.read_items` reads them from a JSONL file.
        """
        with within_gpu_memory(OUT_OF_MEMORY), keeping_freed():
            return evaluate(
                self.model,
                self.tokenizer,
                self.layers(adapter=adapter, dense=dense),
                texts=texts or {},
                tasks=tasks or {},
                max_tokens=max_tokens,
                limit=limit,
                stride=stride,
                strict=strict,
                progress=progress,
            )
