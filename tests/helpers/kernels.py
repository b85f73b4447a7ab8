"""What a kernel of the GPU is given, random: weights in a dtype and in `Memory`, norms, scores with room for their list."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from dejavu.kernels.cuda.common import NormWeights, Side
from dejavu.kernels.cuda.project import side_definition
from dejavu.kernels.cuda.select import NeuronScores
from helpers.kernel_memory import CANARY, Memory, check_rule, midway

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


def converted(value: Any, dtype: torch.dtype) -> Any:
    """A dataclass of weights with its floating-point tensors in another dtype."""
    found = {field.name: getattr(value, field.name) for field in fields(value)}
    return replace(value, **{k: v.to(dtype) for k, v in found.items() if isinstance(v, Tensor) and v.is_floating_point()})


def placed(value: Any, memory: Memory) -> Any:
    """A dataclass of weights, given to a kernel."""
    found = {field.name: getattr(value, field.name) for field in fields(value)}
    return replace(value, **{k: memory.given(v) for k, v in found.items() if isinstance(v, Tensor)})


def norm_of(memory: Memory, size: int, *, rms: bool, affine: bool) -> NormWeights:
    """A LayerNorm's bias of 3 makes what it gives positive."""
    weight_D = memory.normal(size, scale=0.1) + 0.5 if affine else None
    bias_D = memory.normal(size, scale=0.1) + 3 if affine and not rms else None
    return NormWeights(weight=weight_D, bias=bias_D, eps=1e-5, rms=rms)


def side_of(memory: Memory, rows: int, size: int) -> Side:
    return Side(matrix=memory.int8(rows, size), scale=memory.positive(rows).float() / 127 + 0.01, out=torch.empty(0))


def check_side(side: Side, plain_x_D: Tensor, x_D: Tensor, dtype: torch.dtype, memory_side: Side) -> None:
    truth_R = side.scale.double() * (side.matrix.double() @ x_D)
    check_rule(memory_side.out, side_definition(plain_x_D, side), truth_R, dtype)


def neuron_scores(memory: Memory, neurons: int, rank: int, count: int, *, int8: bool) -> NeuronScores:
    """Scores of which so many exceed the threshold; on the CPU, without room for the list."""
    matrix = memory.int8(neurons, rank) if int8 else memory.normal(neurons, rank)
    scores = NeuronScores(
        matrix=matrix, scale=memory.positive(neurons).float() / (127 if int8 else 1), bias=memory.normal(neurons, dtype=FP32),
        threshold=torch.zeros(1), h=memory.normal(rank, dtype=FP32), neurons=torch.empty(0), count=torch.empty(0),
    )  # fmt: skip
    score_F = (matrix.float() @ scores.h) * scores.scale + scores.bias
    return replace(scores, threshold=torch.tensor([midway(score_F, count)]))


def with_room(scores: NeuronScores, memory: Memory) -> NeuronScores:
    count = memory.room(1, dtype=torch.int32, holds=0.0)
    return replace(placed(scores, memory), neurons=memory.room(scores.matrix.shape[0], dtype=torch.int32), count=count)


def check_list(scores: NeuronScores, expected: list[int]) -> None:
    """The list in any order; what lies behind it was not written."""
    count = len(expected)
    assert scores.count.item() == count
    assert sorted(scores.neurons[:count].tolist()) == expected and set(scores.neurons[count:].tolist()) <= {CANARY}
