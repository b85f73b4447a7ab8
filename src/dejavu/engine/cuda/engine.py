"""The engine of the GPU: a whole decode step is one CUDA graph, whatever is selected.

In: token ids and slots. Out: logits and counts, as tensors on the device: a step does not wait for it. What changes from step to
step (tokens, slots, positions) is copied into memory that the graph reads; what is selected never leaves the device. There is a
graph for each number of rows in BUCKETS and for short and long sequences; rows that fill a bucket up write to a page that no
sequence has. `decode` samples on the device too and feeds the tokens back: another graph for each of these, replayed once a token.
Off the GPU (under Triton's interpreter) the same kernels run without a graph.

Letters: B rows of a step  V vocabulary  L layers  F neurons  G key/value heads
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dejavu.config import SamplingConfig, require
from dejavu.engine.cuda.batch_step import BatchStep
from dejavu.engine.cuda.capabilities import CUDA
from dejavu.engine.cuda.decode_loop import RING, SETTING_ROWS, DecodeRows, joined, packed_settings
from dejavu.engine.cuda.readback import selections
from dejavu.engine.cuda.token_step import TokenStep
from dejavu.engine.cuda.weights import layer_predictors, step_model
from dejavu.engine.interface import Decoded, StepProfile, StepResult
from dejavu.engine.options import EngineOptions
from dejavu.engine.paged import PagedEngine
from dejavu.engine.prefill import prefill, prefill_logits
from dejavu.kernels.cuda.attention import SHORT
from dejavu.kernels.cuda.common import INTERPRETED
from dejavu.kernels.cuda.read import read_buffer
from dejavu.kernels.dtypes import TORCH_DTYPES
from dejavu.model.counts import Counts
from dejavu.model.selectors import LayerAdapter
from dejavu.model.transformer import Transformer

BUCKETS = (1, 2, 4, 8, 16, 32)
STAGING_ROWS = 256
COMPUTED = {TORCH_DTYPES[name] for name in CUDA.dtypes}


class CudaEngine(PagedEngine):
    """See `dejavu.engine.interface.Engine`; arguments as of TorchEngine. Reads the model's weights in place.

    deterministic: see TokenStep. crossover: for several rows let those layers run dense whose
    union, at the first step of a bucket, is measured to be slower, and heads likewise; what runs dense selects nothing and counts as dense.
    Raises ValueError for a model that is not on a GPU, or has a dtype or an architecture that the kernels do not compute.
    """

    capabilities = CUDA

    def __init__(
        self,
        model: Transformer,
        layers: Sequence[LayerAdapter] | None = None,
        options: EngineOptions = EngineOptions(),
        *,
        deterministic: bool = False,
        crossover: bool = True,
    ) -> None:
        config, weight = model.config, model.embed.weight
        device = weight.device
        require(device.type == "cuda" or INTERPRETED, f"backend 'cuda' needs a model on a GPU, and this one is on {device}")
        require(weight.dtype in COMPUTED, f"backend 'cuda' does not compute in {weight.dtype}")
        ahead = CUDA.ahead[0] if options.ahead is None else options.ahead
        require(ahead in CUDA.ahead, f"unknown value {ahead!r} for ahead; choose one of {', '.join(CUDA.ahead)}")
        CUDA.check_architecture(config)
        # One slot and one page more than the user's: where the rows that fill a bucket write.
        super().__init__(model, layers, options, spare=1)
        self._cache.reserve(self.info.num_slots, 1)
        self.model = model
        self._predictors, self._counts_ML = layer_predictors(self.layers, config, device)
        self._model = step_model(model, self.layers, self._predictors, self._counts_ML)
        self._ahead, self._deterministic = ahead, deterministic
        self._crossover = crossover and not deterministic
        self._dense_layers: dict[int, frozenset[int]] = {}  # by bucket: what was measured to be faster dense
        self._dense_heads: dict[tuple[int, int], bool] = {}  # by bucket and length
        words = config.num_layers if self._record else 0
        self._words_LF = torch.zeros(words, config.intermediate_size, dtype=torch.int32, device=device)
        self._steps: dict[tuple[int, int], TokenStep | BatchStep] = {}
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self._decode_graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self._inputs: dict[int, Tensor] = {}  # by bucket: its short and its long step read the same
        self._decode_rows: dict[int, DecodeRows] = {}
        self._sums: Tensor | None = None
        self._staging = torch.zeros(STAGING_ROWS, (3 + SETTING_ROWS) * BUCKETS[-1], dtype=torch.int32, pin_memory=device.type == "cuda")
        self._staging_numbers, self._staging_row = self._staging.numpy(), 0
        if device.type == "cuda":
            self._prepare()

    @torch.inference_mode()
    def _prepare(self) -> None:
        """Compile and capture a step of one row, as if it filled a bucket, alone and in `decode`, which does not record: the first
        real one is then as fast as the others."""
        key = 1, SHORT
        step = self._step_of(key)
        step.inputs[1].fill_(self.info.num_slots)
        self._graphs[key] = self._captured(key, lambda: self._run(step))
        if not self._record:
            self._decode_bucket((0,), (self.info.num_slots,), 1, (SamplingConfig(),), (0,))

    @property
    def records(self) -> bool:
        return self._record

    @torch.inference_mode()
    def _prefill(self, slot: int, token_ids: Sequence[int], *, every: bool) -> Tensor:
        return (prefill_logits if every else prefill)(self.model, self._cache, slot, token_ids)

    @torch.inference_mode()
    def decode(
        self,
        token_ids_B: Sequence[int],
        slots_B: Sequence[int],
        count: int,
        sampling: Sequence[SamplingConfig] | None = None,
        choices: Sequence[int] | None = None,
    ) -> Decoded:
        """See DecodesTokens. Nothing waits for the device, and nothing ends early: who reads the tokens cuts them where a text ends."""
        require(count >= 1, f"decode makes at least 1 token of each row, not {count}")
        wanted = (SamplingConfig(),) * len(slots_B) if sampling is None else sampling
        chosen = (0,) * len(slots_B) if choices is None else choices
        assert len(token_ids_B) == len(slots_B) == len(set(slots_B)) == len(wanted) == len(chosen) > 0, f"{slots_B=} {sampling=}"
        for token_id, slot in zip(token_ids_B, slots_B, strict=True):
            self._check(slot, (token_id,), count)
        missing = sum(self._cache.missing(slot, count) for slot in slots_B)
        require(
            missing <= self.free_pages,
            f"the key/value cache is full: {count} more tokens for each of {len(slots_B)} rows need {missing} pages and "
            f"{self.free_pages} are free; decode fewer tokens, free a sequence or give the cache more tokens",
        )
        for slot in slots_B:
            self._cache.reserve(slot, count)
        largest = BUCKETS[-1]
        found = []
        for first in range(0, len(slots_B), largest):
            part = slice(first, first + largest)
            found.append(self._decode_bucket(token_ids_B[part], slots_B[part], count, wanted[part], chosen[part]))
        self._count_rows(slots_B, count)
        return joined(found, dim=1)

    def profiled_step(self, token_ids_B: Sequence[int], slots_B: Sequence[int]) -> tuple[StepResult, StepProfile]:
        """As `step`, with what its rows together made it read, at most BUCKETS[-1] of them; it tells no times of parts."""
        require(len(slots_B) <= BUCKETS[-1], f"a profiled step has at most {BUCKETS[-1]} rows, not {len(slots_B)}")
        result = self.step(token_ids_B, slots_B)
        neurons_L = result.union_L
        assert neurons_L is not None, "one graph ran"
        heads_L = result.counts.heads.amax(0)  # of q and O; each row reads its own cache
        points, inputs_LP = self.info.input_points, None
        if result.counts.kept_inputs is not None and points is not None:  # several rows read the matrices whole
            inputs_LP = (
                result.counts.kept_inputs[0]
                if len(slots_B) == 1
                else torch.tensor(points.sizes, device=heads_L.device).expand(self.info.num_layers, -1)
            )
        return result, StepProfile(seconds={}, counts=Counts(neurons=neurons_L, heads=heads_L, kept_inputs=inputs_LP), fired_L=neurons_L)

    @torch.inference_mode()
    def _step(self, token_ids_B: Sequence[int], slots_B: Sequence[int]) -> StepResult:
        """Logits and counts are on the device; nothing waits for them."""
        largest = BUCKETS[-1]
        results = [
            self._rows(token_ids_B[first : first + largest], slots_B[first : first + largest]) for first in range(0, len(slots_B), largest)
        ]
        self._count_rows(slots_B)
        if len(results) == 1:
            return results[0]
        return StepResult(
            logits_BV=torch.cat([result.logits_BV for result in results]),
            counts=Counts.cat([result.counts for result in results]),
            selections=tuple(row for result in results for row in result.selections or ()) if self._record else None,
            fallback_layers=max(result.fallback_layers or 0 for result in results),
        )

    def nodes(self, rows: int = 1) -> int | None:
        """Nodes of the graph of a step of so many rows, of those used so far; None before the first step."""
        graphs = [graph for (size, _), graph in self._graphs.items() if size == rows]
        return _node_count(graphs[-1]) if graphs else None

    def read(self, buffer: Tensor) -> None:
        """Read a device buffer once, as fast as the device can."""
        self._sums = read_buffer(buffer, self._sums)

    def _rows(self, token_ids: Sequence[int], slots: Sequence[int]) -> StepResult:
        """The results of one graph's rows."""
        rows = len(slots)
        bucket, longest, numbers = self._padded(token_ids, slots)
        key = self._key(bucket, longest)
        step = self._step_of(key)
        step.inputs.copy_(self._staged(numbers).view(3, bucket), non_blocking=True)
        self._start(key, self._graphs, lambda: self._run(step))
        per = self.config.heads_per_group
        counts_MBL = self._counts_of(step)[:, :rows].long()
        alone = isinstance(step, TokenStep)
        return StepResult(
            logits_BV=step.logits[:rows].clone(),
            counts=Counts(
                neurons=counts_MBL[0],
                heads=counts_MBL[1] if per == 1 else counts_MBL[1] * per,
                kept_inputs=None if self.info.input_points is None else counts_MBL[2:].permute(1, 2, 0),
            ),
            selections=tuple(selections(step, row, self._words_LF) for row in range(rows)) if self._record else None,
            union_L=counts_MBL[0, 0] if alone else step.unions.long(),
            fallback_layers=0 if alone else step.fallback_layers,
        )

    def _run(self, step: TokenStep | BatchStep) -> None:
        if isinstance(step, TokenStep) or not self._record:
            step.run()
        else:
            step.run(lambda index, word_F: self._words_LF[index].copy_(word_F))

    def _counts_of(self, step: TokenStep | BatchStep) -> Tensor:
        """What the last run selected, int32 [M, B, L] in place: see `layer_predictors`."""
        return self._counts_ML[:, None] if isinstance(step, TokenStep) else step.counts

    def _decode_bucket(
        self, token_ids: Sequence[int], slots: Sequence[int], count: int, sampling: Sequence[SamplingConfig], choices: Sequence[int]
    ) -> Decoded:
        """`decode` for the rows of one bucket."""
        bucket, longest, numbers = self._padded(token_ids, slots)
        if bucket not in self._decode_rows:
            vocab, layers, device = self.info.vocab_size, self.info.num_layers, self._model.head.device
            counts = self._counts_ML.shape[0]
            self._decode_rows[bucket] = DecodeRows(bucket, vocab, layers, self.info.num_slots, device, counts=counts)
        rows = self._decode_rows[bucket]
        keys = [self._key(bucket, longest + index) for index in range(count)]
        inputs = self._step_of(keys[0]).inputs
        settings = packed_settings(sampling, [self._cache.lengths[slot] for slot in slots], bucket, choices)
        staged = self._staged(numbers + settings.flatten().tolist()).view(3 + SETTING_ROWS, bucket)

        def begin() -> None:
            inputs.copy_(staged[:3], non_blocking=True)
            rows.words.copy_(staged[3:], non_blocking=True)
            rows.made.zero_()

        def work(key: tuple[int, int]) -> Callable[[], None]:
            step = self._step_of(key)

            def both() -> None:
                self._run(step)
                rows.run(step.logits, self._counts_of(step), inputs, None if isinstance(step, TokenStep) else step.unions)

            return both

        if inputs.device.type == "cuda":
            for key in sorted(set(keys) - set(self._decode_graphs)):
                begin()  # a capture runs the kernels once before it, at the place where the first token will be
                self._decode_graphs[key] = self._captured(key, work(key))
        begin()
        found = []
        for index, key in enumerate(keys):
            self._start(key, self._decode_graphs, work(key))
            done = index % RING + 1
            if done == RING or index == count - 1:
                step = self._step_of(key)
                alone, fallback = (True, 0) if isinstance(step, TokenStep) else (False, step.fallback_layers)
                found.append(rows.taken(done, len(slots), self.config.heads_per_group, alone=alone, fallback_layers=fallback))
        return joined(found, dim=0)

    def _padded(self, token_ids: Sequence[int], slots: Sequence[int]) -> tuple[int, int, list[int]]:
        """The bucket of so many rows, the longest row's length, and the bucket's tokens, slots and positions, one after the other."""
        bucket = next(size for size in BUCKETS if size >= len(slots))
        positions = [self._cache.lengths[slot] for slot in slots]
        spare = bucket - len(slots)
        return bucket, max(positions), [*token_ids, *[0] * spare, *slots, *[self.info.num_slots] * spare, *positions, *[0] * spare]

    def _key(self, bucket: int, longest: int) -> tuple[int, int]:
        """Which step runs for a longest row of so many tokens."""
        return bucket, SHORT if longest < SHORT else self.info.max_positions

    def _start(self, key: tuple[int, int], graphs: dict[tuple[int, int], torch.cuda.CUDAGraph], work: Callable[[], None]) -> None:
        """Replay the key's graph, captured when it is first wanted; off the GPU do its work."""
        if self._step_of(key).inputs.device.type != "cuda":
            work()
            return
        if key not in graphs:
            graphs[key] = self._captured(key, work)
        graphs[key].replay()

    def _captured(self, key: tuple[int, int], work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """A graph of the work. It is done once before: what is compiled, allocated or chosen by measurement then is not captured."""
        step, stream = self._step_of(key), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            if isinstance(step, BatchStep) and self._crossover:
                self._run(step)  # and nothing behind it: what is measured then writes where this step does
                self._choose(key, step)
            work()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph, stream=stream):
            work()
        graph.instantiate()
        return graph

    def _choose(self, key: tuple[int, int], step: BatchStep) -> None:
        """What runs dense: layers by bucket, heads by bucket and length; measured once each, and the same from then on."""
        rows, _ = key
        if rows not in self._dense_layers:
            self._dense_layers[rows] = step.slower_sparse()
        if key not in self._dense_heads:
            self._dense_heads[key] = step.slower_heads()
        step.run_dense(self._dense_layers[rows], heads=self._dense_heads[key])

    def _staged(self, numbers: Sequence[int]) -> Tensor:
        """A step's numbers in memory that the device copies from when it comes to it. No row is written again before it has."""
        if self._staging_row == STAGING_ROWS:
            torch.cuda.synchronize()
            self._staging_row = 0
        at = self._staging_row
        self._staging_numbers[at, : len(numbers)] = numbers
        self._staging_row += self._staging.is_pinned()
        return self._staging[at, : len(numbers)]

    def _step_of(self, key: tuple[int, int]) -> TokenStep | BatchStep:
        if key not in self._steps:
            self._steps[key] = self._new_step(*key)
        return self._steps[key]

    def _new_step(self, rows: int, tokens: int) -> TokenStep | BatchStep:
        if rows not in self._inputs:
            self._inputs[rows] = torch.zeros(3, rows, dtype=torch.int32, device=self._model.head.device)
        inputs = self._inputs[rows]
        if rows == 1:
            return TokenStep(self._model, self._cache, tokens=tokens, ahead=self._ahead, deterministic=self._deterministic, inputs=inputs)
        padding, deterministic = self.info.num_slots, self._deterministic
        return BatchStep(
            self._model, self._cache, tokens=tokens, deterministic=deterministic, inputs=inputs, padding=padding, record=self._record
        )


def _node_count(graph: torch.cuda.CUDAGraph) -> int | None:
    """cudaGraphGetNodes, through the runtime library that torch has loaded; None where it is not found."""
    with open("/proc/self/maps", encoding="ascii", errors="replace") as maps:
        paths = [line.split()[-1] for line in maps if "libcudart" in line]
    if not paths:
        return None
    count = ctypes.c_size_t()
    status = ctypes.CDLL(paths[0]).cudaGraphGetNodes(ctypes.c_void_p(graph.raw_cuda_graph()), None, ctypes.byref(count))
    return count.value if status == 0 else None
