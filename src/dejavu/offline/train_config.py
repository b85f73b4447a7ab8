"""The options of a training, checked once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dejavu.config import Config, require

METHODS = ("predicted", "exact", "gate", "input")
HEAD = "head"  # a screened head alone: layers run dense
LEAST_RANK, WIDTH_SHARE = 64, 8  # of the ranks tried on a planted opt-6.7b D / 8 read least (docs/log.md)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig(Config):
    """How a model is made sparse. method: one of METHODS, or HEAD; auto trains each that the model can have, with and without a screened
    head, and takes the fastest. budget: allowed relative rise of perplexity, and of a screened head the probability that it may miss. What
    follows is of predictors. rank: None follows the width (rank_of). epochs: passes over the training tokens.

    lookahead "auto" takes 1 (the predictor runs in parallel with attention) where that selects at most (1 + lookahead_tolerance) times the
    neurons that lookahead 0 selects for the same mass (for heads: loses at most that many times the mass at the same density).
    cached_tokens: context at which the heads' reads are counted. work_memory: GB of a layer's activations that the device holds at most,
    None as WorkMemory has it; what comes out is the same.
    """

    method: Literal["predicted", "exact", "gate", "input", "head", "auto"] = "predicted"
    budget: float = 0.005
    rank: int | None = None
    loss: Literal["contribution", "bce"] = "contribution"
    epochs: float = 4.0
    learning_rate: float = 5e-3
    max_tokens: int = 200_000
    lookahead: Literal["auto", "0", "1"] = "auto"
    lookahead_tolerance: float = 0.2
    heads: bool = True
    cached_tokens: int = 256
    seed: int = 0
    work_memory: float | None = None

    def __post_init__(self) -> None:
        methods = (*METHODS, HEAD, "auto")
        require(self.method in methods, f"method {self.method!r} is not supported; supported: {', '.join(methods)}")
        require(0 <= self.budget < 1, f"budget must lie in [0, 1), e.g. 0.005 for +0.5 % perplexity, not {self.budget}")
        require(self.rank is None or self.rank >= 1, f"rank must be at least 1, not {self.rank}")
        require(self.loss in ("contribution", "bce"), f"loss {self.loss!r} is not supported; choose contribution or bce")
        require(self.epochs > 0, f"epochs must be positive, not {self.epochs}")
        require(
            self.work_memory is None or 0 <= self.work_memory < float("inf"),
            f"--work-memory is a number of GB, 0 or more, not {self.work_memory}",
        )
        require(self.max_tokens >= 1, f"max_tokens must be at least 1, not {self.max_tokens}")
        require(self.lookahead in ("auto", "0", "1"), f"lookahead {self.lookahead!r} is not supported; choose auto, 0 or 1")

    def rank_of(self, hidden_size: int) -> int:
        """The rank of a model's MLP predictors: as given, else an eighth of the width, at least LEAST_RANK."""
        return max(LEAST_RANK, hidden_size // WIDTH_SHARE) if self.rank is None else self.rank
