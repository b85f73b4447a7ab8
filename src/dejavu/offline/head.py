"""A screened head within a loss budget: clusters fitted to a text, and the threshold that keeps tokens enough.

In: a TrainingText, perhaps what its layers select. Out: a Screen (kernels/screen.py) and what was measured of it:

    missed = the full head's probability, at temperature 1, of tokens that the screen leaves out, in the mean over a text

which is the total variation between what the two heads draw. Taken is the largest of THRESHOLDS whose missed mass plus its standard error
is within the budget on the windows that calibrate and on those that check; measurements are of the latter. Perplexity keeps its own
budget: what selection in the layers may raise it by, and what the head may miss, are each held against the whole budget.

Letters: W windows  T tokens  N tokens of several windows  D model  E width of the head  V vocabulary  C clusters
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dejavu.config import Progress
from dejavu.kernels.screen import Screen, fit_screen, ratios
from dejavu.model.adapter_config import ScreenConfig
from dejavu.model.masked import MaskedSelection
from dejavu.model.selectors import LayerAdapter
from dejavu.offline.budget import CONFIDENCE
from dejavu.offline.fidelity import hidden_states
from dejavu.offline.memory import CPU
from dejavu.offline.split import beginnings
from dejavu.offline.training_text import TrainingText

STATES = 2048  # hidden states that clusters are fitted to, of windows far apart
MEASURED = 2048  # and that each threshold is measured on, at most, of either part
THRESHOLDS = tuple(10 ** (-step / 8) for step in range(16, 81))  # 1e-2 to 1e-10
BLOCK_VALUES = 1 << 25  # logits in memory at a time; of so many tokens that widening the head is little beside the products


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

    def __init__(self, text: TrainingText, *, seed: int, progress: Progress | None = None) -> None:
        self.text, self.model, self.progress = text, text.model, progress
        self._say("states of the head", 0, 1)
        states_NE = self._states(hidden_states(self.model, beginnings(text.split.train, STATES))).to(CPU).double()
        self._say("clusters of the head", 0, 1)
        moment_EE = states_NE.T @ states_NE / len(states_NE)
        self.screen = fit_screen(self.model.head_matrix, moment_EE, threshold=THRESHOLDS[0], seed=seed)
        self._say("clusters of the head", 1, 1)

    def within(self, budget: float, layers: Sequence[LayerAdapter] | None = None) -> tuple[Screen, ScreenConfig] | None:
        """The screen that reads least of those within the budget; None where none is. layers: what the model runs with."""
        calibrated, checked = (self._missed(states_NE) for states_NE in self._measured(layers))
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

    def _measured(self, layers: Sequence[LayerAdapter] | None) -> tuple[Tensor, Tensor]:
        """States [N, E] that calibrate and that check, at most MEASURED of each, evenly spread."""
        if layers is None:
            calibrate_WTD, check_WTD = self.text.dense.calibrate, self.text.dense.check
        else:
            parts = (beginnings(ids_WT, MEASURED) for ids_WT in (self.text.measured.calibrate, self.text.measured.check))
            calibrate_WTD, check_WTD = (hidden_states(self.model, ids_WT, MaskedSelection(layers)) for ids_WT in parts)
        return self._states(calibrate_WTD, MEASURED), self._states(check_WTD, MEASURED)

    @torch.inference_mode()
    def _states(self, hidden_WTD: Tensor, most: int | None = None) -> Tensor:
        """What meets the head's rows [N, E], of so many tokens at most."""
        hidden_ND = hidden_WTD.flatten(0, 1)
        if most is not None and len(hidden_ND) > most:
            hidden_ND = hidden_ND[torch.linspace(0, len(hidden_ND) - 1, most).long()]
        return self.model.head_inputs(hidden_ND)

    @torch.inference_mode()
    def _missed(self, states_NE: Tensor) -> _Missed:
        """Of all thresholds: a cluster is left out from some on, which its bucket says."""
        screen, model = self.screen, self.model
        cluster_V = torch.empty(len(screen.members_V), dtype=torch.long)
        cluster_V[screen.members_V.long()] = torch.arange(len(screen.sizes_C)).repeat_interleave(screen.sizes_C)
        edges = torch.tensor(THRESHOLDS).log().flip(0)
        counts, hits = torch.zeros(2, len(THRESHOLDS) + 1).unbind(0)
        masses, done = [], 0
        for part_TE in states_NE.split(max(1, BLOCK_VALUES // len(cluster_V))):
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
            self._say("what the head misses", done, len(states_NE))
        missed = (1 - torch.cat(masses).double().cumsum(1)[:, :-1]).clamp(min=0)
        stderr = missed.std(0) / math.sqrt(done)
        return _Missed((counts.cumsum(0) / done)[:-1], (hits.cumsum(0) / done)[:-1], missed.mean(0), stderr)

    def _say(self, what: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(what, min(done, total), total)
