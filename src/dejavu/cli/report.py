"""`dejavu report`: one self-contained HTML page from run folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dejavu.cli.options import AsJson
from dejavu.cli.output import Output


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders that demo, profile, train, eval or bench wrote.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE", help="Default: report.html in the first RUN.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write one HTML page from the results of one or several runs."""
    from dejavu.config import require
    from dejavu.files import absolute
    from dejavu.report.report import REPORT_FILE, RESULTS_FILE, read_results, write_report

    out = Output(as_json)
    for run in runs:
        require(run.exists(), f"run folder not found: {absolute(run)}")
        require(not run.is_dir() or (run / RESULTS_FILE).is_file(), f"{absolute(run)} has no {RESULTS_FILE}: no dejavu command wrote it")
    first = runs[0] if runs[0].is_dir() else runs[0].parent
    path = absolute(first / REPORT_FILE if output is None else output)
    require(not path.is_dir(), f"{path} is a folder; give the path of an .html file")
    written = write_report(read_results(runs), path)
    out.write(f"Report: {written}\n")  # as it comes: a path broken over two lines cannot be opened
    out.finish({"report": str(written)})
