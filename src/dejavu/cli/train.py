"""`dejavu train`: what a model can skip, by predictors, its gates or its inputs, calibrated to a loss budget, as an adapter folder."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from dejavu.cli.options import AsJson, Backend, Download, Dtype, Model, Offline, Seed, Texts, Threads, open_model
from dejavu.cli.output import Output, new_table, number, percent, progress_bars, resumable
from dejavu.cli.runs import write_sections
from dejavu.engine.options import EngineOptions

if TYPE_CHECKING:
    from dejavu.model.adapter import Adapter
    from dejavu.model.adapter_config import ScreenConfig

NO_GAIN = 0.98  # below it a method is slower than dense by more than noise
ADVICE = "--method auto keeps what is faster"


def train(
    model: Model,
    text: Texts,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="The adapter folder to write.")],
    budget: Annotated[
        float, typer.Option("--budget", metavar="X", help="Allowed relative rise of perplexity; a screened head may miss as much.")
    ] = 0.005,
    method: Annotated[
        str, typer.Option("--method", metavar="NAME", help="predicted, exact, gate, input, head, or auto: the fastest here.")
    ] = "predicted",
    loss: Annotated[
        str, typer.Option("--loss", metavar="NAME", help="contribution (weighs neurons by what they add) or bce.")
    ] = "contribution",
    rank: Annotated[
        int | None, typer.Option("--rank", metavar="N", help="Rank of the MLP predictors (default: D / 8, at least 64).")
    ] = None,
    epochs: Annotated[float, typer.Option("--epochs", metavar="X", help="Passes over the training tokens.")] = 4.0,
    lookahead: Annotated[str, typer.Option("--lookahead", metavar="N", help="auto, 0 or 1.")] = "auto",
    max_tokens: Annotated[int, typer.Option("--max-tokens", metavar="N", help="Tokens used, spread evenly over the text.")] = 200_000,
    work_memory: Annotated[
        float | None, typer.Option("--work-memory", metavar="GB", help="Activations that a GPU, or memory without one, holds at most.")
    ] = None,
    backend: Backend = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    seed: Seed = 0,
    download: Download = False,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Find what can be skipped within a loss budget; writes an adapter. Resumes where it was interrupted."""
    from dejavu.files import absolute, check_replaceable, new_folder
    from dejavu.model.adapter import write_adapter
    from dejavu.model.texts import named_texts
    from dejavu.offline.train_config import TrainConfig

    out = Output(as_json)
    options: dict[str, Any] = {"budget": budget, "method": method, "loss": loss, "rank": rank, "epochs": epochs, "lookahead": lookahead}
    options |= {"max_tokens": max_tokens, "seed": seed, "work_memory": work_memory}
    TrainConfig.from_dict(options)  # an impossible value is said before a model is loaded
    target = absolute(output)
    work = target.with_name(f"{target.name}.partial")  # made when the first layer is finished
    check_replaceable(target)
    check_replaceable(work)
    texts = named_texts(text)
    lm = open_model(
        model, out, EngineOptions(backend=backend, dtype=dtype, threads=threads), seed=seed, needs_adapter=False,
        download=download, offline=offline,
    )  # fmt: skip
    kept = (
        "run the same command again"
        if method == "head"
        else f"layers that are finished are kept in {work}; run the same command again to go on"
    )
    with resumable(kept), progress_bars() as progress:
        adapter, found = lm.train_measured(list(texts.values()), work_folder=work, progress=progress, **options)
    measured: dict[str, Any] = {**found}
    about = {"model": lm.name, "backend": lm.backend, "dtype": lm.dtype, "cache_dtype": lm.cache_dtype, "notes": list(lm.notes)}
    if adapter is None:
        out.show(_candidates(measured), escape(measured["why"]))
        _say_untimed(out, measured)
        out.say(f"No adapter was written{f'; the one in {target} is as it was' if target.exists() else ''}.")
        out.say(f"What was trained is kept in {work}: another --budget goes on from there.")
        out.finish(measured | about | {"adapter": None})
        return
    named = dataclasses.replace(adapter.config, calibration_texts=tuple(Path(name).name for name in texts))
    adapter = dataclasses.replace(adapter, config=named)
    with new_folder(target) as folder:
        write_adapter(adapter, folder)
        write_sections(folder, lm, train={"source": "trained", **measured})
    shutil.rmtree(work, ignore_errors=True)
    show(out, adapter, measured)
    out.say(f"Adapter: {target}\nUse it:  dejavu generate {model} --adapter {output} --prompt ...")
    out.finish(measured | about | {"adapter": str(target)})


