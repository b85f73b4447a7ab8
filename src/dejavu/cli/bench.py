"""`dejavu bench`: speed of decode, its parts, prompts and whole requests, dense and sparse and against other programs, in turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from dejavu.cli.against import PEERS, opened_peers, peer_names
from dejavu.cli.options import (
    AcceptBase,
    AdapterFolder,
    AsJson,
    Backend,
    CacheDtype,
    Dense,
    Download,
    Dtype,
    Offline,
    OptionalTexts,
    ScreenedHead,
    Seed,
    Threads,
)
from dejavu.cli.output import Output, progress_bars
from dejavu.cli.runs import open_run, write_sections
from dejavu.cli.speed import Plan, measure, show
from dejavu.cli.subjects import Subject, loaded, made_up
from dejavu.engine.options import EngineOptions

BELONGS_TO_MODEL = "belongs to a MODEL, not to --synthetic (--results keeps rows of both)"
NEEDS_SYNTHETIC = "says what is made up; it needs --synthetic NAME instead of MODEL"
TEXT_TOKENS = 2048  # of each text, of perplexity beside peers
MODEL_HELP = "A bundled model or adapter, a folder, a GGUF file, or a hub id."
SHAPE_HELP = "Random weights of a known shape, e.g. opt-6.7b, instead of MODEL; with exact zeros planted on cuda."
DENSITY_HELP = "MLP density to set the predictors' thresholds to; may repeat."
METHOD_HELP = "predicted, gate or input: what selects in a model of --synthetic (default: predicted where zeros are exact, else gate)."
SELECTION_HELP = "uniform, clustered, hot-set or, on cuda, published: which neurons a token needs (with --synthetic); may repeat."
PROMPT_HELP = "Time the prefill of a prompt of N tokens in every mode (with --against 512; 0: none); may repeat."
REQUEST_HELP = "Time requests of P prompt tokens and N new ones (with --against 128+128 and 1024+128; 0: none); may repeat."
PERPLEXITY_HELP = "Tokens of each text to measure perplexity on, peers' too (with --against 2048; 0: none)."
AHEAD_HELP = "Where neurons are selected: beside attention, on a branch of the graph, or in-line (cuda)."

Ahead = Annotated[str | None, typer.Option("--ahead", metavar="NAME", help=AHEAD_HELP)]
Against = Annotated[list[str] | None, typer.Option("--against", metavar="NAMES", help=f"Peers to time: {', '.join(PEERS)}; may repeat.")]
Batch = Annotated[list[int] | None, typer.Option("--batch", metavar="N", help="Rows of a decode step (default 1); may repeat.")]
Context = Annotated[
    list[int] | None, typer.Option("--context", metavar="N", help="Tokens before the first step (default 128); may repeat.")
]
Density = Annotated[list[float] | None, typer.Option("--density", metavar="X", help=DENSITY_HELP)]
Gguf = Annotated[Path | None, typer.Option("--gguf", metavar="FILE", help="The model that llama.cpp runs.")]
HeadDensity = Annotated[list[float] | None, typer.Option("--head-density", metavar="X", help="The same for attention heads; may repeat.")]
Method = Annotated[str | None, typer.Option("--method", metavar="NAME", help=METHOD_HELP)]
NumLayers = Annotated[int | None, typer.Option("--layers", metavar="N", help="The first N layers alone (with --synthetic on cuda).")]
OptionalModel = Annotated[str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
OutputFolder = Annotated[Path | None, typer.Option("-o", "--output", metavar="DIR", help="Run folder that keeps the rows.")]
Ops = Annotated[bool, typer.Option("--ops", help="Time single ops too, at several densities and selections (cuda).")]
Perplexity = Annotated[int | None, typer.Option("--perplexity", metavar="N", help=PERPLEXITY_HELP)]
Prompt = Annotated[list[int] | None, typer.Option("--prompt", metavar="N", help=PROMPT_HELP)]
Rank = Annotated[int | None, typer.Option("--rank", metavar="N", help="Of the planted predictors (with --synthetic).")]
Request = Annotated[list[str] | None, typer.Option("--request", metavar="P+N", help=REQUEST_HELP)]
Results = Annotated[Path | None, typer.Option("--results", metavar="FILE", help="Append the rows to a .jsonl file.")]
Selection = Annotated[list[str] | None, typer.Option("--selection", metavar="NAME", help=SELECTION_HELP)]
Steps = Annotated[int, typer.Option("--steps", metavar="N", help="Decode steps timed in each mode, at least 5.")]
Synthetic = Annotated[str | None, typer.Option("--synthetic", metavar="NAME", help=SHAPE_HELP)]


def bench(
    model: OptionalModel = None,
    synthetic: Synthetic = None,
    density: Density = None,
    head_density: HeadDensity = None,
    selection: Selection = None,
    method: Method = None,
    rank: Rank = None,
    layers: NumLayers = None,
    ops: Ops = False,
    ahead: Ahead = None,
    against: Against = None,
    gguf: Gguf = None,
    batch: Batch = None,
    context: Context = None,
    steps: Steps = 32,
    prompt: Prompt = None,
    request: Request = None,
    perplexity: Perplexity = None,
    text: OptionalTexts = None,
    results: Results = None,
    output: OutputFolder = None,
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
    """Time decode, its parts and prefill, dense and sparse in turns, on a text (--text; default: the one that comes with dejavu)."""
    out, names = Output(as_json), peer_names(against or [])
    thinned = bool(density or head_density or selection)
    _require_one(model, synthetic)
    _require_sense(dense=dense, thinned=thinned, gguf=gguf, names=names)
    folder = None if output is None else open_run(output)
    options = EngineOptions(
        backend=backend, dtype=dtype, cache_dtype=cache_dtype, screened_head=screened_head, threads=threads, ahead=ahead
    )
    if synthetic is not None:
        of_model = {"--text": text, "--adapter": adapter, "--accept-base": accept_base, "-o": output, "--download": download}
        _require_none(of_model | {"--perplexity": perplexity}, BELONGS_TO_MODEL)
        subject = made_up(
            synthetic, out, options, seed=seed, rank=rank, num_layers=layers, dense=dense, densities=density or [],
            heads=bool(head_density), selections=selection or [], ops=ops, method=method,
        )  # fmt: skip
    else:
        _require_none({"--selection": None if ops else selection, "--method": method, "--rank": rank, "--layers": layers}, NEEDS_SYNTHETIC)
        subject = loaded(
            model or "", out, options, seed=seed, texts=text, adapter=adapter, dense=dense, accept_base=accept_base,
            densities=density or [], download=download, offline=offline,
        )  # fmt: skip
    if gguf is None and model is not None and model.endswith(".gguf") and Path(model).is_file():
        gguf = Path(model)  # the same file, unless another is named
    plan = Plan(
        **_whole(prompt, request, against=bool(names)), **_text(model, text, perplexity, against=bool(names)),
        dense=dense, head_densities=head_density or [], batches=batch or [], contexts=context or [], steps=steps, ops=ops,
        op_selections=selection or [], seed=seed,
    )  # fmt: skip
    _run(out, subject, plan, names, gguf=gguf, results=results, folder=folder, as_calibrated=not (thinned or dense))


def _whole(prompts: Sequence[int] | None, requests: Sequence[str] | None, *, against: bool) -> dict[str, Any]:
    """Of a plan, the prompts and requests to time: what is named, else the usual ones where peers are compared with."""
    from dejavu.bench.requests import USUAL, Request, request_of

    if prompts is None and requests is None:
        return {"requests": USUAL if against else (), "usual": True}
    found = [Request(prompt=tokens) for tokens in prompts or () if tokens]
    return {"requests": found + [request_of(text) for text in requests or () if text != "0"]}


def _text(model: str | None, texts: list[str] | None, tokens: int | None, *, against: bool) -> dict[str, Any]:
    """Of a plan, what perplexity is measured on."""
    from dejavu.config import require
    from dejavu.model.texts import DATA, named_texts

    require(tokens is None or tokens >= 0, f"--perplexity takes 0 tokens or more of each text, not {tokens}")
    asked = (TEXT_TOKENS if against else 0) if tokens is None else tokens
    if model is None or not asked:
        return {}
    return {"texts": named_texts(texts or [str(DATA / "evaluation.txt")]), "text_tokens": asked, "text_usual": tokens is None}


def _run(
    out: Output,
    subject: Subject,
    plan: Plan,
    names: Sequence[str],
    *,
    gguf: Path | None,
    results: Path | None,
    folder: Path | None,
    as_calibrated: bool,
) -> None:
    """Measure, show, and keep the rows."""
    from dejavu.bench.rows import append_rows, completed
    from dejavu.config import require

    require(
        not plan.ops or subject.options.backend == "cuda",
        f"--ops times kernels of the cuda backend, not of {subject.options.backend!r}; leave it out",
    )
    notes = list(subject.notes)
    with opened_peers(names, subject, gguf, notes) as peers, progress_bars() as progress:
        others = [{key: getattr(peer, key) for key in ("mode", "version", "dtype", "model", "threads")} for peer in peers]
        found = measure(subject, plan, peers, out, progress)
    notes += found.notes
    for _, measured in found.runs:
        notes += [note for note in measured.notes if note not in notes]
    rows = completed(found.rows) if results is None else append_rows(results, found.rows)
    show(out, subject, found, others, notes[len(subject.notes) :])
    if as_calibrated and subject.lm is not None and subject.lm.adapter is not None:
        quality = subject.lm.adapter.config.quality
        if {"ppl_dense", "ppl_sparse"} <= set(quality):
            out.show(f"perplexity as the adapter states it: {quality['ppl_dense']:.3f} dense, {quality['ppl_sparse']:.3f} sparse")
    if folder is not None and subject.lm is not None:
        out.say(f"Results: {write_sections(folder, subject.lm, screen=found.screen, rows=[row.to_dict() for row in rows])}")
    out.finish(
        {
            "rows": [row.to_dict() for row in rows],
            "ratios": [each for _, measured in found.runs for each in measured.ratios],
            "peers": others,
            "model": subject.name,
            "cache_dtype": subject.options.cache_dtype,
            "screened_head": 0.0 if subject.screen is None else subject.screen.threshold,
            "notes": notes,
            **({} if not found.qualities else {"perplexity": [row.to_dict() for row in completed(found.qualities)]}),
            **({} if found.screen is None else {"screen": found.screen}),
            **({} if subject.planted is None else {"planted": {"rank": subject.planted.rank, "modes": found.planted}}),
        }
    )


def _require_one(model: str | None, synthetic: str | None) -> None:
    from dejavu.config import require

    require((model is None) != (synthetic is None), "give either MODEL or --synthetic NAME, one of the two")


def _require_sense(*, dense: bool, thinned: bool, gguf: Path | None, names: Sequence[str]) -> None:
    """What contradicts itself whatever the model."""
    from dejavu.config import require

    require(not (dense and thinned), "--dense leaves nothing to select; drop it or the densities")
    require(gguf is None or "llama.cpp" in names, "--gguf is the model of --against llama.cpp; add that or leave it out")


def _require_none(options: Mapping[str, Any], why: str) -> None:
    from dejavu.config import require

    wrong = [option for option, value in options.items() if value]
    require(not wrong, f"{', '.join(wrong)} {why}")
