"""Rows of measured speed: one schema for `dejavu bench` and results/*.jsonl, which are append-only.

In: `Row`s of a measurement. Out: one JSON object a line with every key, among them where and with what it was measured:
`device`, `versions`, `commit` and `time`, which `append_rows` fills in. Times are microseconds per op, `tok_s` tokens a
second, `gbs` useful bytes a second in 1e9. A key that does not apply is null.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Self, TypeVar

import torch

from dejavu.config import Config, require
from dejavu.files import read_text
from dejavu.model.checkpoint import Checkpoint
from dejavu.version import __version__

PACKAGES = ("numpy", "tokenizers", "triton", "transformers", "ctranslate2", "llama_cpp_python")


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured(Config):
    """What every row says: what ran it, where, with what and when. `append_rows` fills in what is not set."""

    backend: str
    device: str | None = None
    versions: dict[str, str] | None = None
    commit: str | None = None
    time: str | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            finite = not isinstance(value, float) or math.isfinite(value)
            require(finite, f"{field.name} of a result is {value}; a measurement that failed is not recorded")
            absolute = isinstance(value, str) and (PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute())
            require(not absolute and value != "~", f"{field.name} {value!r} is a path; results name models and tools, not folders")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row(Measured):
    """One measurement. `model` is a name, never a path; `layers` how many layers of it ran (it and `threads` null where not known);
    `synthetic` whether weights or predictor are made up. adapter: its `Adapter.digest` where it selects as it was calibrated.
    read_share: useful bytes of a step over those of the same step run dense, predictors, gates, norms and head included."""

    op: str
    mode: str
    model: str
    layers: int | None
    dtype: str
    batch: int
    context: int
    threads: int | None
    synthetic: bool
    mlp_density: float | None = None
    head_density: float | None = None
    p20_us: float | None = None
    p50_us: float | None = None
    p80_us: float | None = None
    tok_s: float | None = None
    gbs: float | None = None
    pct_ceiling: float | None = None
    selection: str | None = None
    union_density: float | None = None
    nodes: int | None = None
    cache_dtype: str | None = None
    screened_head: int = 0
    adapter: str | None = None
    read_share: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityRow(Measured):
    """Perplexity of one way to run a model that exists, on texts by name. mode: dense, sparse, or the name of another program, which
    is then the backend too. rule: how windows are cut and which of their tokens count. texts_hash: of the token ids."""

    model: str
    mode: str
    dtype: str
    cache_dtype: str | None
    adapter: str | None
    rule: str
    texts: tuple[str, ...]
    texts_hash: str
    tokens: int
    ppl: float
    stderr: float | None = None
    mlp_density: float = 1.0
    head_density: float = 1.0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        return super(QualityRow, cls).from_dict({**values, "texts": tuple(values.get("texts", ()))})


AnyRow = TypeVar("AnyRow", bound=Measured)


def device_name(*, cuda: bool = False) -> str:
    """The processor's model name and its cores open to this process, or the name of the current GPU."""
    if cuda:
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        named = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = named[0] if named else name
    cores = len(os.sched_getaffinity(0)) if os.name == "posix" and platform.system() == "Linux" else os.cpu_count()
    return f"{name}, {cores} cores"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape a measurement, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    # What runs, not what is installed: torch's own version carries its build (+cpu, +cu126).
    return found | {"dejavu": __version__, "torch": torch.__version__}


def commit(file: Path = Path(__file__)) -> str | None:
    """The commit the package runs from, with "-dirty" after it where files that shape a measurement differ from it: the package's, the
    native engine's and the recipes'.

    None where `file` is not tracked by git (an installed package) or git is not there.
    """

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(package), *arguments], capture_output=True, text=True, timeout=30, check=False)
        except (FileNotFoundError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    package = file.resolve().parent.parent
    if git("ls-files", "--error-unmatch", str(file.resolve())) is None:
        return None
    head = git("rev-parse", "HEAD")
    shaping = (".", ":(top)native", ":(top)CMakeLists.txt", ":(top)recipes")
    return f"{head}-dirty" if head is not None and git("status", "--porcelain", "--", *shaping) else head


def about(checkpoint: Checkpoint, *, backend: str, dtype: str, threads: int, cuda: bool = False) -> dict[str, Any]:
    """The sections `model` and `environment` of results.json: what ran, on what, when."""
    config = checkpoint.config
    return {
        "model": {
            "name": checkpoint.name,
            "base_hash": checkpoint.base_hash,
            "parameters": sum(parameter.numel() for parameter in checkpoint.model.parameters()),
            "layers": config.num_layers,
            "hidden_size": config.hidden_size,
            "neurons": config.intermediate_size,
            "heads": config.num_heads,
            "activation": config.activation,
        },
        "environment": {
            "device": device_name(cuda=cuda),
            "backend": backend,
            "dtype": dtype,
            "threads": threads,
            "versions": versions(),
            "commit": commit(),
            "time": _now(),
        },
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def completed(rows: Sequence[AnyRow]) -> list[AnyRow]:
    """The rows with device, versions, commit and time (UTC) where these are not set."""
    now = _now()
    known, head = versions(), commit()
    return [
        dataclasses.replace(
            row,
            device=row.device or device_name(cuda=row.backend == "cuda"),
            versions=row.versions or known,
            commit=row.commit or head,
            time=row.time or now,
        )
        for row in rows
    ]


def append_rows(path: Path, rows: Sequence[AnyRow]) -> list[AnyRow]:
    """Append rows, completed, to a JSONL file, which is made with its folder where missing; returns what was written.

    The lines go out in one write, so that an interrupted run leaves earlier rows as they were.
    """
    written = completed(rows)
    text = "".join(json.dumps(row.to_dict(), allow_nan=False) + "\n" for row in written)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            # A line cut short by a crash must not swallow the next row.
            text = text if file.read(1) == b"\n" else "\n" + text
        file.write(text.encode())
    return written


def read_rows(path: Path, kind: type[AnyRow] = Row) -> list[AnyRow]:
    """The rows of a JSONL file, which are all of one kind. ValueError names the line that is no row of it."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values: Any = json.loads(line)
            require(isinstance(values, dict), "not a JSON object")
            rows.append(kind.from_dict(values))
        except (json.JSONDecodeError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: not a row of results ({error}); remove or mend the line") from error
    return rows
