"""The report: one self-contained HTML page from the results of a run.

In: a dict of sections, each of them optional, as `results.json` of a run holds it. Out: one HTML file without a script or an
external resource. A section that is not there leaves no gap. Sections:

    model        name, and what is known of: parameters, layers, hidden_size, neurons, heads, activation
    environment  device, versions, commit, time, and where it applies backend, dtype, cache_dtype, threads, screened_head, screen_agreement,
                 screen_missed
    generation   prompt, new_tokens, runs, speedup; dense, sparse: each tok_s, text, tok_s_runs; mlp_density, head_density, read_share
    evaluation   what quality/evaluate.py returns
    profile      what offline/profile.py returns
    train        source (where the predictors come from), method, budget, layers: recall, mass, density, lookahead, heads; null: not of the
                 method; attention where inputs are selected
    curves       what offline/curves.py's perplexity_curves returns
    recall       what its recall_curves returns
    firing       what report/activation_map.py returns
    rows         rows of speed, as bench/rows.py has them
    seconds      step -> seconds it took

Everything in it is untrusted text: the template escapes all of it, and only figures drawn here are markup.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dejavu.config import require
from dejavu.figures import CurvePoint, Curves, Evaluation, LayerTraining, PartTraining, Profile
from dejavu.files import absolute, read_json, write_text
from dejavu.report.activation_map import MARGIN, NATURAL_RGB, SELECTED_RGB, activation_svgs, columns_width
from dejavu.version import __version__

RESULTS_FILE, REPORT_FILE = "results.json", "report.html"
TEMPLATES = Path(__file__).parent / "templates"
SECTIONS = ("generation", "evaluation", "profile", "train", "curves", "recall", "firing", "rows")
DETAILS = ("model", "environment", "seconds")
MISSING = "\u2013"  # en dash


class GenerationSide(TypedDict):
    tok_s: float
    text: str
    tok_s_runs: list[float]


class GenerationSection(TypedDict):
    """read_share: None, or not there in older runs, where it is not known."""

    prompt: str
    new_tokens: int
    runs: int
    dense: GenerationSide
    sparse: GenerationSide
    speedup: float
    mlp_density: float
    head_density: float
    read_share: NotRequired[float | None]


class TrainSection(TypedDict):
    """What the predictors are. source: where they come from. method: not there in runs of before there were several."""

    source: str
    method: NotRequired[str]
    budget: float
    layers: list[LayerTraining]


class Sections(TypedDict):
    """What a report is made of; None: not measured in this run."""

    model: dict[str, Any] | None
    environment: dict[str, Any] | None
    generation: GenerationSection | None
    evaluation: Evaluation | None
    profile: Profile | None
    train: TrainSection | None
    curves: Curves | None
    recall: Sequence[Mapping[str, list[list[float]] | None]] | None
    firing: dict[str, Any] | None
    rows: list[dict[str, Any]] | None
    seconds: dict[str, float] | None


def read_results(runs: Sequence[Path]) -> dict[str, Any]:
    """The results of one run, or of several joined: each is a folder with results.json, or such a file.

    Raises ValueError for a file that is no results, and for a section that two runs have.
    """
    require(len(runs) > 0, "no run to report; give the folder that a command wrote, e.g. runs/demo")
    joined: dict[str, Any] = {}
    for run in runs:
        path = absolute(run)
        path = path / RESULTS_FILE if path.is_dir() else path
        results = read_json(path)
        known = isinstance(results, dict) and any(section in results for section in SECTIONS)
        require(known, f"{path} holds no results of dejavu (none of {', '.join(SECTIONS)}); give a run's folder")
        twice = [section for section in SECTIONS if section in results and section in joined]
        require(not twice, f"{path} and a run before it both have {', '.join(twice)}; report them one by one")
        models = [found.get("model") or {} for found in (joined, results)]
        other = all(models) and models[0].get("base_hash", models[0]["name"]) != models[1].get("base_hash", models[1]["name"])
        require(not other, f"{path} is a run of another model than the runs before it; report them one by one")
        joined = {**results, **joined}
    return joined


def write_report(results: dict[str, Any], path: Path) -> Path:
    """Write the page, whole or not at all; returns its path. Raises ValueError where it cannot be written or has nothing to show."""
    html = render(results)
    path = absolute(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror}); choose another path") from None
    write_text(path, html)
    return path


def render(results: dict[str, Any]) -> str:
    """The page as a string."""
    from dejavu.report import plots  # matplotlib, a second to import: only where a report is drawn

    unknown = sorted(set(results) - set(SECTIONS) - set(DETAILS))
    require(not unknown, f"a report knows no section {', '.join(unknown)}; it knows {', '.join((*DETAILS, *SECTIONS))}")
    require(any(results.get(section) for section in SECTIONS), "the results hold nothing to report; run a measurement first")
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": percent, "share": share, "number": number, "signed": signed, "tokens": whole}
    sections = cast(Sections, {name: results.get(name) for name in (*SECTIONS, *DETAILS)})  # read from files of earlier versions too
    generation = sections["generation"]
    return environment.get_template("report.html.j2").render(
        **sections,
        figures={name: _markup(drawn) for name, drawn in _figures(sections).items()},
        tiles=_tiles(sections),
        layer_rows=_layer_rows(sections),
        texts=None if generation is None else compare(generation["dense"]["text"], generation["sparse"]["text"]),
        notes=_notes(sections),
        weights_read=_weights_read(sections),
        maps_width=MARGIN + columns_width(len(sections["firing"]["tokens"])) if sections["firing"] else 0,
        map_colours={"selected": SELECTED_RGB, "natural": NATURAL_RGB},
        light=Markup(plots.css_variables(plots.LIGHT)),
        dark=Markup(plots.css_variables(plots.DARK)),
        dejavu_version=__version__,
    )


def number(value: float | None, digits: int = 2) -> str:
    return MISSING if value is None else f"{value:,.{digits}f}"


def whole(value: int | None) -> str:
    return MISSING if value is None else f"{value:,}"


def percent(value: float | None, digits: int = 1) -> str:
    return MISSING if value is None else f"{100 * value:.{digits}f}%"


def share(value: float) -> str:
    """A percentage within a sentence: a whole is 100%."""
    return percent(value, 0 if value >= 1 else 1)


def signed(value: float | None, digits: int = 2) -> str:
    return MISSING if value is None else f"{100 * value:+.{digits}f}%".replace("-", "\u2212")


def compare(dense: str, sparse: str) -> dict[str, Any]:
    """Where two texts part: what both begin with, whole words only, the count of those, and what each goes on with:
    the `gap` before its own first `word`, and the rest."""
    words = [re.findall(r"\s*\S+|\s+$", text) for text in (dense, sparse)]
    common = 0
    for mine, other in zip(*words, strict=False):
        if mine != other:
            break
        common += 1
    parts = []
    for side in words:
        first = "".join(side[common : common + 1])
        word = first.lstrip()
        parts.append({"gap": first.removesuffix(word), "word": word, "rest": "".join(side[common + 1 :])})
    shared = words[0][:common]
    count = sum(not word.isspace() for word in shared)
    return {"shared": "".join(shared), "common": count, "dense": parts[0], "sparse": parts[1], "equal": dense == sparse}


def _markup(drawn: str | tuple[str, ...]) -> Markup | tuple[Markup, ...]:
    return Markup(drawn) if isinstance(drawn, str) else tuple(map(Markup, drawn))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _weights_read(sections: Sections) -> bool:
    """Whether densities are shares of weights, as where inputs are selected, and not of neurons and heads."""
    train = sections["train"]
    return train is not None and train.get("method") == "input"


def _tiles(sections: Sections) -> list[dict[str, str]]:
    """Headline numbers: what it is, its value, what it stands on, and the note that says how it was measured."""
    tiles = []

    def tile(name: str, value: str, detail: str, note: str) -> None:
        tiles.append({"name": name, "value": value, "detail": detail, "note": note})

    generation, evaluation, train, profile = sections["generation"], sections["evaluation"], sections["train"], sections["profile"]
    if generation is not None:
        speeds = [number(generation[side]["tok_s"], 1) for side in ("sparse", "dense")]
        detail = f"sparse {speeds[0]}, dense {speeds[1]} tokens per second"
        tile("Speed, sparse / dense", f"{number(generation['speedup'])}\u00d7", detail, "speed")
    sparse = None if evaluation is None else evaluation["sparse"]
    if evaluation is not None and sparse is not None and sparse["ppl"] is not None:
        error = "" if evaluation["rise_stderr"] is None else f"± {percent(evaluation['rise_stderr'], 2)}; "
        detail = f"{error}sparse {number(sparse['ppl'])}, dense {number(evaluation['dense']['ppl'])}"
        tile("Change of perplexity", signed(evaluation["rise"]), detail, "perplexity")
    densities = evaluation if sparse is not None else generation
    if densities is not None:
        weights = _weights_read(sections)
        detail = "of the MLP's weights, for a token" if weights else "of the MLP's neurons, for a token"
        if profile is not None:
            detail += f"; {percent(_mean([layer['mlp_density'] for layer in profile['layers']]))} are active{' neurons' if weights else ''}"
        tile("Read: MLP density", share(densities["mlp_density"]), detail, "density")
        heads, every = densities["head_density"], "all attention heads, for every token"
        detail = "of attention's weights, for a token" if weights else every if heads >= 1 else "of the attention heads, for a token"
        tile("Read: head density", share(heads), detail, "density")
    if generation is not None and generation.get("read_share") is not None:
        detail = "of what a dense token reads: predictors, attention, the cache and the vocabulary's head included"
        tile("Read: all bytes", share(generation["read_share"]), detail, "density")
    predicted = [] if train is None else [layer for layer in train["layers"] if layer["lookahead"] is not None]
    if predicted:
        mass = _mean([layer["mass"] or 0.0 for layer in predicted])
        detail = f"of the active neurons; with them {percent(mass)} of what neurons add up to (mass)"
        tile("Found: recall", percent(_mean([layer["recall"] or 0.0 for layer in predicted])), detail, "recall")
    return tiles


def _selected(sections: Sections) -> list[float] | None:
    """MLP density per layer as it was used: in the evaluation, else as calibration measured it."""
    evaluation, train = sections["evaluation"], sections["train"]
    if evaluation is not None and evaluation["sparse"] is not None:
        return evaluation["sparse"]["mlp_density_per_layer"]
    if train is not None:
        return [layer["density"] for layer in train["layers"]]
    return None


def _layer_rows(sections: Sections) -> list[dict[str, Any]]:
    """One row a layer for the tables: profile, what was selected, and the predictors' quality."""
    profile, train, evaluation = sections["profile"], sections["train"], sections["evaluation"]
    selected = _selected(sections)
    profiled = [] if profile is None else profile["layers"]
    trained = [] if train is None else train["layers"]
    sparse = None if evaluation is None else evaluation["sparse"]
    heads = None if sparse is None else sparse["head_density_per_layer"]
    count = max(len(profiled), len(trained), len(selected or ()))
    return [
        {
            "layer": layer,
            "profile": profiled[layer] if profiled else None,
            "selected": selected[layer] if selected else None,
            "selected_heads": heads[layer] if heads else None,
            "mlp": trained[layer] if trained else None,
            "heads": trained[layer].get("heads") if trained else None,
            "inputs": bool(trained) and trained[layer].get("attention", 1) < 1,
        }
        for layer in range(count)
    ]


