"""Records of results/quality.jsonl: what a command printed of a model's quality, each kind by the keys that it has.

In: lines, of which each is a `Record`. Out: records whose `result` is of its kind's class, down to the last key: one that is unknown, is
missing, or is of another type is an error, as in every file of results/.
"""

# Annotations are evaluated here, as in figures.py: else each key would be a required one.
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NotRequired, Self, TypedDict, TypeVar

from dejavu.bench.rows import Measured, read_rows
from dejavu.config import require
from dejavu.figures import Evaluation, HeadAgreement, Profile, Training, check

QUALITY = Path(__file__).resolve().parents[1] / "results" / "quality.jsonl"


class Printed(TypedDict):
    """What commands say in addition to what they measured."""

    model: str
    backend: NotRequired[str]
    dtype: str
    cache_dtype: NotRequired[str]
    notes: list[str]


class EvalResult(Evaluation, Printed):
    """`dejavu eval`. harness: metrics of lm-evaluation-harness by side and task."""

    screen: NotRequired[HeadAgreement]
    harness: NotRequired[dict[str, dict[str, dict[str, float]] | None]]


class ProfileResult(Profile, Printed):
    """`dejavu profile`."""


class TrainResult(Training, Printed):
    """`dejavu train`."""


class DemoSide(TypedDict):
    """A text, its speed, and the perplexity of the demo's texts."""

    tok_s: float
    ppl: float
    text: str


class DemoResult(TypedDict):
    """`dejavu demo`."""

    dense: DemoSide
    sparse: DemoSide
    speedup: float
    mlp_density: float
    head_density: float
    read_share: NotRequired[float | None]
    backend: NotRequired[str]
    dtype: NotRequired[str]
    lookahead: list[int | None]


class CurvePoint(TypedDict):
    """At thresholds moved by `shift`: KL to dense in nats a token, and the relative rise of perplexity."""

    shift: float
    density: float
    kl: float
    rise: float


class CurveResult(TypedDict):
    """adapter_curve.py."""

    tokens: int
    points: list[CurvePoint]


class MethodResult(TypedDict):
    """methods.py: what a way to select costs, by text and task. accuracy, tok_s: dense and sparse."""

    model: str
    method: str
    mlp_density: float
    head_density: float
    rise: float
    rise_stderr: float
    text_rises: dict[str, float]
    tokens: int
    accuracy: dict[str, dict[str, float]]
    items: int
    dtype: str
    tok_s: dict[str, float]


class AutomaticResult(TypedDict):
    """automatic.py: what `auto` takes within a budget, and its ratio over the fastest program of no worse perplexity, by what is timed
    (decode, or a request), in each process. Where it keeps the dense model there is nothing to compare."""

    budget: float
    takes: str
    rival: str
    ppl: float | None
    ppl_rival: float | None
    tok_s: float | None
    ratios: dict[str, list[float]]


class JudgedTexts(TypedDict):
    """Relative rises of perplexity: of all texts together, of the worst, of each."""

    rise: float
    worst: float
    rises: dict[str, float]
    mlp_density: float
    tokens: int


class JudgedTasks(TypedDict):
    """All items together. loss: of accuracy, sparse to dense, with the 95th percentile of its paired bootstrap; flipped: other answers."""

    items: int
    dense: float
    sparse: float
    loss: float
    loss_upper95: float
    flipped: float


class JudgedWritten(TypedDict):
    """On text that the dense model wrote at a temperature. variation, kl: of distributions at temperature 1."""

    temperature: float
    agreement: float
    variation: float
    kl: float
    mlp_density: float
    tokens: int


class JudgedOwn(TypedDict):
    """Nats a token of samples at temperature 1 under the dense model: its own, the sparse model's, and how much more these are."""

    nll_dense: float
    nll_sparse: float
    excess: float
    stderr: float
    samples: int


class JudgeResult(TypedDict):
    """judge.py, the parts of it that were asked for."""

    model: str
    adapter: str
    backend: str
    dtype: str
    texts: NotRequired[JudgedTexts]
    tasks: NotRequired[JudgedTasks]
    written: NotRequired[list[JudgedWritten]]
    own: NotRequired[JudgedOwn]


KINDS: dict[str, type[Any]] = {
    "eval": EvalResult,
    "profile": ProfileResult,
    "train": TrainResult,
    "demo": DemoResult,
    "curve": CurveResult,
    "method": MethodResult,
    "judge": JudgeResult,
    "automatic": AutomaticResult,
}
# What `dejavu train` did not print yet when the first lines were written.
LATER = {"train": ("method", "reads", "read_share", "tok_s", "tok_s_dense", "speedup", "tokens_given")}
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True, slots=True)
class Record(Measured, Generic[Result]):
    """kind: a key of KINDS. model: what the table calls it; of a method, with the method."""

    kind: str
    model: str
    result: Result

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        record = super(Record, cls).from_dict({**values, "result": _named_sides(values.get("result"))})
        require(record.kind in KINDS, f"unknown kind {record.kind!r}; choose one of {', '.join(KINDS)}")
        check(record.result, KINDS[record.kind], may_lack=LATER.get(record.kind, ()))
        return record


def _named_sides(result: Any) -> Any:
    """Older lines of kind method called the sparse side of `accuracy` what it selected by."""
    if not isinstance(result, dict) or not isinstance(result.get("accuracy"), dict):
        return result
    sides = {"dense" if side == "dense" else "sparse": tasks for side, tasks in result["accuracy"].items()}
    return {**result, "accuracy": sides}


def records(kind: type[Result], path: Path) -> list[Record[Result]]:
    """Records of a kind, the oldest first, that somebody can measure again: none of a commit with changed files."""
    return [record for record in read_rows(path, Record) if KINDS[record.kind] is kind and record.repeatable]
