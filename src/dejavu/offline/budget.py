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
from dejavu.offline.calibrate import Part, ThresholdCandidate, Tried, meet_goal
from dejavu.offline.fidelity import Comparison, compare_runs, hidden_states, token_divergence, token_nll
from dejavu.offline.split import Split

CHECKS = 5  # times the goal is lowered when the check text asks for it; an adapter still over budget says so
SPENT, HIGHER = 0.7, 1.5  # of the budget: the share below which the goal is raised, once, and how far
USUAL_PASSES = 5
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
    """The dense model, once for all methods: hidden states [W, T - 1, D] of the windows that calibrate, negative log likelihood of those
    that check."""

    calibrate: Tensor
    check: Tensor

    @classmethod
    def of(cls, model: Transformer, split: Split) -> DenseRuns:
        return cls(hidden_states(model, split.calibrate), token_nll(model, split.check))


@dataclass(frozen=True, slots=True)
class Fitted:
    """A choice, the layers it makes, and perplexity and densities on the check windows."""

    choice: Choice
    layers: tuple[LayerAdapter, ...]
    checked: Comparison
    counter: DensityCounter


def divergence_for(budget: float, tokens: int) -> float:
    """The divergence whose rise of perplexity, with its standard error on so many tokens, is as large as the budget.

    A difference of losses whose mean is d, of a model that knows its text, has a variance of about 2 d.
    """
    root = CONFIDENCE / math.sqrt(2 * tokens)
    return (math.sqrt(root**2 + math.log1p(budget)) - root) ** 2


def fit(model: Transformer, split: Split, dense: DenseRuns, space: SearchSpace, budget: float, progress: Progress | None) -> Fitted:
    """Spend the budget on the calibration windows; where the check windows ask for it less of it, and once more where they leave room."""
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

    goal, tried = divergence_for(budget, dense.check.numel()), list[Tried]()
    kept: Fitted | None = None
    last: Fitted | None = None
    for check in range(CHECKS):
        choice = meet_goal(space.parts, goal, divergence, tried)
        if last is not None and choice == last.choice:
            break
        layers = space.layers(choice)
        selection = MaskedSelection(layers)
        said("checking the budget")
        checked = compare_runs(dense.check, token_nll(model, split.check, selection))
        last = Fitted(choice, layers, checked, selection.counter)
        cautious = checked.rise + CONFIDENCE * checked.stderr
        over, dense_choice = cautious > budget, all(candidate is None for candidate in choice)
        if not over:
            kept = last
        if dense_choice or (kept is not None and (check > 0 or cautious > SPENT * budget)):
            break
        goal *= (0.9 if over else 1.0) * min(HIGHER, budget / max(cautious, 1e-12))
    found = kept or last
    assert found is not None
    return found
