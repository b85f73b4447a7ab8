"""Steps of so many rows on the GPU, each a graph: captured when it is first used, replayed from then on.

In: tokens, slots and positions of the rows, in memory that the device copies from. Out: the step that ran, in whose memory its results
are, or the tokens that were decoded. A bucket has a step for short sequences and one for long ones, which read the same inputs, so that one
can take over from the other between two tokens of `decode`. Off the GPU (under Triton's interpreter) the same kernels run without a graph.

Letters: B rows  M counts of a layer  L layers
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from dejavu.config import ModelConfig
from dejavu.engine.cache import PagedCache
from dejavu.engine.cuda.batch_step import BatchStep
from dejavu.engine.cuda.crossover import Crossover
from dejavu.engine.cuda.decode_loop import RING, SETTING_ROWS, DecodeRows, joined
from dejavu.engine.cuda.token_step import TokenStep
from dejavu.engine.cuda.weights import StepModel
from dejavu.engine.interface import Decoded
from dejavu.kernels.cuda.attention import SHORT


class Step(Protocol):
    """The kernels of a step, over memory that stays where it is: a graph of them can be replayed. After `run` its memory holds logits fp32
    [B, V], counts int32 [M, B, L] (see `layer_predictors`) and, of several rows, unions int32 [L], the neurons that were read; of one row
    these are its own. fallback_layers: of the layers that select neurons, those that run dense since that is faster."""

    config: ModelConfig
    model: StepModel
    logits: Tensor

    @property
    def counts(self) -> Tensor: ...

    @property
    def unions(self) -> Tensor | None: ...

    @property
    def fallback_layers(self) -> int: ...

    def run(self) -> None:
        """Start every kernel on the current stream."""
        ...

    def settle(self) -> None:
        """Choose by measurement what can be chosen, before the step is captured."""
        ...

    def neurons_of(self, index: int, row: int) -> Tensor | None:
        """The neurons that a row selected in a layer, int64, in order; None where the layer ran dense."""
        ...

    def groups_of(self, index: int, row: int) -> Tensor | None:
        """Likewise the groups of heads; None where the layer has no predictor of them."""
        ...

    def inputs_of(self, index: int, point: str, row: int) -> Tensor:
        """Likewise the inputs kept at a point of a layer that selects them."""
        ...


class Bucket:
    """rows: B. padding: the slot of rows that only fill the bucket. record: keep what `neurons_of` and the like tell. ahead, deterministic:
    see TokenStep; a deterministic dense step of one row is a BatchStep, which gives the bits that it gives with others. crossover: let what
    is measured to be slower sparse run dense."""

    def __init__(
        self,
        rows: int,
        model: StepModel,
        cache: PagedCache,
        *,
        ahead: str,
        deterministic: bool,
        crossover: bool,
        record: bool,
        padding: int,
    ) -> None:
        self.rows, self._model, self._cache = rows, model, cache
        self._ahead, self._deterministic, self._record, self._padding = ahead, deterministic, record, padding
        self.inputs = torch.zeros(3, rows, dtype=torch.int32, device=model.head.device)
        self._lengths = SHORT, model.config.max_positions
        self._steps: dict[int, Step] = {}  # by the longest row that it is for
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._decode_graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.crossover = Crossover() if crossover else None
        self.decode_rows: DecodeRows | None = None

    @property
    def graph(self) -> torch.cuda.CUDAGraph | None:
        """Of a step, the last one captured."""
        return next(reversed(self._graphs.values()), None)

    def step(self, longest: int) -> Step:
        """The one for a longest row of so many tokens."""
        return self._step(self._length(longest))

    def run(self, numbers: Tensor, longest: int) -> Step:
        """Run a step of inputs int32 [3 B]: tokens, slots, positions. longest: tokens of the longest row."""
        self.inputs.copy_(numbers.view(3, self.rows), non_blocking=True)
        step = self.step(longest)
        self._start(self._length(longest), self._graphs, step.run)
        return step

    def prepare(self) -> None:
        """Capture the short step, as if its rows only filled the bucket."""
        self.inputs[1].fill_(self._padding)
        length = self._lengths[0]
        self._graphs[length] = self._captured(self._step(length), self._step(length).run)

    def decode(self, numbers: Tensor, longest: int, count: int, rows: int) -> Decoded:
        """`count` tokens of each of the first `rows` rows. numbers: those of `run` and, behind them, `packed_settings`."""
        if self.decode_rows is None:
            vocab, layers = self._model.config.vocab_size, self._model.config.num_layers
            counts, device = self._model.counts.shape[0], self.inputs.device
            self.decode_rows = DecodeRows(self.rows, vocab, layers, self._padding, device, counts=counts)
        drawn = self.decode_rows
        lengths = [self._length(longest + index) for index in range(count)]
        staged = numbers.view(3 + SETTING_ROWS, self.rows)

        def begin() -> None:
            self.inputs.copy_(staged[:3], non_blocking=True)
            drawn.words.copy_(staged[3:], non_blocking=True)
            drawn.made.zero_()

        def work(step: Step) -> Callable[[], None]:
            def both() -> None:
                step.run()
                drawn.run(step.logits, step.counts, self.inputs, step.unions)

            return both

        if self.inputs.device.type == "cuda":
            for length in sorted(set(lengths) - set(self._decode_graphs)):
                begin()  # a capture runs the kernels once before it, at the place where the first token will be
                self._decode_graphs[length] = self._captured(self._step(length), work(self._step(length)))
        begin()
        found = []
        for index, length in enumerate(lengths):
            step = self._step(length)
            self._start(length, self._decode_graphs, work(step))
            done = index % RING + 1
            if done == RING or index == count - 1:
                heads_per_group, alone = self._model.config.heads_per_group, step.unions is None
                found.append(drawn.taken(done, rows, heads_per_group, alone=alone, fallback_layers=step.fallback_layers))
        return joined(found, dim=0)

    def _length(self, longest: int) -> int:
        short, whole = self._lengths
        return short if longest < short else whole

    def _step(self, length: int) -> Step:
        if length not in self._steps:
            self._steps[length] = self._new_step(length)
        return self._steps[length]

    def _new_step(self, length: int) -> Step:
        selects = any(own.selector is not None or own.group_scores is not None for own in self._model.predictors)
        selects |= any(layer is not None and any(layer.selects) for layer in self._model.inputs)
        if self.rows == 1 and (selects or not self._deterministic):
            return TokenStep(
                self._model, self._cache, tokens=length, ahead=self._ahead, deterministic=self._deterministic, inputs=self.inputs
            )
        return BatchStep(
            self._model,
            self._cache,
            tokens=length,
            deterministic=self._deterministic,
            inputs=self.inputs,
            padding=self._padding,
            record=self._record,
            crossover=self.crossover,
        )

    def _start(self, length: int, graphs: dict[int, torch.cuda.CUDAGraph], work: Callable[[], None]) -> None:
        """Replay the graph, captured at its first use; off the GPU do its work."""
        if self.inputs.device.type != "cuda":
            work()
            return
        if length not in graphs:
            graphs[length] = self._captured(self._step(length), work)
        graphs[length].replay()

    def _captured(self, step: Step, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """A graph of the work. It is done once before: what is compiled, allocated or chosen by measurement then is not captured."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step.settle()
            work()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph, stream=stream):
            work()
        graph.instantiate()
        return graph
