"""`dejavu eval`: perplexity of texts and accuracy on tasks, dense and sparse."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from dejavu.cli.options import (
    AcceptBase,
    AdapterFolder,
    AsJson,
    Backend,
    CacheDtype,
    Dense,
    Download,
    Dtype,
    Model,
    Offline,
    OptionalTexts,
    ScreenedHead,
    Seed,
    Threads,
    open_model,
)
from dejavu.cli.output import Output, new_table, number, percent, progress_bars, resumable, screen_line
from dejavu.cli.runs import PARTS, open_run, write_sections
from dejavu.engine.options import EngineOptions

if TYPE_CHECKING:
    from dejavu.config import Progress
    from dejavu.figures import HeadAgreement, Quality
    from dejavu.language_model import LanguageModel

MAX_SCREEN_TOKENS = 2048
NOTHING: dict[str, Any] = {"dense": {"texts": {}, "tasks": {}}, "sparse": None, "rise": None, "rise_stderr": None}


def evaluation(
    model: Model,
    text: OptionalTexts = None,
    tasks: Annotated[list[str] | None, typer.Option("--tasks", metavar="FILE", help="A JSONL file or a quoted glob; may repeat.")] = None,
    harness: Annotated[
        list[str] | None,
        typer.Option("--harness", metavar="TASK", help="A task of lm-evaluation-harness, or its YAML file; may repeat."),
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", metavar="N", help="Tokens scored of each text.")] = 100_000,
    limit: Annotated[int, typer.Option("--limit", metavar="N", help="Items used of each task.")] = 250,
    stride: Annotated[int | None, typer.Option("--stride", metavar="N", help="Tokens between windows (default: the context).")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Run the context of a task sparse too.")] = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="DIR", help="Run folder: keeps results, and resumes.")] = None,
    adapter: AdapterFolder = None,
    accept_base: AcceptBase = False,
    dense: Dense = False,
    backend: Backend = "auto",
    dtype: Dtype = "auto",
    cache_dtype: CacheDtype = "auto",
    screened_head: ScreenedHead = None,
    threads: Threads = None,
    seed: Seed = 0,
    download: Download = False,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Measure perplexity and task accuracy, dense and sparse."""
    from dejavu.config import require
    from dejavu.kernels.memory import within_gpu_memory
    from dejavu.model.texts import SEPARATOR, has_separator, named_files, named_texts
    from dejavu.offline_methods import OUT_OF_MEMORY
    from dejavu.quality.evaluate import evaluate
    from dejavu.quality.resume import PartStore
    from dejavu.quality.tasks import read_items

    out = Output(as_json)
    require(bool(text or tasks or harness), "nothing to evaluate; give a text (--text) or a task (--tasks, --harness)")
    missing = "--harness needs lm-evaluation-harness; install it with: pip install 'dejavu-llm[eval]'"
    require(not harness or find_spec("lm_eval") is not None, missing)
    require(not screened_head or bool(text), "--screened-head is measured on a text; give one (--text)")
    texts = named_texts(text or [])
    items = {Path(name).with_suffix("").as_posix(): read_items(path) for name, path in named_files(tasks or []).items()}
    options = EngineOptions(backend=backend, dtype=dtype, cache_dtype=cache_dtype, screened_head=screened_head, threads=threads)
    lm = open_model(
        model, out, options, seed=seed,
        adapter=adapter, dense=dense, accept_base=accept_base, texts=text, download=download, offline=offline,
    )  # fmt: skip
    notes = list(lm.notes)
    separated = [name for name, content in texts.items() if has_separator(content)]
    if separated:
        notes.append(f"scored as stored, as one document, {SEPARATOR} lines included: {', '.join(separated)}")
        out.warn(notes[-1])
    settings: dict[str, Any] = {"max_tokens": max_tokens, "limit": limit, "stride": stride, "strict": strict}
    folder = None if output is None else open_run(output)
    store = PartStore({**settings, **_identity(lm)}, None if folder is None else folder / PARTS)
    hint = (
        "nothing was kept; with -o DIR a run resumes" if folder is None else f"finished texts and tasks are kept in {folder}; run it again"
    )
    with resumable(hint), within_gpu_memory(OUT_OF_MEMORY), progress_bars() as progress:
        result = NOTHING | {}
        if texts or items:
            result |= evaluate(lm.model, lm.tokenizer, lm.layers(), texts=texts, tasks=items, store=store, progress=progress, **settings)
        if harness:
            result["harness"] = _harness(lm, harness, limit, progress)
        if lm.screened_head and texts:
            result["screen"] = _agreement(lm, texts, progress)
    if store.reused:
        out.show(f"{store.reused} texts and tasks were already measured")
    show(out, result)
    if folder is not None:
        written = write_sections(folder, lm, screen=result.get("screen"), evaluation=result)
        out.say(f"Results: {written}")
    out.finish(result | {"model": lm.name, "backend": lm.backend, "dtype": lm.dtype, "cache_dtype": lm.cache_dtype, "notes": notes})


