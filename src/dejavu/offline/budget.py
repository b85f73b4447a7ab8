"""From candidates to a choice that keeps the loss budget: calibrated on one part of the text, checked on another.

In: a model, windows, and what a method has to choose among (`SearchSpace`). Out: `Fitted`: the choice, the layers that it makes and what
was measured of them on windows that the choice did not see.
"""

from __future__ import annotations

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
from dejavu.offline.calibrate import Part, ThresholdCandidate, meet_budget
from dejavu.offline.fidelity import Comparison, compare_runs, token_nll
from dejavu.offline.split import Split

CHECKS = 5  # times the goal is lowered when the check text asks for it; an adapter still over budget says so
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
    """Negative log likelihood of the dense model on the windows that calibrate and on those that check; once for all methods."""

    calibrate: Tensor
    check: Tensor

    @classmethod
    def of(cls, model: Transformer, split: Split) -> DenseRuns:
        return cls(token_nll(model, split.calibrate), token_nll(model, split.check))


@dataclass(frozen=True, slots=True)
class Fitted:
    """A choice, the layers it makes, and perplexity and densities on the check windows."""

    choice: Choice
    layers: tuple[LayerAdapter, ...]
    checked: Comparison
    counter: DensityCounter


def fit(model: Transformer, split: Split, dense: DenseRuns, space: SearchSpace, budget: float, progress: Progress | None) -> Fitted:
    """Spend the budget on the calibration windows; where the check windows, which are then harder, ask for it, less of it."""
    trials = 0

    def measured_rise(choice: list[ThresholdCandidate | None]) -> float:
        """Rise of perplexity on the calibration windows, with its standard error to spare."""
        nonlocal trials
        trials += 1
        if progress is not None:
            progress("meeting the budget", trials, max(trials, 6))
        rise = compare_runs(dense.calibrate, token_nll(model, split.calibrate, MaskedSelection(space.layers(choice))))
        return rise.rise + CONFIDENCE * rise.stderr

    goal, check = budget, 0
    while True:
        check += 1
        choice = meet_budget(space.parts, goal, measured_rise)
        layers = space.layers(choice)
        selection = MaskedSelection(layers)
        checked = compare_runs(dense.check, token_nll(model, split.check, selection))
        cautious = checked.rise + CONFIDENCE * checked.stderr
        if cautious <= budget or all(candidate is None for candidate in choice) or check == CHECKS:
            return Fitted(choice, layers, checked, selection.counter)
        goal *= 0.9 * budget / cautious  # the text that calibration did not see is harder: aim lower
