"""A linear map rounded to few bits so that its outputs on a text stay: later roundings make up for earlier ones.

In: over the tokens t of a text, the inputs x_t that the map reads and the outputs y_t that it should give, with weights w_t; its matrix W.
Out: a matrix Q in the grid int4, int8 or one of GGUF, and a bias, of which sum_t w_t |y_t - Q x_t - b|^2 is small:

    H = sum w x x^T + d,    W* = (sum w y x^T + d W) H^-1       without rounding; d damps, so that a short text changes W little
    for each input i:       Q_i = rounded W*_i,   e = (W*_i - Q_i) / U_ii,   W*_j -= e U_ij for each later j,    U^T U = H^-1

which is GPTQ (Frantar et al., 2023), with a scale chosen once its values are reached. A map with a bias is fitted to x and y less their
means, and b = mean y - Q mean x. With H diagonal and a scale of the largest value this is plain rounding (kernels/quantize.py).

Letters: N tokens  I inputs  O outputs  R groups with a scale  C candidates of it
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dejavu.kernels.quantize import GROUP, LEAST_INT4_SCALE, quantize_rows
from dejavu.kernels.quantized import QuantizedMatrix, packed_blocks, packed_nibbles

BLOCK_GRIDS = ("q4_0", "q4_1", "q8_0")  # types of GGUF: groups run along the inputs in every matrix
RANGES = {"int4": (-8, 7), "q4_0": (-8, 7), "q4_1": (0, 15), "int8": (-127, 127), "q8_0": (-127, 127)}  # of the integers
DAMPING = 0.01  # of the mean of H's diagonal
FACTORS = (0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, -0.75, -0.8, -0.85, -0.9, -0.95, -1.0, -1.05, -1.1)
ENDS = (0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)  # factors of the least and of the largest value of a group with a minimum
TRIED_AT_ONCE = 1 << 20  # values
TOGETHER = 64  # inputs after which the others learn of their errors


class Moments:
    """Weighted sums over tokens of a map's inputs and wanted outputs, fp32. centred: it has a bias."""

    def __init__(self, inputs: int, outputs: int, *, centred: bool) -> None:
        self.centred, self.total = centred, 0.0
        self.xx_II, self.yx_OI = torch.zeros(inputs, inputs), torch.zeros(outputs, inputs)
        self.x_I, self.y_O = torch.zeros(inputs), torch.zeros(outputs)
        self.origin: tuple[Tensor, Tensor] | None = None  # near the means: what is squared stays small

    def add(self, x: Tensor, y: Tensor, weight: Tensor) -> None:
        """Tokens: x [.., I], y [.., O], weight [..]."""
        x_NI, y_NO, weight_N1 = x.flatten(0, -2), y.flatten(0, -2), weight.flatten()[:, None]
        if self.origin is None:
            self.origin = x_NI.mean(0) * self.centred, y_NO.mean(0) * self.centred
        x_NI, y_NO = x_NI - self.origin[0], y_NO - self.origin[1]
        weighted_NI = x_NI * weight_N1
        self.xx_II.addmm_(weighted_NI.T, x_NI)
        self.yx_OI.addmm_(y_NO.T, weighted_NI)
        self.x_I += weighted_NI.sum(0)
        self.y_O += (y_NO * weight_N1).sum(0)
        self.total += float(weight.sum())

    def fitted(self, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        """W* [O, I] and H [I, I]."""
        x_I, y_O = self.x_I / self.total, self.y_O / self.total
        xx_II, yx_OI = self.xx_II / self.total, self.yx_OI / self.total
        if self.centred:
            xx_II, yx_OI = xx_II.addr(x_I, x_I, alpha=-1), yx_OI.addr(y_O, x_I, alpha=-1)
        damping = max(DAMPING * float(xx_II.diagonal().mean()), torch.finfo(torch.float32).tiny)
        xx_II.diagonal().add_(damping)
        factor_II = torch.linalg.cholesky(xx_II)
        return torch.cholesky_solve(yx_OI.add(weight_OI, alpha=damping).T, factor_II).T.contiguous(), xx_II

    def bias(self, rounded_OI: Tensor) -> Tensor:
        """b [O] that gives the mean outputs."""
        assert self.centred and self.origin is not None, "tokens of a map with a bias"
        return self.origin[1] + self.y_O / self.total - rounded_OI @ (self.origin[0] + self.x_I / self.total)


def rounded_by_output(weight_OI: Tensor, moment_II: Tensor, grid: str, *, factors: tuple[float, ...] = FACTORS) -> QuantizedMatrix:
    """A matrix with a row for each output, whose groups run along the inputs. moment_II: H. grid: int4, int8 or one of BLOCK_GRIDS."""
    left_OI, inverse_II = weight_OI.clone(), _factor_of_inverse(moment_II)
    outputs, inputs = weight_OI.shape
    q_OI = torch.empty(outputs, inputs, dtype=torch.int8)
    scales, minima = [quantize_rows(weight_OI)[1]] if grid == "int8" else [], []
    for first in range(0, inputs, GROUP):
        last = min(first + GROUP, inputs)
        if grid != "int8":
            scale_O, minimum_O = _best_grid(left_OI[:, first:last], inverse_II.diagonal()[first:last].pow(-2), grid, factors)
            scales.append(scale_O)
            minima.append(minimum_O)
        scale_O, minimum_O = scales[-1].float(), minima[-1].float() if minima else 0.0
        error_OI = torch.empty(outputs, last - first)
        for index in range(first, last):
            values_O = left_OI[:, index]
            q_O = _rounded(values_O - minimum_O, scale_O, grid)
            q_OI[:, index] = q_O
            error_O = (values_O - (q_O * scale_O + minimum_O)) / inverse_II[index, index]
            left_OI[:, index + 1 : last] -= error_O[:, None] * inverse_II[index, index + 1 : last]
            error_OI[:, index - first] = error_O
        left_OI[:, last:] -= error_OI @ inverse_II[first:last, last:]
    if grid in BLOCK_GRIDS:
        return packed_blocks(grid, q_OI, torch.stack(scales, dim=1), torch.stack(minima, dim=1))
    return _held(q_OI, scales[0] if grid == "int8" else torch.stack(scales, dim=1), grid)


def rounded_by_input(weight_IO: Tensor, moment_II: Tensor, grid: str, *, factors: tuple[float, ...] = FACTORS) -> QuantizedMatrix:
    """A matrix with a row for each input, whose groups run along the outputs: `down` and `o`. The inputs that weigh most come first, as
    nothing makes up for the last ones."""
    order_I = moment_II.diagonal().argsort(descending=True)
    left_IO, inverse_II = weight_IO[order_I], _factor_of_inverse(moment_II[order_I][:, order_I])
    inputs, outputs = weight_IO.shape
    groups = -(-outputs // GROUP)
    q_IO = torch.empty(inputs, outputs, dtype=torch.int8)
    scale_IR = torch.empty(inputs, dtype=torch.float32) if grid == "int8" else torch.empty(inputs, groups, dtype=torch.float16)
    equal_G = torch.ones(GROUP)
    for first in range(0, inputs, TOGETHER):
        last = min(first + TOGETHER, inputs)
        error_IO = torch.empty(last - first, outputs)
        for index in range(first, last):
            values_O = left_IO[index]
            if grid == "int8":
                scale = quantize_rows(values_O[None])[1]
                scale_O = scale.expand(outputs)
            else:
                scale = _best_scales(F.pad(values_O, (0, -outputs % GROUP)).view(groups, GROUP), equal_G, factors)
                scale_O = scale.float().repeat_interleave(GROUP)[:outputs]
            scale_IR[index] = scale[0] if grid == "int8" else scale
            q_O = _rounded(values_O, scale_O, grid)
            q_IO[index] = q_O
            error_O = (values_O - q_O * scale_O) / inverse_II[index, index]
            left_IO[index + 1 : last] -= inverse_II[index, index + 1 : last, None] * error_O
            error_IO[index - first] = error_O
        left_IO[last:] -= inverse_II[first:last, last:].T @ error_IO
    back_I = order_I.argsort()
    return _held(q_IO[back_I], scale_IR[back_I], grid)


def rounded_alone(matrix: Tensor, grid: str, *, factors: tuple[float, ...] = FACTORS) -> QuantizedMatrix:
    """int4, q4_0 or q4_1 of a matrix [rows, columns] whose inputs nobody knows: the scales of the least squared error."""
    rows, columns = matrix.shape
    grouped = F.pad(matrix, (0, -columns % GROUP)).view(-1, GROUP)
    scale, minimum = _best_grid(grouped, torch.ones(GROUP), grid, factors)
    q = _rounded(grouped - minimum.float()[:, None], scale.float()[:, None], grid).to(torch.int8)
    q, scale, minimum = q.view(rows, -1)[:, :columns].contiguous(), scale.view(rows, -1), minimum.view(rows, -1)
    return packed_blocks(grid, q, scale, minimum) if grid in BLOCK_GRIDS else _held(q, scale, grid)


def _factor_of_inverse(moment_II: Tensor) -> Tensor:
    """U, upper triangular, with U^T U = H^-1."""
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moment_II)), upper=True)


