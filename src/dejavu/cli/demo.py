"""`dejavu demo`: the whole road on the bundled model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dejavu.cli.options import AdapterFolder, AsJson, Backend, CacheDtype, Download, Dtype, Offline, Seed, Threads, open_model
from dejavu.cli.output import Output, new_table, number, percent, progress_bars, resumable
from dejavu.engine.options import EngineOptions

MODEL = "opt-mini"


def demo(
    model: Annotated[str, typer.Option("--model", metavar="MODEL", help="Another model than the bundled one.")] = MODEL,
    retrain: Annotated[bool, typer.Option("--retrain", help="Train the predictors here instead of using the bundled ones.")] = False,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Where results and report go.")] = Path("runs/demo"),
    adapter: AdapterFolder = None,
    backend: Backend = "auto",
    dtype: Dtype = "auto",
    cache_dtype: CacheDtype = "auto",
    threads: Threads = None,
    seed: Seed = 0,
    download: Download = False,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Profile the bundled model, generate and evaluate it dense and sparse, and write a report."""
    from dejavu.config import require
    from dejavu.report.demo import run_demo

    out = Output(as_json)
    require(not (retrain and adapter is not None), "--retrain trains an adapter, --adapter names one; give one of the two")
    options = EngineOptions(backend=backend, dtype=dtype, cache_dtype=cache_dtype, threads=threads)
    lm = open_model(
        model, out, options, seed=seed,
        adapter=adapter, needs_adapter=not retrain, download=download, offline=offline,
    )  # fmt: skip
    require(retrain or lm.adapter is not None, f"{lm.name} has no adapter; train one with --retrain, or name one with --adapter DIR")
    with resumable(f"the demo keeps nothing but what is in {output}: run it again"), progress_bars() as progress:
        result = run_demo(
            lm.checkpoint,
            lm.adapter,
            retrain=retrain,
            output=output,
            options=lm.options,
            seed=seed,
            progress=progress,
            say=out.say,
        )
    show(out, result)
    out.finish(result)


def show(out: Output, result: dict[str, Any]) -> None:
    """Texts, figures and, on the last line, the report's path."""
    from dejavu.report.demo import PROMPT

    dense, sparse = result["dense"], result["sparse"]
    for name, side in (("dense", dense), ("sparse", sparse)):
        out.show(f"\n[bold]{name}[/bold]")
        out.say(f"{PROMPT}{side['text'].rstrip()}")
    table = new_table("\nDense and sparse", "", "dense", "sparse", "against dense")
    speeds = [number(side["tok_s"], ",.1f") for side in (dense, sparse)]
    table.add_row("tokens per second", *speeds, f"{result['speedup']:.2f}×")  # noqa: RUF001
    table.add_row("perplexity (lower is better)", number(dense["ppl"]), number(sparse["ppl"]), f"{sparse['ppl'] / dense['ppl'] - 1:+.2%}")
    for what, density in (
        ("share of the MLP read (MLP density)", "mlp_density"),
        ("share of attention read (head density)", "head_density"),
    ):
        table.add_row(what, percent(1.0), percent(result[density]), "")
    table.add_row("bytes that a token reads, all in all", percent(1.0), percent(result["read_share"]), "")
    out.show(table)
    out.write(f"Report: {result['report']}\n")  # as it comes: a path broken over two lines cannot be opened