def _figures(sections: Sections) -> dict[str, str | tuple[str, str]]:
    """Every figure that the results allow, by name; a map is two, the second of which scrolls."""
    from dejavu.report import plots

    figures: dict[str, str | tuple[str, str]] = {}
    profile, train, recall, activations = sections["profile"], sections["train"], sections["recall"], sections["firing"]
    if profile is not None:
        layers = profile["layers"]
        figures["density"] = plots.mlp_density(layers, _selected(sections))
        figures["mass"] = plots.layer_curves(
            "mass", [layer["mass_curve"] for layer in layers], x="share of the layer's neurons kept", y="share of mass"
        )
        figures["head_share"] = plots.layer_curves(
            "head-share", [layer["head_curve"] for layer in layers], x="share of the layer's heads kept", y="share of the output"
        )
        figures["cosine"] = plots.cosine([layer["cosine"] for layer in layers])
    if recall is None and train is not None and all("curve" in layer for layer in train["layers"]):
        recall = [{"mlp": layer["curve"], "heads": None} for layer in train["layers"]]
    for part, what in (("mlp", "neurons"), ("heads", "heads")):
        if recall is not None and any(layer[part] for layer in recall):
            found = [[(density, value) for density, value, _ in points] if (points := layer[part]) else None for layer in recall]
            chosen = None if train is None else [_chosen(layer if part == "mlp" else layer.get("heads")) for layer in train["layers"]]
            figures[f"recall_{part}"] = plots.layer_curves(
                f"recall-{part}", found, x=f"share of {what} selected", y=f"{what} found (recall)", chosen=chosen
            )
    figures |= _perplexity_figures(sections)
    if activations is not None:
        figures["firing_neurons"] = activation_svgs(activations, "neurons")
        figures["firing_heads"] = activation_svgs(activations, "heads")
    return figures


