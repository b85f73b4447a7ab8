"""The evaluation of evaluate.py in parts that can be kept: what an interrupted run has finished is not measured again.

In: as `evaluate`, and a store of finished parts. Out: the same dict. A part is one text or one task, dense and sparse, as
plain JSON: sums per window of a text, the summary of a task, and what was selected.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dejavu.config import require
from dejavu.files import read_json, text_hash, write_json
from dejavu.measure.evaluate import BOS_NEVER, BOS_ONCE, Progress, scored_part
from dejavu.measure.perplexity import MaskedSelections, PerplexityResult, paired_rise, perplexity, pooled
from dejavu.measure.tasks import evaluate_task
from dejavu.model.predictor import DensityCounter, LayerAdapter
from dejavu.model.tokenizer import Tokenizer
from dejavu.model.transformer import Transformer


@dataclass
class PartStore:
    """Finished parts by name, kept in a JSON file where there is one. Parts measured with other settings are dropped."""

    settings: Mapping[str, Any]
    path: Path | None = None
    parts: dict[str, Any] = field(default_factory=dict)
    reused: int = 0

    def __post_init__(self) -> None:
        if self.path is not None and self.path.is_file():
            held = read_json(self.path)
            if isinstance(held, dict) and held.get("settings") == dict(self.settings):
                self.parts = held["parts"]

    def get(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The part of this name, measured and kept if it is not there yet."""
        if name in self.parts:
            self.reused += 1
            return self.parts[name]
        self.parts[name] = measure()
        if self.path is not None:
            write_json(self.path, {"settings": dict(self.settings), "parts": self.parts})
        return self.parts[name]


