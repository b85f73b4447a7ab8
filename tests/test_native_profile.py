"""What a profiled step of the native engine says it took and read, and the sequential read that is held against it."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from conftest import Tiny
from dejavu.engine.native.engine import NativeEngine
from dejavu.kernels import native
from dejavu.model.masked import MaskedSelection
from dejavu.model.selectors import LayerAdapter
from dejavu.model.transformer import LayerInputs
from helpers.engines import ids_of, random_layers
from helpers.native import ISAS, engine_of, needs_library

ROWS, PROMPT = 3, 5


class FiredRecorder(MaskedSelection):
    """By layer, which neurons of the last token were selected [F], and which of them were not zero."""

    def __init__(self, layers: tuple[LayerAdapter, ...]) -> None:
        super().__init__(layers)
        self.selected: list[Tensor] = []
        self.fired: list[Tensor] = []

    def neurons(self, layer: int, inputs: LayerInputs, act_BTF: Tensor) -> Tensor:
        kept = super().neurons(layer, inputs, act_BTF)
        self.selected.append(super().neurons(layer, inputs, torch.ones_like(act_BTF))[0, -1] != 0)
        self.fired.append(kept[0, -1] != 0)
        return kept


@needs_library
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("family", "mlp", "heads"), [("opt", 1, None), ("opt", 0, 0), ("llama", 1, 1), ("opt", None, None)])
def test_the_counts_are_those_of_the_definition(tiny: Tiny, family: str, mlp: int | None, heads: int | None, threads: int) -> None:
    """Unions over rows of what a masked forward pass selects and finds not zero, and the same logits as without a profile."""
    model = tiny(family)
    layers = random_layers(model, mlp=mlp, heads=heads)
    engine, plain = (engine_of(model, layers, num_slots=ROWS, record=True, threads=threads) for _ in range(2))
    sequences = [ids_of(40 + row, PROMPT + 4) for row in range(ROWS)]
    for slot, ids in enumerate(sequences):
        engine.prefill(slot, ids[:1])
        plain.prefill(slot, ids[:1])
    for step in range(1, PROMPT + 4):
        tokens, slots = [ids[step] for ids in sequences], list(range(ROWS))
        result, profile = engine.profiled_step(tokens, slots)
        expected = plain.step(tokens, slots)
        assert torch.equal(result.logits_BV, expected.logits_BV) and torch.equal(result.counts.neurons, expected.counts.neurons)
        recorders = [FiredRecorder(layers) for _ in sequences]
        # The reference masks every token, the prompt too, so what fired is compared in layer 0, whose inputs do not depend on that.
        for recorder, ids in zip(recorders, sequences, strict=True):
            model(torch.tensor([ids[: step + 1]]), recorder)
        assert result.selections is not None
        for layer in range(model.config.num_layers):
            chosen = [row[layer] for row in result.selections]
            unions = []
            for name, total in (("neurons_A", model.config.intermediate_size), ("heads_A", model.config.num_heads)):
                found = [getattr(each, name) for each in chosen]
                unions.append(total if found[0] is None else len(set(torch.cat(found).tolist())))
            assert [profile.counts.neurons[layer], profile.counts.heads[layer]] == unions
        fired = torch.stack([recorder.fired[0] for recorder in recorders]).any(0)
        if mlp is None:
            assert profile.fired_L.tolist() == [model.config.intermediate_size] * 2, "a dense layer reads every row of down"
        elif family == "opt":
            assert int(profile.fired_L[0]) == int(fired.sum()) < int(profile.counts.neurons[0])
        else:
            assert torch.equal(profile.fired_L, profile.counts.neurons), "SiLU is never exactly zero"


@needs_library
@pytest.mark.parametrize(("heavy", "sizes"), [("mlp", {"intermediate_size": 9001}), ("head", {"vocab_size": 30011})])
def test_the_seconds_belong_to_their_op(tiny: Tiny, heavy: str, sizes: dict[str, int]) -> None:
    """The op that has nearly all of the weights takes most of the time, and all of them no more than the call."""
    engine = engine_of(tiny("opt", **sizes), threads=1)
    totals = dict.fromkeys(native.OPS, 0.0)
    start = time.perf_counter()
    for token in ids_of(1, 12):
        for op, seconds in engine.profiled_step([token], [0])[1].seconds.items():
            assert seconds >= 0
            totals[op] += seconds
    assert sum(totals.values()) < time.perf_counter() - start
    assert totals[heavy] > 0.5 * sum(totals.values())


@needs_library
def test_a_predictor_takes_time_only_where_there_is_one(tiny: Tiny) -> None:
    model = tiny("opt", intermediate_size=4001)
    dense, sparse = (engine_of(model, layers, threads=1) for layers in (None, random_layers(model, mlp=1, heads=0, threshold=1e9)))
    ids = ids_of(2, 12)
    dense_s, sparse_s = (sum(engine.profiled_step([token], [0])[1].seconds["predictor"] for token in ids) for engine in (dense, sparse))
    assert sparse_s > 5 * dense_s


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_read_reads_everything_and_no_more(tiny: Tiny, isa: str, threads: int) -> None:
    engine: NativeEngine = engine_of(tiny("opt"), threads=threads, instruction_set=isa)
    for count in (0, 1, 7, 1000, 200_003):
        values = torch.full((count + 2,), torch.nan)
        values[1:-1] = (torch.arange(count) % 8).float()
        assert engine.read(values[1:-1]) == int((torch.arange(count) % 8).sum())


@needs_library
def test_a_profile_of_too_many_rows_is_refused(tiny: Tiny) -> None:
    engine = engine_of(tiny("opt"), num_slots=33)
    with pytest.raises(ValueError, match="at most 32 rows, not 33"):
        engine.profiled_step([1] * 33, list(range(33)))
