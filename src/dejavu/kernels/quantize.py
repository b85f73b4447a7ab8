"""Matrices in few bits: int8 with a scale for each row, int4 with a scale for each group of a row, bf16. The plain definition.

int8: a matrix [rows, columns] becomes q int8 [rows, columns] and scale fp32 [rows] with

    scale_r = max_c |x_rc| / 127, rounded to 16 significant bits        q_rc = round(x_rc / scale_r)        x_rc ~ q_rc * scale_r

int4: q int8 [rows, columns] of -8 .. 7 and scale fp16 [rows, groups], a group being GROUP values of a row in order (the last
one fewer). With m the value of the group that is largest in size, the positive one of two

    scale_g = m / -8 as fp16        q_rc = round(x_rc / scale_g), at most 7        x_rc ~ q_rc * scale_g

so that m takes the integer that has no counterpart of the other sign (llama.cpp's Q4_0 does the same). A group whose scale
would be below 2^-20, where fp16 has few bits left, is zero: no value of it is larger than 2^-17.

A cached vector of a head is kept as it is, as fp16, or as int8 with one fp32 scale, max |x| / 127.

Every product q * scale of a matrix is exact in fp32, and quantising the dequantised matrix again gives back the same q and scale: what was
measured with the fp32 values is what an integer kernel computes with.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST = 127
SCALE_BITS = 16
GROUP = 32
LEAST_INT4_SCALE = 2.0**-20


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


def quantize_groups(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """q int8 [rows, columns] of -8 .. 7 and scale fp16 [rows, groups] of a matrix [rows, columns]; a group of zeros has scale 0."""
    rows, columns = matrix.shape
    padded = F.pad(matrix, (0, -columns % GROUP)) if columns % GROUP else matrix
    grouped = padded.float().reshape(rows, -1, GROUP)
    low, high = torch.aminmax(grouped, dim=2, keepdim=True)
    largest = torch.where(high >= -low, high, low)
    scale = (largest / -8).half()
    scale = torch.where(scale.abs() < LEAST_INT4_SCALE, torch.zeros_like(scale), scale)
    inverse = torch.where(scale == 0, torch.zeros_like(largest), 1 / scale.float())
    q = (grouped * inverse).round_().clamp_(-8, 7).to(torch.int8)
    return q.view(rows, -1)[:, :columns].contiguous(), scale.squeeze(2)


def dequantize_groups(q: Tensor, scale: Tensor) -> Tensor:
    """The matrix fp32 [rows, columns] that q int8 [rows, columns] and scale fp16 [rows, groups] stand for."""
    return q.float() * scale.float().repeat_interleave(GROUP, dim=1)[:, : q.shape[1]]


def rounded_vectors(x: Tensor, dtype: str) -> Tensor:
    """Vectors [.., K] with the values that a key/value cache of that dtype (fp32, fp16, int8) holds, in the dtype of x."""
    match dtype:
        case "fp16":
            return x.half().to(x.dtype)
        case "int8":
            wide = x.float()
            scale = (wide.abs().amax(dim=-1, keepdim=True) / LARGEST).clamp_min(1e-30)
            return ((wide / scale).round() * scale).to(x.dtype)
    assert dtype == "fp32", f"{dtype=}"
    return x


def rounded(matrix: Tensor, dtype: str) -> Tensor:
    """The matrix fp32 [rows, columns] with the values that an engine of that dtype (fp32, fp16, bf16, int8, int4) computes with."""
    match dtype:
        case "int8":
            return dequantize_rows(*quantize_rows(matrix))
        case "int4":
            return dequantize_groups(*quantize_groups(matrix))
        case "fp16":
            return matrix.half().float()
        case "bf16":
            return matrix.bfloat16().float()
    assert dtype in ("fp32", "stored"), f"{dtype=}"
    return matrix.float()
