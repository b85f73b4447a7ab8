"""Speed of decode, prefill and the parts of a decode step: our engines in every mode, and peers, in turns on the same tokens.

In: a model, variants of running it, token ids. Out: `Bench`: `SpeedRow`s, ratios of decode speed, notes. In order:

    check     each variant's and peer's logits against a (masked) forward pass; where they differ nothing is timed
    prefill   dense in every mode: the dense engine and the peers
    profile   every variant decodes the text once, each step telling what it read and, on the native engine, what its parts took;
              for the variants and the peers this is also the warm-up
    decode    the same tokens again, without a profile; a sequential read by the engine takes its turn in every round

A turn is TURN steps, the first SKIPPED of which find the caches full of what others read and do not count, in both passes. On a GPU
a turn of the timed pass is up to QUEUED steps, or reads, of which only the last is waited for, and a duration is its share.

A step's duration is that of the host's clock, from when all earlier work is done to when its own is, also on a GPU: latency.

Useful bytes are those of bytes_read.py for what the steps selected. The read ceiling is the median of the sequential reads, over
a buffer as large as the weights that a dense token reads, within the limits of memory.buffer_bytes.

Letters: B rows of a step  T tokens  L layers
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from dejavu.bench.bytes_read import Reads, attended, formats_of, read_share, step_bytes, weight_bytes
from dejavu.bench.facts import engine_facts, on_gpu, peer_facts, variant_facts
from dejavu.bench.graphs import node_count
from dejavu.bench.memory import buffer_bytes, sequential_buffer
from dejavu.bench.rows import Shape, SpeedRow
from dejavu.bench.timing import MIN_REPEATS, Work, nothing, percentiles, time_interleaved
from dejavu.bench.variants import Peer, Variant, check_mode, check_peer, runs_same
from dejavu.config import ModelConfig, Progress, require
from dejavu.engine.backends import make_engine
from dejavu.engine.interface import CapturesSteps, Engine, EngineInfo, ProfilesSteps, ReadsBuffers, StepProfile, StepResult
from dejavu.engine.options import EngineOptions
from dejavu.kernels.memory import free_gpu_bytes
from dejavu.model.counts import Counts
from dejavu.model.transformer import Transformer

TURN, SKIPPED = 4, 1  # steps of a turn, and how many of them do not count
USUAL_AHEAD = "beside"  # another way of looking ahead is part of a mode's name
QUEUED = 8  # steps of a turn on a GPU, in the pass that is timed
PREFILLS = 6  # the first one does not count
READ = "read"  # the sequential read among the decoders' turns


class Ratio(TypedDict):
    """How a speed of ours compares with dense or with a peer, of the same op, batch, context and new tokens; below 1: slower."""

    op: str
    mode: str
    dtype: str
    batch: int
    context: int
    new_tokens: int | None
    mlp_density: float | None
    head_density: float | None
    selection: str | None
    against: str
    against_dtype: str
    ratio: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What a benchmark found. ratios: tokens a second of `mode` over those of `against`."""

    rows: list[SpeedRow]
    ratios: list[Ratio]
    notes: list[str]

    @property
    def decodes(self) -> list[SpeedRow]:
        """The decode row of each variant, in their order."""
        return [row for row in self.rows if row.op == "decode" and not row.peer]


@dataclass
class _Steps:
    """What the steps of one variant selected and, where the engine profiles, took."""

    mlp: list[float] = field(default_factory=list)  # densities
    heads: list[float] = field(default_factory=list)
    union: list[float] = field(default_factory=list)
    counts: list[Counts] = field(default_factory=list)  # [L], and fired and cached [2, L]: those of bytes_read.Reads
    reads: list[Tensor] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def mean_reads(self, rows: int) -> Reads:
        fired_L, cached_L = torch.stack(self.reads).mean(0).tolist()
        return Reads(rows=rows, counts=Counts.stack(self.counts).mean(), fired_L=fired_L, cached_L=cached_L)


