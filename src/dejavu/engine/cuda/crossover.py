"""What of a step of several rows runs dense since it is measured to be slower sparse on this device.

In: a BatchStep that has run, so that its memory holds the unions and positions of real rows. Out: the layers whose MLP runs dense, and
whether all heads do. Whether a union pays depends on its size: one layer is timed at several sizes, as its selection runs beside
attention, and the union of every layer is compared with that table. q, k, v and O are read whole whatever heads the rows select, so
selecting them saves reading the cache alone: attention of one layer is timed both ways.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from dejavu.engine.cuda.batch_step import BatchStep

FRACTIONS = (0.25, 0.5, 0.75, 1.0)  # sizes of a union at which it is timed
REPEATS = 5


class Crossover:
    """What was measured of the steps of a bucket: layers once, heads for each step; the same from then on."""

    def __init__(self) -> None:
        self.layers: frozenset[int] | None = None
        self.heads: dict[int, bool] = {}  # by the step's tokens

    def settle(self, step: BatchStep) -> None:
        """Have the step, which has just run, run dense what is slower sparse."""
        if self.layers is None:
            self.layers = slower_layers(step)
        if step.tokens not in self.heads:
            self.heads[step.tokens] = slower_heads(step)
        step.run_dense(self.layers, heads=self.heads[step.tokens])


def slower_layers(step: BatchStep) -> frozenset[int]:
    """The layers whose union, as the last run left it, is slower than dense on this device."""
    timed = [index for index, own in enumerate(step.predictors) if own.neurons is not None and index not in step.dense_layers]
    if not timed:
        return frozenset()
    table = mlp_times(step)
    unions, neurons = step.unions.tolist(), step.config.intermediate_size
    return frozenset(index for index in timed if _between(table, unions[index] / neurons) > table[0][1])


def slower_heads(step: BatchStep) -> bool:
    """Whether attention over the rows' selected heads, with their selection, is slower than over all: of one layer, at the positions of
    the last run, whose keys and values there are overwritten: the step must run again."""
    index = next((at for at, own in enumerate(step.predictors) if own.group_scores is not None), None)
    if index is None or step.dense_heads:
        return False
    selected, whole = step.attention_ways(index)
    return milliseconds(selected) > milliseconds(whole)


def mlp_times(step: BatchStep) -> list[tuple[float, float]]:
    """(share of the neurons, milliseconds) of a layer whose MLP runs over a union of that size, with its selection; first (0, dense)."""
    index = next((at for at, own in enumerate(step.predictors) if own.neurons is not None), None)
    assert index is not None, "a model without predictors of neurons is dense"
    kept = step.unions.clone(), step.counts.clone()
    found = [(0.0, milliseconds(step.dense_mlp(index)))]
    for fraction in FRACTIONS:
        found.append((fraction, milliseconds(step.union_mlp(index, round(fraction * step.config.intermediate_size)))))
    step.unions.copy_(kept[0])
    step.counts.copy_(kept[1])
    return found


def _between(table: list[tuple[float, float]], share: float) -> float:
    """Time at a share of the neurons, between those that were measured; the first entry is dense."""
    (left, left_time), *rest = table[1:]
    if share <= left:
        return left_time
    for right, right_time in rest:
        if share <= right:
            return left_time + (right_time - left_time) * (share - left) / (right - left)
        left, left_time = right, right_time
    return left_time


def milliseconds(work: Callable[[], object]) -> float:
    """Median time on the device, without launches: of a graph's replays."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            work()
    times = []
    for _ in range(REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / REPEATS)
    return sorted(times)[REPEATS // 2]
