"""Accuracy on items of a task: multiple choice, partial evaluation (Winograd) and last-word prediction (LAMBADA).

In: the records of a JSONL file, in one of three forms (other keys are ignored):
    {"context", "choices", "label"}               the choice of highest log-probability given the context
    {"contexts", "continuation", "label"}         the context that makes the one continuation likeliest
    {"context", "target"}                         is the target the greedy continuation?
Out: acc, acc_norm, acc_bytes and their standard errors sqrt(p (1 - p) / (n - 1)). acc_norm divides a choice's log-probability by its
characters without the leading space, acc_bytes by its UTF-8 bytes, as lm-evaluation-harness does; in the other forms they equal acc.
LAMBADA also gets ppl = exp(-mean log p(target)).

Tokens are cut as lm-evaluation-harness cuts them (`encode_pair`). A context too long for the model loses its start, the same for all
choices of an item, as if each were as long as the longest; `truncated` counts such items. The
context is prefill and runs dense, its last token included, whose logits score the first token of the continuation; the
continuation's tokens run sparse, but for the last, whose output nobody needs. `strict` runs the context sparse as well.

Letters: B batch  T tokens  D model  N rows to score
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dejavu.config import require
from dejavu.figures import TaskScore
from dejavu.files import parse_json, read_text
from dejavu.model.finite import require_finite
from dejavu.model.tokenizer import Tokenizer
from dejavu.model.transformer import Transformer
from dejavu.quality.perplexity import MaskedSelections, SelectionFactory, dense_selection, score_targets

NOTHING_SPARSE = "no token ran sparse: every continuation is one token, which the dense prefill scores; strict masks the context too"


def read_items(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file; blank lines are skipped. ValueError names the line that is no JSON object."""
    items = []
    # Not splitlines: JSON strings may hold separators such as U+2028.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            item = parse_json(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}); give one object per line") from error
        require(isinstance(item, dict), f"{path}, line {number}: not a JSON object; give one object per line")
        items.append(item)
    return items


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One question: the (context, continuation) pairs to score and the right one. form: choices, contexts or target."""

    form: str
    pairs: tuple[tuple[str, str], ...]
    label: int


def _texts(record: Mapping[str, Any], key: str, where: str) -> list[str]:
    values = record[key]
    good = isinstance(values, list) and len(values) > 0 and all(isinstance(value, str) for value in values)
    require(good, f"{where}: {key!r} must be a list of strings, not {values!r}")
    return values


def _text(record: Mapping[str, Any], key: str, where: str) -> str:
    require(isinstance(record.get(key), str), f"{where}: {key!r} must be a string, not {record.get(key)!r}")
    return record[key]


def parse_item(record: Mapping[str, Any], where: str) -> Item:
    """The item of one record; `where` names task and row in the ValueError for a missing, ill-typed or empty part."""
    if "contexts" in record:
        continuation = _text(record, "continuation", where)
        form, pairs = "contexts", tuple((context, continuation) for context in _texts(record, "contexts", where))
    elif "target" in record:
        form, pairs = "target", ((_text(record, "context", where), _text(record, "target", where)),)
    elif "choices" in record:
        context = _text(record, "context", where)
        form, pairs = "choices", tuple((context, choice) for choice in _texts(record, "choices", where))
    else:
        raise ValueError(f"{where}: no 'choices', 'contexts' or 'target' among the keys {sorted(record)}")
    for _, continuation in pairs:
        require(continuation != "", f"{where}: a continuation is empty; give it at least one character")
    if form == "target":
        return Item(form=form, pairs=pairs, label=0)
    label = record.get("label")
    good = isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(pairs)
    require(good, f"{where}: label {label!r} is not the index of one of the {len(pairs)} options")
    assert isinstance(label, int)
    return Item(form=form, pairs=pairs, label=label)


def first_token(tokenizer: Tokenizer) -> int:
    """What stands for an empty context: BOS, else EOS; ValueError where there is neither."""
    if tokenizer.bos_token_id is not None:
        return tokenizer.bos_token_id
    require(len(tokenizer.eos_token_ids) > 0, "an empty context needs a BOS or EOS token, and the tokenizer has neither")
    return tokenizer.eos_token_ids[0]


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str, where: str) -> tuple[list[int], list[int]]:
    """Token ids of context and continuation, neither empty, by the rules of lm-evaluation-harness.

    Whitespace that ends the context moves to the continuation. Both are encoded joined and cut at the number of the
    context's own tokens; where that leaves nothing (one token spans the join), the continuation is encoded alone and
    appended. An empty context is one BOS (else EOS), not doubled where the continuation begins with it.
    """
    require(continuation != "", f"{where}: a continuation is empty; give it at least one character")
    stripped = context.rstrip()
    context, continuation = stripped, context[len(stripped) :] + continuation
    context_ids = tokenizer.encode(context) if context else []
    if context_ids:
        rest = tokenizer.encode(context + continuation)[len(context_ids) :] or tokenizer.encode_plain(continuation)
    else:
        context_ids, rest = [first_token(tokenizer)], tokenizer.encode_plain(continuation)
        rest = rest[1:] if len(rest) > 1 and rest[0] == context_ids[0] else rest
    require(len(rest) > 0, f"{where}: the continuation {continuation!r} has no tokens; the tokenizer drops all of it")
    return context_ids, rest


@dataclass(frozen=True, slots=True)
class Request:
    """What one pair costs: inputs (context and continuation but its last token, cut on the left) and targets."""

    inputs: tuple[int, ...]
    targets: tuple[int, ...]

    @property
    def first(self) -> int:
        """The position whose logits score the first target."""
        return len(self.inputs) - len(self.targets)


def make_request(context_ids: Sequence[int], continuation_ids: Sequence[int], limit: int, where: str) -> Request:
    """A request that fits a model of `limit` positions; ValueError where the continuation alone does not."""
    count = len(continuation_ids)
    require(count <= limit, f"{where}: the continuation's {count} tokens exceed the model's context of {limit}; shorten it")
    inputs = (*context_ids, *continuation_ids)[-(limit + 1) :][:-1]
    return Request(tuple(inputs), tuple(continuation_ids))


def item_requests(tokenizer: Tokenizer, item: Item, limit: int, where: str) -> tuple[list[Request], bool]:
    """The requests of an item's pairs, and whether a context lost its start. One context that several choices have is cut for all of
    them as for the longest, or they would be judged by different texts."""
    pairs = [encode_pair(tokenizer, *pair, where) for pair in item.pairs]
    longest = max(len(continuation) for _, continuation in pairs)
    kept = max(1, limit + 1 - longest)  # of a continuation beyond the limit make_request says so
    requests = [make_request(context[-kept:], continuation, limit, where) for context, continuation in pairs]
    return requests, any(len(context) > kept for context, _ in pairs)


@dataclass(frozen=True, slots=True)
class Score:
    """Log-probability of a continuation in nats (float64), and whether every token of it is the greedy choice."""

    log_prob: float
    greedy: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Requests that run together: distinct inputs, padded on the right, which a causal model never looks at.

    rows: for every input the indices of the requests that share it. sparse_BT marks the tokens that run sparse.
    """

    ids_BT: Tensor
    sparse_BT: Tensor
    rows: list[list[int]]


