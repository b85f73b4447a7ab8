"""What profiling, training and evaluating a model give back, as typed dicts: plain JSON, by the keys that commands print.

Densities, shares and accuracies are fractions; perplexities are of e; a key that may be None says when in the docstring of its class.
"""

# Annotations are evaluated here, not kept as strings: else each key would be a required one for what reads `__required_keys__`.
import typing
from collections.abc import Collection
from typing import Any, Literal, NotRequired, TypedDict


class LayerProfile(TypedDict):
    """One layer by nature. dead, always_on, contextual: fractions of its neurons, which add up to 1; mass99_density: the fewest neurons
    that carry 99 % of the mass; cosine: of the residual stream before and after; heads90: the fewest heads that carry 90 % of what
    attention adds. mass_curve, head_curve: pairs of density and share.
    """

    mlp_density: float
    dead: float
    always_on: float
    contextual: float
    mass99_density: float
    cosine: float
    heads90: float
    mass_curve: list[list[float]]
    head_curve: list[list[float]]


class OraclePoint(TypedDict):
    """Perplexity where an oracle keeps that density of neurons or heads. mass: the share that it keeps, of neurons alone."""

    part: Literal["mlp", "heads"]
    density: float
    ppl: float
    mass: NotRequired[float]


class Profile(TypedDict):
    """What `LanguageModel.profile` returns. ppl_dense: on the oracle_tokens tokens that the oracle's curves are of."""

    layers: list[LayerProfile]
    oracle: list[OraclePoint]
    ppl_dense: float
    tokens: int
    oracle_tokens: int


class CurvePoint(TypedDict):
    """Perplexity at a density, of a selection by predictors or by an oracle."""

    kind: Literal["predicted", "oracle"]
    density: float
    ppl: float


class Curves(TypedDict):
    """Perplexity against the density of neurons and of heads, with the dense model's."""

    mlp: list[CurvePoint]
    heads: list[CurvePoint]
    ppl_dense: float
    tokens: NotRequired[int]


class PartTraining(TypedDict):
    """A predictor on held-out text."""

    recall: float
    mass: float
    density: float
    lookahead: int


class LayerTraining(TypedDict):
    """A layer on held-out text. recall, mass: None where neurons are not what is selected; lookahead: None without a predictor of
    neurons; heads: None where they are dense. curve: [density, recall, mass] of each threshold that could be chosen. threshold: of a
    gate, None where the layer is dense. attention, inputs: densities, where inputs are selected.
    """

    recall: float | None
    mass: float | None
    density: float
    lookahead: int | None
    heads: PartTraining | None
    curve: list[list[float]]
    threshold: NotRequired[float | None]
    attention: NotRequired[float]
    inputs: NotRequired[dict[str, float]]


class ScreenTraining(TypedDict):
    """A screened head on text that it was not fitted to, see ScreenConfig."""

    threshold: float
    clusters: int
    tokens: float
    agreement: float
    missed: float
    missed_stderr: float


class Candidate(TypedDict):
    """What a method reached on text that calibration did not see. rise: of perplexity, relative; reads: values of weights and cache that
    the layers read for a token, read_share of what they read dense. tok_s, tok_s_dense, speedup: of decoding one sequence here, in turns
    with the dense model; None where it could not be timed, and speed_note says why. screened_head: where it has
    one, which is taken where it is faster than speedup_without, by a margin.
    """

    method: str
    rise: float
    rise_stderr: float
    within_budget: bool
    mlp_density: float
    head_density: float
    reads: float
    read_share: float
    seconds: float
    tok_s: float | None
    tok_s_dense: float | None
    speedup: float | None
    speed_note: NotRequired[str | None]
    screened_head: NotRequired[ScreenTraining | None]
    speedup_without: NotRequired[float]


class Training(Candidate):
    """What `LanguageModel.train_measured` returns with the adapter. tokens: those used, of tokens_given. candidates, why: with auto."""

    layers: list[LayerTraining]
    ppl_dense: float
    ppl_sparse: float
    budget: float
    tokens: int
    tokens_given: int
    candidates: NotRequired[list[Candidate]]
    why: NotRequired[str]


