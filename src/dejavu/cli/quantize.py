"""`dejavu quantize`: a folder of few bits, rounded with the activations of a text in view, and what that costs on unseen text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from dejavu.cli.options import AdapterFolder, AsJson, Download, Model, Offline, Seed, Texts, Threads, open_model
from dejavu.cli.output import Output, progress_bars, resumable
from dejavu.engine.options import EngineOptions

if TYPE_CHECKING:
    from dejavu.model.adapter import Adapter


def quantize(
    model: Model,
    text: Texts,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="The folder to write.")],
    dtype: Annotated[str, typer.Option("--dtype", metavar="NAME", help="int4, int8, q4_0, q4_1 or q8_0.")] = "int4",
    int8: Annotated[
        str, typer.Option("--int8", metavar="KINDS", help="What gets 8 bits all the same, of embed, qkv, o, up, down; joined by commas.")
    ] = "embed",
    max_tokens: Annotated[int, typer.Option("--max-tokens", metavar="N", help="Tokens used, spread evenly over the text.")] = 32_768,
    eval_text: Annotated[
        list[str] | None, typer.Option("--eval-text", metavar="FILE", help="What to measure on; not set: a part of the text; may repeat.")
    ] = None,
    adapter: AdapterFolder = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Merge the adapter's changes of weights first; what it selects goes along in any case.")
    ] = False,
    threads: Threads = None,
    seed: Seed = 0,
    download: Download = False,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Round a model to few bits with its activations in view; writes a folder that loads as it is, and says what it costs."""
    from dejavu.cli.accept import TOLERANCE
    from dejavu.files import absolute, check_replaceable, new_folder, write_text
    from dejavu.model.adapter import merged_model
    from dejavu.model.bundle import write_grids
    from dejavu.model.texts import corpus_hash, named_texts
    from dejavu.offline.quantize import QuantizeConfig, calibration_windows, quantized, quantized_card, window_perplexity

    out = Output(as_json)
    config = QuantizeConfig(dtype=dtype, int8=tuple(kind for kind in int8.split(",") if kind), max_tokens=max_tokens)
    target = absolute(output)
    check_replaceable(target)
    texts = list(named_texts(text).values())
    unseen = None if eval_text is None else list(named_texts(eval_text).values())
    options = EngineOptions(backend="torch", dtype="stored", cache_dtype="fp32", threads=threads)
    lm = open_model(model, out, options, seed=seed, adapter=adapter, download=download, offline=offline)
    calibration, check = calibration_windows(lm.tokenizer, lm.config, texts, unseen, config)
    base = merged_model(lm.model, lm.adapter) if merge else lm.model
    with resumable("nothing was written; run the command again"), progress_bars() as progress:
        before = window_perplexity(base, check)
        made = quantized(base, calibration, config, progress)
        after = window_perplexity(made, check)
        found: dict[str, Any] = {
            "ppl_before": before, "ppl_after": after, "rise": after / before - 1, "eval_tokens": check[:, 1:].numel(),
            "tokens": calibration.numel(), "calibration_text_hash": corpus_hash(texts),
            "eval_text_hash": None if unseen is None else corpus_hash(unseen), **config.to_dict(),
        }  # fmt: skip
        kept, note = (lm.adapter.merged(), None) if merge and lm.adapter else _fitting(lm.adapter, found["rise"], TOLERANCE)
        with new_folder(target) as folder:
            write_grids(made, lm.tokenizer, folder, adapter=kept, sampling=lm.sampling if merge else lm.checkpoint.sampling)
            write_text(folder / "README.md", quantized_card(lm.name, lm.checkpoint.stored_dtype, found))
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    out.show(
        f"perplexity of {found['eval_tokens']:,} unseen tokens {before:.3f} before, {after:.3f} after: [bold]{found['rise']:+.2%}[/bold]"
    )
    if note is not None:
        out.show(f"[yellow]note:[/yellow] {escape(note)}")
    out.say(f"Wrote {target} ({size / 1e6:,.1f} MB, {config.dtype}). Use it: dejavu generate {output} --prompt ...")
    out.finish(found | {"folder": str(target), "bytes": size, "adapter": kept is not None, "merged": merge, "note": note, "model": lm.name})


def _fitting(adapter: Adapter | None, rise: float, tolerance: float) -> tuple[Adapter | None, str | None]:
    """The adapter that came with the model, where it may run on the rounded one by the rule of --accept-base, and why not."""
    if adapter is None or abs(rise) <= tolerance:
        return adapter, None
    differs = f"dense perplexity differs by {rise:+.1%} from that of the model that it was made for, and {tolerance:.0%} is allowed"
    return None, f"the adapter is left out: {differs}; train one for this folder"
