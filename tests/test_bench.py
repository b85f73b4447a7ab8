"""The benchmark's loop: what is checked before it times, what its rows and ratios say, and how other programs take part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import dejavu.bench.variants as variants_module
from conftest import Tiny
from dejavu.bench.bytes_read import Reads, formats_of, step_bytes, weight_bytes
from dejavu.bench.decode import TURN, bench, ratios_of
from dejavu.bench.memory import buffer_bytes
from dejavu.bench.rows import SpeedRow
from dejavu.bench.variants import DENSE_VARIANT, Peer, Variant, check_mode, export_name
from dejavu.engine.backends import make_engine
from dejavu.engine.interface import Engine, StepResult
from dejavu.engine.native.engine import NativeEngine
from dejavu.engine.options import EngineOptions
from dejavu.model.counts import Counts
from dejavu.model.selectors.dense import ALL_HEADS, ALL_NEURONS
from dejavu.model.transformer import Transformer
from helpers.cuda import cuda_engine_of
from helpers.engines import ids_of, random_layers
from helpers.native import needs_library
from helpers.peers import FakeClock, FakePeer
from helpers.standins import GPU_NAME, CudaStandIn

IDS = ids_of(7, 60)
SIZES: dict[str, Any] = {"name": "tiny", "options": EngineOptions(backend="torch"), "context": 9, "steps": 7}


def variants(model: Transformer) -> list[Variant]:
    return [DENSE_VARIANT, Variant(mode="sparse", layers=random_layers(model, mlp=1, heads=None))]


def test_a_peer_takes_turns_on_the_same_tokens(tiny: Tiny) -> None:
    """Its rows, its share of the clock to the microsecond, the same prompt and tokens as ours, ratios against it."""
    model = tiny("opt")
    peer: Peer = FakePeer(model)
    assert isinstance(peer, FakePeer)
    peer.clock = FakeClock()
    found = bench(model, variants(model), IDS, **SIZES, peers=[peer], clock=peer.clock)
    rows = {(row.op, row.mode): row for row in found.rows}
    assert [key for key in rows if key[1] == "transformers"] == [("prefill", "transformers"), ("decode", "transformers")]
    prefill, decode = rows["prefill", "transformers"], rows["decode", "transformers"]
    assert (prefill.p20_us, prefill.p80_us) == pytest.approx((500_001, 500_001)) and prefill.tok_s == pytest.approx(9 / 0.500001)
    assert (decode.p20_us, decode.p80_us) == pytest.approx((250_001, 250_001)) and decode.tok_s == pytest.approx(1 / 0.250001)
    assert (decode.backend, decode.model, decode.dtype, decode.layers) == ("transformers", "tiny", "fp32", 2)
    assert decode.gbs is None and decode.pct_ceiling is None
    # 7 steps are three turns of one that does not count and three that do, once to warm up and once timed.
    assert peer.requested[8:] == [IDS[: 9 + step + 1] for _ in range(2) for step in range(3 * TURN)]
    own = rows["decode", "dense"]
    assert own.p50_us == pytest.approx(1), "a fake clock stands still while we compute"
    assert own.tok_s is not None and decode.tok_s is not None
    against = [each for each in found.ratios if each["against"] == "transformers"]
    assert [each["mode"] for each in against] == ["dense", "sparse"]
    assert against[0]["ratio"] == pytest.approx(own.tok_s / decode.tok_s) and against[0]["against_dtype"] == "fp32"
    assert [each["mode"] for each in found.ratios if each["against"] == "dense"] == ["sparse"]
    assert found.notes == ["transformers fp32 picks the same next token as tiny dense after 60 of 60 tokens"]


def test_two_peers_of_one_name_have_a_row_each(tiny: Tiny) -> None:
    model = tiny("opt")
    peers = [FakePeer(model, mode="llama.cpp", dtype=dtype) for dtype in ("q4_0", "q8_0")]
    found = bench(model, [DENSE_VARIANT], IDS, **SIZES, peers=peers)
    assert [row.dtype for row in found.rows if (row.op, row.mode) == ("decode", "llama.cpp")] == ["q4_0", "q8_0"]
    assert [each["against_dtype"] for each in found.ratios] == ["q4_0", "q8_0"]


@pytest.mark.parametrize(
    ("dtype", "error", "fails"), [("fp32", 0.0, False), ("fp32", 0.1, True), ("int8", 0.1, False), ("int8", 0.5, True)]
)
def test_a_peer_with_other_logits_is_not_timed(tiny: Tiny, dtype: str, error: float, fails: bool) -> None:
    model = tiny("opt")
    spread = float(model(torch.tensor([IDS[:16]])).std())
    peer = FakePeer(model, dtype=dtype, error=error * spread)
    if not fails:
        assert bench(model, [DENSE_VARIANT], IDS, **SIZES, peers=[peer]).rows
        return
    with pytest.raises(ValueError, match="transformers decodes other logits than tiny dense .*not timed"):
        bench(model, [DENSE_VARIANT], IDS, **SIZES, peers=[peer])
    assert len(peer.requested) == 8, "the check, and nothing after it"


def test_a_peer_of_another_vocabulary_or_with_nan_is_not_timed(tiny: Tiny) -> None:
    model = tiny("opt")
    with pytest.raises(ValueError, match=r"transformers has logits \[8, 97\] where ours are \[8, 96\]: not timed"):
        bench(model, [DENSE_VARIANT], IDS, **SIZES, peers=[FakePeer(tiny("opt", vocab_size=97))])
    with pytest.raises(ValueError, match="error nan"):
        bench(model, [DENSE_VARIANT], IDS, **SIZES, peers=[FakePeer(model, error=float("nan"))])


def test_what_could_not_be_compared_is_said(tiny: Tiny) -> None:
    model = tiny("opt")
    silent, other = FakePeer(model), FakePeer(tiny("llama"), mode="llama.cpp", name="smol")
    silent.silent = True
    found = bench(model, [DENSE_VARIANT], IDS, **SIZES, peers=[silent, other])
    assert found.notes[0].startswith("transformers gives no logits") and found.notes[1].startswith("llama.cpp runs smol, another model")
    rows = {row.mode: row for row in found.rows if row.op == "decode"}
    assert (rows["llama.cpp"].model, rows["llama.cpp"].layers, rows["transformers"].layers) == ("smol", None, 2)
    batch = bench(model, [DENSE_VARIANT], IDS, **(SIZES | {"batch": 2}), peers=[silent])
    assert [row.mode for row in batch.rows if row.op == "decode"] == ["dense"]
    assert batch.notes == ["transformers decodes one sequence: not timed at batch 2"]


def test_an_exported_model_is_known_by_its_folder(tiny: Tiny) -> None:
    """It is ours under another name: checked, and its rows have our name."""
    model = tiny("opt")
    peer = FakePeer(model, name=export_name("owner/tiny"), error=9.0)
    with pytest.raises(ValueError, match="not timed"):
        bench(model, [DENSE_VARIANT], IDS, **(SIZES | {"name": "owner/tiny"}), peers=[peer])
    peer.error = 0.0
    found = bench(model, [DENSE_VARIANT], IDS, **(SIZES | {"name": "owner/tiny"}), peers=[peer])
    assert {row.model for row in found.rows} == {"owner/tiny"}


def test_an_engine_that_is_wrong_is_not_timed(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("opt")
    monkeypatch.setattr("dejavu.engine.torch_engine.sparse_mlp", lambda x_D, weights, idx_A: x_D)
    peer = FakePeer(model)
    with pytest.raises(ValueError, match="backend 'torch' decodes other logits than the forward pass .*not timed"):
        bench(model, variants(model), IDS, **SIZES, peers=[peer])
    assert peer.requested == []


class WrongInRow:
    """An engine one of whose rows has other logits."""

    def __init__(self, engine: Engine, row: int) -> None:
        self.engine, self.row, self.info, self.prefill = engine, row, engine.info, engine.prefill

    def step(self, token_ids_B: Sequence[int], slots_B: Sequence[int]) -> StepResult:
        found = self.engine.step(token_ids_B, slots_B)
        logits_BV = found.logits_BV.clone()
        logits_BV[self.row] += 10 * torch.arange(logits_BV.shape[1]).sin()
        return replace(found, logits_BV=logits_BV)


@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=needs_library), pytest.param("cuda", marks=pytest.mark.slow)])
@pytest.mark.parametrize("wrong", [0, 1, 3])
def test_a_step_of_several_rows_is_checked(tiny: Tiny, backend: str, wrong: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first rows and the last."""
    if backend == "cuda":
        pytest.importorskip("triton")
    model = tiny("llama", activation="relu")
    layers, options = random_layers(model, mlp=1, heads=1), EngineOptions(backend=backend)

    def made(model: Transformer, layers: Any, options: EngineOptions) -> Engine:
        if backend != "cuda":
            return make_engine(model, layers, options)
        return cuda_engine_of(model, layers, num_slots=options.num_slots, cache_tokens=options.cache_tokens)

    monkeypatch.setattr("dejavu.bench.variants.make_engine", made)
    check_mode(model, layers, IDS, options, 4)
    monkeypatch.setattr("dejavu.bench.variants.make_engine", lambda *given: WrongInRow(made(*given), wrong))
    with pytest.raises(ValueError, match=f"decodes other logits in row {wrong} of 4 than the forward pass .*not timed"):
        check_mode(model, layers, IDS, options, 4)


