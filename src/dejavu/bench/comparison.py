"""Perplexity of our model, dense and sparse, and of other programs: the same windows of the same tokens, by llama.cpp's rule.

In: a LanguageModel's parts or a Peer, texts or their token ids by name. Out: QualityRows, with which speeds are shown. The rule is
`perplexity.half_windows`; NLL is summed in float64, and the standard error is over windows.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from dejavu.bench.rows import QualityRow, device_facts
from dejavu.bench.variants import Peer, selects_heads
from dejavu.config import require
from dejavu.model.selectors import LayerAdapter
from dejavu.model.tokenizer import Tokenizer
from dejavu.model.transformer import Transformer
from dejavu.quality.evaluate import scored_part
from dejavu.quality.perplexity import (
    HALF_CONTEXT,
    MaskedSelections,
    PerplexityResult,
    SelectionFactory,
    Window,
    dense_selection,
    half_windows,
    scored_windows,
)

RULE = f"llama.cpp, windows of {HALF_CONTEXT}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """What is scored: windows of several texts, their names, and a hash of the tokens."""

    windows: tuple[Window, ...]
    names: tuple[str, ...]
    texts_hash: str

    @classmethod
    def of(cls, ids: Mapping[str, Sequence[int]], *, bos: int | None) -> Passage:
        """Whole windows of each text. Raises ValueError for one that is shorter than a window."""
        windows = tuple(window for part in ids.values() for window in half_windows(part, bos=bos))
        read = ",".join(str(token) for window in windows for token in (*window.inputs, window.targets[-1]))
        return cls(windows=windows, names=tuple(ids), texts_hash=hashlib.sha256(read.encode()).hexdigest()[:16])

    @classmethod
    def of_texts(cls, texts: Mapping[str, str], tokenizer: Tokenizer, *, max_tokens: int, positions: int) -> Passage:
        """The first tokens of each text, by its name. positions: of the model. Raises ValueError where a window does not fit in there."""
        require(positions >= HALF_CONTEXT, f"windows have {HALF_CONTEXT} tokens, and the model has {positions} positions")
        ids = {name: scored_part(tokenizer, text, max_tokens).ids for name, text in texts.items()}
        return cls.of(ids, bos=tokenizer.document_bos)

    def result(self, window_nll: Sequence[float]) -> PerplexityResult:
        counts = tuple(len(window.targets) for window in self.windows)
        half = HALF_CONTEXT // 2
        return PerplexityResult(window_nll=tuple(window_nll), window_tokens=counts, context=HALF_CONTEXT, stride=half, bos=False)


def own_quality(
    model: Transformer,
    layers: tuple[LayerAdapter, ...] | None,
    passage: Passage,
    *,
    name: str,
    backend: str,
    dtype: str,
    cache_dtype: str,
    adapter: str | None,
) -> QualityRow:
    """Dense without layers; else every token masked. The model holds the values of the dtypes that are named."""
    masked = None if layers is None else MaskedSelections(layers)
    factory: SelectionFactory = dense_selection if masked is None else masked
    found = passage.result(scored_windows(model, passage.windows, factory))
    densities = (1.0, 1.0) if masked is None else (masked.counter.mlp_density() or 0.0, masked.counter.head_density() or 0.0)
    cuda = model.device.type == "cuda"
    return QualityRow(
        model=name, mode="dense" if layers is None else "sparse", backend=backend, dtype=dtype, cache_dtype=cache_dtype,
        adapter=None if layers is None else adapter, rule=RULE, texts=passage.names, texts_hash=passage.texts_hash, tokens=found.tokens,
        ppl=found.ppl, stderr=found.stderr, mlp_density=densities[0], head_density=densities[1],
        sparse=layers is not None, sparse_heads=selects_heads(layers), **device_facts(cuda=cuda),
    )  # fmt: skip


def peer_quality(peer: Peer, passage: Passage, *, vocab_size: int) -> QualityRow | None:
    """Of a program that tells the logits of a whole pass; None where it does not, or has another vocabulary than the passage's."""
    window_nll = []
    for window in passage.windows:
        logits_TV = peer.logits(window.inputs)
        if logits_TV is None or logits_TV.shape[-1] != vocab_size:
            return None
        targets_N = torch.tensor(window.targets)
        scores_NV = logits_TV[-len(window.targets) :].double().log_softmax(-1)
        window_nll.append(math.fsum((-scores_NV.gather(-1, targets_N[:, None])[:, 0]).tolist()))
    found = passage.result(window_nll)
    return QualityRow(
        model=peer.model, mode=peer.mode, backend=peer.mode, dtype=peer.dtype, cache_dtype=None, adapter=None, rule=RULE,
        texts=passage.names, texts_hash=passage.texts_hash, tokens=found.tokens, ppl=found.ppl, stderr=found.stderr,
        peer=True, **device_facts(),
    )  # fmt: skip
