"""What `gpu_road.py` measured of a model, as the file that it writes: one JSON object, checked down to the last key.

In: a file of results/community/. Out: a RoadRow. Who ran the road on another model sends its file in; a test reads all.
"""

# Annotations are evaluated here, as in figures.py: else each key would be a required one.
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired, Self, TypedDict

from dejavu.bench.rows import Measured
from dejavu.config import require
from dejavu.figures import check
from dejavu.files import read_object

COMMUNITY = Path(__file__).resolve().parents[1] / "results" / "community"
FOLDERS = re.compile(r"(?:[A-Za-z]:)?(?<![\w.])[/\\](?:[\w.~+-]+[/\\])+")  # of a path within a message


class Step(TypedDict):
    """seconds, and peaks in 1e9 bytes of GPU memory that torch allocated and of host memory that the process held; None where the step was
    not done, or the machine does not tell. why: of a step that failed or was left out. runs: how many began it, where several: seconds and
    peaks are of the last one, which went on where they had been interrupted."""

    state: Literal["done", "failed", "left out"]
    seconds: float | None
    gpu_gb: float | None
    host_gb: float | None
    why: NotRequired[str]
    runs: NotRequired[int]


class Claim(TypedDict):
    """A claim of the paper in its words, and what was measured here; None where the step was not done."""

    what: str
    paper: str
    measured: str | None


class Found(TypedDict):
    """Means over layers; rises are of perplexity, relative; speeds of decoding one sequence, greedy."""

    natural_density: NotRequired[float]
    cosine: NotRequired[float]
    heads90: NotRequired[float]
    profile_tokens: NotRequired[int]
    train_tokens: NotRequired[int]
    train_rise: NotRequired[float]
    recall: NotRequired[float | None]
    within_budget: NotRequired[bool]
    eval_tokens: NotRequired[int]
    ppl_dense: NotRequired[float]
    ppl_sparse: NotRequired[float]
    rise: NotRequired[float]
    mlp_density: NotRequired[float]
    head_density: NotRequired[float]
    tasks: NotRequired[dict[str, dict[str, float]]]
    tok_s_dense: NotRequired[float]
    tok_s_sparse: NotRequired[float]
    request_s: NotRequired[float]


class Result(TypedDict):
    """shape: of made-up weights, else None. text: what was trained and judged on: its own (temperature 1), or files by name."""

    shape: str | None
    layers: int
    parameters: int
    backend: str
    dtype: str
    method: str
    budget: float
    text: str
    steps: dict[str, Step]
    found: Found
    claims: list[Claim]


@dataclass(frozen=True, kw_only=True, slots=True)
class RoadRow(Measured):
    """model: its name."""

    model: str
    result: dict[str, Any]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        row = super(RoadRow, cls).from_dict(values)
        check(row.result, Result)
        paths = [step["why"] for step in row.result["steps"].values() if FOLDERS.search(step.get("why", ""))]
        require(not paths, f"{paths[:1]} names folders of a machine; leave them out")
        return row


def read_road(path: Path) -> RoadRow:
    """Raises ValueError for a file that is not of the schema."""
    try:
        return RoadRow.from_dict(read_object(path))
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error


def without_folders(message: str) -> str:
    """A message in one line, of whose paths the last parts alone are left."""
    return FOLDERS.sub("", " ".join(message.split()))