def _best_grid(groups_RG: Tensor, importance_G: Tensor, grid: str, factors: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """fp16 scales and minima [R]: those of `_best_scales`, or of q8_0 the plain ones; of q4_1 the ends of the least weighted error."""
    match grid:
        case "q8_0":
            scale_R = (groups_RG.abs().amax(1) / RANGES[grid][1]).half()
            return scale_R, torch.zeros_like(scale_R)
        case "q4_1":
            return _best_ends(groups_RG, importance_G, ENDS if len(factors) > 1 else (1.0,))
    scale_R = _best_scales(groups_RG, importance_G, factors)
    return scale_R, torch.zeros_like(scale_R)


def _best_ends(groups_RG: Tensor, importance_G: Tensor, factors: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """The same of q4_1, whose values are scale * (0 .. 15) + minimum: both ends of a group moved towards the middle of its values."""
    low_R, high_R = torch.aminmax(groups_RG, dim=1)
    middle_R = groups_RG.mean(1)
    best_R, scale_R, minimum_R = (torch.full_like(low_R, torch.inf), torch.zeros_like(low_R).half(), torch.zeros_like(low_R).half())
    for low in factors:
        for high in factors:
            least_R = (middle_R + low * (low_R - middle_R)).half()
            step_R = ((middle_R + high * (high_R - middle_R) - least_R.float()) / RANGES["q4_1"][1]).half()
            shifted_RG = groups_RG - least_R.float()[:, None]
            error_R = (_rounded(shifted_RG, step_R.float()[:, None], "q4_1") * step_R.float()[:, None] - shifted_RG).square() @ importance_G
            better_R = error_R < best_R
            best_R = torch.where(better_R, error_R, best_R)
            scale_R, minimum_R = torch.where(better_R, step_R, scale_R), torch.where(better_R, least_R, minimum_R)
    return scale_R, minimum_R


def _best_scales(groups_RG: Tensor, importance_G: Tensor, factors: tuple[float, ...]) -> Tensor:
    """fp16 scales [R] of int4: of those that are a factor times the plain one, the one of the least weighted squared error."""
    largest_R1 = groups_RG.gather(1, groups_RG.abs().argmax(1, keepdim=True))
    scale_RC = (largest_R1 / RANGES["int4"][0] * torch.tensor(factors)).half()
    scale_RC = torch.where(scale_RC.abs() < LEAST_INT4_SCALE, torch.zeros_like(scale_RC), scale_RC)
    chosen = []
    step = max(1, TRIED_AT_ONCE // (len(factors) * groups_RG.shape[1]))
    for group_RG, some_RC in zip(groups_RG.split(step), scale_RC.split(step), strict=True):
        wide_RC1 = some_RC.float()[:, :, None]
        error_RCG = _rounded(group_RG[:, None], wide_RC1, "int4").mul_(wide_RC1).sub_(group_RG[:, None])
        chosen.append((error_RCG.square_() @ importance_G).argmin(1, keepdim=True))
    return scale_RC.gather(1, torch.cat(chosen))[:, 0]


def _rounded(values: Tensor, scale: Tensor, grid: str) -> Tensor:
    """The integers, as fp32; zero where the scale is."""
    inverse = torch.where(scale == 0, torch.zeros_like(scale), 1 / scale)
    return (values * inverse).round_().clamp_(*RANGES[grid])


def _held(q: Tensor, scale: Tensor, grid: str) -> QuantizedMatrix:
    return QuantizedMatrix(grid, packed_nibbles(q) if grid == "int4" else q, scale, q.shape[1])
