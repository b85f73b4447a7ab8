"""How far a sparse model is from its dense self, on windows of token ids.

In: a model, windows [W, T] and a Selection. Out: negative log likelihood per token, or the divergence
KL(dense || sparse) per token, of a whole choice or of switching one part of one layer to a predictor. KL is measured rather than the
change of the loss because it is never negative and has far less noise: a few thousand tokens rank candidates that cost 0.01 %.

Letters: W windows  T tokens of a window  N tokens  D model  V vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dejavu.config import Progress, require
from dejavu.model.finite import FIX, require_finite
from dejavu.model.masked import MaskedSelection
from dejavu.model.selectors import LayerAdapter
from dejavu.model.transformer import DENSE, Selection, Transformer
from dejavu.offline.collect import window_names
from dejavu.offline.memory import tokens_at_once

AT_ONCE = 4096  # tokens that a pass takes: what stored matrices cost to widen is then little beside the products
LOGITS = 1 << 27  # values that are in memory at a time


def _passes(model: Transformer, ids_WT: Tensor, selection: Selection, *, logits: bool = False) -> Iterator[tuple[slice, Tensor]]:
    """Some windows after the other, with their hidden states [W, T - 1, D]."""
    length = ids_WT.shape[1]
    batch = max(1, tokens_at_once(model, max(1, AT_ONCE // length) * length, logits=logits) // length)
    for first in range(0, len(ids_WT), batch):
        windows = slice(first, min(first + batch, len(ids_WT)))
        yield windows, model.hidden(ids_WT[windows], selection)[:, :-1]


def _pieces(model: Transformer, tokens: int, *, models: int = 1) -> Iterator[slice]:
    """Tokens whose logits, of so many models, fit LOGITS."""
    step = max(1, LOGITS // (models * model.config.vocab_size))
    return (slice(first, min(first + step, tokens)) for first in range(0, tokens, step))


def _nll(model: Transformer, hidden_ND: Tensor, target_N: Tensor) -> Tensor:
    pieces = _pieces(model, len(target_N))
    return torch.cat([F.cross_entropy(model.logits(hidden_ND[piece]), target_N[piece], reduction="none") for piece in pieces])


def _finite_nll(model: Transformer, hidden_WTD: Tensor, ids_WT: Tensor, windows: slice, selection: Selection) -> Tensor:
    """Of some of the windows, whose hidden states those are."""
    ids = ids_WT[windows]
    nll = _nll(model, hidden_WTD.flatten(0, 1), ids[:, 1:].flatten()).view(len(ids), -1)
    require_finite(nll, model, ids, selection, window_names(windows.start, len(ids)))
    return nll


@torch.inference_mode()
def token_nll(model: Transformer, ids_WT: Tensor, selection: Selection = DENSE) -> Tensor:
    """Negative log likelihood [W, T - 1] of each token after the first of its window, natural units, fp32. The ids are where the model is.

    Raises ValueError, with the first layer and token, for values that are not finite.
    """
    passes = _passes(model, ids_WT, selection, logits=True)
    return torch.cat([_finite_nll(model, hidden_WTD, ids_WT, windows, selection) for windows, hidden_WTD in passes])


@torch.inference_mode()
def states_nll(model: Transformer, hidden_WTD: Tensor, ids_WT: Tensor) -> Tensor:
    """The same from the hidden_states of the dense model."""
    return _finite_nll(model, hidden_WTD, ids_WT, slice(0, len(ids_WT)), DENSE)


@torch.inference_mode()
def hidden_states(model: Transformer, ids_WT: Tensor, selection: Selection = DENSE) -> Tensor:
    """What the head reads for each token of a window but the last: [W, T - 1, D]."""
    return torch.cat([hidden_WTD for _, hidden_WTD in _passes(model, ids_WT, selection)])


@torch.inference_mode()
def token_divergence(model: Transformer, ids_WT: Tensor, dense_WTD: Tensor, selection: Selection) -> Tensor:
    """KL(dense || sparse) [W, T - 1] of each token, nats, from the hidden_states of the dense model.

    Raises ValueError, with the first layer and token, for values that are not finite.
    """
    rows = []
    for windows, hidden_WTD in _passes(model, ids_WT, selection, logits=True):
        dense_ND, sparse_ND = dense_WTD[windows].flatten(0, 1), hidden_WTD.flatten(0, 1)
        found = []
        for piece in _pieces(model, len(dense_ND), models=2):
            log_dense_NV, log_sparse_NV = (model.logits(each[piece]).log_softmax(-1) for each in (dense_ND, sparse_ND))
            found.append(F.kl_div(log_sparse_NV, log_dense_NV, reduction="none", log_target=True).sum(-1))
        divergence = torch.cat(found).view(len(hidden_WTD), -1)
        require_finite(divergence, model, ids_WT[windows], selection, window_names(windows.start, len(hidden_WTD)))
        rows.append(divergence)
    return torch.cat(rows)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Relative rise of perplexity of a sparse run over the dense run of the same tokens, with its standard error."""

    ppl_dense: float
    ppl_sparse: float
    rise: float
    stderr: float


