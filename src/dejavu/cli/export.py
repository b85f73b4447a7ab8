"""`dejavu export`: a model as a plain Hugging Face folder, or as a folder of few bits, with its adapter next to it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from dejavu.cli.options import AdapterFolder, AsJson, Dense, Download, Model, Offline, open_model
from dejavu.cli.output import Output
from dejavu.engine.options import EngineOptions


def export(
    model: Model,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to write.")],
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="NAME", help="fp32 or bf16; for dejavu alone int8, int4, q8_0, q4_0, q4_1, q5_0 or q5_1.")
    ] = "fp32",
    adapter: AdapterFolder = None,
    dense: Dense = False,
    merge: Annotated[
        bool, typer.Option("--merge", help="Write the model that the adapter makes (changed weights and activation), without an adapter.")
    ] = False,
    peft: Annotated[
        Path | None, typer.Option("--peft", metavar="DIR", help="Also write the adapter's changes of weights as a LoRA that PEFT reads.")
    ] = None,
    download: Download = False,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Write a folder that transformers loads, or one of few bits; its adapter goes to DIR/adapter, which loading DIR uses."""
    from dejavu.config import require
    from dejavu.files import absolute
    from dejavu.model.adapter import merged_model
    from dejavu.model.bundle import EXPORT_DTYPES
    from dejavu.model.bundle import export as write_export
    from dejavu.model.peft import write_peft
    from dejavu.model.rounding import rounding_note

    out = Output(as_json)
    require(dtype in EXPORT_DTYPES, f"dtype {dtype!r} cannot be exported; choose one of {', '.join(EXPORT_DTYPES)}")
    lm = open_model(
        model, out, EngineOptions(backend="torch", dtype="stored"), seed=0, adapter=adapter, dense=dense, download=download, offline=offline
    )  # fmt: skip
    if peft is not None and lm.adapter is None:
        raise ValueError("--peft writes an adapter's changes of weights, and there is no adapter; give one with --adapter DIR")
    if peft is not None and lm.adapter is not None:
        write_peft(lm.adapter, lm.config, peft)
    merged = merged_model(lm.model, lm.adapter) if merge else None
    written = lm.adapter if merged is None else None
    sampling = lm.checkpoint.sampling if merged is None else lm.sampling
    write_export(merged or lm.model, lm.tokenizer, folder, dtype=dtype, adapter=written, sampling=sampling)
    path = absolute(folder)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    with_adapter = "without an adapter" if written is None else f"with its adapter in {path / 'adapter'}"
    digest = None if lm.adapter is None else lm.adapter.digest
    note = None if merge else rounding_note(lm.base_hash, dtype, stored_dtype=lm.checkpoint.stored_dtype, adapter=digest)
    if note is not None:
        out.show(f"[yellow]note:[/yellow] {escape(note)}; dejavu quantize rounds with activations in view")
    out.say(f"Wrote {path} ({size / 1e6:,.1f} MB, {dtype}), {with_adapter}")
    about = {"folder": str(path), "dtype": dtype, "bytes": size, "adapter": written is not None, "merged": merge}
    out.finish(about | {"model": lm.name, "note": note})
