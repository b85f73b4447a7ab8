"""Cases of a test with several axes: every pair of values, in place of every combination."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any


def all_pairs(*axes: Iterable[Any], allowed: Callable[..., bool] = lambda *values: True) -> list[tuple[Any, ...]]:
    """Few combinations, the same ones on every call: any two values of two axes that may share one are together in one.

    Greedy: of all combinations, the first that has the most pairs which no earlier one has.
    """
    pairs_of = {each: set(itertools.combinations(enumerate(each), 2)) for each in itertools.product(*axes) if allowed(*each)}
    missing, chosen = set[Any]().union(*pairs_of.values()), []
    while missing:
        chosen.append(max(pairs_of, key=lambda each: len(pairs_of[each] & missing)))
        missing -= pairs_of[chosen[-1]]
    return chosen
