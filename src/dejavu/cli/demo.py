"""`dejavu demo`: the whole road on the bundled model, in a few minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dejavu.cli.options import AdapterFolder, AsJson, Backend, CacheDtype, Download, Dtype, Offline, Seed, Threads, open_model
from dejavu.cli.output import Output, new_table, number, progress_bars, ratio, resumable

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
    from dejavu.measure.demo import run_demo

    out = Output(as_json)
    require(not (retrain and adapter is not None), "--retrain trains an adapter, --adapter names one; give one of the two")
    lm = open_model(
        model, out, backend=backend, dtype=dtype, cache_dtype=cache_dtype, threads=threads, seed=seed,
        adapter=adapter, needs_adapter=not retrain, download=download, offline=offline,
    )  # fmt: skip
    require(retrain or lm.adapter is not None, f"{lm.name} has no adapter; train one with --retrain, or name one with --adapter DIR")
    with resumable(f"the demo keeps nothing but what is in {output}: run it again"), progress_bars() as progress:
        result = run_demo(
            lm.checkpoint,
            lm.adapter,
            retrain=retrain,
            output=output,
            backend=lm.backend,
            dtype=lm.dtype,
            cache_dtype=lm.cache_dtype,
            threads=threads,
            seed=seed,
            progress=progress,
            say=lambda text: None if "\n" in text else out.say(text),  # its last word, in lines, is shown as a table below
        )
    show(out, result)
    out.finish(result)


def show(out: Output, result: dict[str, Any]) -> None:
    """Texts, figures and the report's path."""
    from dejavu.measure.demo import PROMPT

    dense, sparse = result["dense"], result["sparse"]
    for name, side in (("dense", dense), ("sparse", sparse)):
        out.show(f"\n[bold]{name}[/bold]")
        out.write(f"{PROMPT}{side['text'].rstrip()}\n")
    table = new_table("\nDense and sparse", "", "tok/s", "perplexity", "MLP density", "head density")
    table.add_row("dense", number(dense["tok_s"], ",.1f"), number(dense["ppl"]), "1.000", "1.000")
    densities = (number(result["mlp_density"]), number(result["head_density"]))
    table.add_row("sparse", number(sparse["tok_s"], ",.1f"), number(sparse["ppl"]), *densities)
    out.show(table, ratio(sparse["tok_s"], dense["tok_s"]))
    lookaheads = ", ".join("dense" if value is None else str(value) for value in result["lookahead"])
    out.show(f"perplexity, sparse against dense: [bold]{sparse['ppl'] / dense['ppl'] - 1:+.2%}[/bold] · lookahead by layer: {lookaheads}")
    out.say(f"Report: {result['report']}")
