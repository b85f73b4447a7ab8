"""Steers the densities of a model in training: their mean to a target, and no layer below a floor or above a ceiling.

In: the density of each layer in the last step. Out: a price per layer, in nats per (density / target); the loss adds
price_l x (soft density of l) / target, averaged over layers. All layers pay one price, which grows by a factor while the mean is above the
target and shrinks below it, so that layers settle where a neuron more is worth the same everywhere. A layer outside
its bounds gets a price of its own on top, which may turn negative: a dying layer is paid to select.

Letters: L layers
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FIRST_PRICE, LEAST_PRICE, LARGEST_PRICE = 0.02, 1e-4, 50.0
GAIN = 0.5  # of the common price, per relative miss of the target
PUSH = 0.2  # a step's change of a layer's own price, per relative violation of its bound
PUSH_LIMIT = 20.0
RELEASE = 0.9  # what is left, after each step within the bounds, of a layer's own price


class DensityController:
    """floor and ceiling are multiples of the target of the moment; least_density is a floor whatever the target. price: the first one."""

    def __init__(
        self, num_layers: int, *, floor: float = 1 / 3, ceiling: float = 4.0, least_density: float = 0.02, price: float = FIRST_PRICE
    ) -> None:
        self.floor, self.ceiling, self.least_density = floor, ceiling, least_density
        self.price = price
        self.push_L = torch.zeros(num_layers, dtype=torch.float64)

    def bounds(self, target: float) -> tuple[float, float]:
        """The least and the largest density that a layer may have at this target."""
        return min(target, max(self.floor * target, self.least_density)), min(1.0, self.ceiling * target)

    def prices(self) -> Tensor:
        """fp64 [L]."""
        return self.price + self.push_L

    def update(self, density_L: Tensor, target: float, pace: float = 1.0) -> None:
        """Take in the densities [L] of a step.

        pace: how fast weights move, 1 at the peak of the learning rate. The price moves no faster: or else densities swing.
        """
        density_L = density_L.double().cpu()
        miss = (float(density_L.mean()) - target) / max(target, self.least_density)
        self.price = min(LARGEST_PRICE, max(LEAST_PRICE, self.price * math.exp(GAIN * pace * miss)))
        low, high = self.bounds(target)
        violation_L = (density_L / high - 1).clamp_min(0) - (1 - density_L / low).clamp_min(0)
        pushed_L = self.push_L + PUSH * violation_L
        # Leaving a floor, a layer must at least stop paying the common price, however high that is.
        pushed_L = torch.where(violation_L < 0, pushed_L.minimum(torch.full_like(pushed_L, -self.price)), pushed_L)
        self.push_L = torch.where(violation_L == 0, self.push_L * RELEASE, pushed_L).clamp(-PUSH_LIMIT - self.price, PUSH_LIMIT)

    def state(self) -> Tensor:
        """All of it, fp64 [1 + L]."""
        return torch.cat([torch.tensor([self.price], dtype=torch.float64), self.push_L])

    def restore(self, state: Tensor) -> None:
        self.price, self.push_L = float(state[0]), state[1:].clone()
