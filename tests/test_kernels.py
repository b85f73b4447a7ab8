"""Every operation of the registry against its definition, and the selection's promise: what is left out is not read.

The rule: the error against fp64 is at most twice that of the plain version in the same dtype, plus one rounding (half an eps). New
memory is filled with NaN during the tests, so that an output never written cannot pass.
"""

import random
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dejavu.kernels import OPS, Op
from dejavu.kernels.activation import activate
from dejavu.kernels.attention import ScoreConfig, attend_pages, attend_pages_bytes, output_heads, plain_attention, query_heads
from dejavu.kernels.sparse_mlp import MlpWeights, dense_mlp, masked_mlp, sparse_mlp, sparse_mlp_bytes

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


pytestmark = pytest.mark.usefixtures("poisoned_empty")


def converted(value: Any, dtype: torch.dtype) -> Any:
    """The same argument with floating-point tensors in another dtype."""
    if isinstance(value, MlpWeights):
        return MlpWeights(**{field.name: converted(getattr(value, field.name), dtype) for field in fields(value)})
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def error_and_limit(op: Op, shape: tuple[int, ...], dtype: torch.dtype, fn: Callable[..., Tensor]) -> tuple[float, float]:
    """Largest error of fn and the limit of the rule. NaN where an output is NaN."""
    kwargs = op.inputs(shape, dtype, "cpu")
    truth = op.ref(**{key: converted(value, torch.float64) for key, value in kwargs.items()})
    plain, fast = op.ref(**kwargs).double(), fn(**kwargs)
    assert fast.dtype == dtype and fast.shape == truth.shape
    if truth.numel() == 0:
        return 0.0, 0.0
    limit = 2 * (plain - truth).abs().max() + torch.finfo(dtype).eps * truth.abs().max()
    return float((fast.double() - truth).abs().max()), float(limit)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_error_is_at_most_twice_the_plain_error(name: str, dtype: torch.dtype) -> None:
    """On a third of the shapes, drawn anew for each dtype."""
    op = OPS[name]
    for shape in random.Random(f"{name} {dtype}").sample(op.shapes, len(op.shapes) // 3):
        error, limit = error_and_limit(op, shape, dtype, op.fn)
        assert error <= limit, f"{name} {shape} {dtype}: {error=:.3g} > {limit=:.3g}"
        assert op.bytes(**op.inputs(shape, dtype, "cpu")) > 0


def last_index_dropped(x_D: Tensor, weights: MlpWeights, idx_A: Tensor) -> Tensor:
    return sparse_mlp(x_D, weights, idx_A[:-1])


def index_off_by_one(x_D: Tensor, weights: MlpWeights, idx_A: Tensor) -> Tensor:
    return sparse_mlp(x_D, weights, (idx_A + 1) % weights.up_FD.shape[0])


def bias_not_gathered(x_D: Tensor, weights: MlpWeights, idx_A: Tensor) -> Tensor:
    assert weights.up_bias_F is not None
    return sparse_mlp(x_D, replace(weights, up_bias_F=weights.up_bias_F.index_copy(0, idx_A, weights.up_bias_F[: idx_A.shape[0]])), idx_A)


def output_not_written(x_D: Tensor, weights: MlpWeights, idx_A: Tensor) -> Tensor:
    y_D = torch.empty_like(x_D)
    y_D[:-1] = sparse_mlp(x_D, weights, idx_A)[:-1]
    return y_D


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bug", [last_index_dropped, index_off_by_one, bias_not_gathered, output_not_written])
def test_the_rule_catches(bug: Callable[..., Tensor], dtype: torch.dtype) -> None:
    error, limit = error_and_limit(OPS["sparse_mlp"], (96, 257, 51, 1, 1), dtype, bug)
    assert not error <= limit


def mlp(seed: int, *, gated: bool, biased: bool, neurons: int = 37, size: int = 17) -> tuple[Tensor, MlpWeights]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return normal(size), MlpWeights(
        up_FD=normal(neurons, size),
        down_FD=normal(neurons, size),
        gate_FD=normal(neurons, size) if gated else None,
        up_bias_F=normal(neurons) if biased else None,
        gate_bias_F=normal(neurons) if gated and biased else None,
        down_bias_D=normal(size) if biased else None,
    )


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_neurons_left_out_are_not_read(gated: bool, dtype: torch.dtype) -> None:
    x_D, weights = mlp(1, gated=gated, biased=True)
    x_D = x_D.to(dtype)
    weights = converted(weights, dtype)
    idx_A = torch.tensor([0, 5, 6, 36])
    expected = sparse_mlp(x_D, weights, idx_A)
    left_out = torch.ones(37, dtype=torch.bool).index_fill(0, idx_A, False)

    def poisoned(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else torch.where(left_out.view(-1, *[1] * (tensor.dim() - 1)), torch.nan, tensor)

    names = ("up_FD", "down_FD", "gate_FD", "up_bias_F", "gate_bias_F")
    poison = replace(weights, **{name: poisoned(getattr(weights, name)) for name in names})
    assert torch.equal(sparse_mlp(x_D, poison, idx_A), expected)
    assert dense_mlp(x_D, poison).isnan().any()


@pytest.mark.parametrize("gated", [False, True])
def test_no_neuron_gives_exactly_the_down_bias(gated: bool) -> None:
    none = torch.empty(0, dtype=torch.int64)
    x_D, weights = mlp(2, gated=gated, biased=True)
    assert weights.down_bias_D is not None
    assert torch.equal(sparse_mlp(x_D, weights, none), weights.down_bias_D)
    x_D, weights = mlp(3, gated=gated, biased=False)
    assert torch.equal(sparse_mlp(x_D, weights, none), torch.zeros(17))


@pytest.mark.parametrize("activation", ["relu", "relu2", "fatrelu", "silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("gated", [False, True])
def test_every_activation(activation: str, gated: bool) -> None:
    x_D, weights = mlp(4, gated=gated, biased=True)
    weights = replace(weights, activation=activation, activation_threshold=0.3)
    idx_A = torch.tensor([36, 2, 9])  # any order
    torch.testing.assert_close(sparse_mlp(x_D, weights, idx_A), masked_mlp(x_D, weights, idx_A), rtol=1e-5, atol=1e-5)
    act_F = activate((weights.gate_FD if weights.gate_FD is not None else weights.up_FD) @ x_D, activation, 0.3)
    assert act_F.shape == (37,)


def test_transposed_weights_are_computed_too() -> None:
    x_D, weights = mlp(5, gated=False, biased=True)
    strided = replace(weights, up_FD=weights.up_FD.t().contiguous().t(), down_FD=weights.down_FD.t().contiguous().t())
    idx_A = torch.arange(0, 37, 3)
    torch.testing.assert_close(sparse_mlp(x_D, strided, idx_A), sparse_mlp(x_D, weights, idx_A))
    torch.testing.assert_close(dense_mlp(x_D, strided), dense_mlp(x_D, weights))


def test_bytes_count_the_rows_that_are_read() -> None:
    x_D, weights = mlp(6, gated=True, biased=False)
    one, three = (sparse_mlp_bytes(x_D, weights, torch.arange(count)) for count in (1, 3))
    assert three - one == 2 * (3 * 17 * 4 + 8)  # two more neurons: three fp32 rows of 17 and an index each


def test_groups_left_out_are_not_read() -> None:
    kwargs = OPS["attend_pages"].inputs((3, 10, 4, 9, 5, 2), torch.float32, "cpu")
    expected = attend_pages(**kwargs)
    keep_PG = torch.zeros(kwargs["k_PGSK"].shape[:2], dtype=torch.bool)
    keep_PG[kwargs["page_N"][:, None], kwargs["idx_A"]] = True
    for name in ("k_PGSK", "v_PGSK"):
        kwargs[name][~keep_PG] = torch.nan  # other groups and other sequences' pages
        kwargs[name][kwargs["page_N"][-1], :, 1:] = torch.nan  # tokens past the end: 9 = 2 pages of 4, and 1
    assert torch.equal(attend_pages(**kwargs), expected)

    weight, idx_A = torch.randn(5, 6, 8), torch.tensor([1, 4])
    x_D, mixed = torch.randn(8), torch.randn(2, 2, 3)
    poison = weight.clone()
    poison[[0, 2, 3]] = torch.nan
    queries, outputs = (query_heads(x_D, w.view(30, 8), None, idx_A, 5) for w in (weight, poison))
    assert torch.equal(queries, outputs)
    queries, outputs = (output_heads(mixed, w.view(30, 8), None, idx_A, 5) for w in (weight, poison))
    assert torch.equal(queries, outputs)


SCORES = [ScoreConfig(window=5), ScoreConfig(window=64, scale=0.3), ScoreConfig(cap=2.0), ScoreConfig(window=7, cap=1.5, scale=0.9)]


@pytest.mark.parametrize("scores", SCORES, ids=str)
@pytest.mark.parametrize("length", [1, 5, 6, 16, 23])
def test_windows_caps_and_scales_of_scores(scores: ScoreConfig, length: int) -> None:
    """Against the definition; what lies before the window is NaN."""
    generator = torch.Generator().manual_seed(length)
    groups, per, page, head = 3, 2, 4, 6
    pool = [torch.randn(9, groups, page, head, generator=generator, dtype=torch.float64) for _ in range(2)]
    page_N = torch.randperm(9, generator=generator)[: -(-length // page)]
    q_ARK = torch.randn(2, per, head, generator=generator, dtype=torch.float64)
    idx_A = torch.tensor([2, 0])
    expected = plain_attention(q_ARK, pool[0], pool[1], page_N, length, idx_A, scores)
    for token in range(scores.first(length)):
        for each in pool:
            each[page_N[token // page], :, token % page] = torch.nan
    found = attend_pages(q_ARK, pool[0], pool[1], page_N, length, idx_A, scores)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert attend_pages_bytes(q_ARK, pool[0], pool[1], page_N, length, idx_A, scores) <= attend_pages_bytes(
        q_ARK, pool[0], pool[1], page_N, length, idx_A
    )
