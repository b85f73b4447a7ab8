"""`dejavu plant`: a made-up checkpoint with planted sparsity, of any size, as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dejavu.cli.options import AsJson, Seed
from dejavu.cli.output import Output, progress_bars


def plant(
    shape: Annotated[str, typer.Argument(metavar="SHAPE", help="What it is like: a name that `bench --synthetic` takes.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to write.")],
    dtype: Annotated[str, typer.Option("--dtype", metavar="NAME", help="fp32, fp16 or bf16.")] = "fp16",
    density: Annotated[
        float | None,
        typer.Option("--density", metavar="X", help="Share of neurons that fire for a token (default: 0.05; of a SiLU shape none)."),
    ] = None,
    layers: Annotated[int | None, typer.Option("--layers", metavar="N", help="The first N layers alone (default: all).")] = None,
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="Where weights are drawn: auto, cpu or cuda.")] = "auto",
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Write a made-up model of the shape of a real one, sparse by design where its activation is ReLU, else random."""
    import torch

    from dejavu.bench.models.folder import write_planted
    from dejavu.bench.models.made_up import made_up
    from dejavu.config import require

    out = Output(as_json)
    asked = made_up(shape, dtype=dtype, density=density, num_layers=layers)
    require(device in ("auto", "cpu", "cuda"), f"device {device!r} is not known; choose one of auto, cpu, cuda")
    has_gpu = torch.cuda.is_available()
    require(device != "cuda" or has_gpu, "device cuda is not available: torch finds no GPU; take cpu")
    place = "cuda" if has_gpu and device != "cpu" else "cpu"
    with progress_bars() as progress:
        about = write_planted(asked, folder, device=place, seed=seed, progress=progress)
    sparse = "random weights" if about["density"] is None else f"{about['density']:.3g} of the neurons fire"
    out.say(f"Wrote {about['folder']} ({about['bytes'] / 1e9:,.2f} GB, {dtype}, {about['layers']} layers): {sparse}")
    out.finish(about)
