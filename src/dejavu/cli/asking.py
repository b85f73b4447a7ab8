"""Whether a command may fetch from the hub: as its options say, or as a person at a terminal does."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from dejavu.cli.output import Output

if TYPE_CHECKING:
    from dejavu.model.download import Download, Offer


def consent(out: Output, *, download: bool, offline: bool) -> Download:
    """What `load` takes as `download`. Nobody is asked where an option answers, where there is no terminal, and where stdout is JSON.

    Raises ValueError where both options are set.
    """
    from dejavu.config import require

    require(not (download and offline), "--download fetches what --offline forbids to; give one of the two")
    asks = not (download or offline or out.as_json) and sys.stdin.isatty() and sys.stderr.isatty()
    return ask if asks else download


def ask(offer: Offer) -> bool:
    """The question, on stderr: stdout may be a file."""
    return typer.confirm(f"{offer.text}. Download?", err=True)


@contextmanager
def interruptible() -> Generator[None]:
    """Where a download within is interrupted, say what is kept of it."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if str(stop):
            print(f"\ndejavu: {stop}", file=sys.stderr)
        raise