def make_batches(requests: Sequence[Request], *, strict: bool, batch_tokens: int, device: torch.device) -> Iterator[Batch]:
    """Batches of at most batch_tokens padded tokens (at least one row), longest first, so that little is padding.

    Equal inputs (one-token choices of one context) run once. Rows without a sparse token get batches of their own.
    """
    shared: dict[tuple[tuple[int, ...], int], list[int]] = {}
    for index, request in enumerate(requests):
        shared.setdefault((request.inputs, request.first), []).append(index)

    def has_sparse(key: tuple[tuple[int, ...], int]) -> bool:
        return strict or len(key[0]) > key[1] + 1

    keys = sorted(shared, key=lambda key: (has_sparse(key), -len(key[0])))
    start = 0
    while start < len(keys):
        longest, kind, end = len(keys[start][0]), has_sparse(keys[start]), start + 1
        most = max(1, batch_tokens // longest)
        while end < len(keys) and end - start < most and has_sparse(keys[end]) == kind:
            end += 1
        ids_BT = torch.zeros(end - start, longest, dtype=torch.long)
        sparse_BT = torch.zeros(end - start, longest, dtype=torch.bool)
        for row, (inputs, first) in enumerate(keys[start:end]):
            ids_BT[row, : len(inputs)] = torch.tensor(inputs)
            sparse_BT[row, 0 if strict else first + 1 : len(inputs)] = True
        yield Batch(ids_BT=ids_BT.to(device), sparse_BT=sparse_BT.to(device), rows=[shared[key] for key in keys[start:end]])
        start = end


def _run(model: Transformer, batch: Batch, requests: Sequence[Request], factory: SelectionFactory) -> dict[int, Score]:
    hidden_BTD = model.hidden(batch.ids_BT, factory(batch.sparse_BT))
    order = [(row, index) for row, indices in enumerate(batch.rows) for index in indices]
    parts = [hidden_BTD[row, requests[index].first : len(requests[index].inputs)] for row, index in order]
    targets = [target for _, index in order for target in requests[index].targets]
    nll_N, greedy_N = score_targets(model, torch.cat(parts), torch.tensor(targets, device=hidden_BTD.device))
    require_finite(nll_N, model, batch.ids_BT, factory(batch.sparse_BT), [f"request {indices[0] + 1}" for indices in batch.rows])
    counts = [len(part) for part in parts]
    split = zip(order, nll_N.split(counts), greedy_N.split(counts), strict=True)
    return {index: Score(-math.fsum(nll.tolist()), bool(greedy.all())) for (_, index), nll, greedy in split}


@torch.inference_mode()
def score_requests(
    model: Transformer,
    requests: Sequence[Request],
    *,
    masked: MaskedSelections | None = None,
    strict: bool = False,
    batch_tokens: int = 4096,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Score], list[Score] | None]:
    """Scores of every request, dense and (with `masked`, whose counter grows) sparse, both on the same batches.

    A batch in which no token runs sparse is the dense one, so its scores are taken over, unless the adapter changes weights. progress
    counts requests.
    """
    dense: dict[int, Score] = {}
    sparse: dict[int, Score] = {}
    for batch in make_batches(requests, strict=strict, batch_tokens=batch_tokens, device=model.device):
        scores = _run(model, batch, requests, dense_selection)
        dense |= scores
        if masked is not None:
            differs = masked.changes_weights or bool(batch.sparse_BT.any())
            sparse |= _run(model, batch, requests, masked) if differs else scores
        if progress is not None:
            progress(len(dense), len(requests))
    every = range(len(requests))
    return [dense[index] for index in every], None if masked is None else [sparse[index] for index in every]


