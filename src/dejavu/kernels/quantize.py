"""int8 per row: a matrix as small integers and one scale for each of its rows. The plain definition.

In: a matrix [rows, columns] in fp32. Out: q int8 [rows, columns] and scale fp32 [rows] with

    scale_r = max_c |x_rc| / 127, rounded to 16 significant bits        q_rc = round(x_rc / scale_r)        x_rc ~ q_rc * scale_r

With 16 bits of scale every product q * scale is exact in fp32, so that quantising the dequantised matrix again gives back
the same q and scale: what was measured with the fp32 values is what an int8 kernel computes with.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 127
SCALE_BITS = 16


def quantize_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """q int8 [rows, columns] and scale fp32 [rows] of a matrix [rows, columns]; a row of zeros has scale 0."""
    wide = matrix.float()
    mantissa, exponent = torch.frexp(wide.abs().amax(dim=1) / LARGEST)
    scale = torch.ldexp((mantissa * 2**SCALE_BITS).round() / 2**SCALE_BITS, exponent)
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale))
    q = (wide / divisor[:, None]).round().clamp(-LARGEST, LARGEST).to(torch.int8)
    return q, scale


def dequantize_rows(q: Tensor, scale: Tensor) -> Tensor:
    """The matrix fp32 [rows, columns] that q int8 [rows, columns] and scale fp32 [rows] stand for."""
    return q.float() * scale.float()[:, None]
