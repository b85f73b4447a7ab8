"""`dejavu try`: what sparsity gains a model on this machine, with nothing trained."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from dejavu.cli.options import (
    AdapterFolder,
    AsJson,
    Backend,
    CacheDtype,
    Download,
    Dtype,
    Model,
    Offline,
    OptionalTexts,
    Seed,
    Threads,
    open_model,
)
from dejavu.cli.output import Output, new_table, number, percent, progress_bars
from dejavu.engine.options import EngineOptions

if TYPE_CHECKING:
    from dejavu.bench.trial import Trial
    from dejavu.config import ModelConfig


def trial(
    model: Model,
    text: OptionalTexts = None,
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
    """Time MODEL dense and in every way to select that needs no training, with what each costs in quality; advice at the end."""
    from dejavu.bench.trial import TOKENS, trial
    from dejavu.loading import bundled_adapter_of
    from dejavu.model.texts import DATA, named_texts
    from dejavu.quality.evaluate import scored_part

    out = Output(as_json)
    options = EngineOptions(backend=backend, dtype=dtype, cache_dtype=cache_dtype, threads=threads)
    lm = open_model(
        model, out, options, seed=seed, adapter=adapter,
        download=download, offline=offline,
        before_weights=lambda config, picked, held, sizes: check_fits(model, config, picked, held, sizes),
    )  # fmt: skip
    engine = {"--backend": backend, "--dtype": dtype}
    called = " ".join([model, *_given(engine)])  # for the command to run next
    measured = "\n".join(named_texts(text or [str(DATA / "evaluation.txt")]).values())
    set_on = (DATA / "calibration.txt").read_text(encoding="utf-8")
    part = scored_part(lm.tokenizer, measured, TOKENS)
    with progress_bars() as progress:
        found = trial(
            lm.model,
            name=lm.name,
            called=called,
            chatted=" ".join([called, *_given({"--cache-dtype": cache_dtype, "--adapter": adapter})]),
            chatted_dense=" ".join([called, *_given({"--cache-dtype": cache_dtype})]),
            own=lm.layers(),
            screen=lm.screen(),
            threshold_ids=lm.tokenizer.encode_plain(set_on[:20_000]),
            measured_ids=part.ids,
            bos=part.bos,
            options=lm.options,
            progress=progress,
        )
    known = None if lm.adapter is not None else bundled_adapter_of(lm.base_hash)
    notes = list(lm.notes) if known is None else [*lm.notes, f"an adapter of this model comes with dejavu: dejavu try {known}"]
    if lm.backend == "native" and lm.dtype == "fp32":
        notes.append("weights of fewer bits are read faster: --dtype bf16, or int8 for some quality")
    peak = peak_bytes(lm.backend)
    show(
        out,
        found,
        f"{lm.dtype}{' on the GPU' if lm.backend == 'cuda' else ''}",
        peak,
        notes[len(lm.notes) :],
        tokens=len(part.ids),
        own_text=bool(text),
    )
    about = {"model": lm.name, "backend": lm.backend, "dtype": lm.dtype, "cache_dtype": lm.cache_dtype, "notes": notes}
    rows = [row.to_dict() for row in found.rows]
    out.finish({**asdict(found), "rows": rows, "peak_bytes": peak, **about})


def _given(options: Mapping[str, object]) -> list[str]:
    """What was asked for by an option, as it is typed."""
    return [f"{name} {value}" for name, value in options.items() if value not in (None, "auto")]


def check_fits(name: str, config: ModelConfig, backend: str, dtype: str, sizes: Mapping[str, int]) -> None:
    """Raise ValueError where this machine's free memory is less than a trial takes, before weights are read."""
    import torch

    from dejavu.bench.trial import memory_needed
    from dejavu.config import require
    from dejavu.files import absolute
    from dejavu.kernels.memory import available_bytes

    needed = memory_needed(sizes, config, backend=backend, dtype=dtype)
    free = torch.cuda.mem_get_info()[0] if backend == "cuda" else available_bytes(absolute("/"))
    where = "on the GPU" if backend == "cuda" else "on this machine"
    fix = "give --dtype int8 or close other programs" if backend == "native" and dtype != "int8" else "take a smaller model"
    short = free is not None and needed > free
    gigabytes = f"about {needed / 1e9:.1f} GB, and {(free or 0) / 1e9:.1f} GB are free {where}"
    held = "as it is stored" if dtype == "stored" else f"in {dtype}"
    require(not short, f"{name} {held} takes {gigabytes}; {fix}")


def peak_bytes(backend: str) -> int | None:
    """The most memory that this process has held: of the GPU on cuda, else resident; None where the system does not tell (Windows)."""
    import torch

    if backend == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ModuleNotFoundError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def show(out: Output, found: Trial, held: str, peak: int | None, notes: Sequence[str], *, tokens: int, own_text: bool) -> None:
    """The table, memory, advice and what to run next. held: how the weights are held, in words. notes: what else may help."""
    table = new_table("\nWhat it gains here", "way", "keeps", "reads", "tok/s", "times dense", "perplexity", "change", "±")
    for row in found.rows:
        cells: list[Any] = [percent(row.mlp_density, 0), percent(row.read_share, 0), number(row.tok_s, ",.1f"), number(row.times, ".2f")]
        change = "" if row.way == "dense" else number(row.rise, "+.1%")
        error = "" if row.rise_stderr is None else percent(row.rise_stderr)
        table.add_row(row.label, *cells, number(row.ppl, ".2f"), change, error, style="bold" if row.pays else "")
    out.show(table)
    for row in found.rows:
        if row.note is not None:
            out.say(f"{row.label}: {row.note}")
    out.say(f"perplexity: of {tokens:,} tokens{'' if own_text else ' of the text that comes with dejavu'}, so not that of other pages.")
    out.say("keeps: share of the MLP's neurons (input: of its weights). reads: bytes of a step, of a dense one's.")
    most = "" if peak is None else f"; this trial took {peak / 1e9:.1f} GB at most"
    out.say(f"Memory: weights {found.weight_bytes / 1e6:,.0f} MB in {held}{most}.")
    out.show(f"\n[bold]{escape(found.advice)}[/bold]")
    out.say(f"Next: {found.command}")
    for note in notes:
        out.say(f"Also: {note}")