class TextScore(TypedDict):
    """Of one text; word_ppl per word between white space. Densities in the sparse run alone."""

    ppl: float
    word_ppl: NotRequired[float]
    bits_per_byte: float
    stderr: float | None
    tokens: int
    windows: int
    mlp_density: NotRequired[float | None]
    head_density: NotRequired[float | None]


class TaskScore(TypedDict):
    """Of one task of n items, of which `truncated` lost the start of a context. ppl, ppl_stderr: of targets, where items have one.
    Densities, tokens_sparse: of the sparse run."""

    acc: float
    acc_norm: float
    acc_bytes: NotRequired[float]
    stderr: float | None
    stderr_norm: float | None
    stderr_bytes: NotRequired[float | None]
    n: int
    truncated: NotRequired[int]
    ppl: NotRequired[float | None]
    ppl_stderr: NotRequired[float | None]
    mlp_density: NotRequired[float | None]
    head_density: NotRequired[float | None]
    tokens_sparse: NotRequired[int]
    note: NotRequired[str]


class Quality(TypedDict):
    """One side of an evaluation. mode: dense, or what selects. ppl, stderr: over all texts, None without one. tokens: scored, of which
    tokens_sparse sparse.
    """

    mode: str
    ppl: float | None
    stderr: float | None
    texts: dict[str, TextScore]
    tasks: dict[str, TaskScore]
    mlp_density: float
    head_density: float
    mlp_density_per_layer: list[float]
    head_density_per_layer: list[float]
    tokens: int
    tokens_sparse: int


class Evaluation(TypedDict):
    """What `LanguageModel.evaluate` returns. sparse: None without an adapter; rise, rise_stderr: of perplexity, None without an adapter or
    a text. context, stride: tokens of a window and between two; bos: in words, where one stands.
    """

    dense: Quality
    sparse: Quality | None
    rise: float | None
    rise_stderr: float | None
    mlp_density: float
    head_density: float
    context: int
    stride: int
    bos: str


class HeadAgreement(TypedDict):
    """What a screened head leaves out. screened_head: its threshold; shortlist: how many tokens get logits, in the mean; tokens: of the
    text; agreement: the share of them after which it chooses what the full head does; missed: the full head's probability of what has no
    logit, in the mean.
    """

    screened_head: float
    shortlist: float
    tokens: int
    agreement: float
    missed: float


def check(value: Any, kind: Any, *, may_lack: Collection[str] = (), where: str = "it") -> None:
    """Make sure that a value, of a file perhaps, is of a typed dict, all the way down. may_lack: keys that it need not have itself.

    Raises ValueError naming the place where it has a key that its class does not name, lacks one that it must have, or has another type.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if typing.is_typeddict(kind):
        _require(isinstance(value, dict), where, kind)
        unknown = sorted(set(value) - kind.__required_keys__ - kind.__optional_keys__)
        missing = sorted(kind.__required_keys__ - set(value) - set(may_lack))
        _require(not unknown and not missing, f"{where} (unknown keys {unknown}, missing keys {missing})", kind)
        hints = typing.get_type_hints(kind)
        for key, entry in value.items():
            check(entry, hints[key], where=key)
    elif origin is list:
        _require(isinstance(value, list), where, kind)
        for entry in value:
            check(entry, arguments[0], where=where)
    elif origin is dict:
        _require(isinstance(value, dict), where, kind)
        for key, entry in value.items():
            check(entry, arguments[1], where=key)
    elif origin is typing.Literal:
        _require(value in arguments, where, kind)
    elif arguments:  # a union with None
        if value is not None:
            check(value, next(part for part in arguments if part is not type(None)), where=where)
        else:
            _require(type(None) in arguments, where, kind)
    else:
        number = isinstance(value, int | float) if kind is float else isinstance(value, kind)
        _require(number and (kind is bool or not isinstance(value, bool)), where, kind)


def _require(condition: bool, where: str, kind: Any) -> None:
    if not condition:
        raise ValueError(f"{where} is no {getattr(kind, '__name__', kind)}")
