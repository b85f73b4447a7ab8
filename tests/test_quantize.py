"""Matrices in few bits: quantising what was quantised changes nothing, errors are what the scales say, packing loses nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dejavu.kernels.quantize import GROUP, LEAST_INT4_SCALE, dequantize_groups, quantize_groups, rounded
from helpers.matrices import random_matrix

DTYPES = ("fp32", "bf16", "int8", "int4")


@given(rows=st.integers(1, 9), columns=st.integers(1, 131), seed=st.integers(0, 99))
def test_rounding_twice_is_rounding_once(rows: int, columns: int, seed: int) -> None:
    matrix = random_matrix(rows, columns, seed)
    for dtype in DTYPES:
        once = rounded(matrix, dtype)
        assert once.shape == matrix.shape and once.dtype == torch.float32
        assert torch.equal(rounded(once, dtype), once), dtype


@given(rows=st.integers(1, 9), columns=st.integers(1, 131), seed=st.integers(0, 99))
def test_int4_is_within_half_a_step(rows: int, columns: int, seed: int) -> None:
    """Half a step of the group, but for values opposite to the largest, of which 7.5 steps and more become 7."""
    matrix = random_matrix(rows, columns, seed)
    q, scale = quantize_groups(matrix)
    assert q.shape == matrix.shape and scale.shape == (rows, -(-columns // GROUP)) and scale.dtype == torch.float16
    assert q.min() >= -8 and q.max() <= 7
    step = scale.float().abs().repeat_interleave(GROUP, dim=1)[:, :columns]
    error = (dequantize_groups(q, scale) - matrix).abs()
    clamped = (q == 7) & (matrix / torch.where(step > 0, step, torch.ones_like(step))).abs().gt(7.4)
    assert (error <= torch.where(clamped, 1.01, 0.505) * step + 8 * LEAST_INT4_SCALE * (step == 0)).all()


def test_every_integer_of_a_group_comes_back() -> None:
    integers = torch.arange(-8, 8).repeat(3, 5)  # 80 columns: the last group is half full
    for size in (1e-5, 0.031, 7.0):
        scale = torch.tensor(size).half().float()
        q, scales = quantize_groups(integers * scale)
        assert torch.equal(q.long(), integers) and (scales.float() == scale).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e6])
def test_what_int4_cannot_hold_has_a_scale_that_is_not_finite(value: float) -> None:
    matrix = torch.ones(2, 40)
    matrix[1, 35] = value
    scale = quantize_groups(matrix)[1]
    assert not scale[1, 1].isfinite() and scale[0].isfinite().all() and scale[1, 0].isfinite()