def test_layers_that_an_engine_runs_dense_are_checked_as_dense(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama", activation="relu")
    layers = random_layers(model, mlp=1, heads=1)
    ran = (replace(layers[0], neurons=ALL_NEURONS), replace(layers[1], heads=ALL_HEADS))
    forward = [variants_module._forward(model, each, IDS) for each in (layers, ran)]
    assert variants_module._error(*forward) > 0.02, "nothing to tell apart"
    monkeypatch.setattr("dejavu.bench.variants.make_engine", lambda model, layers, options: make_engine(model, ran, options))
    check_mode(model, layers, IDS, EngineOptions(backend="torch"), 3)


@needs_library
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_useful_bytes_are_those_of_what_the_timed_steps_selected(tiny: Tiny, batch: int) -> None:
    """gbs of a native row is step_bytes of the unions over the rows, counted here from recorded selections, over its median time."""
    model = tiny("llama", max_positions=64)
    chosen = random_layers(model, mlp=1, heads=1)
    found = bench(
        model, [DENSE_VARIANT, Variant(mode="sparse+heads", layers=chosen)], IDS,
        EngineOptions(backend="native", threads=2), name="tiny", batch=batch, context=5, steps=6,
    )  # fmt: skip
    engine = NativeEngine(model, chosen, EngineOptions(num_slots=batch, record=True, threads=2))
    needed = 5 + 2 * TURN
    rows = [[IDS[(row * 5 + t) % len(IDS)] for t in range(needed)] for row in range(batch)]
    for slot, ids in enumerate(rows):
        engine.prefill(slot, ids[:5])
    counted: list[Counts] = []
    cached: list[Tensor] = []
    union: list[float] = []
    for index in range(2 * TURN):
        step = engine.step([ids[5 + index] for ids in rows], list(range(batch)))
        if index % TURN == 0:
            continue
        assert step.selections is not None
        neurons_L, heads_L = (
            torch.tensor([len({int(i) for row in step.selections for i in getattr(row[layer], part)}) for layer in range(2)])
            for part in ("neurons_A", "heads_A")
        )
        counted.append(Counts(neurons=neurons_L, heads=heads_L))
        cached.append(step.counts.heads.sum(0) / 2 * (6 + index))
        union.append(float(neurons_L.double().mean()) / 64)
    counts = Counts.stack(counted).mean()
    cached_L = torch.stack(cached).double().mean(0).tolist()
    reads = Reads(rows=batch, counts=counts, fired_L=counts.neurons.tolist(), cached_L=cached_L)
    useful = step_bytes(model.config, formats_of(engine.info), reads, chosen)
    by_op = {row.op: row for row in found.rows if row.mode == "sparse+heads"}
    assert set(by_op) == {"decode", "predictor", "attention", "mlp", "head", "other"}
    for op, row in by_op.items():
        assert row.gbs is not None and row.p50_us is not None
        assert row.gbs * row.p50_us * 1e3 == pytest.approx(sum(useful.values()) if op == "decode" else useful[op])
        assert row.union_density == (None if batch == 1 else pytest.approx(sum(union) / len(union)))
    read = next(row for row in found.rows if row.op == "read")
    assert read.gbs is not None and read.p50_us is not None
    assert read.gbs * read.p50_us * 1e3 == pytest.approx(weight_bytes(model.config, formats_of(engine.info)), rel=1e-3)


def test_a_ratio_below_one_is_a_ratio() -> None:
    def row(mode: str, tok_s: float, **changes: Any) -> SpeedRow:
        values = {"op": "decode", "mode": mode, "backend": "torch", "model": "m", "layers": 2, "dtype": "fp32", "batch": 1, "context": 8}
        values |= {"peer": "backend" in changes, "sparse": mode == "sparse"}
        return SpeedRow.from_dict(values | {"threads": 1, "synthetic": False, "tok_s": tok_s} | changes)

    rows = [
        row("dense", 10.0),
        row("sparse", 5.0),
        row("ctranslate2", 20.0, backend="ctranslate2", dtype="int8"),
        row("dense", 7.0, batch=2),
    ]
    found = [(each["mode"], each["against"], each["batch"], each["ratio"]) for each in ratios_of(rows)]
    assert found == [("dense", "ctranslate2", 1, 0.5), ("sparse", "dense", 1, 0.5), ("sparse", "ctranslate2", 1, 0.25)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch must be at least 1, not 0"),
        ({"context": 0}, "context must be at least 1, not 0"),
        ({"steps": 4}, "steps must be at least 5, not 4"),
        ({"context": 60}, "context 60 and 7 steps need 72 positions, the model has 64"),
        ({"context": 50}, "the text has 60 tokens, the benchmark reads 62"),
    ],
)
def test_counts_that_cannot_be(tiny: Tiny, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench(tiny("opt"), [DENSE_VARIANT], IDS, **(SIZES | options))


@pytest.mark.parametrize("batch", [1, 3])
def test_the_cuda_backend(tiny: Tiny, cuda: type[CudaStandIn], batch: int) -> None:
    """Rows name the GPU and the graph's nodes; bytes are of the profile's counts; the engine reads the buffer; `ahead` reaches it."""
    model = tiny("opt", max_positions=64)
    chosen = random_layers(model, mlp=1, heads=1)
    peer = FakePeer(model)
    peer.device = "cuda:0"
    found = bench(
        model, [DENSE_VARIANT, Variant(mode="sparse+heads", layers=chosen)], IDS, peers=[peer],
        **(SIZES | {"options": EngineOptions(backend="cuda", ahead="in-line"), "batch": batch}),
    )  # fmt: skip
    assert all(options.ahead == "in-line" for options in cuda.made) and [options.record for options in cuda.made[2:]] == [False] * 2
    assert {row.device for row in found.rows} == {GPU_NAME} and {row.op for row in found.rows} == {"prefill", "read", "decode"}
    own = {row.mode: row for row in found.decodes}
    facts = {(row.mode, row.sparse, row.sparse_heads, row.ahead) for row in own.values()}
    assert facts == {("dense", False, False, None), ("sparse+heads in-line", True, True, "in-line")}
    assert {row.mode for row in found.rows if row.peer} == (set() if batch > 1 else {peer.mode})
    assert {(row.device_kind, row.cores) for row in found.rows} == {("gpu", None)}
    assert [row.nodes for row in own.values()] == [100 + batch] * 2
    assert set(cuda.buffers) == {2048} and any("over 0.00 GB instead of 1.07: 0.00 GB are free on cuda:0" in note for note in found.notes)
    # Half of the selected neurons' rows of down: fewer bytes than with all of them.
    sparse, dense = own["sparse+heads in-line"], own["dense"]
    assert sparse.gbs is not None and sparse.p50_us is not None and dense.gbs is not None and dense.p50_us is not None
    assert sparse.gbs * sparse.p50_us < dense.gbs * dense.p50_us
    assert (sparse.union_density is None) == (batch == 1)
    assert [row.nodes for row in found.rows if row.mode == "transformers"] == [None] * (2 if batch == 1 else 0)


def test_the_device_is_waited_for_around_every_run(tiny: Tiny, cuda: type[CudaStandIn], monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[int] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(1))
    model = tiny("opt")
    bench(model, [DENSE_VARIANT], IDS, **(SIZES | {"options": EngineOptions(backend="cuda")}), peers=[FakePeer(model)])
    # Prefills of two; steps of two to warm up; turns of two steps each of two and of the read: before and after each.
    assert len(waits) == 2 * (6 * 2 + 3 * TURN * 2 + 3 * TURN // 2 * 3)


@pytest.mark.parametrize(
    ("weights", "device", "free", "size"),
    [
        (1e6, "cpu", None, 1_000_000),
        (1e12, "cpu", None, 1 << 30),
        (1e6, "cuda:0", 80e9, 1 << 30),
        (2e9, "cuda:0", 80e9, 2_000_000_000),
        (1e12, "cuda:0", 80e9, 4 << 30),
        (1e12, "cuda:0", 2e9, 1_000_000_000),
    ],
)
def test_size_of_the_buffer(weights: float, device: str, free: float | None, size: int) -> None:
    found, note = buffer_bytes(weights, device, None if free is None else int(free))
    assert found == size and (note is not None) == (free == 2e9)
    assert note is None or note == "the read ceiling is over 1.00 GB instead of 4.29: 2.00 GB are free on cuda:0"


@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=needs_library)])
def test_layers_that_read_everything_are_named(tiny: Tiny, backend: str) -> None:
    """A mode that is called sparse and was not says so; one that left neurons out says nothing."""
    model = tiny("opt", max_positions=64)
    modes = {"all": random_layers(model, mlp=1, heads=None, threshold=-1e9), "some": random_layers(model, mlp=1, heads=None)}
    variants = [DENSE_VARIANT, *(Variant(mode=mode, layers=layers) for mode, layers in modes.items())]
    notes = bench(model, variants, IDS, **(SIZES | {"options": EngineOptions(backend=backend)})).notes
    assert [note for note in notes if "read every neuron" in note] == [
        "all at batch 1, context 9 read every neuron of 2 layers that select"
    ]
