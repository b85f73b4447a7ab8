"""The operations of a decode step that depend on a selection, by name: for one test and one benchmark over all of them.

`fn` is what the engine calls, `ref` the definition it is tested against, `inputs(shape, dtype, device)` random arguments
for both, `bytes` what any implementation has to move for such arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dejavu.kernels import attention, sparse_linear, sparse_mlp
from dejavu.kernels.sparse_mlp import MlpWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One operation. `shapes` are the sizes it is tested at: pairwise distinct, odd ones, nothing and everything selected."""

    fn: Callable[..., Tensor]
    ref: Callable[..., Tensor]
    inputs: Callable[[tuple[int, ...], torch.dtype, str], dict[str, Any]]
    bytes: Callable[..., int]
    shapes: tuple[tuple[int, ...], ...]


class _Random:
    """Random tensors at model scale, the same for one seed."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.generator = torch.Generator(device).manual_seed(0)
        self.dtype, self.device = dtype, device

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=self.generator, device=self.device) * scale).to(self.dtype)

    def positive(self, *shape: int, scale: float = 1.0) -> Tensor:
        return self.normal(*shape, scale=scale).abs()

    def choice(self, size: int, count: int) -> Tensor:
        return torch.randperm(size, generator=self.generator, device=self.device)[:count].sort().values


def _mlp_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> dict[str, Any]:
    """shape D, F, A, gated, biased. x, up and gate are positive so that every neuron fires and every index matters."""
    size, neurons, active, gated, biased = shape
    random = _Random(dtype, device)
    weights = MlpWeights(
        up_FD=random.positive(neurons, size, scale=1 / size),
        down_FD=random.normal(neurons, size, scale=max(active, 1) ** -0.5),
        gate_FD=random.positive(neurons, size, scale=1 / size) if gated else None,
        up_bias_F=random.positive(neurons, scale=0.1) if biased else None,
        gate_bias_F=random.positive(neurons, scale=0.1) if gated and biased else None,
        down_bias_D=random.normal(size, scale=0.1) if biased else None,
    )
    return {"x_D": random.positive(size), "weights": weights, "idx_A": random.choice(neurons, active)}


def _dense_mlp_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> dict[str, Any]:
    values = _mlp_inputs(shape, dtype, device)
    return {"x_D": values["x_D"], "weights": values["weights"]}


def _dense_mlp_ref(x_D: Tensor, weights: MlpWeights) -> Tensor:
    return sparse_mlp.masked_mlp(x_D, weights, torch.arange(weights.up_FD.shape[0], device=x_D.device))


def _gate_mlp_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> dict[str, Any]:
    values = _mlp_inputs(shape, dtype, device)
    return values | {"gate_F": sparse_mlp.activated_gate(values["x_D"], values["weights"])}


def _linear_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> dict[str, Any]:
    """shape I, O, A, biased; every input where A is -1. The matrix has a row for each output."""
    size, outputs, active, biased = shape
    random = _Random(dtype, device)
    return {
        "x_I": random.normal(size),
        "weight_OI": random.normal(outputs, size, scale=size**-0.5),
        "bias_O": random.normal(outputs) if biased else None,
        "idx_A": None if active < 0 else random.choice(size, active),
    }


def _linear_row_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> dict[str, Any]:
    values = _linear_inputs(shape, dtype, device)
    return values | {"weight_IO": values.pop("weight_OI").t().contiguous()}


def _head_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[_Random, Tensor | None]:
    """Groups selected out of G: all of them, as None, where the shape says -1."""
    random = _Random(dtype, device)
    return random, None if shape[-1] < 0 else random.choice(shape[-2], shape[-1])


def _query_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> dict[str, Any]:
    """shape D, R, K, biased, G, A."""
    size, per_group, head_dim, biased, groups, _ = shape
    random, idx_A = _head_inputs(shape, dtype, device)
    rows = groups * per_group * head_dim
    return {
        "x_D": random.normal(size),
        "weight_QD": random.normal(rows, size, scale=size**-0.5),
        "bias_Q": random.normal(rows) if biased else None,
        "idx_A": idx_A,
        "num_groups": groups,
    }


def _output_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> dict[str, Any]:
    """shape D, R, K, biased, G, A."""
    size, per_group, head_dim, biased, groups, active = shape
    random, idx_A = _head_inputs(shape, dtype, device)
    rows = groups * per_group * head_dim
    return {
        "mixed_ARK": random.normal(groups if active < 0 else active, per_group, head_dim),
        "weight_QD": random.normal(rows, size, scale=rows**-0.5),
        "bias_D": random.normal(size) if biased else None,
        "idx_A": idx_A,
        "num_groups": groups,
    }


def _attend_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> dict[str, Any]:
    """shape R, K, S, T, G, A."""
    per_group, head_dim, page_size, length, groups, active = shape
    random, idx_A = _head_inputs(shape, dtype, device)
    pages = -(-length // page_size)
    pool = 2 * pages + 1
    return {
        "q_ARK": random.normal(groups if active < 0 else active, per_group, head_dim),
        "k_PGSK": random.normal(pool, groups, page_size, head_dim),
        "v_PGSK": random.normal(pool, groups, page_size, head_dim),
        "page_N": random.choice(pool, pages).flip(0),
        "length": length,
        "idx_A": idx_A,
    }


_MLP_SHAPES = tuple(
    (size, neurons, active, gated, biased)
    for size, neurons in ((96, 257), (129, 64), (1, 7), (17, 1), (250, 1000))
    for active in sorted({0, 1, neurons // 5, neurons - 1, neurons})
    for gated in (0, 1)
    for biased in (0, 1)
)
_LINEAR_SHAPES = tuple(
    (size, outputs, active, biased)
    for size, outputs in ((96, 257), (129, 64), (1, 7), (17, 1), (250, 100))
    for active in sorted({-1, 0, 1, size // 5, size})
    for biased in (0, 1)
)
_HEAD_SHAPES = tuple((size, 2, 6, biased, 5, active) for size in (33, 97) for biased in (0, 1) for active in (-1, 0, 1, 3, 4, 5))
_ATTEND_SHAPES = tuple((per, 10, 4, length, 5, active) for per in (1, 3) for length in (1, 4, 5, 31) for active in (-1, 0, 1, 3, 4, 5))

OPS = {
    "dense_mlp": Op(
        fn=sparse_mlp.dense_mlp, ref=_dense_mlp_ref, inputs=_dense_mlp_inputs, bytes=sparse_mlp.dense_mlp_bytes, shapes=_MLP_SHAPES
    ),
    "sparse_mlp": Op(
        fn=sparse_mlp.sparse_mlp, ref=sparse_mlp.masked_mlp, inputs=_mlp_inputs, bytes=sparse_mlp.sparse_mlp_bytes, shapes=_MLP_SHAPES
    ),
    "gate_mlp": Op(
        fn=sparse_mlp.gate_mlp,
        ref=sparse_mlp.masked_gate_mlp,
        inputs=_gate_mlp_inputs,
        bytes=sparse_mlp.gate_mlp_bytes,
        shapes=_MLP_SHAPES,
    ),
    "linear_columns": Op(
        fn=sparse_linear.linear_columns,
        ref=sparse_linear.masked_columns,
        inputs=_linear_inputs,
        bytes=sparse_linear.linear_columns_bytes,
        shapes=_LINEAR_SHAPES,
    ),
    "linear_rows": Op(
        fn=sparse_linear.linear_rows,
        ref=sparse_linear.masked_rows,
        inputs=_linear_row_inputs,
        bytes=sparse_linear.linear_rows_bytes,
        shapes=_LINEAR_SHAPES,
    ),
    "query_heads": Op(
        fn=attention.query_heads,
        ref=attention.masked_query_heads,
        inputs=_query_inputs,
        bytes=attention.query_heads_bytes,
        shapes=_HEAD_SHAPES,
    ),
    "attend_pages": Op(
        fn=attention.attend_pages,
        ref=attention.plain_attention,
        inputs=_attend_inputs,
        bytes=attention.attend_pages_bytes,
        shapes=_ATTEND_SHAPES,
    ),
    "output_heads": Op(
        fn=attention.output_heads,
        ref=attention.masked_output_heads,
        inputs=_output_inputs,
        bytes=attention.output_heads_bytes,
        shapes=_HEAD_SHAPES,
    ),
}
