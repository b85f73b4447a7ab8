"""How much a process computes at a time: the windows of a micro-batch, and whether backward computes layers again.

In: the architecture, the windows of a step, free memory. Out: Sizes. Of a token, backward keeps about

    layers x bytes of a value x (KEPT_NEURON x F + KEPT_MODEL x D)        checkpointed: layers x bytes of a value x D

beside what one layer takes while it runs, 4 x (WORKING_NEURON x F + WORKING_MODEL x D), and what a chunk of logits takes. On the CPU
nothing depends on free memory. Neither choice changes what is trained, but for the order of sums.

Letters: D model  F neurons
"""

from __future__ import annotations

from dataclasses import dataclass

from dejavu.config import ModelConfig, require
from dejavu.offline.adapt.divergence import CHUNK

MOST_WINDOWS_CPU = 16
MOST_TOKENS, ENOUGH_TOKENS = 16384, 4096  # of a micro-batch: more is no faster; and fewer only where layers are checkpointed
KEPT_NEURON, KEPT_MODEL = 4, 8  # at 1.3 and 8B they are 4/3 and 1.15 times too large (docs/log.md)
WORKING_NEURON, WORKING_MODEL = 8, 16
LOGIT_BYTES = 24  # of a logit of a chunk, both models and the gradient
USABLE = 0.9  # of what is free: the rest is lost between pieces


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """micro_batch: windows at a time. checkpoint_layers: whether backward computes layers again."""

    micro_batch: int
    checkpoint_layers: bool

    def smaller(self) -> str:
        """What to lower where these were too large."""
        layers = "" if self.checkpoint_layers else "--checkpoint-layers on"
        fewer = f"--micro-batch {self.micro_batch // 2} (it is {self.micro_batch})" if self.micro_batch > 1 else ""
        return f"take {' or '.join(filter(None, (fewer, layers))) or 'a shorter --length, in another folder, or a smaller model'}"


def bytes_per_token(config: ModelConfig, *, value_bytes: int, checkpoint_layers: bool) -> float:
    """GPU memory that one token of a micro-batch takes while its gradient is computed."""
    neurons, size = config.intermediate_size, config.hidden_size
    kept = size if checkpoint_layers else KEPT_NEURON * neurons + KEPT_MODEL * size
    return value_bytes * config.num_layers * kept + 4 * (WORKING_NEURON * neurons + WORKING_MODEL * size)


def choose_sizes(
    config: ModelConfig,
    *,
    windows: int,
    length: int,
    value_bytes: int,
    free: int | None,
    micro_batch: int | None = None,
    checkpoint_layers: bool | None = None,
) -> Sizes:
    """What is given, and the rest by free bytes (None: the CPU): layers are kept where that leaves micro-batches that fill a GPU.

    windows: of a step, in this process. A micro-batch is a divisor of it; at least one window, whether or not it fits.
    """
    if micro_batch is not None:
        require(
            windows % micro_batch == 0, f"the {windows} windows that a process has of a step are no multiple of micro_batch {micro_batch}"
        )
    if free is None:
        return Sizes(micro_batch=micro_batch or _divisor(windows, MOST_WINDOWS_CPU), checkpoint_layers=bool(checkpoint_layers))
    enough = min(micro_batch or windows, max(1, ENOUGH_TOKENS // length))
    again = checkpoint_layers or False
    while True:
        per_token = bytes_per_token(config, value_bytes=value_bytes, checkpoint_layers=again)
        fit = int((USABLE * free - LOGIT_BYTES * CHUNK) / (length * per_token))
        found = micro_batch or _divisor(windows, min(fit, max(1, MOST_TOKENS // length)))
        if min(found, fit) >= enough or again or checkpoint_layers is not None:
            break
        again = True
    return Sizes(micro_batch=found, checkpoint_layers=again)


def _divisor(windows: int, most: int) -> int:
    """The largest divisor up to `most`, at least 1."""
    return max((each for each in range(1, windows + 1) if windows % each == 0 and each <= most), default=1)
