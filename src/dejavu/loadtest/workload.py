"""The load of a serving benchmark: when requests arrive, how long their prompts and answers are, and what they ask.

In: a `Load`, and for each model a text and how the server counts its tokens. Out: `Planned` requests, the same for every model of a
round and on every run with the same seed. Times are seconds after the start of a round.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dejavu.config import Config, require
from dejavu.model.texts import CHARACTERS_PER_TOKEN

USUAL_REQUESTS = 64
WARM_UP = 10**6  # number of a round that no load reaches: the warm-up's prompts are none of the load's


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix(Config):
    """Lengths in tokens, and the share of requests that have each."""

    lengths: tuple[int, ...]
    shares: tuple[float, ...]

    @classmethod
    def parse(cls, text: str, option: str) -> Mix:
        """`128`, `32,128` (equal shares) or `32:0.5,128:0.3,512:0.2`. Raises ValueError that names the option."""
        form = f"{option} takes lengths with their shares, e.g. 32:0.5,128:0.3,512:0.2, not {text!r}"
        parts = [part.split(":") for part in text.split(",")]
        require(len({len(part) for part in parts}) == 1 and len(parts[0]) <= 2, form)
        try:
            lengths = tuple(int(part[0]) for part in parts)
            shares = tuple(float(part[1]) if len(part) == 2 else 1 / len(parts) for part in parts)
        except ValueError as error:
            raise ValueError(form) from error
        require(min(lengths) >= 1, f"{option}: a length must be at least 1 token, not {min(lengths)}")
        require(all(share > 0 for share in shares), f"{option}: a share must be positive, in {text!r}")
        require(abs(sum(shares) - 1) < 1e-6, f"{option}: the shares must sum to 1, not {sum(shares):g}")
        return cls(lengths=lengths, shares=shares)

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def draw(self, generator: np.random.Generator) -> int:
        return int(generator.choice(self.lengths, p=np.array(self.shares) / sum(self.shares)))

    def __str__(self) -> str:
        return ",".join(f"{length}:{share:g}" for length, share in zip(self.lengths, self.shares, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Load(Config):
    """What each model gets. rate: requests a second of a Poisson process, inf: `concurrency` clients that each wait for their answer.

    requests, or seconds in which requests start: one of the two, over all rounds. A round is a part of the load that one model gets
    before it is another's turn.
    """

    prompt_tokens: Mix
    output_tokens: Mix
    rate: float = math.inf
    concurrency: int | None = None
    requests: int | None = None
    seconds: float | None = None
    rounds: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.rate > 0, f"the rate must be positive (requests a second), or inf for clients that wait, not {self.rate}")
        require(self.open != (self.concurrency is not None), "a load has a rate or a number of clients, one of the two")
        require(self.concurrency is None or self.concurrency >= 1, f"concurrency must be at least 1, not {self.concurrency}")
        require((self.requests is None) != (self.seconds is None), "a load ends after requests or after seconds, one of the two")
        require(self.requests is None or self.requests >= 1, f"requests must be at least 1, not {self.requests}")
        require(self.seconds is None or 0 < self.seconds < math.inf, f"seconds must be positive, not {self.seconds}")
        require(self.rounds >= 1, f"rounds must be at least 1, not {self.rounds}")
        require(0 <= self.seed < 2**64, f"seed must lie between 0 and 2^64 - 1, not {self.seed}")

    @property
    def open(self) -> bool:
        """Whether requests arrive whether or not earlier ones are answered."""
        return math.isfinite(self.rate)

    @property
    def seconds_of_round(self) -> float | None:
        return None if self.seconds is None else self.seconds / self.rounds

    def requests_of_round(self, index: int) -> int | None:
        return None if self.requests is None else self.requests // self.rounds + (index < self.requests % self.rounds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One request. due_s: when it arrives; None where a client sends it when it is free."""

    prompt: str
    output_tokens: int
    due_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """A text to cut prompts from, and how a server counts: n characters are `extra_tokens + n / characters_per_token` tokens."""

    text: str
    characters_per_token: float = CHARACTERS_PER_TOKEN
    extra_tokens: float = 0.0

    def length(self, tokens: int) -> int:
        """Characters of a prompt of about so many tokens, at least 1."""
        return max(1, round((tokens - self.extra_tokens) * self.characters_per_token))

    def check(self, tokens: int) -> None:
        """Raise ValueError unless the text is longer than a prompt of so many tokens."""
        needed = self.length(tokens)
        require(
            needed < len(self.text),
            f"a prompt of {tokens} tokens takes {needed} characters, the text has {len(self.text)}; give a longer --text",
        )

    def cut(self, tokens: int, generator: np.random.Generator) -> str:
        """A stretch of the text from some word on: prompts rarely share a beginning that a server could reuse."""
        length = self.length(tokens)
        start = int(generator.integers(len(self.text) - length))
        word = self.text.find(" ", start, len(self.text) - length) + 1
        start = word or start
        return self.text[start : start + length]


def planned_requests(load: Load, prompts: Prompts, round_index: int) -> Iterator[Planned]:
    """The requests of a round in their order; without end where only the clients' time limits them."""
    generator = np.random.default_rng([load.seed, round_index])
    count, due = load.requests_of_round(round_index), 0.0
    for number in itertools.count():
        if number == count:
            return
        if load.open:
            due += float(generator.exponential(1 / load.rate))
            if load.seconds_of_round is not None and due >= load.seconds_of_round:
                return
        tokens, output = load.prompt_tokens.draw(generator), load.output_tokens.draw(generator)
        yield Planned(prompt=prompts.cut(tokens, generator), output_tokens=output, due_s=due if load.open else None)
