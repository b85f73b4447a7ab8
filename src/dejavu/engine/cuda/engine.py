"""The engine of the GPU: a whole decode step is one CUDA graph, whatever is selected.

In: token ids and slots. Out: logits and counts, as tensors on the device: a step does not wait for it. What changes from step to
step (tokens, slots, positions) is copied into memory that the graph reads; what is selected never leaves the device. There is a
Bucket of steps for each number of rows in BUCKETS; rows that fill one up write to a page that no sequence has. `decode` samples on the
device too and feeds the tokens back.

Letters: B rows of a step  V vocabulary  L layers
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dejavu.config import SamplingConfig, require
from dejavu.engine.cuda.bucket import Bucket
from dejavu.engine.cuda.capabilities import CUDA
from dejavu.engine.cuda.decode_loop import SETTING_ROWS, joined, packed_settings
from dejavu.engine.cuda.prompts import Prompts
from dejavu.engine.cuda.readback import selections
from dejavu.engine.cuda.tuning import tune
from dejavu.engine.cuda.weights import dense_model, layer_predictors, step_model
from dejavu.engine.interface import Decoded, StepProfile, StepResult
from dejavu.engine.options import EngineOptions
from dejavu.engine.paged import PagedEngine
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
    """See `dejavu.engine.interface.Engine`; arguments as of TorchEngine. Reads the model's weights in place; of a quantised
    model it has fp32 ones of its own.

    deterministic: see TokenStep and BatchStep. crossover: for several rows let those layers run dense whose union, at the first step of a
    bucket, is measured to be slower, and heads likewise; what runs dense selects nothing and counts as dense. Raises ValueError for
    a model that is not on a GPU, or has a dtype or an architecture that the kernels do not compute.
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
        model = model.widened()
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
        predictors, counts_ML = layer_predictors(self.layers, config, device)
        self._model = step_model(model, self.layers, predictors, counts_ML)
        self._dense_model = dense_model(self._model) if self.info.sparse else self._model
        self._prompts = Prompts(self._model, self._cache, padding=self.info.num_slots)
        self._ahead, self._deterministic = ahead, deterministic
        self._crossover = crossover and not deterministic
        self._buckets: dict[tuple[int, bool, bool], Bucket] = {}  # by rows, whether sparse, and whether it records
        self._sums: Tensor | None = None
        self._staging = torch.zeros(STAGING_ROWS, (3 + SETTING_ROWS) * BUCKETS[-1], dtype=torch.int32, pin_memory=device.type == "cuda")
        self._staging_numbers, self._staging_row = self._staging.numpy(), 0
        tune(self._model)
        if device.type == "cuda":
            self._prepare()

    @torch.inference_mode()
    def _prepare(self) -> None:
        """Compile and capture a step of one row, as if it filled a bucket, alone and in `decode`, which does not record: the first
        real one is then as fast as the others."""
        self._bucket(1).prepare()
        if not self._record:
            self._decode_bucket((0,), (self.info.num_slots,), 1, (SamplingConfig(),), (0,), sparse=True)

    @property
    def records(self) -> bool:
        return self._record

    @torch.inference_mode()
    def _prefill(self, slot: int, token_ids: Sequence[int], *, every: bool) -> Tensor:
        logits_TV = self._prompts.run([slot], [token_ids], every=every)
        return logits_TV if every else logits_TV[0]

    @torch.inference_mode()
    def _prefill_batch(self, slots_B: Sequence[int], token_ids_B: Sequence[Sequence[int]]) -> Tensor:
        """The tokens of all slots in the same passes."""
        return self._prompts.run(slots_B, token_ids_B, every=False)

    @torch.inference_mode()
    def decode(
        self,
        token_ids_B: Sequence[int],
        slots_B: Sequence[int],
        count: int,
        sampling: Sequence[SamplingConfig] | None = None,
        choices: Sequence[int] | None = None,
        *,
        sparse: bool = True,
    ) -> Decoded:
        """See DecodesTokens. Nothing waits for the device, and nothing ends early: who reads the tokens cuts them where a text ends."""
        require(count >= 1, f"decode makes at least 1 token of each row, not {count}")
        sampling_B = (SamplingConfig(),) * len(slots_B) if sampling is None else sampling
        chosen = (0,) * len(slots_B) if choices is None else choices
        assert len(token_ids_B) == len(slots_B) == len(set(slots_B)) == len(sampling_B) == len(chosen) > 0, f"{slots_B=} {sampling=}"
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
            found.append(self._decode_bucket(token_ids_B[part], slots_B[part], count, sampling_B[part], chosen[part], sparse=sparse))
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
    def _step(self, token_ids_B: Sequence[int], slots_B: Sequence[int], *, sparse: bool, record: bool) -> StepResult:
        """Logits and counts are on the device; nothing waits for them."""
        largest = BUCKETS[-1]
        parts = [slice(first, first + largest) for first in range(0, len(slots_B), largest)]
        results = [self._rows(token_ids_B[part], slots_B[part], sparse=sparse, record=record) for part in parts]
        self._count_rows(slots_B)
        if len(results) == 1:
            return results[0]
        return StepResult(
            logits_BV=torch.cat([result.logits_BV for result in results]),
            counts=Counts.cat([result.counts for result in results]),
            selections=tuple(row for result in results for row in result.selections or ()) if record else None,
            fallback_layers=max(result.fallback_layers or 0 for result in results),
        )

    def graph(self, rows: int) -> torch.cuda.CUDAGraph | None:
        """Of a step of so many rows as the engine was made, of those used so far; None before the first step."""
        bucket = self._buckets.get(self._key(rows, sparse=True, record=self._record))
        return None if bucket is None else bucket.graph

    def read(self, buffer: Tensor) -> None:
        """Read a device buffer once, as fast as the device can."""
        self._sums = read_buffer(buffer, self._sums)

    def _rows(self, token_ids: Sequence[int], slots: Sequence[int], *, sparse: bool, record: bool) -> StepResult:
        """The results of one bucket's rows."""
        rows, bucket = len(slots), self._bucket(len(slots), sparse=sparse, record=record)
        longest, numbers = self._padded(token_ids, slots, bucket.rows)
        step = bucket.run(self._staged(numbers), longest)
        per = self.config.heads_per_group
        counts_MBL = step.counts[:, :rows].long()
        return StepResult(
            logits_BV=step.logits[:rows].clone(),
            counts=Counts(
                neurons=counts_MBL[0],
                heads=counts_MBL[1] if per == 1 else counts_MBL[1] * per,
                kept_inputs=None if self.info.input_points is None else counts_MBL[2:].permute(1, 2, 0),
            ),
            selections=tuple(selections(step, row) for row in range(rows)) if record else None,
            union_L=counts_MBL[0, 0] if step.unions is None else step.unions.long(),
            fallback_layers=step.fallback_layers,
        )

    def _decode_bucket(
        self,
        token_ids: Sequence[int],
        slots: Sequence[int],
        count: int,
        sampling: Sequence[SamplingConfig],
        choices: Sequence[int],
        *,
        sparse: bool,
    ) -> Decoded:
        """`decode` for the rows of one bucket."""
        bucket = self._bucket(len(slots), sparse=sparse)
        longest, numbers = self._padded(token_ids, slots, bucket.rows)
        settings = packed_settings(sampling, [self._cache.lengths[slot] for slot in slots], bucket.rows, choices)
        return bucket.decode(self._staged(numbers + settings.flatten().tolist()), longest, count, len(slots))

    def _padded(self, token_ids: Sequence[int], slots: Sequence[int], rows: int) -> tuple[int, list[int]]:
        """The longest row's length, and tokens, slots and positions of a bucket of so many rows, one after the other."""
        positions = [self._cache.lengths[slot] for slot in slots]
        spare = rows - len(slots)
        return max(positions), [*token_ids, *[0] * spare, *slots, *[self.info.num_slots] * spare, *positions, *[0] * spare]

    def _bucket(self, count: int, *, sparse: bool = True, record: bool = False) -> Bucket:
        """Of so many rows, and those that fill it up."""
        key = self._key(count, sparse=sparse, record=record)
        if key not in self._buckets:
            rows, sparse, record = key
            self._buckets[key] = Bucket(
                rows,
                self._model if sparse else self._dense_model,
                self._cache,
                ahead=self._ahead,
                deterministic=self._deterministic,
                crossover=self._crossover,
                record=record,
                padding=self.info.num_slots,
            )
        return self._buckets[key]

    def _key(self, count: int, *, sparse: bool, record: bool) -> tuple[int, bool, bool]:
        """A dense engine has one model for both; what a step of one row selected can be told whether it records or not."""
        rows = next(size for size in BUCKETS if size >= count)
        return rows, sparse or not self.info.sparse, record and rows > 1

    def _staged(self, numbers: Sequence[int]) -> Tensor:
        """A step's numbers in memory that the device copies from when it comes to it. No row is written again before it has."""
        if self._staging_row == STAGING_ROWS:
            torch.cuda.synchronize()
            self._staging_row = 0
        at = self._staging_row
        self._staging_numbers[at, : len(numbers)] = numbers
        self._staging_row += self._staging.is_pinned()
        return self._staging[at, : len(numbers)]
