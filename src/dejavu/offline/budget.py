"""From candidates to a choice that keeps the loss budget: calibrated on one part of the text, checked on another.

In: a model, windows, and what a method has to choose among (`SearchSpace`). Out: `Fitted`: the choice, the layers that it makes and what
was measured of them on windows that the choice did not see. A choice is calibrated by its divergence from the dense model, which a thousand
tokens tell to a few hundredths, and kept or refused by the rise of perplexity.

Letters: W windows  T tokens of a window  D model
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from dejavu.config import Progress
from dejavu.model.adapter_config import LayerConfig
from dejavu.model.counts import DensityCounter
from dejavu.model.masked import MaskedSelection
from dejavu.model.selectors import LayerAdapter
from dejavu.model.transformer import Transformer
from dejavu.offline.calibrate import Part, ThresholdCandidate, Tried, choose, meet_goal
from dejavu.offline.fidelity import Comparison, compare_runs, hidden_states, states_nll, token_divergence, token_nll
from dejavu.offline.split import Split

CHECKS = 3  # an adapter still over budget says so
SPENT = 0.75  # of the budget: from there on a choice is taken as it is
HIGHER = 1.5  # the most that a goal is raised at once
RATIOS, USUAL_RATIO = (0.3, 2.0), 0.7  # of a rise of the loss to the divergence: bounds of what a check says, and the first guess
SAFE = 0.7  # of a goal for the last check, where none has kept the budget
USUAL_PASSES = 6
CONFIDENCE = 1.0  # standard errors added to a measured rise before it is held against the budget

Choice = Sequence[ThresholdCandidate | None]


class SearchSpace(Protocol):
    """What a method can do to a model: parts with candidates, and what a choice among them (one or None for each part) makes."""

    @property
    def parts(self) -> Sequence[Part]: ...

    def layers(self, choice: Choice) -> tuple[LayerAdapter, ...]:
        """What runs."""
        ...

    def configs(self, choice: Choice, counter: DensityCounter) -> tuple[LayerConfig, ...]:
        """What an adapter's config says of it; counter: of the check."""
        ...

    def rows(self, choice: Choice, counter: DensityCounter) -> list[dict[str, Any]]:
        """What `dejavu train` tells of each layer."""
        ...


@dataclass(frozen=True, slots=True)
class DenseRuns:
    """The dense model, once for all methods: hidden states [W, T - 1, D] of the windows that calibrate and of those that check, and the
    negative log likelihood [W, T - 1] of the latter."""

    calibrate: Tensor
    check: Tensor
    nll: Tensor

    @classmethod
    def of(cls, model: Transformer, split: Split) -> DenseRuns:
        check_WTD = hidden_states(model, split.check)
        return cls(hidden_states(model, split.calibrate), check_WTD, states_nll(model, check_WTD, split.check))


@dataclass(frozen=True, slots=True)
class Fitted:
    """A choice, the layers it makes, and perplexity and densities on the check windows. held: whether it kept the budget there, with its
    standard error."""

    choice: Choice
    layers: tuple[LayerAdapter, ...]
    checked: Comparison
    counter: DensityCounter
    held: bool

    @classmethod
    def nothing(cls, parts: int, num_layers: int, dense: DenseRuns) -> Fitted:
        """Every part dense, which costs nothing and needs no pass."""
        counter, ppl = DensityCounter(num_layers), math.exp(float(dense.nll.double().mean()))
        counter.add([1.0] * num_layers, [1.0] * num_layers)
        return cls([None] * parts, (LayerAdapter(),) * num_layers, Comparison(ppl, ppl, 0.0, 0.0), counter, held=True)


def divergence_for(budget: float, ratio: float, spread: float) -> float:
    """The divergence d whose rise of the loss, with what is added for its standard error, is the budget's:

    ratio d + spread sqrt(d) = log(1 + budget)

    ratio: of the rise to the divergence, which is 1 where a model knows its text. A difference of losses has a variance of about 2 d.
    """
    return ((math.sqrt(spread**2 + 4 * ratio * math.log1p(budget)) - spread) / (2 * ratio)) ** 2


def least_reads(parts: Sequence[Part], budget: float) -> float:
    """What the parts read, of what they read dense, where the rise is as small beside the divergence as it may be: no choice reads less."""
    choice = choose(parts, math.log1p(budget) / RATIOS[0])
    total = sum(part.dense_reads for part in parts)
    kept = sum(part.dense_reads if found is None else found.reads for part, found in zip(parts, choice, strict=True))
    return kept / total if total else 0.0


def fit(model: Transformer, split: Split, dense: DenseRuns, space: SearchSpace, budget: float, progress: Progress | None) -> Fitted:
    """Spend the budget on the calibration windows: as much of it as the check windows say, which are asked up to CHECKS times."""
    done = 0

    def said(what: str) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(what, done, max(done, USUAL_PASSES))

    def divergence(choice: list[ThresholdCandidate | None]) -> float:
        said("meeting the budget")
        selection = MaskedSelection(space.layers(choice))
        return float(token_divergence(model, split.calibrate, dense.calibrate, selection).double().mean())

    tried, refused = list[Tried](), math.inf
    goal = divergence_for(budget, USUAL_RATIO, CONFIDENCE * math.sqrt(2 / dense.nll.numel()))
    kept: Fitted | None = None
    last: Fitted | None = None
    for check in range(1, CHECKS + 1):
        choice = meet_goal(space.parts, goal, divergence, tried)
        if last is not None and choice in (last.choice, None if kept is None else kept.choice):
            break
        layers = space.layers(choice)
        selection = MaskedSelection(layers)
        said("checking the budget")
        checked = compare_runs(dense.nll, token_nll(model, split.check, selection))
        cautious = checked.rise + CONFIDENCE * checked.stderr
        last = Fitted(choice, layers, checked, selection.counter, held=cautious <= budget)
        if last.held:
            kept = last
        else:
            refused = goal
        spent = next((trial.measured for trial in tried if trial.choice == choice), 0.0)
        if all(candidate is None for candidate in choice) or spent == 0 or (cautious <= budget and cautious > SPENT * budget):
            break
        low, high = RATIOS
        ratio = min(high, max(low, math.log1p(checked.rise) / spent))
        aim = divergence_for(budget, ratio, CONFIDENCE * checked.stderr / math.sqrt(spent))
        if cautious > budget:
            goal = min(aim, 0.95 * spent)  # the text that calibration did not see is harder
            if check == CHECKS - 1 and kept is None:
                goal *= SAFE
        elif refused < HIGHER * goal:
            break  # what is left lies between two that were checked
        else:
            goal = min(aim, HIGHER * goal, math.sqrt(goal * refused))
    found = kept or last
    assert found is not None
    return found
