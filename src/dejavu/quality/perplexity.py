"""Sliding-window perplexity of a text, dense or masked, with its standard error.

In: token ids of one document. Out: `PerplexityResult`. The sequence is BOS (where the tokenizer has one, once, at the
start of the document only: later windows get none) followed by the document. The first window holds up to `context`
inputs and predicts the token after each; every further window ends `stride` tokens later, is again filled with `context`
inputs and predicts its last `stride` targets only, so that each token is predicted exactly once (the rolling rule of
lm-evaluation-harness; stride = context is its default). Without a BOS the first token is context only.

To compare with programs that follow another rule, the text is cut as llama.cpp cuts it (`half_windows`).

    ppl = exp(sum NLL / tokens)      bits per byte = sum NLL / (bytes ln 2)      word ppl = exp(sum NLL / words)

The sums are float64. Standard error: the windows are the sampling units; the mean NLL is the ratio of two sums over
windows, its variance k/(k-1) sum (nll_w - mean tokens_w)^2 / tokens^2 over k windows, and ppl follows by the delta method.

Letters: B batch  T tokens  D model  N rows to score  V vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dejavu.config import require
from dejavu.model.counts import DensityCounter
from dejavu.model.finite import require_finite
from dejavu.model.masked import MaskedSelection
from dejavu.model.selectors import LayerAdapter
from dejavu.model.transformer import DENSE, Selection, Transformer

SelectionFactory = Callable[[Tensor | None], Selection]
"""From sparse_BT (the tokens that run sparse; None means all) to the selection of one forward pass."""

LOGITS_AT_ONCE = 2**24
HALF_CONTEXT = 512  # of `half_windows`: what llama.cpp takes if not told otherwise


def dense_selection(sparse_BT: Tensor | None = None) -> Selection:
    """The selection factory of the dense model."""
    return DENSE


class MaskedSelections:
    """The selection factory of an adapter: every pass it serves adds to one `counter`."""

    def __init__(self, layers: tuple[LayerAdapter, ...]) -> None:
        self.layers = layers
        self.counter = DensityCounter(len(layers))
        self.changes_weights = any(layer.block is not None for layer in layers)  # then a dense token differs too

    def __call__(self, sparse_BT: Tensor | None = None) -> MaskedSelection:
        selection = MaskedSelection(self.layers, sparse_BT)
        selection.counter = self.counter
        return selection


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """One forward pass: inputs, and the targets of its last len(targets) positions."""

    inputs: list[int]
    targets: list[int]


def rolling_windows(ids: Sequence[int], *, bos: int | None, context: int, stride: int | None = None) -> list[Window]:
    """The windows of a document, as the file's docstring says. Together their targets are the document, in order."""
    stride = context if stride is None else stride
    require(context >= 1, f"context must be at least 1, not {context}")
    require(1 <= stride <= context, f"stride must lie between 1 and the context {context}, not {stride}")
    sequence = list(ids) if bos is None else [bos, *ids]
    total = len(sequence) - 1
    require(total >= 1, "the text has no token to predict; give a longer text")
    end = min(context, total)
    windows = [Window(inputs=sequence[:end], targets=sequence[1 : end + 1])]
    while end < total:
        start, end = end, min(end + stride, total)
        windows.append(Window(inputs=sequence[end - context : end], targets=sequence[start + 1 : end + 1]))
    return windows