def _proportion(hits: Sequence[bool]) -> tuple[float, float | None]:
    n, p = len(hits), sum(hits) / len(hits)
    return p, math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else None


def _first_best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def summarize(items: Sequence[Item], scores: Sequence[Sequence[Score]], *, truncated: int = 0) -> TaskScore:
    """acc, acc_norm, acc_bytes, their standard errors and n of items (all of one form) from the scores of their pairs; LAMBADA: and ppl,
    ppl_stderr. truncated: items of which a context lost its start."""
    hits, hits_norm, hits_bytes = [], [], []
    for item, row in zip(items, scores, strict=True):
        log_probs = [score.log_prob for score in row]
        hit = row[0].greedy if item.form == "target" else _first_best(log_probs) == item.label
        hits.append(hit)
        texts = [continuation.removeprefix(" ") for _, continuation in item.pairs]
        for found, lengths in ((hits_norm, map(len, texts)), (hits_bytes, (len(text.encode()) for text in texts))):
            normed = [p / max(1, length) for p, length in zip(log_probs, lengths, strict=True)]
            found.append(_first_best(normed) == item.label if item.form == "choices" else hit)
    acc, stderr = _proportion(hits)
    acc_norm, stderr_norm = _proportion(hits_norm)
    acc_bytes, stderr_bytes = _proportion(hits_bytes)
    result: TaskScore = {
        "acc": acc, "acc_norm": acc_norm, "acc_bytes": acc_bytes, "stderr": stderr, "stderr_norm": stderr_norm,
        "stderr_bytes": stderr_bytes, "n": len(items), "truncated": truncated,
    }  # fmt: skip
    if items[0].form == "target":
        nll = [-row[0].log_prob for row in scores]
        mean = math.fsum(nll) / len(nll)
        spread = math.sqrt(math.fsum((x - mean) ** 2 for x in nll) / (len(nll) - 1) / len(nll)) if len(nll) > 1 else None
        # A mean beyond 700 nats has no exponential in float64: such a model's perplexity is not a number worth printing.
        ppl = math.exp(mean) if mean < 700 else None
        result["ppl"], result["ppl_stderr"] = ppl, None if ppl is None or spread is None else ppl * spread
    return result


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """Summaries of one task, and how many tokens were scored in all and on an output that was computed sparse."""

    dense: TaskScore
    sparse: TaskScore | None
    tokens: int
    tokens_sparse: int


