"""Quality of one model, dense and sparse: perplexity of texts and accuracy of tasks, from the same model object.

In: model, tokenizer, the adapter's layers (None: dense only), texts and task records. Out: a `figures.Evaluation`, ready for JSON.

Perplexity masks every token. With stride < context the densities count a token once per window that reads it.

The work is done in parts, one text or one task each, dense and sparse. A part is plain JSON (sums per window of a text, the
summary of a task, what was selected), so that a store can keep it and an interrupted run goes on from there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dejavu.config import Progress, require
from dejavu.figures import Evaluation, Quality, TextScore
from dejavu.files import text_hash
from dejavu.model.counts import DensityCounter
from dejavu.model.selectors import LayerAdapter
from dejavu.model.tokenizer import Tokenizer
from dejavu.model.transformer import Transformer
from dejavu.offline.memory import tokens_at_once
from dejavu.quality.perplexity import MaskedSelections, PerplexityResult, paired_rise, perplexity, pooled
from dejavu.quality.resume import PartStore
from dejavu.quality.tasks import evaluate_task

BOS_ONCE = "once, at the start of a text; later windows get none"
BOS_NEVER = "none: the tokenizer adds no BOS, so the first token of a text is not scored"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredPart:
    """The start of a text that is scored: its ids without BOS, the BOS before them (or None), and the UTF-8 bytes and the words of the
    original text that the predicted tokens cover."""

    ids: list[int]
    bos: int | None
    num_bytes: int
    num_words: int


def scored_part(tokenizer: Tokenizer, text: str, max_tokens: int) -> ScoredPart:
    """The first max_tokens tokens of a text, fewer by up to three where the last would be a part of a character.

    BOS follows the tokenizer's own default and is not doubled where the text begins with it. Without BOS the first token
    is not predicted, so its bytes do not count.
    """
    ids, spans = tokenizer.encode_spans(text)
    bos = tokenizer.document_bos
    begin = 0
    if bos is not None and ids[:1] == [bos]:
        begin = spans[0][1]
        ids, spans = ids[1:], spans[1:]
    kept = min(max_tokens, len(ids))
    while 0 < kept < len(ids) and spans[kept][0] < spans[kept - 1][1]:
        kept -= 1
    end = len(text) if kept == len(ids) else spans[kept - 1][1] if kept else begin
    if bos is None and kept:
        begin = spans[0][1]
    return ScoredPart(ids=ids[:kept], bos=bos, num_bytes=len(text[begin:end].encode()), num_words=len(text[begin:end].split()))


def evaluate(
    model: Transformer,
    tokenizer: Tokenizer,
    layers: tuple[LayerAdapter, ...] | None,
    *,
    texts: Mapping[str, str],
    tasks: Mapping[str, Sequence[Mapping[str, Any]]],
    max_tokens: int = 100_000,
    limit: int = 250,
    context: int | None = None,
    stride: int | None = None,
    strict: bool = False,
    batch_tokens: int = 4096,
    store: PartStore | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure dense and, with an adapter's layers, sparse quality.

    texts: name -> text, of which the first max_tokens tokens are scored; tasks: name -> records, of which the first
    `limit` are used. context: tokens of a window (default: the model's context); stride defaults to it. progress counts
    tokens of "NAME dense" and "NAME sparse", and pairs of a task. store: parts that
    it has are not measured again; its settings must name the model, the layers and every option above that is set (default:
    one in memory). Raises ValueError for nothing to measure, an empty text, a bad item, a layer count that is not the
    model's, and where a sparse run was asked for but nothing ran sparse (case of a dense prefill that silently scores
    everything).
    """
    require(len(texts) + len(tasks) > 0, "nothing to evaluate; give a text (--text) or a task (--tasks)")
    require(max_tokens >= 1, f"max_tokens must be at least 1, not {max_tokens}")
    require(limit >= 1, f"limit must be at least 1, not {limit}")
    for name, text in texts.items():
        require(text != "", f"text {name!r} is empty; give a file with text")
    num_layers = model.config.num_layers
    if layers is not None:
        require(len(layers) == num_layers, f"the adapter has {len(layers)} layers, the model {num_layers}; use the adapter of this model")
        selects = any(layer.sparse for layer in layers)
        require(selects, "the adapter selects in no layer, so nothing would run sparse; evaluate with --dense instead")
    context = model.config.max_positions if context is None else context
    batch_tokens = tokens_at_once(model, batch_tokens)
    store = PartStore({}) if store is None else store

    def watch(what: str) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, total: progress(what, done, total)

    def measure_text(name: str, text: str) -> dict[str, Any]:
        part = scored_part(tokenizer, text, max_tokens)
        least = 1 if part.bos is not None else 2
        require(len(part.ids) >= least, f"text {name!r} has {len(part.ids)} tokens to score, but needs {least}; give more text or tokens")
        settings: dict[str, Any] = {"bos": part.bos, "context": context, "stride": stride, "batch_tokens": batch_tokens}
        dense = perplexity(model, part.ids, **settings, progress=watch(f"{name} dense"))
        found: dict[str, Any] = {"bytes": part.num_bytes, "words": part.num_words, "dense": dataclasses.asdict(dense)}
        if layers is not None:
            masked = MaskedSelections(layers)
            sparse = perplexity(model, part.ids, **settings, selection_factory=masked, progress=watch(f"{name} sparse"))
            found |= {"sparse": dataclasses.asdict(sparse), "selected": dataclasses.asdict(masked.counter)}
        return found

    def measure_task(name: str, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        masked = None if layers is None else MaskedSelections(layers)
        task = evaluate_task(
            model, tokenizer, name, records[:limit], masked=masked, strict=strict, batch_tokens=batch_tokens, progress=watch(name)
        )
        return dataclasses.asdict(task) | ({} if masked is None else {"selected": dataclasses.asdict(masked.counter)})

    text_parts, task_parts = {}, {}
    for name, text in texts.items():
        text_parts[name] = store.get(f"text {name} {text_hash(text)}", lambda n=name, t=text: measure_text(n, t))
    for name, records in tasks.items():
        task_parts[name] = store.get(f"task {name} {text_hash(str(records))}", lambda n=name, r=records: measure_task(n, r))
    methods = sorted({method for layer in layers or () for method in layer.methods})
    dense, sparse = _dense_side(text_parts, task_parts, num_layers), None
    rise = rise_stderr = None
    if methods:
        sparse = _sparse_side(text_parts, task_parts, num_layers, mode="+".join(methods))
        if text_parts:
            paired = paired_rise(*(pooled([_windows(part[side]) for part in text_parts.values()]) for side in ("dense", "sparse")))
            rise, rise_stderr = paired.rise, paired.stderr
    shown = sparse or dense
    return Evaluation(
        dense=dense, sparse=sparse, rise=rise, rise_stderr=rise_stderr,
        mlp_density=shown["mlp_density"], head_density=shown["head_density"],
        context=context, stride=context if stride is None else stride, bos=BOS_ONCE if tokenizer.adds_bos else BOS_NEVER,
    )  # fmt: skip


def _dense_side(texts: Mapping[str, Any], tasks: Mapping[str, Any], num_layers: int) -> Quality:
    ppl, stderr = _perplexity(texts, "dense")
    ones = [1.0] * num_layers
    return Quality(
        mode="dense", ppl=ppl, stderr=stderr, texts={name: _score(part, "dense") for name, part in texts.items()},
        tasks={name: part["dense"] for name, part in tasks.items()}, mlp_density=1.0, head_density=1.0, mlp_density_per_layer=ones,
        head_density_per_layer=ones, tokens=_tokens(texts, tasks), tokens_sparse=0,
    )  # fmt: skip


def _sparse_side(texts: Mapping[str, Any], tasks: Mapping[str, Any], num_layers: int, *, mode: str) -> Quality:
    total = _counted(num_layers, [part["selected"] for part in (*texts.values(), *tasks.values())])
    require(
        total.tokens > 0,
        "a sparse evaluation was asked for, but no token was scored sparse: the context of a task runs dense and every "
        "continuation has one token; use --strict, or add a --text",
    )
    mlp_density, head_density = total.mlp_density(), total.head_density()
    assert mlp_density is not None and head_density is not None, "tokens were counted"
    ppl, stderr = _perplexity(texts, "sparse")
    scores: dict[str, TextScore] = {}
    for name, part in texts.items():
        counter = _counted(num_layers, [part["selected"]])
        scores[name] = {**_score(part, "sparse"), "mlp_density": counter.mlp_density(), "head_density": counter.head_density()}
    tokens_sparse = sum(sum(part["sparse"]["window_tokens"]) for part in texts.values())
    tokens_sparse += sum(part["tokens_sparse"] for part in tasks.values())
    return Quality(
        mode=mode, ppl=ppl, stderr=stderr, texts=scores, tasks={name: part["sparse"] for name, part in tasks.items()},
        mlp_density=mlp_density, head_density=head_density, mlp_density_per_layer=total.mlp_per_layer(),
        head_density_per_layer=total.heads_per_layer(), tokens=_tokens(texts, tasks), tokens_sparse=tokens_sparse,
    )  # fmt: skip


def _tokens(texts: Mapping[str, Any], tasks: Mapping[str, Any]) -> int:
    return sum(sum(part["dense"]["window_tokens"]) for part in texts.values()) + sum(part["tokens"] for part in tasks.values())


def _perplexity(texts: Mapping[str, Any], side: str) -> tuple[float | None, float | None]:
    """Over all texts, with its standard error."""
    whole = pooled([_windows(part[side]) for part in texts.values()]) if texts else None
    return (None, None) if whole is None else (whole.ppl, whole.stderr)


def _score(part: Mapping[str, Any], side: str) -> TextScore:
    found = _windows(part[side])
    return {
        "ppl": found.ppl,
        "word_ppl": found.word_perplexity(max(1, part["words"])),  # of white space alone, one
        "bits_per_byte": found.bits_per_byte(part["bytes"]),
        "stderr": found.stderr,
        "tokens": found.tokens,
        "windows": found.windows,
    }


def _windows(values: Mapping[str, Any]) -> PerplexityResult:
    fields: dict[str, Any] = {**values, "window_nll": tuple(values["window_nll"]), "window_tokens": tuple(values["window_tokens"])}
    return PerplexityResult(**fields)


def _counted(num_layers: int, parts: Iterable[Mapping[str, Any]]) -> DensityCounter:
    """What was selected in all parts together."""
    total = DensityCounter(num_layers)
    for selected in parts:
        total.add(selected["mlp_L"], selected["heads_L"], selected["tokens"])
    return total
