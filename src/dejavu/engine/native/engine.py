"""The engine of the CPU: a whole step of several tokens in one call of the C++ library, sparse where it has predictors.

In: token ids and slots. Out: logits, counts and, when recording, selections, as the torch engine defines them
(engine/torch_engine.py). This file keeps slots and pages; arithmetic, threads and selections are in native/.
A row's result depends on that row alone, bit for bit, whatever its batch mates and the number of threads.

Letters: B rows of a step  N blocks of rows  V vocabulary  L layers  F neurons  G key/value heads  S tokens per page  K head_dim (padded)
"""

from __future__ import annotations

import ctypes
import dataclasses
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dejavu.config import require
from dejavu.engine.interface import LayerSelection, StepProfile, StepResult
from dejavu.engine.native.capabilities import NATIVE
from dejavu.engine.native.selectors import kept_inputs, layout_of, set_selectors
from dejavu.engine.native.weights import matrix_view, packed_model
from dejavu.engine.options import EngineOptions
from dejavu.engine.paged import PagedEngine
from dejavu.kernels import native
from dejavu.kernels.processors import default_threads
from dejavu.model.counts import Counts
from dejavu.model.selectors import LayerAdapter
from dejavu.model.transformer import Transformer


class _Counted(NamedTuple):
    """What blocks of rows selected, int64, as dejavu_block has it: to be written by the library. rows: counts [B, L]."""

    rows: Counts
    union_NL: Tensor
    in_order_NL: Tensor

    @classmethod
    def room(cls, rows: int, layers: int, inputs_BLP: Tensor | None = None) -> _Counted:
        blocks = -(-rows // native.MAX_ROWS)
        neurons_BL, heads_BL = torch.empty(2, rows, layers, dtype=torch.int64).unbind(0)
        union_NL, in_order_NL = torch.empty(2, blocks, layers, dtype=torch.int64).unbind(0)
        return cls(Counts(neurons=neurons_BL, heads=heads_BL, kept_inputs=inputs_BLP), union_NL, in_order_NL)

    def block(self, first: int) -> _Counted:
        """Of the block that begins with row `first`."""
        number = first // native.MAX_ROWS
        if len(self.union_NL) == 1:  # the usual case: indexing takes a hundredth of a small model's token
            return _Counted(self.rows, self.union_NL[0], self.in_order_NL[0])
        return _Counted(self.rows[first : first + native.MAX_ROWS], self.union_NL[number], self.in_order_NL[number])


class NativeEngine(PagedEngine):
    """See `dejavu.engine.interface.Engine`; arguments as of TorchEngine.

    dtype: of the matrices: fp32, bf16, int8 per row, int4 per group. cache_dtype: of keys and values: fp32, fp16, int8 with a scale for
    each head and position. instruction_set: None takes the best. Raises ValueError where the library is missing or cannot run the model,
    MemoryError where the memory is not there, and ValueError from `prefill` and `step` where logits are not finite (the slots are then as
    they were before).
    """

    capabilities = NATIVE

    def __init__(
        self,
        model: Transformer,
        layers: Sequence[LayerAdapter] | None = None,
        options: EngineOptions = EngineOptions(),
        *,
        instruction_set: str | None = None,
    ) -> None:
        self.threads = default_threads() if options.threads is None else options.threads
        head_dim = -(-model.config.head_dim // native.HEAD_PAD) * native.HEAD_PAD
        super().__init__(model, layers, options, threads=self.threads, head_dim=head_dim)
        self._library = native.library()
        self._model = packed_model(model, "stored" if options.dtype == "auto" else options.dtype, layout_of(self.layers))
        self._info = dataclasses.replace(self._info, grids=self._model.grids)
        self._handle = ctypes.c_void_p()
        name = None if instruction_set is None else instruction_set.encode()
        native.check(self._library.dejavu_engine_new(self._model.handle, self.threads, native.MAX_ROWS, name, ctypes.byref(self._handle)))
        self._finalizer = weakref.finalize(self, self._library.dejavu_engine_free, self._handle)
        set_selectors(self._library, self._handle, self.layers, self._model, model)
        if options.screen is not None:
            screen = options.screen
            centroids = matrix_view("int8", screen.centroids, screen.bias_C)
            members, sizes = screen.members_V.contiguous(), screen.sizes_C.contiguous()
            native.check(
                self._library.dejavu_engine_screen(self._handle, centroids.matrix, members.data_ptr(), sizes.data_ptr(), screen.threshold)
            )

    def _prefill(self, slot: int, token_ids: Sequence[int], *, every: bool) -> Tensor:
        """In blocks."""
        start, count = self._cache.lengths[slot], len(token_ids)
        returned = count if every else 1
        logits_TV = torch.empty(returned, self.config.vocab_size)
        for first in range(0, count, native.MAX_ROWS):
            ids = token_ids[first : first + native.MAX_ROWS]
            positions = range(start + first, start + first + len(ids))
            skipped = min(len(ids), max(0, count - returned - first))
            rows_TV = logits_TV[max(0, first - count + returned) :]
            counts = _Counted.room(len(ids), self.config.num_layers)
            self._run(ids, [slot] * len(ids), positions, rows_TV, counts, first_logits=skipped, sparse=False, prompt=True, record=False)
        self._cache.advance(slot, count)
        return logits_TV if every else logits_TV[0]

    def profiled_step(self, token_ids_B: Sequence[int], slots_B: Sequence[int]) -> tuple[StepResult, StepProfile]:
        """As `step`, of at most MAX_ROWS rows, with what it took and read."""
        require(len(slots_B) <= native.MAX_ROWS, f"a profiled step has at most {native.MAX_ROWS} rows, not {len(slots_B)}")
        fired_L, groups_L = torch.zeros(2, self.config.num_layers, dtype=torch.int64).unbind(0)
        inputs_LP = self._input_counts()
        addresses = {"fired": fired_L, "groups": groups_L, "inputs": inputs_LP}
        profile = native.ProfileStruct(**{name: _address(counts) for name, counts in addresses.items()})
        self._admit_rows(token_ids_B, slots_B)
        result = self._step(token_ids_B, slots_B, sparse=True, record=self._record, profile=profile)
        seconds = dict(zip(native.OPS, profile.seconds, strict=True))
        assert result.union_L is not None
        read = Counts(neurons=result.union_L, heads=groups_L * self.config.heads_per_group, kept_inputs=inputs_LP)
        return result, StepProfile(seconds=seconds, counts=read, fired_L=fired_L)

    def read(self, values: Tensor) -> float:
        """The sum of fp32 values, read in order by the engine's threads: what reading memory costs them."""
        assert values.dtype == torch.float32 and values.is_contiguous() and values.device.type == "cpu"
        total = ctypes.c_double()
        native.check(self._library.dejavu_engine_read(self._handle, values.data_ptr(), values.numel(), total))
        return total.value

    def _step(
        self, token_ids_B: Sequence[int], slots_B: Sequence[int], *, sparse: bool, record: bool, full_head: bool = False,
        profile: native.ProfileStruct | None = None,
    ) -> StepResult:  # fmt: skip
        """In one call of the library for each MAX_ROWS rows."""
        batch = len(token_ids_B)
        logits_BV = torch.empty(batch, self.config.vocab_size)
        counts = _Counted.room(batch, self.config.num_layers, self._input_counts(batch))
        selections: list[tuple[LayerSelection, ...]] = []
        for first in range(0, batch, native.MAX_ROWS):
            rows = slice(first, first + native.MAX_ROWS)
            slots = slots_B[rows]
            positions = [self._cache.lengths[slot] for slot in slots]
            selections += self._run(
                token_ids_B[rows],
                slots,
                positions,
                logits_BV[rows],
                counts.block(first),
                sparse=sparse,
                record=record,
                full_head=full_head,
                profile=profile,
            )
        self._count_rows(slots_B)
        # Few numbers: Python adds them up in less time than a tensor's operation takes, and a token of a small model takes 0.4 ms.
        in_order_NL: list[list[int]] = counts.in_order_NL.tolist()
        in_order_L = [sum(of_layer) for of_layer in zip(*in_order_NL, strict=True)]
        return StepResult(
            logits_BV=logits_BV,
            counts=counts.rows,
            selections=tuple(selections) if record else None,
            union_L=counts.union_NL[0] if batch <= native.MAX_ROWS else None,
            fallback_layers=sum(2 * rows > batch * self.config.intermediate_size for rows in in_order_L),
        )

    def _input_counts(self, *rows: int) -> Tensor | None:
        """Room for counts of kept inputs [.., L, P]; None where no layer selects inputs."""
        points = self.info.input_points
        return None if points is None else torch.zeros(*rows, self.config.num_layers, len(points.sizes), dtype=torch.int64)

    def _run(
        self,
        token_ids: Sequence[int],
        slots: Sequence[int],
        positions: Sequence[int],
        logits_BV: Tensor,
        counts: _Counted,
        *,
        sparse: bool,
        record: bool,
        prompt: bool = False,
        full_head: bool = False,
        first_logits: int = 0,
        profile: native.ProfileStruct | None = None,
    ) -> list[tuple[LayerSelection, ...]]:
        """One call of the library: row r is token_ids[r] at positions[r] of slots[r]. The selections, when recording."""
        config, rows = self.config, len(token_ids)
        numbers = (ctypes.c_int64 * rows)(*token_ids), (ctypes.c_int64 * rows)(*positions)
        tables = (ctypes.c_void_p * rows)(*(self._cache.table_address(slot) for slot in slots))
        neuron_mask_BLF = torch.empty(rows, config.num_layers, config.intermediate_size, dtype=torch.uint8) if record else None
        points = self.info.input_points
        input_mask_BLI = torch.empty(rows, config.num_layers, sum(points.sizes), dtype=torch.uint8) if record and points else None
        group_mask_BLG = torch.empty(rows, config.num_layers, config.num_kv_heads, dtype=torch.uint8) if record else None
        block = native.BlockStruct(
            rows=rows,
            first_logits=first_logits,
            num_pages=self._cache.num_pages,
            page_size=self._cache.page_size,
            head_stride=self._cache.k_LPGSK.shape[-1],
            token=ctypes.addressof(numbers[0]),
            position=ctypes.addressof(numbers[1]),
            table=ctypes.addressof(tables),
            k_pool=self._cache.k_LPGSK.data_ptr(),
            v_pool=self._cache.v_LPGSK.data_ptr(),
            k_scale=_address(self._cache.k_scale_LPGS),
            v_scale=_address(self._cache.v_scale_LPGS),
            cache_dtype=native.DTYPE_CODES[self.info.cache_dtype],
            sparse=sparse,
            prompt=prompt,
            full_head=full_head,
            logits=logits_BV.data_ptr(),
            neurons=counts.rows.neurons.data_ptr(),
            heads=counts.rows.heads.data_ptr(),
            neuron_mask=_address(neuron_mask_BLF),
            group_mask=_address(group_mask_BLG),
            inputs=_address(counts.rows.kept_inputs),
            input_mask=_address(input_mask_BLI),
            unions=counts.union_NL.data_ptr(),
            in_order=counts.in_order_NL.data_ptr(),
        )
        if profile is None:
            native.check(self._library.dejavu_engine_run(self._handle, block))
        else:
            native.check(self._library.dejavu_engine_profile(self._handle, block, profile))
        if neuron_mask_BLF is None or group_mask_BLG is None:
            return []
        inputs_BLI = [None] * rows if input_mask_BLI is None else input_mask_BLI
        layers = self._layers_for(sparse)
        return [self._selections(layers, *masks) for masks in zip(neuron_mask_BLF, group_mask_BLG, inputs_BLI, strict=True)]

    def _selections(
        self, layers: Sequence[LayerAdapter], neurons_LF: Tensor, groups_LG: Tensor, inputs_LI: Tensor | None
    ) -> tuple[LayerSelection, ...]:
        heads_LH = groups_LG.repeat_interleave(self.config.heads_per_group, 1)
        return tuple(
            LayerSelection(
                neurons_A=neurons_LF[index].nonzero().squeeze(1) if layer.neurons.selects else None,
                heads_A=heads_LH[index].nonzero().squeeze(1) if layer.heads.selects else None,
                inputs_P=None if inputs_LI is None else kept_inputs(layer.inputs, inputs_LI[index], self.info.input_points),
            )
            for index, layer in enumerate(layers)
        )


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
