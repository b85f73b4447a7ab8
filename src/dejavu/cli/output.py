"""What a command shows: tables and notes on stdout for people, one JSON object on its last line for programs.

Warnings go to stderr, and so do progress bars, but only where that is a terminal.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, RenderableType
from rich.file_proxy import FileProxy
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from dejavu.figures import HeadAgreement

WIDTH = 120  # where stdout is no terminal


class Output:
    """stdout of one command. With as_json nothing but the object given to `finish` is written."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)

    def show(self, *things: RenderableType) -> None:
        """Print for a person: strings (rich markup) and tables."""
        if not self.as_json:
            for thing in things:
                self.console.print(thing)

    def say(self, text: str) -> None:
        """A plain line, whatever brackets it holds; above the bars where some are being drawn on the same terminal."""
        if self.as_json:
            return
        if isinstance(sys.stdout, FileProxy) and self.console.is_terminal:
            print(text)
        else:
            self.console.print(text, markup=False)

    def write(self, text: str) -> None:
        """Plain text as it comes, at once."""
        if not self.as_json:
            print(text, end="", flush=True)

    def warn(self, text: str) -> None:
        """A line on stderr on what came out otherwise than one may expect."""
        print(f"note: {text}", file=sys.stderr)

    def finish(self, result: dict[str, Any]) -> None:
        """The object of --json. Numbers that are not finite become null: JSON has no word for them."""
        if self.as_json:
            print(json.dumps(plain(result), ensure_ascii=False, allow_nan=False))


def plain(value: Any) -> Any:
    """The value with infinite and undefined numbers as None."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def new_table(title: str, *columns: str, left: int = 1) -> Table:
    """A table whose first `left` columns are text and whose others are numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", no_wrap=True)
    return table


def number(value: float | None, form: str = ".3f") -> str:
    """A number for a table cell, a dash where there is none."""
    return "–" if value is None else format(value, form)  # noqa: RUF001


def percent(value: float | None, digits: int = 1) -> str:
    return number(value, f".{digits}%")


def speed(tok_s: float | None) -> str:
    return number(tok_s, ",.1f") + " tok/s"


def ratio(speed: float | None, base: float | None, *, mode: str = "sparse", against: str = "dense") -> str:
    """How one speed compares with another, in plain words."""
    if not speed or not base:
        return f"speed ratio {mode} / {against}: unknown"
    value = speed / base
    word = "faster" if value >= 1 else "slower"
    return f"speed ratio {mode} / {against}: [bold]{value:.2f}×[/bold] ({mode} is {word})"  # noqa: RUF001


def screen_line(screen: HeadAgreement) -> str:
    """What a screened head was measured to do."""
    share = f"[bold]{screen['agreement']:.2%}[/bold] of {screen['tokens']:,} tokens"
    what = f"screened head of {screen['shortlist']:,.0f} tokens (threshold {screen['screened_head']:.3g})"
    return f"{what}: the full head's choice after {share}, [bold]{screen['missed']:.2%}[/bold] of its probability missed"


@contextmanager
def progress_bars(shown: bool = True) -> Generator[Callable[[str, int, int], None] | None]:
    """A callback progress(what, done, total) that draws a bar for each `what`; None where stderr is no terminal or nothing is `shown`.

    What follows a tab in `what` is shown next to the bar and may change.
    """
    if not (shown and sys.stderr.isatty()):
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def progress(what: str, done: int, total: int) -> None:
            what, _, detail = what.partition("\t")
            if what not in tasks:
                for task in tasks.values():  # earlier parts are over: only what runs is shown
                    bars.update(task, visible=False)
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total, description=f"{what} {detail}".rstrip())

        yield progress


@contextmanager
def resumable(saved: str) -> Generator[None]:
    """Where work within is interrupted, say on stderr what is saved and how to go on; where memory ends, in its message."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"\ninterrupted; {saved}", file=sys.stderr)
        raise
    except MemoryError as error:
        raise MemoryError(f"{error}; {saved}") from error
