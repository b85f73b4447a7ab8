"""Run folders: where profile, train, eval and bench leave what they measured, in the form that `dejavu report` reads.

A run folder holds `results.json`: the sections of measure/report.py. A later command on the same model adds its section.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dejavu.cli.output import plain
from dejavu.config import require
from dejavu.version import __version__

if TYPE_CHECKING:
    from dejavu.language_model import LanguageModel

PARTS = "eval-parts.json"


def check_free(path: Path) -> Path:
    """The absolute path of a folder that may be written. Raises ValueError for a file or a folder with other things in it."""
    from dejavu.files import MARKER, absolute

    path = absolute(path)
    require(not path.is_file(), f"{path} is a file; choose another folder to write")
    if path.is_dir() and not (path / MARKER).is_file():
        require(not any(path.iterdir()), f"{path} holds files that dejavu did not write; choose a new or an empty folder")
    return path


def open_run(path: Path) -> Path:
    """The run folder, made if it is not there. Raises ValueError as `check_free`."""
    from dejavu.files import MARKER

    path = check_free(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / MARKER).write_text(f"dejavu {__version__}\n", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path} cannot be created ({error.strerror}); choose another folder") from None
    return path


def about(lm: LanguageModel) -> dict[str, Any]:
    """The sections `model` and `environment`: what ran, on what, when."""
    import torch

    from dejavu.measure.results import commit, device_name, versions

    config = lm.config
    return {
        "model": {
            "name": lm.name,
            "base_hash": lm.base_hash,
            "parameters": lm.num_parameters,
            "layers": config.num_layers,
            "hidden_size": config.hidden_size,
            "neurons": config.intermediate_size,
            "heads": config.num_heads,
            "activation": config.activation,
        },
        "environment": {
            "device": device_name(),
            "versions": versions(),
            "commit": commit(),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "backend": lm.backend,
            "dtype": lm.dtype,
            "threads": torch.get_num_threads(),
        },
    }


def write_sections(folder: Path, lm: LanguageModel, **sections: Any) -> Path:
    """Put sections into the folder's results.json, beside those that it has of the same model; returns the file."""
    from dejavu.files import read_json, write_json
    from dejavu.measure.report import RESULTS_FILE

    path = folder / RESULTS_FILE
    held = read_json(path) if path.is_file() else {}
    same = isinstance(held, dict) and held.get("model", {}).get("base_hash") == lm.base_hash
    write_json(path, plain({**(held if same else {}), **about(lm), **sections}))
    return path
