"""A comparison of `dejavu bench` repeated in several processes: within each all take turns, what is shown is the median over processes.

    python recipes/processes.py smollm2-sparse --dtype bf16 --against llama.cpp --results results/bench.jsonl

In: arguments of `dejavu bench`, which with --results appends the rows of every process. Out: a table of speeds and one of ratios in
Markdown, each the median with the least and the most. A process has its own memory and threads, and what it got of these it keeps: runs
within one differ less than processes do. Perplexity does not, and is measured by the first one alone; --perplexities FILE appends it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dejavu.bench.rows import QualityRow, append_rows
from speeds import PROCESSES, markdown, spread

SPEEDS = ("decode", "prefill", "request")


def run_bench(arguments: Sequence[str]) -> dict[str, Any]:
    """What `dejavu bench` printed as its object, in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "dejavu", "bench", *arguments, "--json"], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def repeated(arguments: Sequence[str], processes: int, run: Callable[[Sequence[str]], dict[str, Any]] = run_bench) -> list[dict[str, Any]]:
    """The objects of so many processes, one after the other."""
    return [run([*arguments, *(("--perplexity", "0") if number else ())]) for number in range(processes)]


def _what(values: Mapping[str, Any]) -> tuple[str, ...]:
    """The op with its tokens, the mode with what selects, and the densities that were asked for, to a hundredth."""
    tokens = f"{values['context']}" if values["new_tokens"] is None else f"{values['context']}+{values['new_tokens']}"
    mode = ", ".join(str(part) for part in (values["mode"], values.get("method"), values["selection"]) if part is not None)
    return f"{values['op']} {tokens}", str(values["batch"]), mode, values["dtype"]


def _density(values: Mapping[str, Any]) -> str:
    return "" if values.get("peer") or values["mlp_density"] is None else f"{values['mlp_density']:.2f}"


def speeds_of(objects: Sequence[Mapping[str, Any]]) -> str:
    """Tokens a second of every op, mode and program, over processes. Processes time the same things in the same order."""
    timed = [[row for row in each["rows"] if row["op"] in SPEEDS] for each in objects]
    table = []
    for rows in zip(*timed, strict=True):
        assert len({_what(row) for row in rows}) == 1, "every process times the same things"
        found = [row["tok_s"] for row in rows]
        seconds = f"{statistics.median(row['p50_us'] for row in rows) / 1e6:.3f}" if rows[0]["op"] == "request" else ""
        middle = f"{statistics.median(found):.1f}"
        table.append([*_what(rows[0]), _density(rows[0]), middle, spread(min(found), max(found), 1), seconds])
    return markdown(["op", "batch", "mode", "dtype", "MLP density", "tokens/s", "least to most", "seconds"], table)


def ratios_of(objects: Sequence[Mapping[str, Any]]) -> str:
    """Speed over dense and over every program, of the same process, over processes; below 1 is slower."""
    table = []
    for each in zip(*(found["ratios"] for found in objects), strict=True):
        assert len({(*_what(ratio), ratio["against"], ratio["against_dtype"]) for ratio in each}) == 1, "every process compares the same"
        found = [ratio["ratio"] for ratio in each]
        against = f"{each[0]['against']} {each[0]['against_dtype']}"
        middle = f"{statistics.median(found):.2f}"
        table.append([*_what(each[0]), _density(each[0]), against, middle, spread(min(found), max(found), 2)])
    return markdown(["op", "batch", "mode", "dtype", "MLP density", "over", "ratio", "least to most"], table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=PROCESSES)
    parser.add_argument("--perplexities", type=Path, help="append the first process's perplexities to this file")
    options, arguments = parser.parse_known_args()
    objects = repeated(arguments, options.processes)
    if options.perplexities is not None:
        append_rows(options.perplexities, [QualityRow.from_dict(row) for row in objects[0].get("perplexity", ())])
    print(speeds_of(objects))
    print(ratios_of(objects))


if __name__ == "__main__":
    main()
