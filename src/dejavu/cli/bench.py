"""`dejavu bench`: speed of decode and prefill, dense and sparse, interleaved."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dejavu.cli.options import AcceptBase, AdapterFolder, AsJson, Backend, Dense, Dtype, Model, OptionalTexts, Seed, Threads, open_model
from dejavu.cli.output import Output, new_table, number, progress_bars, ratio
from dejavu.cli.runs import open_run, write_sections

DEFAULT_CONTEXT = 128


def bench(
    model: Model,
    batch: Annotated[list[int] | None, typer.Option("--batch", metavar="N", help="Rows of a decode step (default 1); may repeat.")] = None,
    context: Annotated[
        list[int] | None, typer.Option("--context", metavar="N", help="Tokens before the first step (default 128); may repeat.")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", metavar="N", help="Decode steps timed in each mode.")] = 32,
    text: OptionalTexts = None,
    results: Annotated[Path | None, typer.Option("--results", metavar="FILE", help="Append the rows to a .jsonl file.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="DIR", help="Run folder that keeps the rows.")] = None,
    adapter: AdapterFolder = None,
    accept_base: AcceptBase = False,
    dense: Dense = False,
    backend: Backend = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Time decode and prefill, dense and sparse in turns, on a text (--text; default: the one that comes with dejavu)."""
    from dejavu.measure.bench import bench as measure
    from dejavu.measure.results import append_rows, completed
    from dejavu.measure.texts import DATA, documents, named_texts

    out = Output(as_json)
    texts = named_texts(text or [str(DATA / "evaluation.txt")])
    folder = None if output is None else open_run(output)
    lm = open_model(
        model, out, backend=backend, dtype=dtype, threads=threads, seed=seed,
        adapter=adapter, dense=dense, accept_base=accept_base, texts=text,
    )  # fmt: skip
    ids = lm.tokenizer.encode("\n".join(part for whole in texts.values() for part in documents(whole)))
    found = []
    with progress_bars() as progress:
        for length in context or [min(DEFAULT_CONTEXT, lm.config.max_positions // 2)]:
            for rows in batch or [1]:
                found += measure(
                    lm.model,
                    lm.layers(),
                    ids,
                    name=lm.name,
                    backend=lm.backend,
                    dtype=lm.dtype,
                    threads=lm.threads,
                    batch=rows,
                    context=length,
                    steps=steps,
                    progress=progress,
                )
    found = completed(found) if results is None else append_rows(results, found)
    table = new_table(
        "Speed", "op", "mode", "batch", "context", "MLP density", "head density", "p20 µs", "p50 µs", "p80 µs", "tok/s", left=2
    )
    for row in found:
        times = (number(value, ",.0f") for value in (row.p20_us, row.p50_us, row.p80_us))
        densities = (number(row.mlp_density), number(row.head_density))
        table.add_row(row.op, row.mode, str(row.batch), str(row.context), *densities, *times, number(row.tok_s, ",.1f"))
    out.show(table)
    decodes = [row for row in found if row.op == "decode"]
    sparse = [row for row in decodes if row.mode != "dense"]
    for row in sparse:
        base = next(r for r in decodes if r.mode == "dense" and (r.batch, r.context) == (row.batch, row.context))
        out.show(f"batch {row.batch}, context {row.context}, {row.mode}: {ratio(row.tok_s, base.tok_s)}")
    if folder is not None:
        out.say(f"Results: {write_sections(folder, lm, rows=[row.to_dict() for row in found])}")
    out.finish({"rows": [row.to_dict() for row in found], "model": lm.name, "notes": list(lm.notes)})
