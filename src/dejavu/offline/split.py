"""What training does with a text: windows of token ids, most of which train, a part of which calibrates, and a last part, which neither
has seen, checks.

Letters: W windows  T tokens
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dejavu.config import ModelConfig, require

MEMORY_LIMIT = 10e9  # bytes that the activations of one layer may take, on a GPU and beside it: the same tokens on every machine
LONGEST = 2048  # tokens of a window: a longer context would leave few windows of a text, and cost more
CHECKED = 4e12  # parameters x tokens of a pass that checks: 80 seconds of two cores
LEAST_CHECKED = 3072  # tokens; fewer would leave too much of a budget to the standard error
MOST_CALIBRATED = 4096  # tokens; a divergence is known to a few hundredths by then
SHORTEST = 256  # tokens of a window, before windows are left out


def training_context(config: ModelConfig) -> int:
    """Tokens of a window: the model's context, or LONGEST."""
    return min(config.max_positions, LONGEST)


@dataclass(frozen=True, slots=True)
class Split:
    """Windows [W, T] for each use."""

    train: Tensor
    calibrate: Tensor
    check: Tensor

    def measured(self, parameters: int) -> Split:
        """The same with beginnings of the windows that calibrate and check, as long as a model of so many parameters has time for.

        A divergence has far less noise than a loss: a fourth of the tokens that check are enough to calibrate.
        """
        tokens = max(LEAST_CHECKED, int(CHECKED / parameters))
        calibrate = beginnings(self.calibrate, min(MOST_CALIBRATED, tokens // 4))
        return Split(self.train, calibrate, beginnings(self.check, tokens))


def beginnings(ids_WT: Tensor, tokens: int) -> Tensor:
    """Of every window so much that it is about so many tokens, of fewer windows where less than SHORTEST would be left of each."""
    count = min(len(ids_WT), max(1, tokens // SHORTEST))
    return ids_WT[torch.linspace(0, len(ids_WT) - 1, count).long(), : tokens // count]


def fitting_windows(ids_WT: Tensor, config: ModelConfig) -> Tensor:
    """As many windows as the activations of one layer fit MEMORY_LIMIT, evenly spread over the text.

    A token takes 4 bytes x D of residual stream, three fp16 inputs of width D, and 4 bytes for each active neuron, of which
    a tenth of the layer is reserved.
    """
    per_token = 10 * config.hidden_size + 0.4 * config.intermediate_size
    fitting = max(3, int(MEMORY_LIMIT / (per_token * ids_WT.shape[1])))
    return ids_WT if len(ids_WT) <= fitting else ids_WT[torch.linspace(0, len(ids_WT) - 1, fitting).long()]


def split_windows(ids_WT: Tensor) -> Split:
    """About 82 % to train, 11 % to calibrate, 7 % to check; windows are interleaved so that each part sees the whole text."""
    count = len(ids_WT)
    require(count >= 3, f"the text gives {count} windows of {ids_WT.shape[1]} tokens, and training needs at least 3; give a longer text")
    check = torch.arange(count) % max(3, min(14, count)) == 0
    calibrate = torch.arange(count) % max(3, min(9, count)) == 1
    return Split(ids_WT[~check & ~calibrate], ids_WT[calibrate & ~check], ids_WT[check])
