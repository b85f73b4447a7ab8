"""A screened head within a loss budget: clusters fitted to a text, and the threshold that keeps tokens enough.

In: a model, windows of token ids, perhaps what its layers select. Out: a Screen (kernels/screen.py) and what was measured of it:

    missed = the full head's probability, at temperature 1, of tokens that the screen leaves out, in the mean over a text

which is the total variation between what the two heads draw. Taken is the largest of THRESHOLDS whose missed mass plus its standard error
is within the budget on the windows that calibrate and on those that check; measurements are of the latter. Perplexity keeps its own
budget: what selection in the layers may raise it by, and what the head may miss, are each held against the whole budget.

Letters: W windows  T tokens  E width of the head  V vocabulary  C clusters
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dejavu.config import Progress
from dejavu.kernels.screen import Screen, fit_screen, ratios
from dejavu.model.adapter_config import ScreenConfig
from dejavu.model.masked import MaskedSelection
from dejavu.model.selectors import LayerAdapter
from dejavu.model.transformer import DENSE, Selection, Transformer
from dejavu.offline.budget import CONFIDENCE
from dejavu.offline.memory import CPU
from dejavu.offline.split import Split

STATES = 4096  # hidden states that clusters are fitted to
MEASURED = 2048  # and that each threshold is measured on, at most, of either part
THRESHOLDS = tuple(10 ** (-step / 8) for step in range(16, 81))  # 1e-2 to 1e-10
BLOCK_TOKENS = 64


@dataclass(frozen=True, slots=True)
class _Missed:
    """Of one threshold after the other, in the mean over tokens."""

    tokens: Tensor
    agreement: Tensor
    missed: Tensor
    stderr: Tensor

    def within(self, budget: float) -> Tensor:
        return self.missed + CONFIDENCE * self.stderr <= budget


class HeadFit:
    """The clusters of a model's head, fitted once; and their threshold for what its layers select."""

    def __init__(self, model: Transformer, split: Split, *, seed: int, progress: Progress | None = None) -> None:
        """split: of windows where the model is."""
        self.model, self.split, self.progress = model, split, progress
        width = model.config.embed_width
        moment_EE, count = torch.zeros(width, width, dtype=torch.float64), 0
        for states_TE in _states(model, _spread(split.train, STATES), DENSE):
            self._say("states of the head", count, STATES)
            wide = states_TE.to(CPU).double()
            moment_EE += wide.T @ wide
            count += len(states_TE)
        self._say("clusters of the head", 0, 1)
        self.screen = fit_screen(model.head_matrix, moment_EE / count, threshold=THRESHOLDS[0], seed=seed)
        self._say("clusters of the head", 1, 1)

    def within(self, budget: float, layers: Sequence[LayerAdapter] | None = None) -> tuple[Screen, ScreenConfig] | None:
        """The screen that reads least of those within the budget; None where none is. layers: what the model runs with."""
        selection = DENSE if layers is None else MaskedSelection(layers)
        calibrated, checked = (self._missed(ids_WT, selection) for ids_WT in (self.split.calibrate, self.split.check))
        kept = (calibrated.within(budget) & checked.within(budget)).nonzero()
        if len(kept) == 0:
            return None
        best = int(kept[0])
        tokens = float(checked.tokens[best])
        config = ScreenConfig(
            threshold=THRESHOLDS[best],
            clusters=len(self.screen.sizes_C),
            tokens=tokens,
            agreement=float(checked.agreement[best]),
            missed=float(checked.missed[best]),
            missed_stderr=float(checked.stderr[best]),
        )
        return self.screen.at(THRESHOLDS[best], tokens), config

    @torch.inference_mode()
    def _missed(self, ids_WT: Tensor, selection: Selection) -> _Missed:
        """Of all thresholds: a cluster is left out from some on, which its bucket says."""
        screen, model = self.screen, self.model
        cluster_V = torch.empty(len(screen.members_V), dtype=torch.long)
        cluster_V[screen.members_V.long()] = torch.arange(len(screen.sizes_C)).repeat_interleave(screen.sizes_C)
        edges = torch.tensor(THRESHOLDS).log().flip(0)
        counts, hits = torch.zeros(2, len(THRESHOLDS) + 1).unbind(0)
        masses, done = [], 0
        ids_WT = _spread(ids_WT, MEASURED)
        for states_TE in _states(model, ids_WT, selection):
            for part_TE in states_TE.split(BLOCK_TOKENS):
                probability_TV = model.head_logits(part_TE).softmax(-1).to(CPU)
                ratio_TC = ratios(part_TE.to(CPU).float(), screen)
                ratio_TC[torch.arange(len(part_TE)), ratio_TC.argmax(1)] = 0.0  # the likeliest is kept at any threshold
                bucket_TC = len(THRESHOLDS) - torch.bucketize(ratio_TC, edges, right=True)
                mass_TC = torch.zeros_like(ratio_TC.T).index_add_(0, cluster_V, probability_TV.T.contiguous()).T
                masses.append(torch.zeros(len(part_TE), len(THRESHOLDS) + 1).scatter_add_(1, bucket_TC, mass_TC))
                counts += torch.bincount(bucket_TC.flatten(), screen.sizes_C.float().repeat(len(part_TE)), minlength=len(counts))
                chosen_T = cluster_V[probability_TV.argmax(1)]
                hits += torch.bincount(bucket_TC.gather(1, chosen_T[:, None])[:, 0], minlength=len(hits))
                done += len(part_TE)
                self._say("what the head misses", done, ids_WT.numel())
        missed = (1 - torch.cat(masses).double().cumsum(1)[:, :-1]).clamp(min=0)
        stderr = missed.std(0) / math.sqrt(done)
        return _Missed((counts.cumsum(0) / done)[:-1], (hits.cumsum(0) / done)[:-1], missed.mean(0), stderr)

    def _say(self, what: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(what, min(done, total), total)


def _spread(ids_WT: Tensor, tokens: int) -> Tensor:
    """As many windows as hold so many tokens, at least one, evenly spread."""
    count = max(1, min(len(ids_WT), tokens // ids_WT.shape[1]))
    return ids_WT[torch.linspace(0, len(ids_WT) - 1, count).long()]


@torch.inference_mode()
def _states(model: Transformer, ids_WT: Tensor, selection: Selection) -> Iterator[Tensor]:
    """What meets the head's rows [T, E], fp32, of one window after the other."""
    for ids_1T in ids_WT.split(1):
        yield model.head_inputs(model.hidden(ids_1T, selection))[0]
