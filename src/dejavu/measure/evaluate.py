"""Quality of one model, dense and sparse: perplexity of texts and accuracy of tasks, from the same model object.

In: model, tokenizer, the adapter's layers (None: dense only), texts and task records. Out: one plain dict, ready for JSON:
    dense, sparse   each: mode ("dense" or "predicted"), ppl (over all texts: exp(sum NLL / sum tokens)), stderr,
                    texts  name -> ppl, bits_per_byte, stderr, tokens, windows
                    tasks  name -> acc, acc_norm, stderr, stderr_norm, n (LAMBADA: and ppl, ppl_stderr)
                    mlp_density, head_density, and both per layer; tokens scored, and tokens_sparse scored sparse.
                    Texts and tasks of `sparse` carry their own densities. `sparse` is None without an adapter.
    rise            relative rise of perplexity sparse / dense - 1, and rise_stderr, paired by window
    mlp_density, head_density   those of the sparse run (of the dense run, 1.0, without an adapter)
    context, stride, bos        how the texts were cut; bos says in words where a BOS stands
Perplexity masks every token. With stride < context the densities count a token once per window that reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dejavu.config import require
from dejavu.measure.perplexity import MaskedSelections, PerplexityResult, paired_rise, perplexity, pooled
from dejavu.measure.tasks import evaluate_task
from dejavu.model.predictor import DensityCounter, LayerAdapter
from dejavu.model.tokenizer import Tokenizer
from dejavu.model.transformer import Transformer

BOS_ONCE = "once, at the start of a text; later windows get none"
BOS_NEVER = "none: the tokenizer adds no BOS, so the first token of a text is not scored"

Progress = Callable[[str, int, int], None]
"""progress(what, done, total): what is e.g. "wiki.txt dense" or a task's name; done and total count tokens or pairs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredPart:
    """The start of a text that is scored: its ids without BOS, the BOS before them (or None) and the UTF-8 bytes of the
    original text that the predicted tokens cover."""

    ids: list[int]
    bos: int | None
    num_bytes: int


def scored_part(tokenizer: Tokenizer, text: str, max_tokens: int) -> ScoredPart:
    """The first max_tokens tokens of a text, fewer by up to three where the last would be a part of a character.

    BOS follows the tokenizer's own default and is not doubled where the text begins with it. Without BOS the first token
    is not predicted, so its bytes do not count.
    """
    encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    ids, spans = encoding.ids, encoding.offsets
    bos = tokenizer.bos_token_id if tokenizer.adds_bos else None
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
    return ScoredPart(ids=ids[:kept], bos=bos, num_bytes=len(text[begin:end].encode()))


def _counted(totals: DensityCounter, part: DensityCounter) -> None:
    totals.tokens += part.tokens
    totals.mlp_L = [a + b for a, b in zip(totals.mlp_L, part.mlp_L, strict=True)]
    totals.heads_L = [a + b for a, b in zip(totals.heads_L, part.heads_L, strict=True)]


def _text_entry(result: PerplexityResult, num_bytes: int) -> dict[str, Any]:
    return {
        "ppl": result.ppl,
        "bits_per_byte": result.bits_per_byte(num_bytes),
        "stderr": result.stderr,
        "tokens": result.tokens,
        "windows": result.windows,
    }


