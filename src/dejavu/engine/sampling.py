"""The choice of the next token. In: logits [V]. Out: a token id and its log-probability.

The log-probability is that of the full softmax, before temperature, top_k and top_p. Drawing happens on the CPU in fp64,
with a generator of the sequence's own: the same seed gives the same tokens whatever else runs, and torch's global random
state is never touched.

Letters: V vocabulary  C candidates
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from dejavu.config import SamplingConfig


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A token id and its log-probability (natural logarithm) under the model."""

    token_id: int
    logprob: float


class Sampler:
    """Draws the tokens of one sequence.

    index tells the choices of one request apart: each has its own stream, and choice 0 draws what a lone one would.
    Without a seed the stream starts from fresh entropy.
    """

    def __init__(self, config: SamplingConfig, *, index: int = 0) -> None:
        self.config = config
        self._generator = torch.Generator()
        if config.seed is None:
            self._generator.seed()
        else:
            digest = hashlib.sha256(f"{config.seed}/{index}".encode()).digest()
            self._generator.manual_seed(int.from_bytes(digest[:4], "big"))  # torch's CPU generator reads 32 bits of a seed

    def draw(self, logits_V: Tensor) -> SampledToken:
        """The next token. Raises ValueError when the logits are not numbers."""
        logits_V = logits_V.detach().to("cpu", torch.float64)
        if self.config.temperature == 0:
            token_id = int(logits_V.argmax())
        else:
            token_id = self._draw(logits_V)
        logprob = float(logits_V[token_id] - logits_V.logsumexp(0))
        if logprob != logprob:
            raise ValueError("the model's logits are not numbers (NaN): its weights are damaged or overflow in this dtype; try fp32")
        return SampledToken(token_id, logprob)

    def _draw(self, logits_V: Tensor) -> int:
        config = self.config
        # A temperature near zero must not overflow: differences to the best are divided, and they are at most 0.
        scaled_V = (logits_V - logits_V.max()) / config.temperature
        if scaled_V.isnan().any():
            return int(logits_V.argmax())
        if config.top_k is None and config.top_p is None:
            return int(torch.multinomial(scaled_V.softmax(0), 1, generator=self._generator))
        count = min(config.top_k or scaled_V.shape[0], scaled_V.shape[0])
        scaled_C, id_C = scaled_V.topk(count)
        prob_C = scaled_C.softmax(0)
        if config.top_p is not None:
            before_C = prob_C.cumsum(0) - prob_C
            prob_C = torch.where(before_C < config.top_p, prob_C, 0.0)  # the best is always kept: nothing is before it
        return int(id_C[torch.multinomial(prob_C, 1, generator=self._generator)])