def compare_runs(dense_nll: Tensor, sparse_nll: Tensor) -> Comparison:
    """Compare two runs over the same tokens; the error is that of the mean paired difference."""
    difference = (sparse_nll - dense_nll).double().flatten()
    rise = math.expm1(float(difference.mean()))
    stderr = float(difference.std() / math.sqrt(len(difference))) * (1 + rise)
    return Comparison(math.exp(float(dense_nll.double().mean())), math.exp(float(sparse_nll.double().mean())), rise, stderr)


class DenseStates:
    """A dense pass over one window, kept so that a change in layer l only runs the layers from l on."""

    def __init__(self, model: Transformer, ids_1T: Tensor) -> None:
        self.model = model
        self.position_T = torch.arange(ids_1T.shape[1], device=ids_1T.device)
        x, mlp_in = model.embedded(ids_1T, self.position_T), None
        self.states: list[tuple[Tensor, Tensor | None]] = []
        for layer in range(model.config.num_layers):
            self.states.append((x, mlp_in))
            x, mlp_in = model.layer(layer, x, self.position_T, mlp_in, DENSE)
        self.log_probs_TV = self._log_probs(x)

    def _log_probs(self, x: Tensor) -> Tensor:
        hidden = x if self.model.final_norm is None else self.model.final_norm(x)
        return self.model.logits(hidden)[0].log_softmax(-1)

    def divergence(self, layer: int, selection: Selection) -> float:
        """Mean KL(dense || changed) per token when only `selection` acts, from `layer` on."""
        x, mlp_in = self.states[layer]
        for index in range(layer, self.model.config.num_layers):
            x, mlp_in = self.model.layer(index, x, self.position_T, mlp_in, selection if index == layer else DENSE)
        changed_TV = self._log_probs(x)
        found = float((self.log_probs_TV.exp() * (self.log_probs_TV - changed_TV)).sum(-1).mean())
        require(math.isfinite(found), f"layer {layer}: what a selection costs is {found}, no number; {FIX}")
        return max(0.0, found)


Variants = Sequence[Sequence[LayerAdapter]]


@torch.inference_mode()
def divergences(model: Transformer, ids_WT: Tensor, variants: Variants, progress: Progress | None = None) -> list[list[float]]:
    """KL per token of every variant of every layer: variants[l][i] is a LayerAdapter used in layer l alone."""
    num_layers = model.config.num_layers
    total = len(ids_WT) * sum(len(v) for v in variants)
    sums, done = [[0.0] * len(v) for v in variants], 0
    for window in range(len(ids_WT)):
        dense = DenseStates(model, ids_WT[window : window + 1])
        for layer, options in enumerate(variants):
            for index, option in enumerate(options):
                only_here = tuple(option if other == layer else LayerAdapter() for other in range(num_layers))
                sums[layer][index] += dense.divergence(layer, MaskedSelection(only_here)) / len(ids_WT)
                done += 1
                if progress is not None:
                    progress("what each part costs", done, total)
    return sums
