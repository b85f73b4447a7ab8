"""The report page: whole with any part of the results missing, self-contained, safe against hostile text, and labelled."""

from __future__ import annotations

import base64
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import dejavu
from dejavu.figures import CurvePoint
from dejavu.report import plots
from dejavu.report.activation_map import MARGIN, WIDTH, columns_width
from dejavu.report.report import SECTIONS, compare, read_results, render, write_report

HOSTILE = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>"
LAYERS, TOKENS, ROWS, HEADS = 3, 5, 4, 2
VOID = {"meta", "img", "br", "input", "link", "hr", "image", "rect", "path", "use"}


def packed(count: int) -> str:
    return base64.b64encode(bytes(index * 37 % 256 for index in range(count))).decode()


def complete() -> dict[str, Any]:
    """Every section, in the shape that the measurements write."""
    curve = [[0.1, 0.5], [0.5, 0.9], [1.0, 1.0]]
    layers = [
        {
            "mlp_density": 0.05 + 0.01 * layer,
            "dead": 0.1,
            "always_on": 0.02,
            "contextual": 0.88,
            "mass99_density": 0.04,
            "cosine": 0.5 + 0.2 * layer,
            "heads90": 0.5,
            "mass_curve": curve,
            "head_curve": curve,
        }
        for layer in range(LAYERS)
    ]
    dense = {"recall": 1.0, "mass": 1.0, "density": 1.0, "lookahead": None}
    heads = {"recall": 0.9, "mass": 0.95, "density": 0.75, "lookahead": 1}
    predicted = {"recall": 0.9876, "mass": 0.998, "density": 0.2, "lookahead": 1, "heads": heads}
    points = [
        {"kind": kind, "density": density, "ppl": 20 + 3 * (1 - density)} for kind in ("predicted", "oracle") for density in (0.1, 0.5, 1)
    ]
    text = {"ppl": 20.0, "bits_per_byte": 1.25, "stderr": 0.5, "tokens": 12345, "windows": 13}
    sparse_text = text | {"ppl": 20.08, "mlp_density": 0.46, "head_density": 0.9}
    picture = {
        "neurons": packed(ROWS * TOKENS),
        "rows": ROWS,
        "density": 0.2,
        "union": 0.5,
        "predicted": True,
        "heads": packed(HEADS * TOKENS),
        "num_heads": HEADS,
        "head_density": 0.75,
        "heads_predicted": True,
    }
    row = {
        "op": "decode",
        "mode": "sparse",
        "backend": "torch",
        "model": "tiny",
        "synthetic": True,
        "dtype": "fp32",
        "batch": 1,
        "context": 64,
        "threads": 2,
        "mlp_density": 0.1,
        "p20_us": 1.0,
        "p50_us": 1234.5,
        "p80_us": 3.0,
        "tok_s": 77.7,
        "gbs": None,
        "pct_ceiling": None,
    }
    return {
        "model": {"name": "tiny", "parameters": 1_500_000, "layers": LAYERS, "neurons": 64, "heads": HEADS, "activation": "relu"},
        "environment": {
            "device": "A processor, 2 cores",
            "versions": {"python": "3.11.0", "torch": "2.9.0"},
            "commit": "0123456789abcdef",
            "time": "2025-01-02T03:04:05+00:00",
            "backend": "torch",
            "dtype": "fp32",
            "threads": 2,
        },
        "generation": {
            "prompt": "Once upon",
            "new_tokens": 6,
            "runs": 3,
            "speedup": 0.8,
            "dense": {"tok_s": 100.0, "tok_s_runs": [99.0, 100.0, 101.0], "text": " a time there was a king."},
            "sparse": {"tok_s": 80.0, "tok_s_runs": [79.0, 80.0, 81.0], "text": " a time there was a queen."},
            "mlp_density": 0.47,
            "head_density": 0.92,
        },
        "evaluation": {
            "dense": {"ppl": 20.0, "texts": {"a book": text}, "tasks": {"quiz": {"acc": 0.25, "stderr": 0.02, "n": 100}}},
            "sparse": {
                "ppl": 20.08,
                "texts": {"a book": sparse_text},
                "tasks": {"quiz": {"acc": 0.26, "stderr": 0.02, "n": 100}},
                "mlp_density_per_layer": [1.0, 0.2, 0.2],
                "head_density_per_layer": [1.0, 0.75, 0.75],
            },
            "rise": 0.004,
            "rise_stderr": 0.0003,
            "mlp_density": 0.4667,
            "head_density": 0.8333,
            "context": 1024,
            "stride": 1024,
            "bos": "once",
        },
        "profile": {"layers": layers, "oracle": [{"part": "mlp", "density": 0.1, "ppl": 21.0}], "ppl_dense": 20.0, "tokens": 4096},
        "train": {"source": "trained", "budget": 0.005, "layers": [dense | {"heads": None}, predicted, predicted]},
        "curves": {"mlp": points, "heads": points, "ppl_dense": 20.0, "tokens": 1024},
        "recall": [{"mlp": None, "heads": None}]
        + [{"mlp": [[0.1, 0.7, 0.9], [0.3, 0.99, 1.0]], "heads": [[0.5, 0.7, 0.8], [1, 1, 1]]}] * 2,
        "firing": {
            "tokens": [" a", "\n", "<b>", " there", " was"],
            "layers": [picture | {"predicted": False, "heads_predicted": False}] + [picture] * 2,
        },
        "rows": [row],
        "seconds": {"profile": 1.5, "curves": 2.5},
    }


