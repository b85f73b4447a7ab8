"""The runs of `dejavu bench`, one for each batch and context, its prompts and requests, its perplexities, and what they show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from dejavu.cli.output import Output, new_table, number, ratio, screen_line
from dejavu.cli.subjects import Subject, planted_qualities, quality_line
from dejavu.config import Progress

if TYPE_CHECKING:
    from dejavu.bench.comparison import Passage
    from dejavu.bench.decode import Bench
    from dejavu.bench.requests import Request
    from dejavu.bench.rows import QualityRow, SpeedRow
    from dejavu.bench.variants import Peer, Variant
    from dejavu.figures import HeadAgreement

DEFAULT_CONTEXT = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """At what to measure. contexts: none for the usual one. requests: whole ones, and prompts; usual: those that have no room are left out
    with a note. ops: single ops too, at these selections. seed: of their data. texts: of which perplexity is measured, by name, the first
    text_tokens of each (0: it is not); text_usual: where it cannot be measured a note says so."""

    dense: bool
    head_densities: Sequence[float]
    batches: Sequence[int]
    contexts: Sequence[int]
    steps: int
    requests: Sequence[Request] = ()
    usual: bool = False
    texts: Mapping[str, str] = field(default_factory=dict)
    text_tokens: int = 0
    text_usual: bool = False
    ops: bool = False
    op_selections: Sequence[str] = ()
    seed: int = 0


@dataclass(slots=True)
class Found:
    """What was measured: runs by title, the last of them of requests, rows of single ops, perplexities, what planted predictors miss, the
    screened head's agreement, and what is to be said of them."""

    runs: list[tuple[str, Bench]] = field(default_factory=list)
    qualities: list[QualityRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    op_rows: list[SpeedRow] = field(default_factory=list)
    planted: list[dict[str, Any]] = field(default_factory=list)
    screen: HeadAgreement | None = None

    @property
    def rows(self) -> list[SpeedRow]:
        return [row for _, measured in self.runs for row in measured.rows] + self.op_rows


def measure(subject: Subject, plan: Plan, peers: Sequence[Peer], out: Output, progress: Progress | None) -> Found:
    """Every run. Planted predictors say what they miss before any speed is measured."""
    from dejavu.bench.decode import bench
    from dejavu.bench.requests import bench_requests
    from dejavu.bench.variants import variants_at
    from dejavu.quality.head_agreement import head_agreement

    variants = variants_at(
        subject.model,
        subject.layers_for if not plan.dense else lambda *_: None,
        subject.ids,
        densities=subject.densities,
        head_densities=plan.head_densities,
        selections=subject.selections,
        inputs_alike=subject.synthetic,
        screen=subject.screen,
    )
    found = Found()
    requests, passage = _requests_with_room(subject, plan, found.notes), _passage(subject, plan, found.notes)
    for mode, quality in planted_qualities(subject, variants):
        out.say(quality_line(mode, quality))
        found.planted.append({"mode": mode, **asdict(quality)})
    held = None if subject.lm is None or subject.densities or plan.head_densities else subject.lm.adapter
    adapter = None if held is None else held.digest
    for length in plan.contexts or [min(DEFAULT_CONTEXT, subject.model.config.max_positions // 2)]:
        for size in plan.batches or [1]:
            measured = bench(
                subject.model, variants, subject.ids, subject.options, name=subject.name, shape=subject.shape, batch=size, context=length,
                steps=plan.steps, peers=peers, adapter=adapter, progress=progress,
            )  # fmt: skip
            found.runs.append((f"batch {size}, context {length}", measured))
            if plan.ops:
                found.op_rows += _op_rows(subject, plan, measured, plan.seed, progress)
    if requests:
        measured = bench_requests(
            subject.model, variants, subject.ids, subject.options, name=subject.name, requests=requests, adapter=adapter,
            shape=subject.shape, peers=peers, progress=progress,
        )  # fmt: skip
        found.runs.append(("prompts and whole requests", measured))
    if passage is not None:
        found.qualities = _qualities(passage, subject, variants, peers, adapter, found.notes)
    if subject.screen is not None:  # in the last of the variants: with the predictors, where there are any
        last = variants[-1]
        found.screen = head_agreement(subject.model, last.layers, subject.ids, last.options(subject.options), progress=progress)
    return found


def _requests_with_room(subject: Subject, plan: Plan, notes: list[str]) -> list[Request]:
    """Those of the plan; notes gain which of the usual ones have no room. Raises ValueError for one that was asked for."""
    from dejavu.bench.requests import fits
    from dejavu.config import require

    reasons = {request: fits(request, subject.model.config, subject.ids) for request in plan.requests}
    found = [reason for reason in reasons.values() if reason is not None]
    require(plan.usual or not found, "".join(found[:1]))
    notes += [f"{reason}: not timed" for reason in found]
    return [request for request, reason in reasons.items() if reason is None]


def _passage(subject: Subject, plan: Plan, notes: list[str]) -> Passage | None:
    """What perplexity is measured on; None where it is not, and where nobody asked for it notes say why."""
    from dejavu.bench.comparison import Passage

    if not plan.text_tokens:
        return None
    lm = subject.lm
    assert lm is not None, "a made-up model has no perplexity"
    try:
        return Passage.of_texts(plan.texts, lm.tokenizer, max_tokens=plan.text_tokens, positions=lm.config.max_positions)
    except ValueError as error:
        if not plan.text_usual:
            raise
        notes.append(f"no perplexity was measured: {error}")
        return None


def _qualities(
    passage: Passage, subject: Subject, variants: Sequence[Variant], peers: Sequence[Peer], adapter: str | None, notes: list[str]
) -> list[QualityRow]:
    """Perplexity of every mode that was timed and of the peers, on the same windows. It is that of the full head, so that modes which
    differ in a screened head alone are one: what that misses is `screen`."""
    from dejavu.bench.comparison import own_quality, peer_quality

    lm = subject.lm
    assert lm is not None, "a made-up model has no perplexity"
    named = {"name": lm.name, "backend": lm.backend, "dtype": lm.dtype, "cache_dtype": lm.cache_dtype, "adapter": adapter}
    layers = {id(variant.layers): variant.layers for variant in variants}
    found = [own_quality(subject.model, each, passage, **named) for each in layers.values()]
    for peer in peers:
        row = peer_quality(peer, passage, vocab_size=lm.config.vocab_size)
        if row is None:
            notes.append(f"{peer.mode} {peer.dtype} tells no logits of this vocabulary: its perplexity is not known")
        else:
            found.append(row)
    return found


def _op_rows(subject: Subject, plan: Plan, measured: Bench, seed: int, progress: Progress | None) -> list[SpeedRow]:
    """Rows of single ops at the batch of a run."""
    from dejavu.bench.models.random import SELECTIONS
    from dejavu.bench.ops import bench_ops
    from dejavu.bench.ops_cuda import cuda_ops

    decode = next(row for row in measured.rows if row.op == "decode")
    ops_at, read = cuda_ops(subject.model, batch=decode.batch, seed=seed)
    return bench_ops(ops_at, read=read, template=decode, selections=plan.op_selections or SELECTIONS, device="cuda", progress=progress)


def show(out: Output, subject: Subject, found: Found, peers: Sequence[dict[str, Any]], notes: Sequence[str]) -> None:
    """Tables, ratios, peers and notes."""
    for title, measured in found.runs:
        _show_run(out, f"Speed of {subject.name}{' (synthetic)' if subject.synthetic else ''}: {title}", measured)
    if found.qualities:
        _show_qualities(out, found.qualities)
    if found.op_rows:
        _show_ops(out, f"Single ops of {subject.name}", found.op_rows)
    for each in peers:
        line = "peer {mode} {version} · {dtype} · threads: {threads} · {model}".format(**each)
        out.show(escape(line))
    if found.screen is not None:
        out.show(screen_line(found.screen))
    for note in notes:
        out.say(f"note: {note}")


def _show_run(out: Output, title: str, measured: Bench) -> None:
    """The rows as a table, and how their speeds compare."""
    union = any(row.union_density is not None for row in measured.rows)
    nodes = any(row.nodes is not None for row in measured.rows)
    apart = len({(row.context, row.new_tokens) for row in measured.rows}) > 1
    densities = ("MLP", "heads", *(("union",) if union else ()))
    times = ("p20 µs", "p50 µs", "p80 µs", "tok/s", "GB/s", "% of read", *(("nodes",) if nodes else ()))
    table = new_table(escape(title), "op", "mode", *densities, *times, left=2)
    for row in measured.rows:
        mode = ", ".join(part for part in (row.mode, row.selection, row.dtype if row.peer else None) if part is not None)
        cells = [number(row.mlp_density), number(row.head_density), *((number(row.union_density),) if union else ())]
        cells += [number(value, ",.0f") for value in (row.p20_us, row.p50_us, row.p80_us)]
        cells += [number(row.tok_s, ",.1f"), number(row.gbs, ".1f"), number(row.pct_ceiling, ".0f")]
        op = row.op if row.op not in ("prefill", "request") or not apart else f"{row.op} {_tokens(row.context, row.new_tokens)}"
        table.add_row(op, mode, *cells, *((number(row.nodes, "d"),) if nodes else ()))
    out.show(table)
    for each in measured.ratios:
        against = each["against"] if each["against"] == "dense" else f"{each['against']} {each['against_dtype']}"
        chosen = "" if each["selection"] is None else f", {each['selection']}"
        whole = each["mode"] == "dense" or each["op"] == "prefill"
        at = "" if whole else f" (MLP density {each['mlp_density']:.3f}, heads {each['head_density']:.3f}{chosen})"
        what = "" if each["op"] == "decode" else f" {each['op']} {_tokens(each['context'], each['new_tokens'])}"
        out.show(ratio(each["ratio"], 1.0, mode=each["mode"] + what, against=escape(against)) + at)


def _tokens(prompt: int, new: int | None) -> str:
    return f"{prompt}" if new is None else f"{prompt}+{new}"


def _show_qualities(out: Output, rows: Sequence[QualityRow]) -> None:
    """Perplexity beside our dense one."""
    tokens, rule = rows[0].tokens, rows[0].rule
    table = new_table(
        f"Perplexity of {tokens:,} tokens ({rule})", "mode", "dtype", "MLP", "heads", "perplexity", "±", "beside dense", left=2
    )
    dense = next(row for row in rows if row.dense)
    for row in rows:
        densities = ("", "") if row.peer else (number(row.mlp_density), number(row.head_density))
        table.add_row(row.mode, row.dtype, *densities, f"{row.ppl:.3f}", number(row.stderr, ".3f"), f"{row.ppl / dense.ppl - 1:+.2%}")
    out.show(table)


def _show_ops(out: Output, title: str, rows: Sequence[SpeedRow]) -> None:
    table = new_table(
        escape(title), "op", "mode", "selection", "batch", "context", "density", "p20 µs", "p50 µs", "p80 µs", "GB/s", "% of read", left=3
    )
    for row in rows:
        cells = [str(row.batch), str(row.context), number(row.mlp_density, ".2f")]
        cells += [number(value, ",.1f") for value in (row.p20_us, row.p50_us, row.p80_us)]
        table.add_row(row.op, row.mode, row.selection or "", *cells, number(row.gbs, ",.0f"), number(row.pct_ceiling, ".0f"))
    out.show(table)
