"""Memory for one launch of a kernel, and the rule that its results are held to.

Everything a kernel is given lies between NaNs, which a read past an end would spread, and must be the same afterwards. Everything it
fills starts as NaN (or a number that no index has) between canaries, which a write past an end would change.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dejavu.kernels.sparse_mlp import MlpWeights

EDGE = 64  # values on either side: a multiple of 16 bytes in every dtype
CANARY = -77


class Memory:
    """given(values): a copy that must not change. room(shape): what a kernel fills. `check` after the launch. Random values by seed."""

    def __init__(self, device: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(seed)
        self._kept: list[tuple[Tensor, Tensor, bool]] = []

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Random values on the CPU, rounded to the dtype."""
        return (torch.randn(shape, generator=self.generator) * scale).to(dtype or self.dtype)

    def positive(self, *shape: int, scale: float = 1.0) -> Tensor:
        return self.normal(*shape, scale=scale).abs()

    def int8(self, *shape: int) -> Tensor:
        return torch.randint(-127, 128, shape, generator=self.generator, dtype=torch.int8)

    def choice(self, size: int, count: int) -> Tensor:
        """Some of the indices below size, int64, in no order."""
        return torch.randperm(size, generator=self.generator)[:count]

    def given(self, values: Tensor) -> Tensor:
        return self._placed(values, math.nan if values.is_floating_point() else CANARY, fixed=True)

    def room(self, *shape: int, dtype: torch.dtype = torch.float32, holds: Tensor | float | None = None) -> Tensor:
        """Memory that holds NaN or CANARY, or these values, before the launch."""
        start = holds if holds is not None else math.nan if dtype.is_floating_point else CANARY
        values = start.to(dtype) if isinstance(start, Tensor) else torch.full(shape, start, dtype=dtype)
        assert values.shape == shape
        return self._placed(values, CANARY, fixed=False)

    def check(self) -> None:
        for whole, before, fixed in self._kept:
            found = whole.cpu().view(torch.uint8)
            edge = EDGE * before.element_size()
            expected = before.view(torch.uint8)
            assert torch.equal(found[:edge], expected[:edge]) and torch.equal(found[-edge:], expected[-edge:]), "written past an end"
            assert not fixed or torch.equal(found, expected), "an input was written"

    def _placed(self, values: Tensor, edge: float, *, fixed: bool) -> Tensor:
        count = values.numel()
        before = torch.full((count + 2 * EDGE,), edge, dtype=values.dtype)
        before[EDGE : EDGE + count] = values.flatten()
        whole = before.to(self.device, copy=True)
        self._kept.append((whole, before, fixed))
        return whole[EDGE : EDGE + count].view(values.shape)


def check_rule(found: Tensor, plain: Tensor, truth: Tensor, dtype: torch.dtype, added_to: Tensor | None = None) -> None:
    """The largest error against fp64 is at most twice that of plain torch in the dtype, plus a little: a tenth of an eps, and a few
    in fp32, where an exponential or another order of a sum differs by that much.

    added_to: fp32 sums that were there already; each program's addition is rounded as they are, in any order.
    """
    assert found.shape == plain.shape == truth.shape and truth.dtype == torch.float64
    if truth.numel() == 0:
        return
    slack = (4.0 if dtype == torch.float32 else 0.1) * torch.finfo(dtype).eps
    error = float((found.cpu().double() - truth).abs().max())
    limit = float(2 * (plain.double() - truth).abs().max() + slack * truth.abs().max())
    if added_to is not None:
        limit += 2 * torch.finfo(torch.float32).eps * float(added_to.abs().max())
    assert error <= limit, f"{error=:.3g} {limit=:.3g}"


def midway(scores: Tensor, count: int) -> float:
    """A threshold that exactly so many scores exceed."""
    ordered = scores.double().flatten().sort(descending=True).values
    if count in (0, ordered.numel()):
        return float(ordered[0] + 1 if count == 0 else ordered[-1] - 1)
    assert ordered[count - 1] - ordered[count] > 1e-5, "scores too close to tell apart in fp32"
    return float((ordered[count - 1] + ordered[count]) / 2)


def poisoned_rows(matrix: Tensor, keep: Tensor | Sequence[int]) -> Tensor:
    """A copy whose rows other than those are NaN."""
    poisoned = torch.full_like(matrix, math.nan)
    index = torch.as_tensor(keep, dtype=torch.int64)
    poisoned[index] = matrix[index]
    return poisoned


def poisoned_neurons(weights: MlpWeights, keep_A: Tensor) -> MlpWeights:
    """The weights with everything that belongs to other neurons NaN."""
    names = ("up_FD", "down_FD", "gate_FD", "up_bias_F", "gate_bias_F")
    poisoned: dict[str, Any] = {name: poisoned_rows(values, keep_A) for name in names if (values := getattr(weights, name)) is not None}
    return replace(weights, **poisoned)
