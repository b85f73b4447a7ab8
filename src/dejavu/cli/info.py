"""`dejavu info`: what this machine offers."""

from __future__ import annotations

from dejavu.cli.options import AsJson
from dejavu.cli.output import Output, new_table


def info(as_json: AsJson = False) -> None:
    """Show backends, processor, GPU, versions and the models that come with the package."""
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
