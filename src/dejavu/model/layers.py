"""The building blocks of a decoder layer: norms, linear maps and rotary positions.

Letters: B batch  T tokens  D model  N all heads x head_dim  H query heads  G key/value heads  K head_dim  I in  O out
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dejavu.config import ModelConfig, RopeConfig
from dejavu.kernels.quantized import AnyMatrix, Matrix, QuantizedMatrix, Stacked, all_rounded_to, linear, linear_by_input, rounded_by_output


class Norm(nn.Module):
    """LayerNorm, y = (x - mean) / std * weight + bias, or RMSNorm, y = x / rms(x) * weight."""

    def __init__(self, config: ModelConfig, size: int | None = None) -> None:
        super().__init__()
        size = size or config.hidden_size
        self.rms = config.norm == "rmsnorm"
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.ones(size)) if config.norm_affine else None
        self.bias = nn.Parameter(torch.zeros(size)) if config.norm_affine and not self.rms else None

    def forward(self, x: Tensor) -> Tensor:
        if not self.rms:
            weight, bias = (None if p is None else p.to(x.dtype) for p in (self.weight, self.bias))  # a trained one is wider than x
            return F.layer_norm(x, x.shape[-1:], weight, bias, self.eps)
        wide = x.float()
        normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)
        return normed if self.weight is None else normed * self.weight.to(x.dtype)


class Held(nn.Module):
    """A module with a matrix: a parameter `weight`, or a quantised one, which has no `weight` to read or to change."""

    weight: Tensor
    quantized: QuantizedMatrix | Stacked | None = None

    @property
    def held(self) -> AnyMatrix:
        """What is held; of q, k and v together it may be several matrices."""
        return self.weight if self.quantized is None else self.quantized

    @property
    def matrix(self) -> Matrix:
        """The one matrix that is held."""
        assert not isinstance(self.quantized, Stacked), "these are several matrices: take `held`"
        return self.weight if self.quantized is None else self.quantized

    def rounded(self, dtype: str) -> AnyMatrix:
        """What is held with the values that an engine of that dtype computes with."""
        return all_rounded_to(self.held, dtype)

    def hold(self, matrix: AnyMatrix) -> None:
        """Hold another matrix from now on."""
        self._parameters.pop("weight", None)
        if isinstance(matrix, Tensor):
            self.weight = nn.Parameter(matrix, requires_grad=False)
        else:
            self.quantized = matrix

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":  # a parameter stands for what was quantised
            self.__dict__["quantized"] = None
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and self.quantized is not None:
            raise AttributeError(f"this weight is {self.quantized.grid}: take `matrix`, or the fp32 weights of `model.widened()`")
        return super().__getattr__(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self.quantized is not None:  # it moves, and stays in its grid
            self.quantized = self.quantized.to(fn(torch.empty(0, dtype=torch.uint8, device=self.quantized.device)).device)
        return self


class Linear(Held, nn.Linear):
    """y = weight_OI x + bias_O."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.held, self.bias)


class Embedding(Held, nn.Embedding):
    """Rows of a table by their number."""

    def forward(self, input: Tensor) -> Tensor:
        table = self.matrix
        if isinstance(table, Tensor):
            return F.embedding(input, table)
        return table.dequantize(input.flatten()).unflatten(0, input.shape)


class InputMajorLinear(Held):
    """y = x @ weight_IO + bias_O: one contiguous row for each *input*, so that an unused input is a row not read.

    The MLP's down projection (a row per neuron) and the attention's output projection (K rows per head) are kept so.
    """

    def __init__(self, size_in: int, size_out: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size_in, size_out))
        self.bias = nn.Parameter(torch.zeros(size_out)) if bias else None

    def rounded(self, dtype: str) -> AnyMatrix:
        return rounded_by_output(self.held, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return linear_by_input(x, self.matrix, self.bias)


class Rows(NamedTuple):
    """Some outputs of a linear map: matrix [O, I] and bias [O] are views of its own."""

    matrix: Matrix
    bias: Tensor | None

    @property
    def weight(self) -> Tensor:
        if isinstance(self.matrix, Tensor):
            return self.matrix
        raise AttributeError(f"this weight is {self.matrix.grid}: take `matrix`, or the fp32 weights of `model.widened()`")

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.matrix, self.bias)


