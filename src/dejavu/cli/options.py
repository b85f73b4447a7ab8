"""Options that commands share, and the model they describe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from dejavu.cli.output import Output
from dejavu.engine.options import EngineOptions

if TYPE_CHECKING:
    from dejavu.language_model import LanguageModel
    from dejavu.loading import BeforeWeights

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A bundled model or adapter, a folder, a GGUF file, or a hub id.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on the last line of stdout and nothing else there.")]
Backend = Annotated[str, typer.Option("--backend", metavar="NAME", help="auto, torch, native or cuda.")]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype", metavar="NAME", help="auto, stored (as the file has it), fp32, fp16, bf16, int8 or int4 (the last two native)."
    ),
]
CacheDtype = Annotated[str, typer.Option("--cache-dtype", metavar="NAME", help="Of keys and values: auto, fp32, fp16 or int8 (native).")]
ScreenedHead = Annotated[
    float | None,
    typer.Option("--screened-head", metavar="P", help="Threshold of the adapter's screened head (native); 0: the full head."),
]
Threads = Annotated[int | None, typer.Option("--threads", metavar="N", help="CPU threads.")]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Makes the command reproducible.")]
AdapterFolder = Annotated[
    Path | None,
    typer.Option("--adapter", metavar="DIR", help="An adapter, by folder or hub id; default: the one that came with MODEL."),
]
AcceptBase = Annotated[
    bool,
    typer.Option("--accept-base", help="Let the adapter accept MODEL, if its perplexity on the adapter's training text (--text) agrees."),
]
Dense = Annotated[bool, typer.Option("--dense", help="Ignore the adapter.")]
Download = Annotated[bool, typer.Option("--download", help="Fetch from the Hugging Face hub what is not on this machine, unasked.")]
Offline = Annotated[bool, typer.Option("--offline", help="Ask the hub for nothing, and nobody whether to.")]
Texts = Annotated[list[str], typer.Option("--text", metavar="FILE", help="A .txt or .xz file or a quoted glob; may repeat.")]
OptionalTexts = Annotated[list[str] | None, typer.Option("--text", metavar="FILE", help="A .txt or .xz file or a quoted glob; may repeat.")]
BaseTexts = Annotated[
    list[str] | None,
    typer.Option("--text", metavar="FILE", help="What the adapter was trained on (its README.md says), for --accept-base; may repeat."),
]


def open_model(
    model: str,
    out: Output,
    options: EngineOptions,
    *,
    seed: int,
    adapter: Path | None = None,
    dense: bool = False,
    accept_base: bool = False,
    texts: list[str] | None = None,
    needs_adapter: bool = True,
    before_weights: BeforeWeights | None = None,
    download: bool = False,
    offline: bool = False,
    drawing: Callable[[LanguageModel], str] | None = None,
) -> LanguageModel:
    """Load the model of a command and say what was picked. needs_adapter: whether the command would use one. drawing: how it draws
    text, in words. download, offline: whether the hub is asked for what is not here; a person at a terminal is asked first, unless
    one of them is set.
    """
    import torch

    from dejavu.cli.accept import accept, check_own
    from dejavu.cli.asking import consent, interruptible
    from dejavu.config import require
    from dejavu.loading import load

    require(not (dense and adapter is not None), "--dense ignores the adapter that --adapter names; give one of the two")
    require(not (accept_base and adapter is None), "--accept-base needs --adapter DIR, the adapter that is to accept this model")
    require(0 <= seed < 2**64, f"seed must lie between 0 and 2^64 - 1, not {seed}")
    if accept_base and adapter is not None:
        check_own(adapter)
    torch.manual_seed(seed)
    chosen = None if dense or accept_base or not needs_adapter else "bundled" if adapter is None else adapter
    allowed = consent(out, download=download, offline=offline)
    with interruptible():
        lm = load(
            model, backend=options.backend, dtype=options.dtype, cache_dtype=options.cache_dtype, screened_head=options.screened_head,
            threads=options.threads, adapter=chosen, before_weights=before_weights, download=allowed,
        )  # fmt: skip
    if accept_base and adapter is not None:
        lm.adapter = accept(lm, adapter, texts or [], out)
        lm.notes = (*lm.notes, *lm.adapter.notes)
    drawn = "" if drawing is None else f" · {drawing(lm)}"
    out.show(describe(lm, adapter_matters=needs_adapter) + drawn, *(f"[yellow]note:[/yellow] {escape(note)}" for note in lm.notes))
    return lm


def screened_head(lm: LanguageModel) -> str:
    """The screened head that runs, and at its own threshold what was measured of it."""
    screen = lm.screen()
    assert screen is not None and lm.adapter is not None and lm.adapter.config.screened_head is not None, "a screened head"
    measured = lm.adapter.config.screened_head
    if screen.threshold != measured.threshold:
        return f"screened head at {screen.threshold:.3g}"
    kept = f"{measured.tokens:,.0f} tokens, {measured.missed:.2%} of probability missed, agreement {measured.agreement:.2%}"
    return f"screened head at {screen.threshold:.3g}: {kept}"


def describe(lm: LanguageModel, *, adapter_matters: bool) -> str:
    """One line on what runs: model, size, backend, dtypes, threads, adapter."""
    parts = [f"[bold]{escape(lm.name)}[/bold]", f"{lm.num_parameters / 1e6:,.1f} M parameters", f"backend {lm.backend}", lm.dtype]
    if lm.backend == "torch" and lm.model.stored_as != lm.dtype:
        parts[-1] += f" (weights {lm.model.stored_as})"
    parts.append(f"cache {lm.cache_dtype}")
    if lm.screened_head:
        parts.append(screened_head(lm))
    parts.append(f"{lm.num_threads} thread{'s' * (lm.num_threads > 1)}")
    if adapter_matters and lm.adapter is None:
        parts.append("dense")
    elif adapter_matters and lm.adapter is not None:
        config = lm.adapter.config
        parts.append(f"adapter: MLP density {config.mlp_density:.3f}, heads {config.head_density:.3f}")
    return " · ".join(parts)
