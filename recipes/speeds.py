"""Which measured speeds may be shown, and the tables of a model that exists, on a CPU.

In: results/bench.jsonl (rows of `dejavu bench`, a process each) and results/perplexity.jsonl (`recipes/quality.py`). Out: `Speed`s, one way
to run a model each, over all processes of one commit, and Markdown. The rules, which docs/measuring.md explains:

    a commit with changed files (-dirty), or none, is refused
    a model that exists needs a perplexity of the same adapter, dtype, cache dtype and backend
    a dtype of ours that costs more than LIMIT of perplexity over fp32, in the same mode, is refused
    it needs PROCESSES processes: the median is shown with the least and the most, and README takes the least
    only what ran in one setting (device, context, threads of ours) and was scored on the same text stands in one table

What is refused is named on stderr with the reason. Where nothing is left to show, `Refused` ends the rendering.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dejavu.bench.rows import Measured, QualityRow, SpeedRow, read_rows

RESULTS = Path(__file__).resolve().parents[1] / "results"
BENCH, PERPLEXITY = RESULTS / "bench.jsonl", RESULTS / "perplexity.jsonl"
LIMIT = 0.03  # of perplexity, that a dtype may cost
EXACT = ("fp32", "fp32")  # weights and cache
NOISE = 0.005  # of perplexity: by how much a program may be worse and still count as no worse
PROCESSES = 5
DENSE = "Run it dense"  # what is said of a model that sparsity makes no faster than the fastest program of no worse perplexity


class Refused(SystemExit):
    """No row that a table needs may be shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """One way to run a model. rows: a decode row of each process, all of one commit. quality: of the same way; None: not measured."""

    rows: tuple[SpeedRow, ...]
    quality: QualityRow | None

    @property
    def row(self) -> SpeedRow:
        """That of the median process."""
        return sorted(self.rows, key=lambda row: row.speed)[len(self.rows) // 2]

    @property
    def own(self) -> bool:
        return not self.row.peer

    @property
    def median(self) -> float:
        return statistics.median(row.speed for row in self.rows)

    @property
    def least(self) -> float:
        return min(row.speed for row in self.rows)

    @property
    def most(self) -> float:
        return max(row.speed for row in self.rows)

    @property
    def ppl(self) -> float:
        assert self.quality is not None, "refused without one"
        return self.quality.ppl

    @property
    def texts(self) -> str:
        """What its perplexity was measured on."""
        assert self.quality is not None, "refused without one"
        return self.quality.texts_hash

    @property
    def program(self) -> str:
        return f"dejavu {self.row.mode}" if self.own else self.row.mode


def qualities() -> list[QualityRow]:
    return read_rows(PERPLEXITY, QualityRow) if PERPLEXITY.exists() else []


def quality_of(row: SpeedRow, known: Sequence[QualityRow], *, stored: tuple[str, str | None] | None = None) -> QualityRow | None:
    """The newest perplexity of the very same way to run it. stored: with another dtype and cache dtype than the row's."""
    found = [
        each
        for each in known
        if (each.model, each.backend, each.adapter) == (row.model, row.backend, row.adapter)
        and (each.peer, each.sparse, each.sparse_heads) == (row.peer, row.sparse, row.sparse_heads)
        and (each.dtype, each.cache_dtype) == (stored or (row.dtype, row.cache_dtype))
    ]
    return found[-1] if found else None


def _stored(row: SpeedRow) -> str:
    return row.dtype if row.dtype != "fp32" else f"a cache in {row.cache_dtype}"


def refusal(speed: Speed, known: Sequence[QualityRow], *, processes: int = PROCESSES) -> str | None:
    """Why a speed may not be shown; None where it may."""
    row, quality = speed.row, speed.quality
    if not row.repeatable:
        return f"commit {short_commit(row)}: files were changed or no commit is known, so nobody can measure it again"
    if row.synthetic:
        return None
    if quality is None:
        with_ = "" if row.adapter is None else f" with adapter {row.adapter}"
        return f"no perplexity in {row.dtype}, cache {row.cache_dtype}, backend {row.backend}{with_}: run recipes/quality.py"
    if not quality.repeatable:
        return f"its perplexity is of commit {short_commit(quality)}, whose files were changed"
    if speed.own and (row.dtype, row.cache_dtype) != EXACT:
        base = quality_of(row, [each for each in known if each.texts_hash == quality.texts_hash], stored=EXACT)
        if base is None:
            return f"its perplexity in fp32 on the same text is not known, so nobody knows what {_stored(row)} costs"
        cost = quality.ppl / base.ppl - 1
        if cost > LIMIT:
            return f"{_stored(row)} costs {100 * cost:.1f} % of perplexity beside fp32, over {100 * LIMIT:.0f} %"
    found = len({each.time for each in speed.rows})
    if found < processes:
        return f"measured in {found} processes, not {processes}"
    return None


def speeds(model: str) -> list[Speed]:
    """Of every way to run a model that exists on a CPU, one sequence, and of the other programs that ran in the same processes: the newest
    commit that may be shown. All of one setting and one text: those of the newest row of ours that may be shown.
    """
    known = qualities()
    usual = [
        row
        for row in read_rows(BENCH)
        if row.op == "decode" and row.batch == 1 and not row.synthetic and row.device_kind == "cpu" and row.screened_head == 0
    ]
    ours = {row.time: row for row in usual if row.model == model and not row.peer}
    groups: dict[tuple[Any, ...], dict[str, list[SpeedRow]]] = {}
    for row in usual:
        own = ours.get(row.time)  # whose process it ran in
        if own is not None and (row.model == model or row.peer):
            key = (row.model, row.mode, row.backend, row.dtype, row.cache_dtype, row.adapter, setting(own))
            groups.setdefault(key, {}).setdefault(str(row.commit), []).append(row)
    found: list[tuple[Speed, Setting]] = []
    for key, commits in groups.items():
        for number, rows in enumerate(sorted(commits.values(), key=lambda rows: str(rows[-1].time), reverse=True)):
            speed = Speed(rows=tuple(rows), quality=quality_of(rows[0], known))
            reason = refusal(speed, known)
            if reason is None:
                found.append((speed, key[-1]))
                break
            if number == 0 and (speed.row.cache_dtype is not None or not speed.own):  # older rows could not say what they were
                say_refused(speed, reason)
    newest = max((each for each in found if each[0].own), key=lambda each: str(each[0].row.time), default=None)
    if newest is None:
        return []
    return [speed for speed, where in found if where == newest[1] and speed.texts == newest[0].texts]


Setting = tuple[str | None, int, int | None]


def setting(row: SpeedRow) -> Setting:
    """What has to be the same for speeds to be compared: of a process, its row of ours."""
    return row.device, row.context, row.threads


_said: set[str] = set()


def say_refused(speed: Speed, reason: str) -> None:
    row = speed.row
    line = f"not shown: {row.model}, {speed.program}, {row.dtype}, {row.time}: {reason}"
    if line not in _said:
        _said.add(line)
        print(line, file=sys.stderr)


def ratios(one: Speed, other: Speed) -> list[float]:
    """Of processes that timed both, in turns. Where none did: the least of the one over the most of the other."""
    by_time = {row.time: row.speed for row in other.rows}
    return [row.speed / by_time[row.time] for row in one.rows if row.time in by_time] or [one.least / other.most]


def rival(speed: Speed, others: Iterable[Speed]) -> Speed:
    """The fastest program, ours included, whose perplexity on the same text is no worse (but for NOISE)."""
    fair = [other for other in others if other is not speed and other.ppl <= speed.ppl * (1 + NOISE)]
    if not fair:
        raise Refused(f"nothing to compare {speed.row.model}, {speed.program} with: no program of no worse perplexity on the same text")
    return max(fair, key=lambda other: other.median)


# Markdown


def markdown(header: list[str], rows: list[list[str]]) -> str:
    align = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, align, *rows]) + "\n"