class QueryKeyValue(Linear):
    """One matrix [(H + 2G) K, D] with the rows of q, then k, then v, and one bias; each of the three is a view."""

    def __init__(self, config: ModelConfig) -> None:
        self.sizes = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        super().__init__(config.hidden_size, self.sizes[0] + 2 * self.sizes[1], bias=config.qkv_bias)

    @property
    def q(self) -> Rows:
        return self._rows(0, self.sizes[0])

    @property
    def k(self) -> Rows:
        return self._rows(self.sizes[0], sum(self.sizes))

    @property
    def v(self) -> Rows:
        return self._rows(sum(self.sizes), self.out_features)

    def _rows(self, start: int, stop: int) -> Rows:
        matrix, rows = self.held, slice(start, stop)
        return Rows(matrix[rows] if isinstance(matrix, Tensor) else matrix.rows(rows), None if self.bias is None else self.bias[rows])


class SeparateQueryKeyValue(nn.Module):
    """The same as three maps of any kind with parameters of their own, for training: an optimiser sees three matrices."""

    def __init__(self, q: nn.Module, k: nn.Module, v: nn.Module) -> None:
        super().__init__()
        self.q, self.k, self.v = q, k, v


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """inv_freq fp32 [half of a head's rotated values], by rope type (the rules of transformers' modeling_rope_utils)."""
    with torch.device("cpu"):  # worked out on the meta device these few numbers load torch's compiler, which takes seconds
        found = _frequencies(rope, head_dim)
    return found.to(torch.get_default_device())


def _frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    size = rope.size(head_dim)
    inv_freq = 1.0 / rope.theta ** (torch.arange(0, size, 2, dtype=torch.int64).float() / size)
    match rope.type:
        case "linear":
            return inv_freq / rope.factor
        case "llama3":
            return _llama3(rope, inv_freq)
        case "yarn":
            return _yarn(rope, inv_freq, size)
        case "longrope":
            return inv_freq / torch.tensor(rope.short_factors)
    return inv_freq


def _llama3(rope: RopeConfig, inv_freq: Tensor) -> Tensor:
    """Low frequencies divided by the factor, high ones as they are, a ramp over wavelengths between."""
    wavelength = 2 * math.pi / inv_freq
    low = rope.original_max_positions / rope.low_freq_factor
    high = rope.original_max_positions / rope.high_freq_factor
    smooth = (rope.original_max_positions / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    between = (1 - smooth) * inv_freq / rope.factor + smooth * inv_freq
    scaled = torch.where(wavelength > low, inv_freq / rope.factor, inv_freq)
    return torch.where((wavelength <= low) & (wavelength >= high), between, scaled)


def _yarn(rope: RopeConfig, inv_freq: Tensor, size: int) -> Tensor:
    """The same with a ramp over the index, between those that turn beta_fast and beta_slow times within the original context."""

    def index_of(turns: float) -> float:
        return size * math.log(rope.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = index_of(rope.beta_fast), index_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    high += 0.001 if low == high else 0
    ramp = ((torch.arange(size // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return inv_freq / rope.factor * ramp + inv_freq * (1 - ramp)


def rotate(x_THK: Tensor, position_T: Tensor, inv_freq: Tensor, factor: float = 1.0) -> Tensor:
    """Rotary embedding of x [..., T, heads, K] at positions [T] (the half-split layout of Hugging Face checkpoints), times the factor.

    Of each head the first 2 * len(inv_freq) values are rotated; the others stay as they are.
    """
    size = 2 * inv_freq.shape[0]
    angle_TK = torch.outer(position_T.float(), inv_freq).repeat(1, 2)[:, None, :]
    cos, sin = (angle_TK.cos() * factor).to(x_THK.dtype), (angle_TK.sin() * factor).to(x_THK.dtype)
    turned = x_THK[..., :size]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat([-second, first], dim=-1) * sin
    return turned if size == x_THK.shape[-1] else torch.cat([turned, x_THK[..., size:]], dim=-1)


def capped(x: Tensor, cap: float) -> Tensor:
    """cap tanh(x / cap); x where the cap is 0."""
    return x if cap == 0 else cap * torch.tanh(x / cap)
