"""Rows of measured speed: one schema for `dejavu bench` and results/*.jsonl, which are append-only.

In: `SpeedRow`s of a measurement. Out: one JSON object a line with every key, among them where and with what it was measured:
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
from dejavu.files import read_text, unwritten
from dejavu.model.checkpoint import Checkpoint
from dejavu.version import __version__

PACKAGES = ("numpy", "tokenizers", "triton", "transformers", "ctranslate2", "llama_cpp_python")


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured(Config):
    """Where, with what and when something was measured. `append_rows` fills in what is not set.

    device: a name for people; device_kind: cpu or gpu, None where it is not known; cores: of a CPU, open to this process. commit: with
    "-dirty" after it where `dirty`: files that shape a measurement differ from it.
    """

    device: str | None = None
    device_kind: str | None = None
    cores: int | None = None
    versions: dict[str, str] | None = None
    commit: str | None = None
    dirty: bool = False
    time: str | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            finite = not isinstance(value, float) or math.isfinite(value)
            require(finite, f"{field.name} of a result is {value}; a measurement that failed is not recorded")
            absolute = isinstance(value, str) and (PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute())
            require(not absolute and value != "~", f"{field.name} {value!r} is a path; results name models and tools, not folders")

    @property
    def repeatable(self) -> bool:
        """Whether somebody can measure it again: a commit is known, and its files were not changed."""
        return self.commit is not None and not self.dirty


@dataclass(frozen=True, kw_only=True, slots=True)
class WayToRun(Measured):
    """What ran. `model` is a name, never a path; mode: in words, see SpeedRow and QualityRow. peer: another program than ours ran it.

    sparse: something is selected in each token, by whatever method; sparse_heads: attention heads too, by predictors of their own.
    adapter: its `Adapter.digest` where it selects as it was calibrated.
    """

    backend: str
    mode: str
    model: str
    dtype: str
    cache_dtype: str | None = None
    adapter: str | None = None
    peer: bool = False
    sparse: bool = False
    sparse_heads: bool = False

    @property
    def dense(self) -> bool:
        """Whether it is ours, and selects nothing."""
        return not self.peer and not self.sparse


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """The architecture that made-up weights have: its name, and how many layers it has in full, of which a slice has fewer."""

    name: str
    layers: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeedRow(WayToRun):
    """One measurement. mode: dense, sparse or sparse+heads, with another `ahead` than the usual one behind it; or the peer's name.

    `layers`: how many layers of the model ran (it and `threads` null where not known). `synthetic`: whether weights or predictor are made
    up, in the shape of that name, which has shape_layers in full. ahead: where the cuda engine selects neurons; null where it does not.
    read_share: useful bytes of a step over those of the same step run dense, predictors, gates, norms and head included. method: what
    selects: predicted, gate or input, joined by + where layers differ; null where nothing does, and in older lines. new_tokens: of a
    request, whose prompt is the context.
    """

    op: str
    layers: int | None
    batch: int
    context: int
    threads: int | None
    synthetic: bool
    shape: str | None = None
    shape_layers: int | None = None
    mlp_density: float | None = None
    head_density: float | None = None
    p20_us: float | None = None
    p50_us: float | None = None
    p80_us: float | None = None
    tok_s: float | None = None
    gbs: float | None = None
    pct_ceiling: float | None = None
    selection: str | None = None
    ahead: str | None = None
    union_density: float | None = None
    nodes: int | None = None
    screened_head: float = 0
    read_share: float | None = None
    method: str | None = None
    new_tokens: int | None = None

    @property
    def speed(self) -> float:
        """Tokens a second, of a row that has them: of decode, prefill and request."""
        assert self.tok_s is not None, f"a row of {self.op} has no tokens a second"
        return self.tok_s


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityRow(WayToRun):
    """Perplexity of one way to run a model that exists, on texts by name. mode: dense, sparse, or the name of another program, which
    is then the backend too. rule: how windows are cut and which of their tokens count. texts_hash: of the token ids."""

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
    return f"{name}, {_cores()} cores"


def _cores() -> int | None:
    return len(os.sched_getaffinity(0)) if os.name == "posix" and platform.system() == "Linux" else os.cpu_count()


def device_facts(*, cuda: bool = False) -> dict[str, Any]:
    """`device`, `device_kind` and `cores` of a row."""
    return {"device": device_name(cuda=cuda), "device_kind": "gpu" if cuda else "cpu", "cores": None if cuda else _cores()}


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
    return commit_facts(file)["commit"]


def commit_facts(file: Path = Path(__file__)) -> dict[str, Any]:
    """`commit`, as of the function of that name, and `dirty` of a row."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(package), *arguments], capture_output=True, text=True, timeout=30, check=False)
        except (FileNotFoundError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    package = file.resolve().parent.parent
    if git("ls-files", "--error-unmatch", str(file.resolve())) is None:
        return {"commit": None, "dirty": False}
    head = git("rev-parse", "HEAD")
    shaping = (".", ":(top)native", ":(top)CMakeLists.txt", ":(top)recipes")
    dirty = head is not None and bool(git("status", "--porcelain", "--", *shaping))
    return {"commit": f"{head}-dirty" if dirty else head, "dirty": dirty}


def about(checkpoint: Checkpoint, *, backend: str, dtype: str, threads: int, cuda: bool = False) -> dict[str, Any]:
    """The sections `model` and `environment` of results.json: what ran, on what, when."""
    config = checkpoint.config
    return {
        "model": {
            "name": checkpoint.name,
            "base_hash": checkpoint.base_hash,
            "parameters": checkpoint.model.num_parameters,
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
    now, known, head = _now(), versions(), commit_facts()
    found = []
    for row in rows:
        device = {} if row.device else device_facts(cuda=isinstance(row, WayToRun) and row.backend == "cuda")
        source = {} if row.commit else head
        found.append(dataclasses.replace(row, versions=row.versions or known, time=row.time or now, **device, **source))
    return found


def append_rows(path: Path, rows: Sequence[AnyRow]) -> list[AnyRow]:
    """Append rows, completed, to a JSONL file, which is made with its folder where missing; returns what was written.

    The lines go out in one write, so that an interrupted run leaves earlier rows as they were.
    """
    written = completed(rows)
    text = "".join(json.dumps(row.to_dict(), allow_nan=False) + "\n" for row in written)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        if end > 0:
            file.seek(-1, os.SEEK_END)
            # A line cut short by a crash must not swallow the next row.
            text = text if file.read(1) == b"\n" else "\n" + text
        content = text.encode()
        try:
            while content:  # on a full disk first a part of them is written, then nothing
                content = content[file.write(content) :]
        except OSError as error:
            file.truncate(end)
            raise unwritten(path, error, len(text)) from error
    return written


def read_rows(path: Path, kind: type[AnyRow] = SpeedRow) -> list[AnyRow]:
    """The rows of a JSONL file, which are all of one kind. ValueError names the line that is no row of it.

    Older lines have no `device_kind` and what came with it: `_of_old_strings` fills it in.
    """
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values: Any = json.loads(line)
            require(isinstance(values, dict), "not a JSON object")
            rows.append(kind.from_dict(values if "device_kind" in values else _of_old_strings(values) | values))
        except (json.JSONDecodeError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: not a row of results ({error}); remove or mend the line") from error
    return rows


def _of_old_strings(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a line lacks which was written when they stood in its strings alone. Nothing else knows how they did:

    device        of a CPU ends with ", N cores"; of another machine than the load test's it is "unknown"
    commit        ends with "-dirty" where files were changed
    mode          of another program is its backend too; ours begins with "sparse" or "sparse+heads" where it selects, and after a
                  space may stand how the cuda engine looked ahead, which is else "beside"
    model         of a slice of a made-up model is "SHAPE[12 of 48 layers]", of a whole one the shape
    head_density  of a quality row is below 1 where heads were selected
    """
    device, _, cores = str(values.get("device")).removesuffix(" cores").rpartition(", ")
    cpu = bool(device) and cores.isdigit()
    known = values.get("device") not in (None, "unknown")
    found: dict[str, Any] = {
        "device_kind": ("cpu" if cpu else "gpu") if known else None,
        "cores": int(cores) if cpu else None,
        "dirty": str(values.get("commit")).endswith("-dirty"),
    }
    if "mode" not in values:
        return found
    mode, _, ahead = str(values["mode"]).partition(" ")
    peer = values["mode"] == values.get("backend")
    sparse = not peer and mode in ("sparse", "sparse+heads")
    heads = values.get("head_density") if "ppl" in values else None
    found |= {"peer": peer, "sparse": sparse, "sparse_heads": sparse and (mode == "sparse+heads" or heads not in (None, 1))}
    if "ppl" in values:
        return found
    found["ahead"] = (ahead or "beside") if sparse and (values.get("op"), values.get("backend")) == ("decode", "cuda") else None
    if values.get("synthetic"):
        shape, _, part = str(values.get("model")).partition("[")
        whole = part.removesuffix(" layers]").rpartition(" of ")[2]
        found |= {"shape": shape, "shape_layers": int(whole) if whole else values.get("layers")}
    return found
