"""The peers of `dejavu bench --against`: which were asked for, and how they get at the model."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from dejavu.cli.subjects import Subject

if TYPE_CHECKING:
    from dejavu.bench.variants import Peer

PEERS = ("transformers", "transformers-compile", "ctranslate2", "llama.cpp")


def peer_names(against: Sequence[str]) -> list[str]:
    """Names of peers, each once. Raises ValueError for one that is none."""
    from dejavu.config import require

    names = list(dict.fromkeys(name.strip() for given in against for name in given.split(",") if name.strip()))
    unknown = [name for name in names if name not in PEERS]
    require(not unknown, f"--against {', '.join(unknown)} is no peer; choose from {', '.join(PEERS)}")
    return names


@contextmanager
def opened_peers(names: Sequence[str], subject: Subject, gguf: Path | None, notes: list[str]) -> Generator[list[Peer]]:
    """The peers by name; notes gain what could not run, and why.

    On the GPU, and for a made-up model on the torch backend, transformers runs our own tensors; else peers load an export.
    """
    from dejavu.bench.peers.cuda import VIEW_PEERS

    on_views: list[str] = []
    if subject.options.backend == "cuda" or (subject.options.backend == "torch" and subject.synthetic):
        on_views = [name for name in names if name in VIEW_PEERS]
    others = [name for name in names if name not in on_views]
    if subject.options.backend == "cuda":
        notes += [f"{name} would run on the CPU and our engine on the GPU: not timed" for name in others]
        others = []
    with TemporaryDirectory(prefix="dejavu-bench-") as temporary:
        opened: list[Peer] = []
        try:
            if on_views:
                opened += _on_our_tensors(on_views, subject, notes)
            if others:
                opened += _on_an_export(others, subject, gguf, Path(temporary), notes)
            yield opened
        finally:
            for peer in opened:
                peer.close()


def _on_our_tensors(names: Sequence[str], subject: Subject, notes: list[str]) -> list[Peer]:
    from dejavu.bench.peers.cuda import open_views

    opened, said = open_views(names, subject.model, name=subject.name)
    notes += said
    return opened


def _on_an_export(names: Sequence[str], subject: Subject, gguf: Path | None, temporary: Path, notes: list[str]) -> list[Peer]:
    import torch

    from dejavu.bench.peers.cpu import open_peers
    from dejavu.bench.variants import export_name
    from dejavu.config import require
    from dejavu.kernels.processors import default_threads
    from dejavu.model.bundle import export

    lm, exported = subject.lm, [name for name in names if name != "llama.cpp"]
    folder: Path | None = None
    if lm is None:
        notes += [f"{name} loads an exported model, and a synthetic one has no tokenizer to export: not timed" for name in exported]
        names = [name for name in names if name not in exported]
    elif exported:
        wide = lm.model.dtype == torch.float32
        require(wide, f"--against {', '.join(exported)} exports the model, which must be loaded as fp32 or int8; leave --dtype out")
        folder = temporary / export_name(subject.name)
        export(lm.model, lm.tokenizer, folder)
    if lm is not None:
        threads = lm.num_threads
    else:  # as many as ours
        threads = subject.options.threads or default_threads() if subject.options.backend == "native" else torch.get_num_threads()
    opened, said = open_peers(names, export_folder=folder, gguf=gguf, threads=threads)
    notes += said
    return opened