def evaluate_parts(
    model: Transformer,
    tokenizer: Tokenizer,
    layers: tuple[LayerAdapter, ...] | None,
    *,
    texts: Mapping[str, str],
    tasks: Mapping[str, Sequence[Mapping[str, Any]]],
    store: PartStore,
    max_tokens: int = 100_000,
    limit: int = 250,
    stride: int | None = None,
    strict: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """As `evaluate` with the model's whole context, skipping the parts that the store has."""
    require(len(texts) + len(tasks) > 0, "nothing to evaluate; give a text (--text) or a task (--tasks)")
    require(max_tokens >= 1, f"max_tokens must be at least 1, not {max_tokens}")
    require(limit >= 1, f"limit must be at least 1, not {limit}")
    context = model.config.max_positions

    def watch(what: str) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, total: progress(what, done, total)

    def measure_text(name: str, text: str) -> dict[str, Any]:
        part = scored_part(tokenizer, text, max_tokens)
        least = 1 if part.bos is not None else 2
        require(len(part.ids) >= least, f"text {name!r} has {len(part.ids)} tokens to score, but needs {least}; give more text or tokens")
        settings: dict[str, Any] = {"bos": part.bos, "context": context, "stride": stride}
        dense = perplexity(model, part.ids, **settings, progress=watch(f"{name} dense"))
        found: dict[str, Any] = {"bytes": part.num_bytes, "dense": dataclasses.asdict(dense), "sparse": None}
        if layers is not None:
            masked = MaskedSelections(layers)
            sparse = perplexity(model, part.ids, **settings, selection_factory=masked, progress=watch(f"{name} sparse"))
            found |= {"sparse": dataclasses.asdict(sparse), "selected": dataclasses.asdict(masked.counter)}
        return found

    def measure_task(name: str, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        masked = None if layers is None else MaskedSelections(layers)
        task = evaluate_task(model, tokenizer, name, records[:limit], masked=masked, strict=strict, progress=watch(name))
        return dataclasses.asdict(task) | ({} if masked is None else {"selected": dataclasses.asdict(masked.counter)})

    for name, text in texts.items():
        require(text != "", f"text {name!r} is empty; give a file with text")
    text_parts = {
        name: store.get(f"text {name} {text_hash(text)}", lambda n=name, t=text: measure_text(n, t)) for name, text in texts.items()
    }
    task_parts = {
        name: store.get(f"task {name} {text_hash(str(records))}", lambda n=name, r=records: measure_task(n, r))
        for name, records in tasks.items()
    }
    return _assembled(text_parts, task_parts, sparse=layers is not None, num_layers=model.config.num_layers) | {
        "context": context,
        "stride": context if stride is None else stride,
        "bos": BOS_ONCE if tokenizer.adds_bos else BOS_NEVER,
    }


def _assembled(texts: Mapping[str, Any], tasks: Mapping[str, Any], *, sparse: bool, num_layers: int) -> dict[str, Any]:
    """The dict of `evaluate` from the parts of texts and tasks."""
    ones, total = [1.0] * num_layers, DensityCounter(num_layers)
    if sparse:
        for part in (*texts.values(), *tasks.values()):
            _add(total, part["selected"])
        require(
            total.tokens > 0,
            "a sparse evaluation was asked for, but no token was scored sparse: the context of a task runs dense and every "
            "continuation has one token; use --strict, or add a --text",
        )
    tokens = sum(sum(part["dense"]["window_tokens"]) for part in texts.values()) + sum(part["tokens"] for part in tasks.values())
    dense_side = _side("dense", texts, tasks) | {"mlp_density": 1.0, "head_density": 1.0}
    dense_side |= {"mlp_density_per_layer": ones, "head_density_per_layer": ones, "tokens": tokens, "tokens_sparse": 0}
    result = {"dense": dense_side, "sparse": None, "rise": None, "rise_stderr": None, "mlp_density": 1.0, "head_density": 1.0}
    if not sparse:
        return result
    tokens_sparse = sum(sum(part["sparse"]["window_tokens"]) for part in texts.values())
    tokens_sparse += sum(part["tokens_sparse"] for part in tasks.values())
    sparse_side = _side("sparse", texts, tasks) | {"mlp_density": total.mlp_density(), "head_density": total.head_density()}
    sparse_side |= {"mlp_density_per_layer": total.mlp_per_layer(), "head_density_per_layer": total.heads_per_layer()}
    sparse_side |= {"tokens": tokens, "tokens_sparse": tokens_sparse}
    result |= {"sparse": sparse_side, "mlp_density": sparse_side["mlp_density"], "head_density": sparse_side["head_density"]}
    if texts:
        rise = paired_rise(*(pooled([_windows(part[side]) for part in texts.values()]) for side in ("dense", "sparse")))
        result |= {"rise": rise.rise, "rise_stderr": rise.stderr}
    return result


def _side(side: str, texts: Mapping[str, Any], tasks: Mapping[str, Any]) -> dict[str, Any]:
    results = {name: _windows(part[side]) for name, part in texts.items()}
    whole = pooled(list(results.values())) if results else None
    entries = {}
    for name, result in results.items():
        bits = result.bits_per_byte(texts[name]["bytes"])
        entries[name] = {
            "ppl": result.ppl,
            "bits_per_byte": bits,
            "stderr": result.stderr,
            "tokens": result.tokens,
            "windows": result.windows,
        }
        if side == "sparse":
            counter = DensityCounter(len(texts[name]["selected"]["mlp_L"]))
            _add(counter, texts[name]["selected"])
            entries[name] |= {"mlp_density": counter.mlp_density(), "head_density": counter.head_density()}
    return {
        "mode": "dense" if side == "dense" else "predicted",
        "ppl": None if whole is None else whole.ppl,
        "stderr": None if whole is None else whole.stderr,
        "texts": entries,
        "tasks": {name: part[side] for name, part in tasks.items()},
    }


def _windows(values: Mapping[str, Any]) -> PerplexityResult:
    fields: dict[str, Any] = {**values, "window_nll": tuple(values["window_nll"]), "window_tokens": tuple(values["window_tokens"])}
    return PerplexityResult(**fields)


def _add(total: DensityCounter, selected: Mapping[str, Any]) -> None:
    total.tokens += selected["tokens"]
    total.mlp_L = [a + b for a, b in zip(total.mlp_L, selected["mlp_L"], strict=True)]
    total.heads_L = [a + b for a, b in zip(total.heads_L, selected["heads_L"], strict=True)]