def _harness(lm: LanguageModel, tasks: list[str], limit: int, progress: Progress | None) -> dict[str, Any]:
    """Metrics of lm-evaluation-harness by task, dense and sparse."""
    from dejavu.harness import harness_results

    return dict(harness_results(lm, tasks, limit=limit, progress=progress))


def _harness_table(found: dict[str, Any]) -> Any:
    sparse = found["sparse"]
    table = new_table("lm-evaluation-harness", "task", "metric", "dense", *(() if sparse is None else ("sparse",)))
    for task, metrics in found["dense"].items():
        for metric, value in metrics.items():
            other = () if sparse is None else (number(sparse[task].get(metric)),)
            table.add_row(escape(task), escape(metric), number(value), *other)
    return table


def _agreement(lm: LanguageModel, texts: dict[str, str], progress: Progress | None) -> HeadAgreement:
    """The screened head against the full one, with the adapter, on the start of every text, the same share of MAX_SCREEN_TOKENS each."""
    from dejavu.model.texts import document_ids
    from dejavu.quality.head_agreement import head_agreement

    share = max(1, MAX_SCREEN_TOKENS // len(texts))
    ids = [token for part in document_ids(lm.tokenizer, texts, max_tokens=share).values() for token in part]
    return head_agreement(
        lm.model,
        lm.layers(),
        ids,
        replace(lm.options, screen=lm.screen()),
        max_tokens=MAX_SCREEN_TOKENS,
        progress=progress,
    )


def _identity(lm: LanguageModel) -> dict[str, Any]:
    """What must be equal for finished parts to be used again."""
    from dejavu.files import text_hash

    adapter = None if lm.adapter is None else text_hash(json.dumps(lm.adapter.config.to_dict(), sort_keys=True))
    # form: of the parts; one more whenever they hold something else
    return {"form": 2, "base_hash": lm.base_hash, "dtype": lm.dtype, "cache_dtype": lm.cache_dtype, "adapter": adapter}


def show(out: Output, result: dict[str, Any]) -> None:
    """The tables of an evaluation."""
    dense, sparse = result["dense"], result["sparse"]
    if dense["texts"]:
        out.show(_text_table(dense, sparse))
    if dense["tasks"]:
        out.show(_task_table(dense, sparse))
    for name, entry in dense["tasks"].items():
        if entry["truncated"]:
            out.show(f"{escape(name)}: {entry['truncated']:,} of {entry['n']:,} items lost the start of a context that is too long")
    if "harness" in result:
        out.show(_harness_table(result["harness"]))
    if "screen" in result:
        out.show(screen_line(result["screen"]))
    if sparse is None:
        return
    out.show(
        f"MLP density [bold]{sparse['mlp_density']:.3f}[/bold], head density [bold]{sparse['head_density']:.3f}[/bold] over all layers"
    )
    if result["rise"] is not None:
        error = "" if result["rise_stderr"] is None else f" ± {percent(result['rise_stderr'], 2)}"
        out.show(f"perplexity, sparse against dense: [bold]{result['rise']:+.2%}[/bold]{error}")


def _text_table(dense: Quality, sparse: Quality | None) -> Any:
    columns = ("text", "tokens", "dense ppl", "±", "bits/byte")
    table = new_table("Perplexity", *columns, *(() if sparse is None else ("sparse ppl", "rise", "MLP density", "head density")))
    for name, entry in dense["texts"].items():
        row = [escape(name), f"{entry['tokens']:,}", number(entry["ppl"]), number(entry["stderr"], ".2f"), number(entry["bits_per_byte"])]
        if sparse is not None:
            other = sparse["texts"][name]
            row += [number(other["ppl"]), f"{other['ppl'] / entry['ppl'] - 1:+.2%}"]
            row += [number(other["mlp_density"]), number(other["head_density"])]
        table.add_row(*row)
    if len(dense["texts"]) > 1:
        total = sum(entry["tokens"] for entry in dense["texts"].values())
        row = ["all", f"{total:,}", number(dense["ppl"]), number(dense["stderr"], ".2f"), ""]
        if sparse is not None:
            assert sparse["ppl"] is not None and dense["ppl"] is not None, "there are texts"
            row += [number(sparse["ppl"]), f"{sparse['ppl'] / dense['ppl'] - 1:+.2%}", "", ""]
        table.add_row(*row, style="bold")
    return table


def _task_table(dense: Quality, sparse: Quality | None) -> Any:
    columns = ("task", "items", "dense acc", "±", "acc_norm")
    table = new_table("Tasks", *columns, *(() if sparse is None else ("sparse acc", "acc_norm", "difference", "MLP density")))
    for name, entry in dense["tasks"].items():
        row = [escape(name), f"{entry['n']:,}", percent(entry["acc"]), percent(entry["stderr"]), percent(entry["acc_norm"])]
        if sparse is not None:
            other = sparse["tasks"][name]
            row += [percent(other["acc"]), percent(other["acc_norm"]), f"{other['acc'] - entry['acc']:+.1%}", number(other["mlp_density"])]
        table.add_row(*row)
    return table