def show(out: Output, adapter: Adapter, measured: dict[str, Any]) -> None:
    """The tables of layers and, with method auto, of the methods; the summary."""
    if adapter.config.method != "head":
        out.show({"exact": _gates, "gate": _gates, "input": _inputs}.get(adapter.config.method, _predictors)(adapter, measured))
    if "candidates" in measured:
        out.show(_candidates(measured), escape(measured["why"]))
        _say_untimed(out, measured)
    elif measured["speedup"] is not None:
        slower = f" [yellow](slower than dense here; {ADVICE})[/yellow]" if measured["speedup"] < NO_GAIN else ""
        speeds = f"{measured['tok_s_dense']:,.1f} tok/s dense, {measured['tok_s']:,.1f} sparse"
        out.show(f"{speeds}: [bold]{measured['speedup']:.2f}×[/bold]{slower}")  # noqa: RUF001
    else:
        out.warn(f"not timed: {measured['speed_note']}")
    kept = (
        ""
        if measured["within_budget"]
        else " [yellow](over the budget, with its standard error, on text that calibration did not see)[/yellow]"
    )
    rise = f"[bold]{measured['rise']:+.2%}[/bold] for a budget of {measured['budget']:+.2%}{kept}"
    out.show(f"perplexity {measured['ppl_dense']:.3f} dense, {measured['ppl_sparse']:.3f} sparse: {rise}")
    densities = f"MLP density [bold]{measured['mlp_density']:.3f}[/bold], head density [bold]{measured['head_density']:.3f}[/bold]"
    if adapter.config.screened_head is not None:
        out.show(_screen(adapter.config.screened_head))
    of = "of weights, over all layers" if adapter.config.method == "input" else "over all layers"
    if measured["tokens"] < measured["tokens_given"]:
        out.warn(f"activations of {measured['tokens_given']:,} tokens do not fit into memory: {measured['tokens']:,} were used")
    reads = f"{percent(measured['read_share'])} of a dense token's reads in the layers"
    out.show(f"{densities} {of} · {reads} · {measured['tokens']:,} tokens · {measured['seconds']:,.0f} s")


def _screen(screen: ScreenConfig) -> str:
    """What the screened head keeps and misses."""
    missed = f"[bold]{screen.missed:.2%}[/bold] ± {screen.missed_stderr:.2%} of probability missed, agreement {screen.agreement:.2%}"
    return f"screened head at {screen.threshold:.3g}: {screen.tokens:,.0f} tokens in {screen.clusters:,} clusters, {missed}"


def _say_untimed(out: Output, measured: dict[str, Any]) -> None:
    """Why a method has no speed."""
    for found in measured["candidates"]:
        if found["speed_note"] is not None:
            out.warn(f"{found['method']} was not timed: {found['speed_note']}")


def _predictors(adapter: Adapter, measured: dict[str, Any]) -> Any:
    columns = ("layer", "MLP density", "recall", "mass", "lookahead", "rank", "head density", "head mass", "head lookahead")
    table = new_table("Predictors on held-out text", *columns)
    for index, (layer, entry) in enumerate(zip(measured["layers"], adapter.config.layers, strict=True)):
        heads = layer["heads"]
        row = ["dense", "", "", "", ""] if layer["lookahead"] is None else [*_part(layer), str(entry.entries["mlp"].rank)]
        row += ["dense", "", ""] if not heads else [number(heads["density"]), percent(heads["mass"]), str(heads["lookahead"])]
        table.add_row(str(index), *row)
    return table


def _gates(adapter: Adapter, measured: dict[str, Any]) -> Any:
    table = new_table("Gates on held-out text", "layer", "MLP density", "mass", "threshold")
    for index, (layer, entry) in enumerate(zip(measured["layers"], adapter.config.layers, strict=True)):
        chosen = [[number(layer["density"]), percent(layer["mass"]), number(gate.threshold, ".4g")] for gate in entry.entries.values()]
        chosen = chosen[0] if chosen else ["dense", "", ""]
        table.add_row(str(index), *chosen)
    return table


def _inputs(adapter: Adapter, measured: dict[str, Any]) -> Any:
    from dejavu.model.selectors import POINTS

    table = new_table("Inputs kept, and weights read, on held-out text", "layer", *POINTS, "MLP density", "attention density")
    for index, layer in enumerate(measured["layers"]):
        points = (number(layer["inputs"][point]) for point in POINTS)
        table.add_row(str(index), *points, number(layer["density"]), number(layer["attention"]))
    return table


def _candidates(measured: dict[str, Any]) -> Any:
    """What each method reached and how fast it decodes here, in turns with the dense model."""
    columns = ("rise", "missed", "within budget", "MLP density", "head density", "reads", "tok/s dense", "sparse", "times", "seconds")
    table = new_table("Methods", "method", *columns)
    for found in measured["candidates"]:
        head = found.get("screened_head")
        row = [
            f"{found['rise']:+.2%}",
            "" if head is None else f"{head['missed']:.2%}",
            "yes" if found["within_budget"] else "no",
            number(found["mlp_density"]),
        ]
        row += [number(found["head_density"]), percent(found["read_share"]), number(found["tok_s_dense"], ",.1f")]
        row += [number(found["tok_s"], ",.1f"), number(found["speedup"], ".2f"), f"{found['seconds']:,.0f}"]
        table.add_row(found["method"], *row, style="bold" if found["method"] == measured["method"] else "")
    return table


def _part(layer: dict[str, Any]) -> list[str]:
    return [number(layer["density"]), percent(layer["recall"]), percent(layer["mass"]), str(layer["lookahead"])]
