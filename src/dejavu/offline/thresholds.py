"""From scores to thresholds: what a threshold selects, and what it keeps, on held-out tokens.

density: selected / all. recall: selected among the truly active. mass: share of the contribution kept.
For neurons the contribution is |activation| x |down row|, for head groups the norm of what the group adds.

Letters: N tokens  F neurons  G head groups  O outputs
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dejavu.config import require
from dejavu.model.finite import FIX
from dejavu.model.predictor import Predictor
from dejavu.model.transformer import Block
from dejavu.offline.collect import LayerData, down_norms

# From keeping little to keeping nearly all: a layer that everything else builds on may need five nines.
MASS_LEVELS = (
    *(0.8, 0.85, 0.88, 0.9, 0.92, 0.935, 0.95, 0.96, 0.97, 0.975, 0.98, 0.985),
    *(0.99, 0.993, 0.995, 0.997, 0.998, 0.999, 0.9995, 0.9998, 0.9999, 0.99997),
)


@dataclass(frozen=True, slots=True)
class SelectionQuality:
    """What a predictor does at a threshold, on held-out tokens; three fractions."""

    density: float
    recall: float
    mass: float


@dataclass
class Scored:
    """Scores [N, O] of a predictor with the contributions they should find and, for neurons, what was truly active.

    layer: whose they are, for the ValueError that says that some are not finite: those cannot be sorted.
    """

    layer: int
    scores: Tensor
    contribution: Tensor
    active: Tensor
    at_least_one: bool

    def __post_init__(self) -> None:
        for name, values in (("scores", self.scores), ("contributions", self.contribution)):
            finite = bool(values.isfinite().all())
            require(finite, f"layer {self.layer}: {name} are not finite (NaN or infinite), so that no threshold can be set; {FIX}")
        self._sorted = self.scores.flatten().sort(descending=True)
        cumulative = self.contribution.flatten()[self._sorted.indices].double().cumsum(0)
        self._mass = cumulative / cumulative[-1].clamp_min(1e-30)

    def threshold_for_mass(self, mass: float) -> float:
        """The largest threshold that keeps at least this share of the contribution."""
        return self._below(int(torch.searchsorted(self._mass, mass)))

    def threshold_for_density(self, density: float) -> float:
        return self._below(round(density * self.scores.numel()) - 1)

    def _below(self, last: int) -> float:
        """A threshold just below the score of rank `last`, so that `scores > threshold` selects it."""
        values = self._sorted.values
        last = min(max(last, 0), len(values) - 1)
        score = values[last]
        following = values[min(last + 1, len(values) - 1)]
        if following == score:
            return float(torch.nextafter(score, torch.full_like(score, -torch.inf)))
        middle = (score + following) / 2
        return float(middle if middle < score else following)  # between neighbouring floats the middle may round up to the score

    def quality(self, threshold: float) -> SelectionQuality:
        chosen = self.scores > threshold
        if self.at_least_one:
            chosen = chosen.scatter(-1, self.scores.argmax(-1, keepdim=True), True)
        return SelectionQuality(
            density=float(chosen.float().mean()),
            recall=float((chosen & self.active).sum() / self.active.sum().clamp_min(1)),
            mass=float((self.contribution * chosen).sum() / self.contribution.sum().clamp_min(1e-30)),
        )


@torch.inference_mode()
def score_mlp(predictor: Predictor, data: LayerData, block: Block, tokens: slice) -> Scored:
    """Scores of an MLP predictor on a run of tokens."""
    first, last, _ = tokens.indices(len(data.mlp_ND))
    act_NF = data.active.dense(first, last, data.device)
    scores = predictor.scores(data.mlp_input(predictor.lookahead)[tokens].to(data.device))
    return Scored(data.layer, scores, act_NF.abs() * down_norms(block), act_NF != 0, at_least_one=False)


@torch.inference_mode()
def score_heads(predictor: Predictor, data: LayerData, tokens: slice) -> Scored:
    """Scores of a head predictor; a group counts as active when it gives over half of an equal share of the contribution."""
    norms_NG = data.group_norms_NG[tokens]
    active = norms_NG > 0.5 * norms_NG.mean(-1, keepdim=True)
    scores = predictor.scores(data.head_input(predictor.lookahead)[tokens].to(data.device))
    return Scored(data.layer, scores, norms_NG, active, at_least_one=True)