class _Decoder:
    """One variant's engine with its sequences, and what their steps selected and took."""

    def __init__(self, engine: Engine, variant: Variant, rows_BT: list[list[int]], context: int, config: ModelConfig) -> None:
        self.engine, self.variant, self.rows_BT, self.context, self.config = engine, variant, rows_BT, context, config
        self.slots = list(range(len(rows_BT)))
        self.steps = _Steps()

    def start(self) -> None:
        """Every sequence anew, up to the first step."""
        for slot, row in zip(self.slots, self.rows_BT, strict=True):
            self.engine.free(slot)
            self.engine.prefill(slot, row[: self.context])

    def _tokens(self, index: int) -> list[int]:
        return [row[self.context + index] for row in self.rows_BT]

    def step(self, index: int) -> StepResult:
        return self.engine.step(self._tokens(index), self.slots)

    def profiled_step(self, index: int) -> tuple[StepResult, StepProfile | None]:
        if isinstance(self.engine, ProfilesSteps):
            return self.engine.profiled_step(self._tokens(index), self.slots)
        return self.step(index), None

    def note(self, index: int, found: tuple[StepResult, StepProfile | None]) -> None:
        """Keep what a step selected and took, where it counts."""
        if index % TURN < SKIPPED:
            return
        (result, profile), info, steps = found, self.engine.info, self.steps
        if profile is None:
            counts = _unions(result, info)
            fired_L = counts.neurons  # such an engine reads the rows of down of all that it selected
        else:
            counts, fired_L = profile.counts, profile.fired_L
            for op, seconds in profile.seconds.items():
                steps.seconds.setdefault(op, []).append(seconds)
        seen_L = torch.tensor(attended(self.config, self.context + index + 1))
        cached_L = result.counts.heads.sum(0).cpu() / self.config.heads_per_group * seen_L
        steps.counts.append(counts.cpu())
        steps.reads.append(torch.stack([part.double().cpu() for part in (fired_L, cached_L)]))
        mlp_BL, heads_BL = result.counts.densities(info)
        steps.mlp.append(float(mlp_BL.mean()))
        steps.heads.append(float(heads_BL.mean()))
        steps.union.append(float(counts.neurons.double().mean()) / info.num_neurons)


def _unions(result: StepResult, info: EngineInfo) -> Counts:
    """Of the rows of a recorded step together."""
    assert result.selections is not None, "an engine without a profile must record"

    def union(chosen: Sequence[Tensor | None], total: int) -> int:
        found = [indices for indices in chosen if indices is not None]
        return total if len(found) < len(chosen) else int(torch.cat(found).unique().numel())

    layers = list(zip(*result.selections, strict=True))
    neurons_L = torch.tensor([union([row.neurons_A for row in rows], info.num_neurons) for rows in layers])
    heads_L = torch.tensor([union([row.heads_A for row in rows], info.num_heads) for rows in layers])
    if info.input_points is None:
        return Counts(neurons=neurons_L, heads=heads_L)
    sizes = list(enumerate(info.input_points.sizes))
    inputs_LP = [[union([row.inputs_P[at] if row.inputs_P else None for row in rows], size) for at, size in sizes] for rows in layers]
    return Counts(neurons=neurons_L, heads=heads_L, kept_inputs=torch.tensor(inputs_LP))


