"""Matrices rounded with their inputs in view: better than plain rounding where inputs go together, the same where they do not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dejavu.kernels.quantized import QuantizedMatrix, rounded_to
from dejavu.offline.compensated import DAMPING, Moments, rounded_alone, rounded_by_input, rounded_by_output

Round = Callable[..., QuantizedMatrix]
WAYS = [rounded_by_output, rounded_by_input]


def drawn(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def transposed(way: Round, matrix: Tensor) -> Tensor:
    """The matrix [outputs, inputs] of what a way takes or gives, and back."""
    return matrix if way is rounded_by_output else matrix.T


def correlated(tokens: int, size: int) -> Tensor:
    """Inputs [N, I] that few directions make up, one of them large."""
    mixing = drawn(size // 4, size, 1)
    mixing[0] *= 9
    return drawn(tokens, size // 4, 2) @ mixing + 0.1 * drawn(tokens, size, 3)


@pytest.mark.parametrize("grid", ["int4", "int8"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("outputs", "inputs"), [(37, 70), (64, 96)])
def test_with_inputs_that_go_together_the_outputs_err_less(way: Round, grid: str, outputs: int, inputs: int) -> None:
    x_NI, weight_OI = correlated(400, inputs), drawn(outputs, inputs, 4)
    sums = Moments(inputs, outputs, centred=False)
    for part in x_NI.split(150):
        sums.add(part, part @ weight_OI.T, torch.ones(len(part)))
    fitted_OI, moment_II = sums.fitted(weight_OI)
    torch.testing.assert_close(fitted_OI, weight_OI, atol=1e-3, rtol=1e-3)
    matrix = transposed(way, weight_OI).contiguous()
    plain = rounded_to(matrix, grid)
    assert isinstance(plain, QuantizedMatrix)
    errors = [x_NI @ (transposed(way, held.dequantize()) - weight_OI).T for held in (way(matrix, moment_II, grid), plain)]
    assert errors[0].square().mean() < 0.5 * errors[1].square().mean()


@pytest.mark.parametrize("grid", ["int4", "int8"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(37, 70), (5, 33), (64, 96)])
def test_with_inputs_that_have_nothing_to_do_with_each_other_it_is_plain_rounding(way: Round, grid: str, shape: tuple[int, int]) -> None:
    matrix = drawn(*shape, 5)
    inputs = shape[1] if way is rounded_by_output else shape[0]
    found, plain = way(matrix, torch.eye(inputs) * 3, grid, factors=(1.0,)), rounded_to(matrix, grid)
    assert isinstance(plain, QuantizedMatrix) and all(map(torch.equal, found.tensors, plain.tensors)) and found.columns == plain.columns


def test_a_bias_takes_what_the_means_of_inputs_bring() -> None:
    """Inputs with means a hundred times their spread: errors of the matrix would be a constant in every output."""
    x_NI = drawn(500, 64, 6) + 100 * drawn(1, 64, 7)
    weight_OI, bias_O = drawn(9, 64, 8), drawn(1, 9, 9)[0]
    wanted_NO = x_NI @ weight_OI.T + bias_O
    sums = Moments(64, 9, centred=True)
    for part, wanted in zip(x_NI.split(200), wanted_NO.split(200), strict=True):
        sums.add(part, wanted, torch.ones(len(part)))
    rounded_OI = rounded_by_output(*sums.fitted(weight_OI), "int4").dequantize()
    error_NO = x_NI @ rounded_OI.T + sums.bias(rounded_OI) - wanted_NO
    assert error_NO.mean(0).abs().max() < 0.02 and error_NO.std() < 0.15 * (wanted_NO - wanted_NO.mean(0)).std()


def test_the_matrix_is_fitted_to_what_is_wanted_of_other_inputs() -> None:
    """Half of the inputs carry what the others miss: the fitted matrix makes it up, by token weights."""
    x_NI = drawn(600, 16, 10)
    weight_OI, other_OI = drawn(4, 16, 11), drawn(4, 16, 12)
    sums = Moments(16, 4, centred=False)
    sums.add(x_NI[:300], x_NI[:300] @ other_OI.T, torch.full((300,), 1e4))
    sums.add(x_NI[300:], x_NI[300:] @ weight_OI.T, torch.ones(300))
    fitted_OI, moment_II = sums.fitted(weight_OI)
    pulled = (1 - DAMPING) * other_OI + DAMPING * weight_OI
    torch.testing.assert_close(fitted_OI, pulled, atol=0.02, rtol=0)
    assert (moment_II - moment_II.T).abs().max() < 1e-4 and torch.linalg.eigvalsh(moment_II).min() > 0


def test_scales_that_are_chosen_err_less_than_the_plain_ones() -> None:
    matrix = drawn(31, 70, 13)
    plain = rounded_to(matrix, "int4")
    assert isinstance(plain, QuantizedMatrix)
    found = rounded_alone(matrix, "int4")
    assert (found.dequantize() - matrix).square().mean() < 0.95 * (plain.dequantize() - matrix).square().mean()
    assert torch.equal(rounded_alone(torch.zeros(3, 40), "int4").dequantize(), torch.zeros(3, 40))
