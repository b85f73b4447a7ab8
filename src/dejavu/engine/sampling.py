"""The choice of the next token. In: logits [V]. Out: a token id and its log-probability.

The log-probability is that of the full softmax, before temperature, top_k and top_p. Drawing happens on the CPU in fp64,
with a generator of the sequence's own: the same seed gives the same tokens whatever else runs, and torch's global random
state is never touched. An engine that decodes several tokens by itself draws them from a stream of its own: the same seed gives the
same tokens there too, and others than here.

Letters: V vocabulary  C candidates
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dejavu.config import SamplingConfig


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A token id and its log-probability (natural logarithm) under the model."""

    token_id: int
    logprob: float


NOT_NUMBERS = "the model's logits are not numbers (NaN): its weights are damaged or overflow in this dtype; try fp32"


def stream_digest(seed: int, index: int) -> bytes:
    """The bytes that a seed's stream starts from, for one of the choices of a request."""
    return hashlib.sha256(f"{seed}/{index}".encode()).digest()


class Distribution:
    """The full softmax of logits [V], in fp64: worked out when it is asked for, as the likeliest token alone needs none. Logits on the
    CPU are not copied: they have to stay as they are meanwhile.

    Raises ValueError when the logits are not numbers.
    """

    def __init__(self, logits_V: Tensor) -> None:
        # numpy, not torch: torch's threads go on spinning after each operation, on the cores that the next step needs.
        wide = logits_V.dtype in (torch.float32, torch.float64)
        self._value_V = (logits_V if wide else logits_V.float()).detach().cpu().numpy()
        self.best = int(self._value_V.argmax())  # the first NaN, where there is one
        if not math.isfinite(self._value_V[self.best]):
            raise ValueError(NOT_NUMBERS)

    @functools.cached_property
    def below_V(self) -> NDArray[np.float64]:  # noqa: N802 (a shape suffix)
        """Each logit less the largest: at most 0, so that a temperature near zero does not overflow."""
        value_V = self._value_V.astype(np.float64)
        return value_V - value_V[self.best]

    @functools.cached_property
    def _log_total(self) -> float:
        return math.log(float(np.exp(self.below_V).sum()))

    def logit(self, token_id: int) -> float:
        return float(self._value_V[token_id])

    def logprob(self, token_id: int) -> float:
        return float(self.below_V[token_id]) - self._log_total

    def top(self, count: int) -> tuple[tuple[int, float], ...]:
        """The likeliest tokens with their log-probabilities, likeliest first, the smaller id first at ties; none that is impossible."""
        count = min(count, len(self.below_V))
        if count == 0:
            return ()
        least = max(np.partition(self.below_V, -count)[-count], np.finfo(np.float64).min)
        id_C = np.flatnonzero(self.below_V >= least)
        id_C = id_C[np.argsort(-self.below_V[id_C], kind="stable")][:count]
        return tuple((int(token_id), self.logprob(token_id)) for token_id in id_C)


class Sampler:
    """Draws the tokens of one sequence.

    index tells the choices of one request apart: each has its own stream, and choice 0 draws what a lone one would.
    Without a seed the stream starts from fresh entropy.
    """

    def __init__(self, config: SamplingConfig, *, index: int = 0) -> None:
        self.config, self.index = config, index
        self._generator = torch.Generator()
        if config.seed is None:
            self._generator.seed()
        else:
            digest = stream_digest(config.seed, index)
            self._generator.manual_seed(int.from_bytes(digest[:4], "big"))  # torch's CPU generator reads 32 bits of a seed

    def draw(self, logits_V: Tensor) -> SampledToken:
        """The next token of logits [V]. Raises ValueError when the logits are not numbers."""
        found = Distribution(logits_V)
        token_id = self.choose(found)
        return SampledToken(token_id, found.logprob(token_id))

    def choose(self, found: Distribution, bias: Mapping[int, float] | None = None) -> int:
        """The next token. bias: token id -> what is added to its logit before anything else."""
        if self.config.temperature == 0 and not bias:
            return found.best
        best, below_V = found.best, found.below_V
        if bias:
            below_V = below_V.copy()
            below_V[list(bias)] += list(bias.values())
            best = int(below_V.argmax())
            if not np.isfinite(below_V[best]):
                raise ValueError("no token is left to draw: what may come is forbidden or has no logit")
            below_V -= below_V[best]
        if self.config.temperature == 0:
            return best
        with np.errstate(invalid="ignore", over="ignore"):
            return self._draw(below_V)

    def _draw(self, below_V: NDArray[np.float64]) -> int:
        """Draw from logits given as differences to the best."""
        config = self.config
        weight_V = np.exp(below_V / config.temperature)  # the likeliest weighs 1
        if config.min_p is not None:
            weight_V[weight_V < config.min_p] = 0
        if config.top_k is None and config.top_p is None:
            return self._pick(weight_V)
        if config.top_k is not None and config.top_k < len(weight_V):
            id_C = np.argpartition(weight_V, -config.top_k)[-config.top_k :]
        else:
            id_C = np.arange(len(weight_V))
        if config.top_p is not None:
            id_C = _nucleus(weight_V, id_C, config.top_p)
        return int(id_C[self._pick(weight_V[id_C])])

    def _pick(self, weight_C: NDArray[np.float64]) -> int:
        """An index with a probability proportional to its weight."""
        reached_C = weight_C.cumsum()
        uniform = torch.rand((), generator=self._generator, dtype=torch.float64).item()
        return int(np.searchsorted(reached_C, uniform * reached_C[-1], side="right"))


def _nucleus(weight_V: NDArray[np.float64], id_C: NDArray[np.intp], top_p: float) -> NDArray[np.intp]:
    """The fewest of the ids, heaviest first, whose weights reach the share top_p; the heaviest is always among them.

    Ids that weigh less than (1 - top_p) / C of all can be left out together and the others still reach top_p: only those are sorted.
    """
    weight_C = weight_V[id_C]
    total = weight_C.sum()
    heavy = np.flatnonzero(weight_C >= min((1 - top_p) * total / len(id_C), weight_C.max()))  # where top_p is below a rounding error, too
    heavy = heavy[np.argsort(-weight_C[heavy], kind="stable")]
    reached = weight_C[heavy].cumsum()
    return id_C[heavy[: int(np.searchsorted(reached, top_p * total)) + 1]]
