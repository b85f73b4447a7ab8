"""Run folders: where profile, train, eval and bench leave what they measured, in the form that `dejavu report` reads.

A run folder holds `results.json`: the sections of report/report.py. A later command on the same model adds its section.
"""

from __future__ import annotations

import atexit
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dejavu.cli.output import plain

if TYPE_CHECKING:
    from dejavu.figures import HeadAgreement
    from dejavu.language_model import LanguageModel

PARTS = "eval-parts.json"

_kept = contextlib.ExitStack()
atexit.register(_kept.close)


def open_run(path: Path) -> Path:
    """The run folder, made if it is not there, kept until this process ends. Raises ValueError where it may not be written."""
    from dejavu.files import absolute, check_replaceable, working_in

    path = absolute(path)
    check_replaceable(path)
    _kept.enter_context(working_in(path))
    return path


def write_sections(folder: Path, lm: LanguageModel, *, screen: HeadAgreement | None = None, **sections: Any) -> Path:
    """Put sections into the folder's results.json, next to those that it has of the same model; returns the file.

    screen: what a screened head was measured to do, which belongs to what ran.
    """
    from dejavu.bench.rows import about
    from dejavu.files import read_object, write_json
    from dejavu.report.report import RESULTS_FILE

    path = folder / RESULTS_FILE
    held = read_object(path) if path.is_file() else {}
    model = held.get("model")
    same = isinstance(model, dict) and model.get("base_hash") == lm.base_hash
    facts = about(lm.checkpoint, backend=lm.backend, dtype=lm.dtype, threads=lm.num_threads, cuda=lm.backend == "cuda")
    facts["environment"] |= {"cache_dtype": lm.cache_dtype, "screened_head": lm.screened_head}
    if screen is not None:
        facts["environment"] |= {"screen_agreement": screen["agreement"], "screen_missed": screen["missed"]}
    write_json(path, plain({**(held if same else {}), **facts, **sections}))
    return path
