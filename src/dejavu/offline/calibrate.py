"""Spend a loss budget where it buys the most: one threshold for each part of each layer, chosen together.

In: for every part (the MLP or the heads of a layer, its gate, or the inputs at a point) candidate thresholds with the bytes a token
then reads and the divergence they cost. Out: one candidate per part, or none where the part stays dense. For a price kappa per unit of
divergence, each part takes the candidate with the least  bytes + kappa x divergence  (dense: all its bytes, no divergence);
kappa is found so that the sum of divergences meets an allowance, and the allowance so that the *measured* divergence of the whole choice
meets a goal.

Letters: none; sizes are weights read per token (elements), divergences are nats per token
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dejavu.config import ModelConfig
from dejavu.model.selectors import LayerAdapter
from dejavu.offline.thresholds import SelectionQuality

WORTH_SELECTING = 0.9  # of a part's reads: finding and gathering what is selected costs more time than a smaller saving gives back
CLOSE, AIMED = 0.88, 0.95  # of a goal: what ends a search, and what the next trial aims at


@dataclass(frozen=True, slots=True, kw_only=True)
class ThresholdCandidate:
    """A threshold of one part: what it selects on held-out text, what a token then reads, what it costs."""

    threshold: float
    quality: SelectionQuality
    reads: float
    divergence: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The MLP or the heads of a layer, its gate, or the inputs at a point; dense_reads is what a token reads when nothing is selected."""

    layer: int
    kind: str
    dense_reads: float
    candidates: tuple[ThresholdCandidate, ...]

    def best(self, kappa: float) -> ThresholdCandidate | None:
        """The cheapest choice at a price of `kappa` elements per nat; None is dense."""
        chosen, cost = None, self.dense_reads
        for candidate in self.candidates:
            if candidate.reads > WORTH_SELECTING * self.dense_reads:
                continue
            price = candidate.reads + kappa * candidate.divergence
            if price < cost:
                chosen, cost = candidate, price
        return chosen


def token_reads(
    config: ModelConfig, layers: Sequence[LayerAdapter], mlp_L: Sequence[float], heads_L: Sequence[float], cached_tokens: int
) -> float:
    """What a token reads in all layers, weights and cache entries, at these densities (as DensityCounter has them)."""
    total = 0.0
    for layer, mlp, heads in zip(layers, mlp_L, heads_L, strict=True):
        total += layer.neurons.reads(config, mlp, cached_tokens)
        total += layer.inputs.attention_reads(config, layer.heads, heads, cached_tokens)
    return total


def interpolate_divergence(masses: Sequence[float], divergences: Sequence[float], mass: float) -> float:
    """Divergence at a kept mass, log-log linear in the mass that is lost, between measured points (sorted by mass)."""
    points = [(math.log(max(1 - m, 1e-6)), math.log(max(d, 1e-9))) for m, d in zip(masses, divergences, strict=True)]
    x = math.log(max(1 - mass, 1e-6))
    if x >= points[0][0]:
        return math.exp(points[0][1] + (x - points[0][0]))
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 >= x >= x1:
            share = 0.0 if x0 == x1 else (x0 - x) / (x0 - x1)
            return math.exp(y0 + share * (y1 - y0))
    return math.exp(points[-1][1] + (x - points[-1][0]))


def choose(parts: Sequence[Part], allowance: float) -> list[ThresholdCandidate | None]:
    """The choice per part with the fewest reads whose divergences add up to at most `allowance`."""
    low, high = 1.0, 1e15
    for _ in range(80):
        kappa = math.sqrt(low * high)
        spent = sum(c.divergence for part in parts if (c := part.best(kappa)) is not None)
        low, high = (kappa, high) if spent > allowance else (low, kappa)
    return [part.best(high) for part in parts]


@dataclass(frozen=True, slots=True)
class Tried:
    """What an allowance bought, and the divergence that was measured of it."""

    allowance: float
    choice: list[ThresholdCandidate | None]
    measured: float


def next_allowance(tried: Sequence[Tried], goal: float) -> float:
    """The allowance whose measured divergence should be AIMED of the goal: on the line through what was tried, logarithms of both.

    Where nothing was tried, prices are believed; with one trial, the two are taken as proportional. A step is a factor of 4 at most.
    """
    if not tried:
        return goal
    near = sorted(tried, key=lambda trial: abs(math.log(max(trial.measured, 1e-12) / goal)))
    nearest, slope = near[0], 1.0
    other = next((trial for trial in near[1:] if trial.allowance != nearest.allowance), None)
    if other is not None and min(nearest.measured, other.measured) > 0:
        rise = math.log(other.measured / nearest.measured) / math.log(other.allowance / nearest.allowance)
        slope = min(2.0, max(0.5, rise))
    factor = (AIMED * goal / max(nearest.measured, 1e-12)) ** (1 / slope)
    return nearest.allowance * min(4.0, max(0.25, factor))


def meet_goal(
    parts: Sequence[Part],
    goal: float,
    measure: Callable[[list[ThresholdCandidate | None]], float],
    tried: list[Tried],
    *,
    rounds: int = 5,
) -> list[ThresholdCandidate | None]:
    """Choose so that measure(choice), a divergence, is as close to `goal` as `rounds` trials get, never above it.

    tried: of earlier calls, to which those of this one are added. A goal of 0, or one that no trial keeps, gives the choice that costs
    nothing: every part is dense, or leaves out exact zeros.
    """
    if goal <= 0:
        return choose(parts, 0.0)
    for _ in range(rounds):
        kept = [trial for trial in tried if trial.measured <= goal]
        if any(trial.measured > CLOSE * goal for trial in kept):
            break
        low = max((trial.allowance for trial in kept), default=0.0)
        over = [trial for trial in tried if trial.measured > goal and trial.allowance > low]
        high = min((trial.allowance for trial in over), default=math.inf)
        allowance = next_allowance(tried, goal)
        if not low < allowance < high:
            allowance = (low + high) / 2 if math.isfinite(high) else 2 * low
        choice = choose(parts, allowance)
        while any(choice == trial.choice for trial in over) and high - low > 0.01 * high:  # an allowance a little lower bought the same
            high = min(high, allowance)
            allowance = (low + high) / 2
            choice = choose(parts, allowance)
        if all(candidate is None for candidate in choice) or any(choice == trial.choice for trial in tried):
            break
        tried.append(Tried(allowance, choice, measure(choice)))
    kept = [trial for trial in tried if trial.measured <= goal]
    return max(kept, key=lambda trial: trial.measured).choice if kept else choose(parts, 0.0)