def _chosen(part: LayerTraining | PartTraining | None) -> tuple[float, float] | None:
    if part is None or part["recall"] is None or (part["lookahead"] is None and part["density"] >= 1):
        return None
    return part["density"], part["recall"]


def _perplexity_figures(sections: Sections) -> dict[str, str]:
    """Perplexity against density; the oracle alone, from the profile, where no predictor was measured."""
    from dejavu.report import plots

    curves, profile = sections["curves"], sections["profile"]
    if curves is None and profile is not None and profile["oracle"]:
        points: dict[str, list[CurvePoint]] = {"mlp": [], "heads": []}
        for point in profile["oracle"]:
            points[point["part"]].append({"kind": "oracle", "density": point["density"], "ppl": point["ppl"]})
        curves = Curves(mlp=points["mlp"], heads=points["heads"], ppl_dense=profile["ppl_dense"])
    if curves is None:
        return {}
    evaluation = sections["evaluation"]
    figures = {}
    for part, density, what in (
        ("mlp", "mlp_density", "share of neurons read (MLP density)"),
        ("heads", "head_density", "share of heads computed (head density)"),
    ):
        if curves[part]:
            chosen = None if evaluation is None or evaluation["sparse"] is None else evaluation[density]
            figures[f"ppl_{part}"] = plots.perplexity_curves(
                f"ppl-{part}", curves[part], curves["ppl_dense"], x=what, chosen=chosen, join=part == "heads"
            )
    return figures


def _notes(sections: Sections) -> dict[str, int]:
    """The footnotes that apply, numbered in the order of the page."""
    has = {name for name, value in sections.items() if value}
    needs = {
        "speed": {"generation"},
        "density": {"evaluation", "generation"},
        "perplexity": {"evaluation"},
        "recall": {"train", "recall"},
        "firing": {"firing"},
        "profile": {"profile"},
        "curves": {"curves", "profile"},
        "rows": {"rows"},
    }
    return {name: index for index, name in enumerate((name for name, any_of in needs.items() if any_of & has), start=1)}