def evaluate_task(
    model: Transformer,
    tokenizer: Tokenizer,
    name: str,
    records: Sequence[Mapping[str, Any]],
    *,
    masked: MaskedSelections | None = None,
    strict: bool = False,
    batch_tokens: int = 4096,
    progress: Callable[[int, int], None] | None = None,
) -> TaskResult:
    """One task, dense and (with a fresh `masked`) sparse. The sparse summary adds the densities of the tokens that ran
    sparse, None with a `note` where there was none. ValueError for an item that breaks its form names task and row."""
    require(len(records) > 0, f"task {name!r} has no items")
    where = [f"task {name!r}, row {row}" for row in range(1, len(records) + 1)]
    items = [parse_item(record, place) for record, place in zip(records, where, strict=True)]
    require(len({item.form for item in items}) == 1, f"task {name!r} mixes items of several forms; split it into one file per form")
    limit = model.config.max_positions
    made = [item_requests(tokenizer, item, limit, place) for item, place in zip(items, where, strict=True)]
    requests, truncated = [request for own, _ in made for request in own], sum(cut for _, cut in made)
    dense, sparse = score_requests(model, requests, masked=masked, strict=strict, batch_tokens=batch_tokens, progress=progress)

    def grouped(scores: Sequence[Score]) -> list[Sequence[Score]]:
        flat = iter(scores)
        return [[next(flat) for _ in item.pairs] for item in items]

    tokens = sum(len(request.targets) for request in requests)
    result_sparse, tokens_sparse = None, 0
    if masked is not None and sparse is not None:
        counter = masked.counter
        tokens_sparse = tokens if strict else tokens - len(requests)
        result_sparse = summarize(items, grouped(sparse), truncated=truncated)
        result_sparse["mlp_density"], result_sparse["head_density"] = counter.mlp_density(), counter.head_density()
        result_sparse["tokens_sparse"] = tokens_sparse
        if counter.tokens == 0:
            result_sparse["note"] = NOTHING_SPARSE
    return TaskResult(
        dense=summarize(items, grouped(dense), truncated=truncated), sparse=result_sparse, tokens=tokens, tokens_sparse=tokens_sparse
    )