def percent(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{100 * value:.{digits}f} %"


def short_commit(measured: Measured) -> str:
    """Ten digits, and -dirty where files were changed."""
    return str(measured.commit)[:10] + ("-dirty" if measured.dirty else "")


def origins(found: Iterable[Measured]) -> str:
    """A line for each machine, commit and day."""
    return "".join(dict.fromkeys(_origin(each) for each in found))


def _origin(measured: Measured) -> str:
    torch = (measured.versions or {})["torch"]
    return f"\n{measured.device}, torch {torch}, commit {short_commit(measured)}, {str(measured.time)[:10]}.\n"


def spread(least: float, most: float, digits: int) -> str:
    return f"{least:.{digits}f} to {most:.{digits}f}"


def programs(model: str) -> str:
    """Every program and dtype that ran this model, with its quality: the fastest first."""
    found = sorted(speeds(model), key=lambda speed: -speed.median)
    if not found:
        raise Refused(f"no speed of {model} may be shown; see the lines above")
    rows = []
    for speed in found:
        row, threads = speed.row, sorted({str(each.threads) for each in speed.rows})
        density = [percent(row.mlp_density), percent(row.read_share)] if speed.own else ["", ""]
        dense = [each for each in found if each.row.dense and each.row.dtype == row.dtype]
        times = "" if not dense or not speed.own else f"{statistics.median(ratios(speed, dense[0])):.2f}"
        about = [speed.program, row.dtype, str(row.cache_dtype or ""), "/".join(threads), *density, f"{speed.ppl:.2f}"]
        rows.append([*about, f"{speed.median:.1f}", spread(speed.least, speed.most, 1), times])
    header = ["program", "dtype", "cache", "threads", "MLP density", "reads", "perplexity", "tokens/s", "least to most", "times own dense"]
    return markdown(header, rows) + origins(speed.row for speed in found)


def headline_speeds(found: Sequence[Speed], model: str) -> tuple[Speed, Speed, Speed]:
    """Our fastest sparse way, the fastest program of no worse perplexity, and our dense engine in the same dtype."""
    sparse = [speed for speed in found if speed.row.sparse]
    if not sparse:
        raise Refused(f"no sparse speed of {model} may be shown; see the lines above")
    best = max(sparse, key=lambda speed: speed.median)
    dense = [speed for speed in found if speed.row.dense and speed.row.dtype == best.row.dtype]
    if not dense:
        raise Refused(f"no dense speed of {model} in {best.row.dtype} may be shown; see the lines above")
    return best, rival(best, found), dense[0]


def named(speed: Speed) -> str:
    """`our own dense engine in int8`, `llama.cpp in q8_0`."""
    return f"{f'our own {speed.row.mode} engine' if speed.own else speed.program} in {speed.row.dtype}"


def headline(model: str, name: str) -> str:
    """README: one model on one machine, speed and quality in one row, the fastest other program; the least of all processes."""
    found = speeds(model)
    best, other, dense = headline_speeds(found, model)
    others = [speed for speed in found if not speed.own]
    fastest = [max(others, key=lambda speed: speed.median)] if others else []
    rows, shown = [], unique([best, other, dense, *fastest])
    for speed in shown:
        row = speed.row
        share = [percent(row.mlp_density, 0), percent(row.read_share, 0)] if speed.own else ["all", "all"]
        rows.append([f"{speed.program}, {row.dtype}", *share, f"{speed.ppl:.2f}", f"{speed.least:.0f}"])
    against = min(ratios(best, other))
    advice = "" if against >= 1 else f"**{DENSE}.** "
    first = f"{advice}Sparse is **{against:.2f} times as fast as {named(other)}**, the fastest program of no worse perplexity"
    last = "" if other is dense else f", and {min(ratios(best, dense)):.2f} times as fast as {named(dense)}"
    text = f"\n{first}{last}.\nSpeeds and ratios are each the least of {len(best.rows)} processes.\n"
    return markdown([name, "MLP neurons read", "bytes read", "perplexity", "tokens/s"], rows) + text + origins(speed.row for speed in shown)


def second(model: str, name: str) -> str:
    """README: another model in words; the least of all processes."""
    best, other, dense = headline_speeds(speeds(model), model)
    against, own = min(ratios(best, other)), min(ratios(best, dense))
    how = f", sparse in {best.row.dtype}" if against >= 1 else f": **{DENSE}.**\nSparse in {best.row.dtype}"
    text = f"{name}{how}: {best.least:.0f} tokens/s at a perplexity of {best.ppl:.2f}.\n"
    if other is not dense:
        text += f"That is {own:.2f} times as fast as {named(dense)}, {'and' if against >= 1 else 'but only'}\n"
    text += f"**{against:.2f} times as fast as {named(other)}** ({other.least:.0f} tokens/s at {other.ppl:.2f}),\n"
    text += "the fastest program of no worse perplexity"
    alone = "" if {row.time for row in best.rows} & {row.time for row in other.rows} else ": the least over the most, of separate processes"
    return f"{text}{alone}.\n" + origins([best.row, other.row])


def unique(found: list[Speed]) -> list[Speed]:
    return [speed for index, speed in enumerate(found) if not any(speed is other for other in found[:index])]
