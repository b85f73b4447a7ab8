"""`dejavu bench`: speed of decode, its parts and prefill, dense and sparse and against other programs, in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
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
    Dtype,
    OptionalTexts,
    ScreenedHead,
    Seed,
    Threads,
    open_model,
)
from dejavu.cli.output import Output, new_table, number, progress_bars, ratio, screen_line
from dejavu.cli.runs import open_run, write_sections

if TYPE_CHECKING:
    from dejavu.language_model import LanguageModel
    from dejavu.measure.bench import Bench
    from dejavu.measure.decoders import Layers, Peer
    from dejavu.model.transformer import Transformer

DEFAULT_CONTEXT, DEFAULT_DENSITY = 128, 0.1
PEERS = ("transformers", "transformers-compile", "ctranslate2", "llama.cpp")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Subject:
    """What is timed: a loaded model (lm), or a made-up one."""

    name: str
    model: Transformer
    layers_for: Callable[[str | None, float | None], Layers | None]
    ids: list[int]
    backend: str
    dtype: str | None
    cache_dtype: str
    threads: int | None
    notes: list[str]
    lm: LanguageModel | None = None


def bench(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A bundled model or adapter, a folder, a GGUF file, or a cached hub id.")
    ] = None,
    synthetic: Annotated[
        str | None, typer.Option("--synthetic", metavar="NAME", help="Random weights of a known shape, e.g. opt-6.7b, instead of MODEL.")
    ] = None,
    density: Annotated[
        list[float] | None, typer.Option("--density", metavar="X", help="MLP density to set the predictors' thresholds to; may repeat.")
    ] = None,
    head_density: Annotated[
        list[float] | None, typer.Option("--head-density", metavar="X", help="The same for attention heads; may repeat.")
    ] = None,
    selection: Annotated[
        list[str] | None, typer.Option("--selection", metavar="NAME", help="uniform, clustered or hot-set (with --synthetic); may repeat.")
    ] = None,
    rank: Annotated[int | None, typer.Option("--rank", metavar="N", help="Of the planted predictors (with --synthetic).")] = None,
    against: Annotated[
        list[str] | None, typer.Option("--against", metavar="NAMES", help=f"Peers to time as well: {', '.join(PEERS)}; may repeat.")
    ] = None,
    gguf: Annotated[Path | None, typer.Option("--gguf", metavar="FILE", help="The model that llama.cpp runs.")] = None,
    batch: Annotated[list[int] | None, typer.Option("--batch", metavar="N", help="Rows of a decode step (default 1); may repeat.")] = None,
    context: Annotated[
        list[int] | None, typer.Option("--context", metavar="N", help="Tokens before the first step (default 128); may repeat.")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", metavar="N", help="Decode steps timed in each mode, at least 5.")] = 32,
    text: OptionalTexts = None,
    results: Annotated[Path | None, typer.Option("--results", metavar="FILE", help="Append the rows to a .jsonl file.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="DIR", help="Run folder that keeps the rows.")] = None,
    adapter: AdapterFolder = None,
    accept_base: AcceptBase = False,
    dense: Dense = False,
    backend: Backend = "auto",
    dtype: Dtype = "auto",
    cache_dtype: CacheDtype = "auto",
    screened_head: ScreenedHead = 0,
    threads: Threads = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Time decode, its parts and prefill, dense and sparse in turns, on a text (--text; default: the one that comes with dejavu)."""
    from dejavu.config import require
    from dejavu.measure.bench import bench as measure
    from dejavu.measure.decoders import variants_at
    from dejavu.measure.results import append_rows, completed
    from dejavu.measure.screening import head_agreement

    out = Output(as_json)
    require((model is None) != (synthetic is None), "give either MODEL or --synthetic NAME, one of the two")
    require(not (dense and (density or head_density or selection)), "--dense leaves nothing to select; drop it or the densities")
    names = _peer_names(against or [])
    require(gguf is None or "llama.cpp" in names, "--gguf is the model of --against llama.cpp; add that or leave it out")
    named = results is None or (cache_dtype == "auto" and screened_head == 0)
    require(named, "a row of --results has no key for --cache-dtype and --screened-head; leave them out, or keep the rows with -o DIR")
    folder = None if output is None else open_run(output)
    if synthetic is not None:
        taken = {"--text": text, "--adapter": adapter, "--accept-base": accept_base, "-o": output}
        wrong = [option for option, value in taken.items() if value]
        require(not wrong, f"{', '.join(wrong)} belongs to a MODEL, not to --synthetic (--results keeps rows of both)")
        found = _synthetic(
            synthetic, out, backend=backend, dtype=dtype, cache_dtype=cache_dtype, screened_head=screened_head,
            threads=threads, seed=seed, rank=rank, heads=bool(head_density),
        )  # fmt: skip
        densities = [] if dense else density or [DEFAULT_DENSITY]
        selections = [] if dense else selection or ["uniform"]
    else:
        assert model is not None
        require(selection is None and rank is None, "--selection and --rank plant predictors; they need --synthetic NAME instead of MODEL")
        found = _loaded(
            model, out, texts=text, backend=backend, dtype=dtype, cache_dtype=cache_dtype, screened_head=screened_head, threads=threads,
            seed=seed, adapter=adapter, dense=dense, accept_base=accept_base,
        )  # fmt: skip
        densities, selections = density or [], []
    runs: list[tuple[str, Bench]] = []
    notes = list(found.notes)
    with _peers(names, found, gguf, notes) as peers, progress_bars() as progress:
        others = [{key: getattr(peer, key) for key in ("mode", "version", "dtype", "model", "threads")} for peer in peers]
        variants = variants_at(
            found.model,
            found.layers_for if not dense else lambda *_: None,
            found.ids,
            densities=densities,
            head_densities=head_density or [],
            selections=selections,
        )
        for length in context or [min(DEFAULT_CONTEXT, found.model.config.max_positions // 2)]:
            for size in batch or [1]:
                measured = measure(
                    found.model,
                    variants,
                    found.ids,
                    name=found.name,
                    backend=found.backend,
                    dtype=found.dtype,
                    cache_dtype=found.cache_dtype,
                    screened_head=screened_head,
                    threads=found.threads,
                    batch=size,
                    context=length,
                    steps=steps,
                    synthetic=synthetic is not None,
                    peers=peers,
                    progress=progress,
                )
                runs.append((f"batch {size}, context {length}", measured))
                notes += [note for note in measured.notes if note not in notes]
        screen = None
        if screened_head:  # in the last of the variants: with the predictors, where there are any
            screen = head_agreement(
                found.model, variants[-1].layers, found.ids, screened_head=screened_head, backend=found.backend,
                dtype=found.dtype, cache_dtype=found.cache_dtype, threads=found.threads, progress=progress,
            )  # fmt: skip
    rows = [row for _, measured in runs for row in measured.rows]
    rows = completed(rows) if results is None else append_rows(results, rows)
    for title, measured in runs:
        _show(out, f"Speed of {found.name}{' (synthetic)' if synthetic is not None else ''}: {title}", measured)
    for each in others:
        line = "peer {mode} {version} · {dtype} · threads: {threads} · {model}".format(**each)
        out.show(escape(line))
    if screen is not None:
        out.show(screen_line(screen))
    for note in notes[len(found.notes) :]:
        out.say(f"note: {note}")
    if found.lm is not None and found.lm.adapter is not None and not (density or head_density or dense):
        quality = found.lm.adapter.config.quality
        if {"ppl_dense", "ppl_sparse"} <= set(quality):
            out.show(f"perplexity as the adapter states it: {quality['ppl_dense']:.3f} dense, {quality['ppl_sparse']:.3f} sparse")
    if folder is not None and found.lm is not None:
        out.say(f"Results: {write_sections(folder, found.lm, screen=screen, rows=[row.to_dict() for row in rows])}")
    out.finish(
        {
            "rows": [row.to_dict() for row in rows],
            "ratios": [each for _, measured in runs for each in measured.ratios],
            "peers": others,
            "model": found.name,
            "cache_dtype": found.cache_dtype,
            "screened_head": screened_head,
            "notes": notes,
            **({} if screen is None else {"screen": screen}),
        }
    )


def _peer_names(against: Sequence[str]) -> list[str]:
    from dejavu.config import require

    names = list(dict.fromkeys(name.strip() for given in against for name in given.split(",") if name.strip()))
    unknown = [name for name in names if name not in PEERS]
    require(not unknown, f"--against {', '.join(unknown)} is no peer; choose from {', '.join(PEERS)}")
    return names


def _loaded(model: str, out: Output, *, texts: list[str] | None, **options: Any) -> _Subject:
    from dejavu.measure.texts import DATA, documents, named_texts

    named = named_texts(texts or [str(DATA / "evaluation.txt")])
    lm = open_model(model, out, texts=texts, **options)
    ids = lm.tokenizer.encode("\n".join(part for whole in named.values() for part in documents(whole)))
    layers = lm.layers()
    return _Subject(
        name=lm.name,
        model=lm.model,
        layers_for=lambda selection, density: layers,
        ids=ids,
        backend=lm.backend,
        dtype=lm.dtype,
        cache_dtype=lm.cache_dtype,
        threads=lm.threads,
        notes=list(lm.notes),
        lm=lm,
    )


def _synthetic(
    name: str,
    out: Output,
    *,
    backend: str,
    dtype: str,
    cache_dtype: str,
    screened_head: int,
    threads: int | None,
    seed: int,
    rank: int | None,
    heads: bool,
) -> _Subject:
    from dejavu.config import require
    from dejavu.engine.backends import BACKEND_DTYPES, check_screen, pick_backend, pick_cache_dtype
    from dejavu.language_model import set_threads
    from dejavu.measure.synthetic import RANK, planted_layers, random_ids, shape_of, synthetic_model

    picked = pick_backend(backend, dtype="int8" if dtype == "auto" else dtype)
    wanted = dtype if dtype != "auto" else "int8" if "int8" in BACKEND_DTYPES[picked] else "fp32"
    offered = [each for each in BACKEND_DTYPES[picked] if picked != "torch" or each in ("fp32", "bf16")]
    require(
        wanted in offered,
        f"dtype {wanted!r} is not available for a synthetic model on backend {picked!r}; choose one of {', '.join(offered)}",
    )
    if threads is not None:
        set_threads(threads)
    cached = pick_cache_dtype(cache_dtype, backend=picked, dtype=wanted)
    check_screen(screened_head, backend=picked, vocab_size=shape_of(name).vocab_size)
    made = synthetic_model(name, backend=picked, dtype=wanted, seed=seed)
    if picked == "native":
        made.model.round_cache(cached)
    head = f" · screened head {screened_head:,}" if screened_head else ""
    size = f"{made.num_parameters / 1e6:,.1f} M parameters"
    out.show(f"[bold]{escape(name)}[/bold] (synthetic) · {size} · backend {picked} · {wanted} · cache {cached}{head}")

    def layers_for(selection: str | None, density: float | None) -> Layers | None:
        if selection is None or density is None:
            return None
        return planted_layers(
            made.config, selection=selection, density=density, heads=heads, rank=RANK if rank is None else rank, seed=seed
        )

    return _Subject(
        name=name,
        model=made.model,
        layers_for=layers_for,
        ids=random_ids(made.config, 2 * made.config.max_positions, seed=seed),
        backend=picked,
        dtype=wanted,
        cache_dtype=cached,
        threads=threads,
        notes=[],
    )


@contextmanager
def _peers(names: Sequence[str], found: _Subject, gguf: Path | None, notes: list[str]) -> Iterator[list[Peer]]:
    """The peers by name, loaded from an export of the model; notes gain what could not run, and why."""
    if found.backend == "cuda":
        notes += [f"{name} would run on the CPU and our engine on the GPU: not timed" for name in names]
        names = []
    if not names:
        yield []
        return
    import torch

    from dejavu.config import require
    from dejavu.kernels.native import default_threads
    from dejavu.measure.decoders import export_name
    from dejavu.measure.peers import open_peers
    from dejavu.model.bundle import export

    lm, exported = found.lm, [name for name in names if name != "llama.cpp"]
    with TemporaryDirectory(prefix="dejavu-bench-") as temporary:
        folder: Path | None = None
        if lm is None:
            notes += [f"{name} loads an exported model, and a synthetic one has no tokenizer to export: not timed" for name in exported]
            names = [name for name in names if name not in exported]
        elif exported:
            wide = lm.model.embed.weight.dtype == torch.float32
            require(wide, f"--against {', '.join(exported)} exports the model, which must be loaded as fp32 or int8; leave --dtype out")
            folder = Path(temporary) / export_name(found.name)
            export(lm.model, lm.tokenizer, folder)
        if lm is not None:
            threads = lm.num_threads
        else:  # as many as ours
            threads = found.threads or default_threads() if found.backend == "native" else torch.get_num_threads()
        opened, said = open_peers(names, export_folder=folder, gguf=gguf, threads=threads)
        notes += said
        try:
            yield opened
        finally:
            for peer in opened:
                peer.close()


def _show(out: Output, title: str, measured: Bench) -> None:
    """The rows as a table, and how their speeds compare."""
    union = any(row.union_density is not None for row in measured.rows)
    densities = ("MLP", "heads", *(("union",) if union else ()))
    table = new_table(escape(title), "op", "mode", *densities, "p20 µs", "p50 µs", "p80 µs", "tok/s", "GB/s", "% of read", left=2)
    for row in measured.rows:
        mode = ", ".join(part for part in (row.mode, row.selection, row.dtype if row.backend == row.mode else None) if part is not None)
        cells = [number(row.mlp_density), number(row.head_density), *((number(row.union_density),) if union else ())]
        cells += [number(value, ",.0f") for value in (row.p20_us, row.p50_us, row.p80_us)]
        table.add_row(row.op, mode, *cells, number(row.tok_s, ",.1f"), number(row.gbs, ".1f"), number(row.pct_ceiling, ".0f"))
    out.show(table)
    for each in measured.ratios:
        against = each["against"] if each["against"] == "dense" else f"{each['against']} {each['against_dtype']}"
        chosen = "" if each["selection"] is None else f", {each['selection']}"
        at = "" if each["mode"] == "dense" else f" (MLP density {each['mlp_density']:.3f}, heads {each['head_density']:.3f}{chosen})"
        out.show(ratio(each["ratio"], 1.0, mode=each["mode"], against=escape(against)) + at)
