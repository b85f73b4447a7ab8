"""What `dejavu bench-serve` shows of its rows: how much was served, and how long it took."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.markup import escape

from dejavu.cli.output import Output, new_table, number, percent, ratio

if TYPE_CHECKING:
    from dejavu.loadtest.benchmark import ServingBench
    from dejavu.loadtest.rows import ServeRow

LATENCIES = {"ttft": "time to first token", "itl": "inter-token", "tpot": "per token after the first", "e2e": "end to end"}


def show(out: Output, found: ServingBench, notes: Sequence[str]) -> None:
    """Tables, ratios, leaks and notes."""
    first = found.rows[0]
    load = f"{first.concurrency} clients" if first.rate is None else f"{first.rate:g} requests/s (Poisson)"
    title = f"Serving {', '.join(_models(found.rows))}: {load}, prompts {first.prompt_mix}, answers {first.output_mix}"
    _show_throughput(out, escape(title), found.rows)
    _show_latencies(out, found.rows)
    for each in found.ratios:
        out.show(
            f"{ratio(each['tok_s'], 1.0, mode=each['mode'])} in tokens/s, {number(each['tpot_p50_ms'], '.2f')}\u00d7 in time per token"
        )
    if found.leaks is not None:
        pages = "not told" if found.leaks.pages_before is None else f"{found.leaks.pages_before} before, {found.leaks.pages_after} after"
        memory = "not told" if not found.leaks.memory_mb else ", ".join(f"{each:.0f}" for each in found.leaks.memory_mb)
        out.say(
            f"leaks: {'FOUND' if found.leaks.leaks else 'none found'}; free pages {pages}; resident MB before and after each round {memory}"
        )
    for note in notes:
        out.say(f"note: {note}")


def _models(rows: Sequence[ServeRow]) -> list[str]:
    return list(dict.fromkeys(row.model for row in rows))


def _name(row: ServeRow, rows: Sequence[ServeRow]) -> str:
    """The row's mode; with the model, where there are several."""
    return escape(row.mode if len(_models(rows)) == 1 else f"{row.model} ({row.mode})")


def _show_throughput(out: Output, title: str, rows: Sequence[ServeRow]) -> None:
    goodput = any(row.goodput_s is not None for row in rows)
    columns = (
        "done",
        "failed",
        "429s",
        "requests/s",
        "tok/s",
        "in flight",
        *(("goodput/s", "good") if goodput else ()),
        "MLP",
        "heads",
        "union",
    )
    table = new_table(title, "mode", *columns)
    for row in rows:
        good = (number(row.goodput_s, ".2f"), percent(row.goodput_share, 0)) if goodput else ()
        densities = (number(row.mlp_density), number(row.head_density), number(row.union_density))
        speeds = (number(row.requests_s, ".2f"), number(row.tok_s, ",.1f"), number(row.in_flight, ".1f"))
        table.add_row(_name(row, rows), str(row.completed), str(row.failed), str(row.rejected), *speeds, *good, *densities)
    out.show(table)


def _show_latencies(out: Output, rows: Sequence[ServeRow]) -> None:
    table = new_table("Latencies in ms, from intended arrival", "latency", "mode", "p50", "p90", "p95", "p99", left=2)
    for name, title in LATENCIES.items():
        for row in rows:
            table.add_row(title, _name(row, rows), *(number(getattr(row, f"{name}_p{each}_ms"), ",.1f") for each in (50, 90, 95, 99)))
    out.show(table)
