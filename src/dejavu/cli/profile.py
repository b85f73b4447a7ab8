"""`dejavu profile`: where a dense model is sparse by nature, the paper's first experiment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dejavu.cli.options import AsJson, Backend, Download, Dtype, Model, Offline, Seed, Texts, Threads, open_model
from dejavu.cli.output import Output, new_table, number, percent, progress_bars, resumable
from dejavu.cli.runs import open_run, write_sections
from dejavu.engine.options import EngineOptions


def profile(
    model: Model,
    text: Texts,
    max_tokens: Annotated[int, typer.Option("--max-tokens", metavar="N", help="Tokens read of each text.")] = 60_000,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="DIR", help="Run folder that keeps the results.")] = None,
    backend: Backend = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    seed: Seed = 0,
    download: Download = False,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Show where a model is sparse by nature: density, dead and always-on neurons, mass, heads, oracle perplexity."""
    from dejavu.config import require
    from dejavu.model.texts import named_texts

    out = Output(as_json)
    require(max_tokens >= 1, f"--max-tokens must be at least 1, not {max_tokens}")
    texts = named_texts(text)
    folder = None if output is None else open_run(output)
    lm = open_model(
        model, out, EngineOptions(backend=backend, dtype=dtype, threads=threads), seed=seed, needs_adapter=False,
        download=download, offline=offline,
    )  # fmt: skip
    with resumable("a profile is short and keeps nothing: run it again"), progress_bars() as progress:
        result: dict[str, Any] = {**lm.profile(texts, max_tokens=max_tokens, progress=progress)}
    show(out, result)
    if folder is not None:
        out.say(f"Results: {write_sections(folder, lm, profile=result)}")
    out.finish(result | {"model": lm.name, "dtype": lm.dtype, "notes": list(lm.notes)})


def show(out: Output, result: dict[str, Any]) -> None:
    """The tables of a profile."""
    columns = ("layer", "density", "dead", "always on", "contextual", "density for 99 % mass", "residual cosine", "heads for 90 %")
    table = new_table(f"Natural sparsity over {result['tokens']:,} tokens", *columns)
    layers = result["layers"]
    keys = ("mlp_density", "dead", "always_on", "contextual", "mass99_density", "cosine", "heads90")
    for index, layer in enumerate(layers):
        table.add_row(str(index), *(number(layer[key]) if key == "cosine" else percent(layer[key]) for key in keys))
    means = {key: sum(layer[key] for layer in layers) / len(layers) for key in keys}
    table.add_row("mean", *(number(means[key]) if key == "cosine" else percent(means[key]) for key in keys), style="bold")
    out.show(table)
    oracle = new_table(f"Perplexity under oracle selection (dense: {result['ppl_dense']:.3f})", "part", "density", "ppl", "rise")
    for point in result["oracle"]:
        oracle.add_row(point["part"], percent(point["density"]), number(point["ppl"]), f"{point['ppl'] / result['ppl_dense'] - 1:+.2%}")
    out.show(oracle)
