"""`dejavu info`: what this machine offers, and what a model is and takes."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from dejavu.cli.options import AsJson
from dejavu.cli.output import Output, new_table

OptionalModel = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="A bundled model or adapter, a folder, a GGUF file, or a hub id.")
]


def info(model: OptionalModel = None, as_json: AsJson = False) -> None:
    """Show what this machine offers; with MODEL what it is, which backends run it, and the memory that it takes, weights unread."""
    if model is not None:
        return _model_info(model, Output(as_json))
    import torch

    from dejavu.bench.rows import device_name, versions
    from dejavu.engine.backends import backends, pick_backend
    from dejavu.loading import bundled_adapters
    from dejavu.model.bundle import bundled_models

    out = Output(as_json)
    result = {
        "backends": [{"name": b.name, "available": b.available, "reason": b.reason} for b in backends()],
        "auto": pick_backend("auto"),
        "cpu": device_name(),
        "gpu": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "models": bundled_models(),
        "adapters": bundled_adapters(),
    }
    table = new_table("Backends", "backend", "state", "why", left=3)
    for status in backends():
        state = "[green]available[/green]" if status.available else "[red]not available[/red]"
        table.add_row(status.name, state, status.reason or ("picked by auto" if status.name == result["auto"] else ""))
    table.columns[2].no_wrap = False  # a reason is a sentence, and the only one there is
    machine = new_table("Machine", "part", "value", left=2)
    machine.add_row("CPU", result["cpu"])
    machine.add_row("GPU", ", ".join(result["gpu"]) or "none")
    machine.add_row("threads", str(result["threads"]))
    for name, version in result["versions"].items():
        machine.add_row(name, version)
    machine.add_row("bundled models", ", ".join(result["models"]) or "none")
    machine.add_row("bundled adapters", ", ".join(result["adapters"]) or "none")
    out.show(table, machine)
    out.finish(result)


def _model_info(name: str, out: Output) -> None:
    from dejavu.config import DTYPES
    from dejavu.engine.backends import CAPABILITIES, backends
    from dejavu.engine.footprint import footprint, free_bytes
    from dejavu.files import read_json
    from dejavu.loading import bundled_adapters, held_dtype
    from dejavu.model.bundle import ADAPTER_FOLDER, MODELS_FOLDER
    from dejavu.model.checkpoint import resolve_model
    from dejavu.model.hub import packaged_file
    from dejavu.model.source import open_source

    base = read_json(MODELS_FOLDER / name / ADAPTER_FOLDER / "config.json")["base_id"] if name in bundled_adapters() else name
    source = open_source((packaged_file(base) if base != name else None) or resolve_model(base))
    config = source.config
    try:
        template, lacks = source.tokenizer().has_template, None
    except ValueError as error:  # the rest is worth telling all the same
        template, lacks = None, str(error)
    states = {status.name: status for status in backends()}
    runs, memory = [], []
    for backend, capabilities in CAPABILITIES.items():
        lacking, missing = capabilities.beyond(config), states[backend].reason
        runs.append({"backend": backend, "runs": not lacking, "lacking": list(lacking), "available": missing is None, "reason": missing})
        if lacking or missing is not None:
            continue
        free = free_bytes(backend)
        auto = held_dtype("auto", source.stored_dtype, backend)
        computed = [each for each in DTYPES if each in capabilities.dtypes and (backend, each) != ("torch", "fp16")]
        for dtype in dict.fromkeys((auto, *computed, *(("stored",) if backend != "cuda" else ()))):
            shown = source.stored_dtype if dtype == "stored" else dtype
            if (auto == "stored" and dtype == source.stored_dtype) or (auto != "stored" and shown in computed and dtype == "stored"):
                continue
            cache_dtype = capabilities.cache_dtype(dtype=shown if capabilities.packs or dtype != "stored" else "fp32")  # as it computes
            taken = footprint(source.sizes, config, backend=backend, dtype=dtype, cache_dtype=cache_dtype)
            tokens = None if free is None else taken.tokens(free)
            memory.append(
                {
                    "backend": backend, "dtype": shown, "auto": dtype == auto, "cache_dtype": cache_dtype, "weights": taken.weights,
                    "cache_per_token": taken.per_token, "free": free, "cache_tokens": tokens,
                    "max_context": None if tokens is None else min(tokens, config.max_positions),
                    "max_batch": None if tokens is None else tokens // config.max_positions,
                }
            )  # fmt: skip
    result: dict[str, Any] = {
        "model": name, "path": str(source.path), "family": config.family, "parameters": sum(source.sizes.values()),
        "stored_dtype": source.stored_dtype, "types": dict(source.sizes), "layers": config.num_layers, "hidden_size": config.hidden_size,
        "neurons": config.intermediate_size, "heads": config.num_heads, "kv_heads": config.num_kv_heads, "activation": config.activation,
        "vocabulary": config.vocab_size, "context": config.max_positions, "chat_template": template,
        "tokenizer_error": lacks, "backends": runs, "memory": memory,
    }  # fmt: skip
    out.show(_about(result), _runs(runs), _memory(memory, config.max_positions))
    out.say("room: for keys and values of one text, and of how many texts of the whole context, in the memory that is free now")
    out.finish(result)


def _about(result: dict[str, Any]) -> Table:
    table = new_table(escape(result["model"]), "what", "value", left=2)
    types = ", ".join(
        f"{kind} {count / result['parameters']:.1%}" for kind, count in sorted(result["types"].items(), key=lambda each: -each[1])
    )
    gated = f"{result['layers']} layers of {result['neurons']:,} neurons ({result['activation']}) and {result['heads']} heads"
    for what, value in (
        ("family", result["family"]),
        ("parameters", f"{result['parameters'] / 1e6:,.1f} M"),
        ("stored as", f"{result['stored_dtype']} ({types})"),
        ("shape", f"{gated}, {result['kv_heads']} of keys and values"),
        ("vocabulary", f"{result['vocabulary']:,} tokens"),
        ("context", f"{result['context']:,} tokens"),
        ("tokenizer", result["tokenizer_error"] or "read"),
        ("chat template", "yes" if result["chat_template"] else "none"),
        ("lies at", result["path"]),
    ):
        table.add_row(what, escape(value))
    return table


def _runs(runs: list[dict[str, Any]]) -> Table:
    table = new_table("Runs on", "backend", "state", "why", left=3)
    table.columns[2].no_wrap = False
    for row in runs:
        able = row["runs"] and row["available"]
        reason = f"it does not compute {', '.join(row['lacking'])}" if row["lacking"] else row["reason"] or ""
        table.add_row(row["backend"], "[green]yes[/green]" if able else "[red]no[/red]", escape(reason))
    return table


def _memory(rows: list[dict[str, Any]], context: int) -> Table:
    table = new_table("Memory", "backend", "dtype", "weights", "cache a token", "room", f"texts of {context:,}", left=2)
    for row in rows:
        tokens = row["cache_tokens"]
        room = "?" if tokens is None else f"{row['max_context']:,} tokens" if tokens else "does not fit"
        texts = "?" if tokens is None else f"{row['max_batch']:,}"
        cells = (f"{row['weights'] / 1e9:,.2f} GB", f"{row['cache_per_token'] / 1e3:,.1f} kB", room, texts)
        table.add_row(row["backend"], row["dtype"] + (" (auto)" if row["auto"] else ""), *cells, style="bold" if row["auto"] else "")
    return table