def _side(mode: str, results: Sequence[PerplexityResult], texts: dict[str, Any], tasks: dict[str, Any]) -> dict[str, Any]:
    whole = pooled(results) if results else None
    return {
        "mode": mode,
        "ppl": whole.ppl if whole is not None else None,
        "stderr": whole.stderr if whole is not None else None,
        "texts": texts,
        "tasks": tasks,
    }


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
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure dense and, with an adapter's layers, sparse quality; the keys are in the file's docstring.

    texts: name -> text, of which the first max_tokens tokens are scored; tasks: name -> records, of which the first
    `limit` are used. context: tokens of a window (default: the model's context); stride defaults to it. Raises ValueError
    for nothing to measure, an empty text, a bad item, a layer count that is not the model's, and where a sparse run was
    asked for but nothing ran sparse (case of a dense prefill that silently scores everything).
    """
    require(len(texts) + len(tasks) > 0, "nothing to evaluate; give a text (--text) or a task (--tasks)")
    require(max_tokens >= 1, f"max_tokens must be at least 1, not {max_tokens}")
    require(limit >= 1, f"limit must be at least 1, not {limit}")
    num_layers = model.config.num_layers
    if layers is not None:
        require(len(layers) == num_layers, f"the adapter has {len(layers)} layers, the model {num_layers}; use the adapter of this model")
        predicts = any(layer.mlp is not None or layer.heads is not None for layer in layers)
        require(predicts, "the adapter has no predictor in any layer, so nothing would run sparse; evaluate with --dense instead")
    context = model.config.max_positions if context is None else context
    total = DensityCounter(num_layers)
    dense_texts, dense_tasks, sparse_texts, sparse_tasks = {}, {}, {}, {}
    dense_results: list[PerplexityResult] = []
    sparse_results: list[PerplexityResult] = []
    tokens = tokens_sparse = 0

    def watch(what: str) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, all_of_it: progress(what, done, all_of_it)

    for name, text in texts.items():
        require(text != "", f"text {name!r} is empty; give a file with text")
        part = scored_part(tokenizer, text, max_tokens)
        least = 1 if part.bos is not None else 2
        require(len(part.ids) >= least, f"text {name!r} has {len(part.ids)} tokens to score, but needs {least}; give more text or tokens")
        settings: dict[str, Any] = {"bos": part.bos, "context": context, "stride": stride, "batch_tokens": batch_tokens}
        dense = perplexity(model, part.ids, **settings, progress=watch(f"{name} dense"))
        dense_results.append(dense)
        dense_texts[name] = _text_entry(dense, part.num_bytes)
        tokens += dense.tokens
        if layers is not None:
            masked = MaskedSelections(layers)
            sparse = perplexity(model, part.ids, **settings, selection_factory=masked, progress=watch(f"{name} sparse"))
            sparse_results.append(sparse)
            density = {"mlp_density": masked.counter.mlp_density(), "head_density": masked.counter.head_density()}
            sparse_texts[name] = _text_entry(sparse, part.num_bytes) | density
            tokens_sparse += sparse.tokens
            _counted(total, masked.counter)

    for name, records in tasks.items():
        masked = MaskedSelections(layers) if layers is not None else None
        task = evaluate_task(
            model, tokenizer, name, records[:limit], masked=masked, strict=strict, batch_tokens=batch_tokens, progress=watch(name)
        )
        dense_tasks[name] = task.dense
        tokens += task.tokens
        if masked is not None:
            sparse_tasks[name] = task.sparse
            tokens_sparse += task.tokens_sparse
            _counted(total, masked.counter)

    ones = [1.0] * num_layers
    dense_side = _side("dense", dense_results, dense_texts, dense_tasks)
    dense_side |= {"mlp_density": 1.0, "head_density": 1.0, "mlp_density_per_layer": ones, "head_density_per_layer": ones}
    dense_side |= {"tokens": tokens, "tokens_sparse": 0}
    result: dict[str, Any] = {"dense": dense_side, "sparse": None, "rise": None, "rise_stderr": None}
    result |= {"mlp_density": 1.0, "head_density": 1.0, "context": context, "stride": context if stride is None else stride}
    result["bos"] = BOS_ONCE if tokenizer.adds_bos else BOS_NEVER
    if layers is not None:
        require(
            total.tokens > 0,
            "a sparse evaluation was asked for, but no token was scored sparse: the context of a task runs dense and every "
            "continuation has one token; use --strict, or add a --text",
        )
        sparse_side = _side("predicted", sparse_results, sparse_texts, sparse_tasks)
        sparse_side |= {"mlp_density": total.mlp_density(), "head_density": total.head_density()}
        sparse_side |= {"mlp_density_per_layer": total.mlp_per_layer(), "head_density_per_layer": total.heads_per_layer()}
        sparse_side |= {"tokens": tokens, "tokens_sparse": tokens_sparse}
        result |= {"sparse": sparse_side, "mlp_density": sparse_side["mlp_density"], "head_density": sparse_side["head_density"]}
        if sparse_results:
            rise = paired_rise(pooled(dense_results), pooled(sparse_results))
            result |= {"rise": rise.rise, "rise_stderr": rise.stderr}
    return result