def bench(
    model: Transformer,
    variants: Sequence[Variant],
    ids: Sequence[int],
    options: EngineOptions,
    *,
    name: str,
    adapter: str | None = None,
    batch: int = 1,
    context: int = 128,
    steps: int = 32,
    shape: Shape | None = None,
    peers: Sequence[Peer] = (),
    clock: Callable[[], float] = time.perf_counter,
    progress: Progress | None = None,
) -> Bench:
    """Rows of prefill, of decode in every variant (the first of which is dense), of its parts (native engine), and of peers.

    ids: a text with room for context and steps, of which row b of the batch reads its own stretch. steps: decode steps that
    count, rounded up to whole turns. For the rows: adapter, the digest of the one that the variants come from; shape, that of a made-up
    model. options: of the engines, which have slots and cache as the batch needs them. peers: decode one sequence, so they are left out,
    with a note, where batch is not 1. Raises ValueError for a count that is not positive, too few steps, a context that leaves no room
    for the steps, and a decoder that fails its check.
    """
    limit, needed = model.config.max_positions, context + -(-steps // (TURN - SKIPPED)) * TURN
    for what, value in (("batch", batch), ("context", context)):
        require(value >= 1, f"{what} must be at least 1, not {value}")
    require(steps >= MIN_REPEATS, f"steps must be at least {MIN_REPEATS}, not {steps}: fewer do not tell a median from noise")
    require(needed <= limit, f"context {context} and {steps} steps need {needed} positions, the model has {limit}; lower one of them")
    require(len(ids) >= needed, f"the text has {len(ids)} tokens, the benchmark reads {needed}; give a longer text")
    assert variants and variants[0].layers is None, "the first variant is dense: the others are compared with it"
    notes = [f"{peer.mode} decodes one sequence: not timed at batch {batch}" for peer in peers if batch != 1]
    peers = peers if batch == 1 else ()
    variants = named_ahead(variants, options.ahead)
    for variant in variants:
        check_mode(model, variant.layers, ids, variant.options(options), batch)
    notes += _check_peers(peers, model, ids, name)
    rows_BT = [[ids[(row * context + t) % len(ids)] for t in range(needed)] for row in range(batch)]

    def decoder_of(variant: Variant) -> _Decoder:
        # torch keeps its lists anyway, so that recording them costs nothing; the others tell unions in their profile.
        record, tokens = options.backend not in ("native", "cuda"), batch * (needed + 64)
        engine = make_engine(
            model, variant.layers, dataclasses.replace(variant.options(options), num_slots=batch, cache_tokens=tokens, record=record)
        )
        return _Decoder(engine, variant, rows_BT, context, model.config)

    decoders = [decoder_of(variant) for variant in variants]
    run = _DecodeRun(model, decoders, peers, name=name, shape=shape, adapter=adapter, ahead=options.ahead)
    run.time(clock, progress)
    run.say_dense()
    rows = run.rows()
    return Bench(rows=rows, ratios=ratios_of(rows), notes=notes + run.notes)


def named_ahead(variants: Sequence[Variant], ahead: str | None) -> Sequence[Variant]:
    """The variants, of which those that select have another way of looking ahead than the usual one in their mode."""
    if ahead in (None, USUAL_AHEAD):
        return variants
    return [each if each.layers is None else dataclasses.replace(each, mode=f"{each.mode} {ahead}") for each in variants]


def _check_peers(peers: Sequence[Peer], model: Transformer, ids: Sequence[int], name: str) -> list[str]:
    notes = []
    for peer in peers:
        if runs_same(peer, name):
            notes.append(check_peer(peer, model, ids, name))
        else:
            notes.append(f"{peer.mode} runs {peer.model}, another model than {name}: its logits were not compared with ours")
    return notes


class _DecodeRun:
    """The turns of one batch and context, and the rows that come of them. Times are kept by who took the turn."""

    def __init__(
        self, model: Transformer, decoders: list[_Decoder], peers: Sequence[Peer], *,
        name: str, shape: Shape | None, adapter: str | None, ahead: str | None,
    ) -> None:  # fmt: skip
        self.config, self.decoders = model.config, decoders
        self.peers = {f"peer {index}": peer for index, peer in enumerate(peers)}
        self.name, self.shape, self.adapter = name, shape, adapter
        self.dense, self.info = decoders[0].engine, decoders[0].engine.info
        self.ahead = (ahead or USUAL_AHEAD) if self.info.backend == "cuda" else None
        self.batch, self.context = len(decoders[0].rows_BT), decoders[0].context
        self.formats = formats_of(self.info)
        device = self.info.device
        size, note = buffer_bytes(weight_bytes(self.config, self.formats), device, free_gpu_bytes(device))
        self.buffer = sequential_buffer(size // 4, device)
        self.notes = [] if note is None else [note]
        self.prefill: dict[Any, list[float]] = {}
        self.decode: dict[Any, list[float]] = {}

    def time(self, clock: Callable[[], float], progress: Progress | None) -> None:
        row = self.decoders[0].rows_BT[0]
        prompt, tokens = row[: self.context], row[self.context :]
        sync = torch.cuda.synchronize if on_gpu(self.info.device) else nothing  # a peer on the CPU has nothing to wait for

        def steps(works: dict[Any, Work], what: str) -> dict[Any, list[float]]:
            rounds = len(tokens) // TURN
            return time_interleaved(works, rounds, runs=TURN, skipped=SKIPPED, clock=clock, progress=progress, name=what)

        def start() -> None:
            for decoder in self.decoders:
                decoder.start()
            for peer in self.peers.values():
                peer.prefill(prompt)

        prefills = {key: Work(run=lambda _, peer=peer: peer.prefill(prompt), sync=sync) for key, peer in self.peers.items()}
        own = Work(run=lambda _: self.dense.prefill(0, prompt), sync=sync, done=lambda *_: self.dense.free(0))
        found = time_interleaved({self.decoders[0]: own, **prefills}, PREFILLS, clock=clock, progress=progress, name="prefills")
        self.prefill = {key: seconds[1:] for key, seconds in found.items()}
        peers = {key: Work(run=lambda index, peer=peer: peer.step(tokens[index]), sync=sync) for key, peer in self.peers.items()}
        profiled = {decoder: Work(run=decoder.profiled_step, sync=sync, done=decoder.note) for decoder in self.decoders}
        start()
        steps({**profiled, **peers}, "warm-up and profile")
        timed = {decoder: decoder.step for decoder in self.decoders}
        read = {READ: lambda _: _read(self.dense, self.buffer)}
        start()
        if not on_gpu(self.info.device):
            alone = {key: Work(run=run, sync=sync) for key, run in {**timed, **read}.items()}
            self.decode = steps({**alone, **peers}, "decode steps")
            return
        # The steps of a turn wait in the device's queue, as they do where it draws the tokens itself: the host's part overlaps with them.
        queued = max(1, min(QUEUED, len(tokens) // MIN_REPEATS))
        stepped = {key: lambda index, peer=peer: peer.step(tokens[index]) for key, peer in self.peers.items()}
        works = {key: Work(run=_repeated(run, queued), sync=sync) for key, run in {**timed, **read, **stepped}.items()}
        found = time_interleaved(works, len(tokens) // queued, clock=clock, progress=progress, name="decode steps")
        self.decode = {key: [each / queued for each in seconds] for key, seconds in found.items()}

    def say_dense(self) -> None:
        """Note which modes ran layers dense that select neurons: an engine may, where that is faster."""
        for decoder in self.decoders:
            ran = [float(neurons) == self.info.num_neurons for neurons in decoder.steps.mean_reads(self.batch).counts.neurons]
            selects = [layer.neurons.selects for layer in decoder.variant.layers or ()]
            dense = sum(all_read and selected for all_read, selected in zip(ran, selects, strict=False))
            if dense:
                where = f"at batch {self.batch}, context {self.context}"
                self.notes.append(f"{decoder.variant.mode} {where} read every neuron of {dense} layers that select")

    def rows(self) -> list[SpeedRow]:
        prefill = [self._row("prefill", self.prefill[self.decoders[0]], tokens=self.context, batch=1)]
        prefill += [self._of_peer("prefill", peer, self.prefill[key], self.context) for key, peer in self.peers.items()]
        read = self._row(READ, self.decode[READ], useful=self.buffer.nbytes)
        decode = [row for decoder in self.decoders for row in self._of_decoder(decoder)]
        return [*prefill, read, *decode, *(self._of_peer("decode", peer, self.decode[key], 1) for key, peer in self.peers.items())]

    def _row(self, op: str, seconds: list[float], *, tokens: int | None = None, useful: float | None = None, **values: Any) -> SpeedRow:
        p20, p50, p80 = percentiles(seconds)
        speed = None if useful is None else useful * 1e6 / p50
        ceiling = self.buffer.nbytes / float(np.median(self.decode[READ]))
        own = engine_facts(self.info, self.config, name=self.name, shape=self.shape) | {"batch": self.batch, "read_share": 1.0}
        own |= {"op": op, "context": self.context, "p20_us": p20, "p50_us": p50, "p80_us": p80}
        own |= {
            "tok_s": None if tokens is None else tokens * 1e6 / p50,
            "gbs": None if speed is None else speed / 1e9,
            "pct_ceiling": None if speed is None else 100 * speed / ceiling,
        }
        return SpeedRow.from_dict(own | values)

    def _of_decoder(self, decoder: _Decoder) -> list[SpeedRow]:
        held, variant = decoder.steps, decoder.variant
        reads = held.mean_reads(self.batch)
        formats = dataclasses.replace(self.formats, screen=variant.screen)
        useful = step_bytes(self.config, formats, reads, variant.layers)
        values: dict[str, Any] = {
            **variant_facts(variant, adapter=self.adapter, ahead=self.ahead),
            "read_share": read_share(self.config, formats, reads, variant.layers),
            "mlp_density": float(np.mean(held.mlp)),
            "head_density": float(np.mean(held.heads)),
            "union_density": float(np.mean(held.union)) if self.batch > 1 else None,
        }
        graph = decoder.engine.graph(self.batch) if isinstance(decoder.engine, CapturesSteps) else None
        nodes = None if graph is None else node_count(graph)
        whole = self._row("decode", self.decode[decoder], tokens=self.batch, useful=sum(useful.values()), nodes=nodes, **values)
        # An op that reads nothing (a dense model's predictor) is none.
        return [whole, *(self._row(op, held.seconds[op], useful=useful[op], **values) for op in held.seconds if useful[op] > 0)]

    def _of_peer(self, op: str, peer: Peer, seconds: list[float], tokens: int) -> SpeedRow:
        return self._row(op, seconds, tokens=tokens, **peer_facts(peer, name=self.name))


def ratios_of(rows: Sequence[SpeedRow], *, ops: Sequence[str] = ("decode",)) -> list[Ratio]:
    """How speeds of these ops compare: every sparse row with dense, and every row of ours with each peer; below 1 is slower."""
    timed = [row for row in rows if row.op in ops]
    others = [row for row in timed if row.peer or row.dense]
    return [
        Ratio(
            op=row.op, mode=row.mode, dtype=row.dtype, batch=row.batch, context=row.context, new_tokens=row.new_tokens,
            mlp_density=row.mlp_density, head_density=row.head_density, selection=row.selection, against=other.mode,
            against_dtype=other.dtype, ratio=row.speed / other.speed,
        )
        for row in timed if not row.peer
        for other in others if other is not row and _measured_of(other) == _measured_of(row)
    ]  # fmt: skip


def _measured_of(row: SpeedRow) -> tuple[str, int, int, int | None]:
    return row.op, row.batch, row.context, row.new_tokens


def _repeated(run: Callable[[int], Any], times: int) -> Callable[[int], None]:
    """Turn `index` of so many runs, one behind the other."""

    def run_turn(index: int) -> None:
        for number in range(index * times, (index + 1) * times):
            run(number)

    return run_turn


def _read(engine: Engine, buffer: Tensor) -> object:
    """Read the buffer once, as the engine does it: with the library's threads, the GPU's best kernel, or torch's sum."""
    return engine.read(buffer) if isinstance(engine, ReadsBuffers) else float(buffer.sum())