def score_targets(model: Transformer, hidden_ND: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
    """NLL in float64 [N] of each target under its row's hidden state, and whether the target is the greedy choice [N]."""
    nll, greedy = [], []
    rows = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    for hidden, target in zip(hidden_ND.split(rows), target_N.split(rows), strict=True):
        logits_NV = model.logits(hidden)
        top_N = logits_NV.amax(-1, keepdim=True)
        # Exponentials in fp32 are as exact as the logits; the logarithm and all sums that follow are float64.
        log_sum_N = (logits_NV - top_N).exp_().sum(-1).double().log()
        chosen_N = logits_NV.gather(-1, target[:, None])
        nll.append(log_sum_N - (chosen_N.double() - top_N.double())[:, 0])
        greedy.append(logits_NV.argmax(-1) == target)
    return torch.cat(nll), torch.cat(greedy)


@dataclass(frozen=True, slots=True, kw_only=True)
class PerplexityResult:
    """NLL in nats and number of predicted tokens, per window, in the order of the text. `bos`: a BOS began the document."""

    window_nll: tuple[float, ...]
    window_tokens: tuple[int, ...]
    context: int
    stride: int
    bos: bool

    @property
    def nll(self) -> float:
        return math.fsum(self.window_nll)

    @property
    def tokens(self) -> int:
        return sum(self.window_tokens)

    @property
    def windows(self) -> int:
        return len(self.window_tokens)

    @property
    def ppl(self) -> float:
        """Perplexity per token."""
        return _exp(self.nll / self.tokens)

    @property
    def stderr(self) -> float | None:
        """Standard error of `ppl` (delta method over windows); None for a single window."""
        error = _ratio_stderr(self.window_nll, self.window_tokens)
        return None if error is None else self.ppl * error

    def bits_per_byte(self, num_bytes: int) -> float:
        """Bits per UTF-8 byte of the original text that the predicted tokens cover."""
        require(num_bytes >= 1, f"bits per byte needs a text of at least one byte, not {num_bytes}")
        return self.nll / (num_bytes * math.log(2))

    def byte_perplexity(self, num_bytes: int) -> float:
        return _exp(self.bits_per_byte(num_bytes) * math.log(2))

    def word_perplexity(self, num_words: int) -> float:
        """Perplexity per word of the original text, words being what whitespace separates."""
        require(num_words >= 1, f"word perplexity needs a text of at least one word, not {num_words}")
        return _exp(self.nll / num_words)


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def _ratio_stderr(totals: Sequence[float], counts: Sequence[int]) -> float | None:
    """Standard error of sum(totals) / sum(counts), the pairs being independent draws; None for fewer than two."""
    pairs, count = len(counts), sum(counts)
    if pairs < 2:
        return None
    mean = math.fsum(totals) / count
    squares = math.fsum((total - mean * n) ** 2 for total, n in zip(totals, counts, strict=True))
    return math.sqrt(squares * pairs / (pairs - 1)) / count


@torch.inference_mode()
def perplexity(
    model: Transformer,
    ids: Sequence[int],
    *,
    bos: int | None,
    context: int,
    stride: int | None = None,
    selection_factory: SelectionFactory = dense_selection,
    batch_tokens: int = 4096,
    progress: Callable[[int, int], None] | None = None,
) -> PerplexityResult:
    """Perplexity of one document; with an adapter's factory every token of every window runs masked.

    ids: the document without BOS; bos: the id put before it once, or None. Windows of equal length share a batch of at
    most batch_tokens tokens (at least one window). progress(done, total) counts predicted tokens. Raises ValueError for a
    text without a token to predict, a context beyond the model's, a stride outside 1..context, or an NLL that is not
    finite (damaged weights).
    """
    limit = model.config.max_positions
    require(context <= limit, f"context {context} exceeds the model's {limit}; give at most {limit}")
    windows = rolling_windows(ids, bos=bos, context=context, stride=stride)
    # Only a sole first window can be shorter than the context, so all windows have one length.
    window_nll = scored_windows(model, windows, selection_factory, batch_tokens=batch_tokens, progress=progress)
    return PerplexityResult(
        window_nll=tuple(window_nll),
        window_tokens=tuple(len(window.targets) for window in windows),
        context=context,
        stride=context if stride is None else stride,
        bos=bos is not None,
    )


def half_windows(ids: Sequence[int], *, bos: int | None, context: int = HALF_CONTEXT) -> list[Window]:
    """llama.cpp's rule: pieces of `context` tokens, one behind the other, of which the second half is predicted; a rest is left out.

    A BOS, where the tokenizer adds one, begins the text, and then takes the place of the first token of each further piece. Of 512 tokens
    255 are predicted.
    """
    require(context >= 4, f"context must be at least 4, not {context}")
    first = [] if bos is None else [bos]
    tokens = [*first, *ids]
    require(len(tokens) >= context, f"the text has {len(tokens)} tokens, and a window takes {context}; give a longer text")
    pieces = [tokens[at : at + context] for at in range(0, len(tokens) - context + 1, context)]
    return [Window(inputs=(first + piece[len(first) :])[:-1], targets=piece[context // 2 + 1 :]) for piece in pieces]


@torch.inference_mode()
def scored_windows(
    model: Transformer,
    windows: Sequence[Window],
    selection_factory: SelectionFactory = dense_selection,
    *,
    batch_tokens: int = 4096,
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """NLL of the targets of each window, all of one length; the arguments are those of `perplexity`."""
    device = model.device
    per_batch = max(1, batch_tokens // len(windows[0].inputs))
    total, done = sum(len(window.targets) for window in windows), 0
    window_nll: list[float] = []
    for start in range(0, len(windows), per_batch):
        batch = windows[start : start + per_batch]
        ids_BT = torch.tensor([window.inputs for window in batch], device=device)
        hidden_BTD = model.hidden(ids_BT, selection_factory(None))
        counts = [len(window.targets) for window in batch]
        rows_ND = torch.cat([hidden[-count:] for hidden, count in zip(hidden_BTD, counts, strict=True)])
        targets_N = torch.tensor([target for window in batch for target in window.targets], device=device)
        nll_N, _ = score_targets(model, rows_ND, targets_N)
        places = [f"window {start + row + 1}" for row in range(len(batch))]
        require_finite(nll_N, model, ids_BT, selection_factory(None), places)
        window_nll += [math.fsum(part.tolist()) for part in nll_N.split(counts)]
        done += sum(counts)
        if progress is not None:
            progress(done, total)
    return window_nll


def pooled(results: Sequence[PerplexityResult]) -> PerplexityResult:
    """Several documents measured alike, as one: ppl = exp(sum NLL / sum tokens)."""
    first = results[0]
    assert all((r.context, r.stride, r.bos) == (first.context, first.stride, first.bos) for r in results)
    return PerplexityResult(
        window_nll=tuple(nll for result in results for nll in result.window_nll),
        window_tokens=tuple(count for result in results for count in result.window_tokens),
        context=first.context,
        stride=first.stride,
        bos=first.bos,
    )


@dataclass(frozen=True, slots=True)
class Rise:
    """Relative rise of perplexity, sparse / dense - 1, and its standard error (None for a single window)."""

    rise: float
    stderr: float | None


def paired_rise(dense: PerplexityResult, sparse: PerplexityResult) -> Rise:
    """rise = exp(mean NLL difference) - 1, its error from the differences window by window, which are paired: the same
    windows of the same text, so that what makes a text hard cancels."""
    assert dense.window_tokens == sparse.window_tokens, "paired results come from the same windows"
    differences = [b - a for a, b in zip(dense.window_nll, sparse.window_nll, strict=True)]
    ratio = _exp(math.fsum(differences) / dense.tokens)
    error = _ratio_stderr(differences, dense.window_tokens)
    return Rise(ratio - 1, None if error is None else ratio * error)