@pytest.fixture
def results() -> dict[str, Any]:
    return complete()


@pytest.fixture(scope="module")
def whole() -> str:
    """The page of all results. Drawing its figures takes a while."""
    return render(complete())


class Page(HTMLParser):
    """Elements with their attributes; checks that every element is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def words(html: str) -> str:
    return " ".join(" ".join(Page(html).text).split())


def test_the_whole_report(whole: str) -> None:
    text = words(whole)
    for expected in (
        "0.80\u00d7",
        "+0.40%",
        "± 0.03%",
        "46.7%",
        "83.3%",
        "98.8%",
        "12,345",
        "0123456789ab",
        "1,234.5",
        "3 layers of 64 neurons",
    ):
        assert expected in text, expected
    assert "here sparse is slower than dense, 0.80 times the speed" in text
    page = Page(whole)
    assert sum(attributes.get("role") == "img" for attributes in page.all("svg")) == 12, (
        "each map is two: names that stay, strips that scroll"
    )
    assert len(page.all("figure")) == 10


def test_a_faster_sparse_model_is_called_faster(results: dict[str, Any]) -> None:
    results["generation"]["speedup"] = 1.6
    text = words(render({"model": results["model"], "generation": results["generation"]}))
    assert "1.60 times the speed" in text and "slower than dense" not in text


@pytest.mark.parametrize("section", SECTIONS)
def test_any_one_section_is_enough(results: dict[str, Any], section: str) -> None:
    Page(render({section: results[section]}))


@pytest.mark.parametrize("section", SECTIONS)
def test_any_one_section_may_be_missing(results: dict[str, Any], section: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsaved(name: str, label: str, draw: Callable[[Axes], None], *, height: float = 0.0) -> str:
        draw(Figure().subplots())
        return "<svg></svg>"

    monkeypatch.setattr(plots, "_svg", unsaved)  # writing a figure takes longer than drawing it
    del results[section]
    Page(render(results))


def test_a_screened_head_that_never_agrees_is_not_hidden(results: dict[str, Any]) -> None:
    results = {name: results[name] for name in ("model", "environment", "generation")}
    results["environment"] |= {"screened_head": 1e-6, "screen_agreement": 0.0, "screen_missed": 0.02}
    assert "screened head at 1e-06 (0.0% of the full head's choices, 2.0% of its probability missed)" in words(render(results))
    del results["environment"]["screen_agreement"]
    assert "of the full head" not in words(render(results))


def test_a_missing_section_leaves_no_trace(results: dict[str, Any]) -> None:
    text = words(render({"model": results["model"], "profile": results["profile"]}))
    assert "How much a layer turns its input" in text
    for absent in ("The same prompt", "Quality", "token by token", "Speed", "active neurons are found"):
        assert absent not in text
    assert "as in use" not in text and "how many are read" not in text, "only what is in the figures is explained"
    assert "The fewer neurons are read, the higher the perplexity" in text, "the profile's oracle curve stands in for the curves"


def test_dense_only_evaluation(results: dict[str, Any]) -> None:
    evaluation = results["evaluation"] | {"sparse": None, "rise": None, "rise_stderr": None, "mlp_density": 1.0, "head_density": 1.0}
    text = words(render({"evaluation": evaluation}))
    assert "12,345" in text and "Change of perplexity" not in text


def test_the_page_loads_nothing(whole: str) -> None:
    assert not re.search(r"https?://|//[\w.]+/|@import|<link|<script|<iframe", whole)
    page = Page(whole)
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "data", "action", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:image/png;base64,")), f"<{tag} {name}={value}>"
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids)), "ids are unique over all figures"
    targets = {
        attributes[name]
        for _, attributes in page.elements
        for name in ("href", "xlink:href")
        if (attributes.get(name) or "").startswith("#")
    }
    assert targets <= {f"#{name}" for name in ids}
    assert set(re.findall(r"url\(#([^)]+)\)", whole)) <= set(ids)


def _poisoned(value: Any) -> Any:
    """Every string in the results made hostile, except the packed pictures."""
    if isinstance(value, dict):
        kept = ("neurons", "heads", "kind", "part")
        return {key: item if key in kept and isinstance(item, str) else _poisoned(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_poisoned(item) for item in value]
    return value + HOSTILE if isinstance(value, str) else value


def test_hostile_text_stays_text(results: dict[str, Any]) -> None:
    evil = _poisoned(results)
    for side in ("dense", "sparse"):
        for kind in ("texts", "tasks"):
            found = evil["evaluation"][side][kind]
            evil["evaluation"][side][kind] = {HOSTILE + name: value for name, value in found.items()}
    evil["environment"]["versions"] = {HOSTILE: HOSTILE}
    evil["seconds"] = {HOSTILE: 1.0}
    html = render(evil)
    page = Page(html)
    assert page.all("script") == [] and page.all("img") == []
    assert all(not name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert "<script>alert('x')</script>" in "".join(page.text), "the text is shown, not dropped"


def test_figures_and_tables_are_labelled(whole: str) -> None:
    page = Page(whole)
    for attributes in page.all("svg"):
        assert attributes.get("role") == "img" and len(attributes.get("aria-label") or "") > 20
    assert len(page.all("table")) == len(page.all("caption")) == 5
    assert len(page.all("figure")) == len(page.all("figcaption"))
    assert all(attributes.get("scope") in ("col", "colgroup", "row") for attributes in page.all("th"))
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b - a <= 1 for a, b in itertools.pairwise(levels))
    assert page.all("html")[0]["lang"] == "en"


def test_two_texts_part_at_one_word() -> None:
    found = compare("the old man went home, and the dog", "the old man went away, and the dog")
    assert found["shared"] == "the old man went" and found["common"] == 4 and not found["equal"]
    assert found["dense"] == {"gap": " ", "word": "home,", "rest": " and the dog"}, "what follows is not marked, the same or not"
    assert found["sparse"] == {"gap": " ", "word": "away,", "rest": " and the dog"}
    same = compare("a b", "a b")
    assert same["equal"] and same["shared"] == "a b" and same["dense"]["word"] == same["dense"]["rest"] == ""
    assert compare("x", "y")["common"] == 0
    assert compare("a b", "a b c")["sparse"]["word"] == "c" and compare("a b", "a b c")["dense"]["word"] == ""
    assert compare("", "")["equal"]


@pytest.mark.parametrize("dense", ["one  two\nthree four", " one", "", "one  two \n", "\n\n"])
@pytest.mark.parametrize("sparse", ["one  two\n\nfour five", " one ", "one  two"])
def test_every_word_of_both_texts_is_there(dense: str, sparse: str) -> None:
    found = compare(dense, sparse)
    for name, text in (("dense", dense), ("sparse", sparse)):
        assert found["shared"] + "".join(found[name][part] for part in ("gap", "word", "rest")) == text


def test_only_the_point_where_texts_part_is_marked(results: dict[str, Any]) -> None:
    results = {"generation": results["generation"]}
    html = render(results)
    assert re.findall("<mark>(.*?)</mark>", html) == ["where they part", "king.", "queen."]
    assert html.count('<span class="shared"> a time there was a</span>') == 2
    assert "the same 5 words" in words(html)
    results["generation"]["sparse"]["text"] = results["generation"]["dense"]["text"]
    html = render(results)
    assert "word for word" in html and "<mark>" not in html


def test_what_the_run_showed_is_said_first(results: dict[str, Any]) -> None:
    """Speed, quality and what was read, dense and sparse, and the machine: before any figure."""
    results = {name: results[name] for name in ("model", "environment", "generation", "evaluation", "train")}
    text = words(render(results))
    top = text[: text.index("Two texts")]
    for expected in (
        "80.0 tokens per second",
        "dense decoding 100.0",
        "46.7% of the",
        "83.3% of the attention heads",
        "20.08",
        "20.00 dense",
    ):
        assert expected in top, expected
    assert "A processor, 2 cores" in top
    results["evaluation"]["head_density"] = 1.0
    assert "and all attention heads" in words(render(results))
    results["train"]["method"] = "input"
    assert "100% of attention's weights" in words(render(results))


def test_words_lead_to_their_meaning(whole: str) -> None:
    """What test_the_page_loads_nothing follows: every term that is linked has an entry."""
    page = Page(whole)
    linked = {attributes["href"] for attributes in page.all("a") if attributes.get("class") == "term"}
    assert {"#word-perplexity", "#word-neuron", "#word-recall", "#word-lookahead", "#word-bits-per-byte"} <= linked


def test_a_logarithmic_axis_says_so(results: dict[str, Any]) -> None:
    def figure(*ppls: float) -> str:
        points: list[CurvePoint] = [{"kind": "predicted", "density": 0.6 + 0.1 * index, "ppl": ppl} for index, ppl in enumerate(ppls)]
        return plots.perplexity_curves("p", points, 20.0, x="head density")

    steep, flat = figure(90, 60, 30, 21), figure(23, 22, 21, 20)
    assert "log scale" in steep and "log scale" not in flat
    ticks = {text for text in re.findall(r">([\d.]+)</text>", steep)}
    assert {"20", "30", "50", "70"} <= ticks, "round numbers close enough to read between"


def test_figures_keep_numbers_and_use_the_page_s_type(results: dict[str, Any]) -> None:
    svg = plots.cosine([0.026, 0.485])
    assert ">0.026<" in svg and ">0.485<" in svg
    assert set(re.findall(r"font-family: ([^;\"]+)", svg)) == {"var(--font)"}


def test_maps_fit_the_page_or_say_that_they_scroll(whole: str) -> None:
    assert MARGIN + columns_width(95) <= WIDTH < MARGIN + columns_width(200)
    assert whole.count('class="cue of-map"') == 2
    assert f"@container (max-width: {MARGIN + columns_width(TOKENS) - 1}px)" in whole


def test_matplotlib_is_imported_only_to_draw() -> None:
    """Everything that may run without a report, in a fresh interpreter."""
    modules = "dejavu, dejavu.cli.main, dejavu.loading, dejavu.report.demo, dejavu.report.report"
    code = f"import sys, {modules}; print('matplotlib' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(dejavu.__file__).parents[1])}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.stdout.strip() == "False", run.stderr


def test_many_layers_fit(results: dict[str, Any]) -> None:
    results["profile"]["layers"] *= 16
    Page(render({"profile": results["profile"]}))


def test_figures_follow_the_theme(results: dict[str, Any]) -> None:
    """Every colour of a figure is a variable that both themes define."""
    svg = plots.mlp_density(results["profile"]["layers"], [1.0, 0.2, 0.2]) + plots.perplexity_curves(
        "p", results["curves"]["mlp"], 20.0, x="MLP density", chosen=0.4
    )
    assert set(re.findall(r"#[0-9a-f]{6}\b", svg)) <= {"#000000"}
    used = set(re.findall(r"var\(--([\w]+)\)", svg)) - {"font"}
    assert used and used <= set(plots.LIGHT) == set(plots.DARK)


def test_a_figure_is_the_same_every_time(whole: str) -> None:
    assert render(complete()) == whole


def test_writing_and_reading(tmp_path: Path, results: dict[str, Any]) -> None:
    for name, sections in (("a", ("model", "profile", "train")), ("b", ("model", "evaluation"))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps({key: results[key] for key in sections}))
    joined = read_results([tmp_path / "a", tmp_path / "b" / "results.json"])
    assert set(joined) == {"model", "profile", "train", "evaluation"}
    path = write_report(joined, tmp_path / "new" / "page.html")
    assert path.read_text(encoding="utf-8") == render(joined)
    assert [file.name for file in path.parent.iterdir()] == ["page.html"]


def test_runs_that_cannot_be_joined(tmp_path: Path, results: dict[str, Any]) -> None:
    def run(name: str, content: Any) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(content))
        return tmp_path / name

    one = run("one", {"model": {"name": "x"}, "profile": results["profile"]})
    with pytest.raises(ValueError, match="both have profile"):
        read_results([one, one])
    with pytest.raises(ValueError, match="another model"):
        read_results([one, run("other", {"model": {"name": "y"}, "train": results["train"]})])
    with pytest.raises(ValueError, match="no results of dejavu"):
        read_results([run("strange", {"x": 1})])
    with pytest.raises(ValueError, match="no results of dejavu"):
        read_results([run("list", [])])
    with pytest.raises(ValueError, match="does not exist"):
        read_results([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="no run"):
        read_results([])


def test_nothing_to_report(tmp_path: Path, results: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="nothing to report"):
        render({"model": results["model"]})
    with pytest.raises(ValueError, match="no section surprise"):
        render(results | {"surprise": 1})
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="cannot be written"):
        write_report({"generation": results["generation"]}, tmp_path / "file" / "report.html")
