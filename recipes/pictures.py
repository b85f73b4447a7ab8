"""The pictures of docs/concepts.md: docs/images/*.svg.

    python recipes/pictures.py

In: results/ (the newest profile and training of opt-mini, the newest speeds of opt-6.7b). Out: SVG files, each with colours for light
and for dark surroundings on a ground of its own. A picture of a principle shows an example and says so; what it counts is counted
here. Nobody types a measured number.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path

from dejavu.bench.rows import WayToRun, read_rows
from forms import RESULTS as FORMS
from forms import newest_runs
from gpu_tables import newest_decodes
from records import ProfileResult, TrainResult
from speeds import BENCH, Refused, speeds
from tables import SMOLLM2, newest

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
WIDTH = 720
LIGHT = {"paper": "#ffffff", "ink": "#1f2933", "soft": "#55606c", "read": "#2563c4", "back": "#b4500b", "off": "#dfe4ea", "edge": "#8a94a0"}
DARK = {"paper": "#171b21", "ink": "#e6e9ed", "soft": "#a9b3be", "read": "#6ea2f2", "back": "#f09a55", "off": "#343c46", "edge": "#76818d"}


def _colours(palette: dict[str, str]) -> str:
    fills = "".join(f".{name}{{fill:{value}}}" for name, value in palette.items())
    strokes = "".join(f".line-{name}{{stroke:{value}}}" for name, value in palette.items())
    return f"text{{fill:{palette['ink']}}}{fills}{strokes}.on{{fill:{palette['paper']}}}"


STYLE = (
    "text{font-family:sans-serif;font-size:15px}.small{font-size:13px}.head{font-weight:bold}.mono{font-family:monospace}"
    f"path,line{{fill:none;stroke-width:2}}.fat{{stroke-width:5}}.thin{{stroke-width:1}}.dash{{stroke-dasharray:6 5}}{_colours(LIGHT)}"
    f"@media(prefers-color-scheme:dark){{{_colours(DARK)}}}"
)


class Picture:
    """Shapes in the order in which they are drawn. Classes are names of the palette, and those of STYLE."""

    def __init__(self, title: str, height: int) -> None:
        self.title, self.height = title, height
        self.parts: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, kind: str, *, edge: bool = False, corner: float = 2) -> None:
        line = " line-edge" if edge else ""
        self.parts.append(f'<rect x="{x:.4g}" y="{y:.4g}" width="{width:.4g}" height="{height:.4g}" rx="{corner:g}" class="{kind}{line}"/>')

    def text(self, x: float, y: float, words: str, kind: str = "ink", anchor: str = "start") -> None:
        place = "" if anchor == "start" else f' text-anchor="{anchor}"'
        self.parts.append(f'<text x="{x:.4g}" y="{y:.4g}" class="{kind}"{place}>{escape(words)}</text>')

    def path(self, points: list[tuple[float, float]], kind: str = "line-edge", *, arrow: bool = False) -> None:
        self.parts.append(f'<path d="M{"L".join(f"{x:.4g},{y:.4g}" for x, y in points)}" class="{kind}"/>')
        if arrow:
            (x0, y0), (x, y) = points[-2:]
            length = math.hypot(x - x0, y - y0)
            dx, dy = 9 * (x - x0) / length, 9 * (y - y0) / length
            wings = [(x - dx - dy / 2, y - dy + dx / 2), (x, y), (x - dx + dy / 2, y - dy - dx / 2)]
            self.path(wings, kind.replace("dash", "").replace("fat", ""))

    def dot(self, x: float, y: float, kind: str = "read", radius: float = 5) -> None:
        self.parts.append(f'<circle cx="{x:.4g}" cy="{y:.4g}" r="{radius:g}" class="{kind}"/>')

    def legend(self, y: float, entries: list[tuple[str, str]], x: float = 24) -> None:
        for kind, words in entries:
            self.box(x, y - 11, 13, 13, kind)
            self.text(x + 19, y, words, "soft small")
            x += 45 + 7 * len(words)

    def svg(self) -> str:
        size = f'viewBox="0 0 {WIDTH} {self.height}" width="{WIDTH}" height="{self.height}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
        ground = f'<rect width="{WIDTH}" height="{self.height}" rx="8" class="paper"/>'
        return "\n".join([head, f"<title>{escape(self.title)}</title>", f"<style>{STYLE}</style>", ground, *self.parts, "</svg>", ""])


def _percent(value: float, digits: int = 0) -> str:
    return f"{100 * value:.{digits}f} %"


def residual() -> Picture:
    p = Picture("A layer: attention and MLP each read the residual stream and add to it; gradients run back along it", 270)
    p.text(24, 30, "One layer (pre-norm)", "head")
    p.path([(24, 110), (700, 110)], "line-read fat")
    p.path([(680, 110), (704, 110)], "line-read", arrow=True)
    p.text(24, 96, "residual stream", "read")
    p.text(180, 96, "D numbers for each token", "soft small")
    p.path([(690, 62), (300, 62)], "line-back dash", arrow=True)
    p.text(310, 52, "in training: the gradient runs back, through each + unchanged", "back small")
    for x, name, words in ((90, "attention", "looks at earlier tokens"), (430, "MLP", "neurons, this token alone")):
        p.path([(x, 112), (x, 148)], "line-edge", arrow=True)
        p.text(x + 8, 136, "reads", "soft small")
        p.box(x - 42, 150, 84, 28, "off", edge=True, corner=4)
        p.text(x, 169, "norm", "ink small", "middle")
        p.path([(x, 178), (x, 198)], "line-edge", arrow=True)
        p.box(x - 58, 200, 206, 52, "off", edge=True, corner=4)
        p.text(x + 45, 222, name, "head", "middle")
        p.text(x + 45, 241, words, "soft small", "middle")
        p.path([(x + 120, 200), (x + 120, 124)], "line-edge", arrow=True)
        p.text(x + 128, 160, "adds", "soft small")
        p.dot(x + 120, 110, "read", 11)
        p.text(x + 120, 115, "+", "on head", "middle")
    return p


def lookahead() -> Picture:
    p = Picture("With lookahead 1 the predictor runs beside attention, and the MLP need not wait for it", 236)
    p.text(24, 30, "Time runs to the right", "head")
    rows = (
        (
            60,
            "lookahead 0",
            [(150, 220, 0, "attention", "off"), (375, 110, 0, "predictor", "back"), (490, 120, 0, "MLP: listed rows", "read")],
        ),
        (
            132,
            "lookahead 1",
            [(150, 220, 0, "attention", "off"), (150, 110, 36, "predictor", "back"), (375, 120, 0, "MLP: listed rows", "read")],
        ),
    )
    for y, name, blocks in rows:
        p.text(24, y + 20, name, "ink")
        for x, width, below, words, kind in blocks:
            p.box(x, y + below, width, 30, kind, edge=kind == "off", corner=4)
            p.text(x + width / 2, y + below + 20, words, "ink small" if kind == "off" else "on small", "middle")
    p.text(24, 108, "reads what the MLP reads: it must wait until attention is done", "soft small")
    p.text(276, 188, "the list is there before attention ends: its rows can be fetched meanwhile", "soft small")
    p.text(24, 220, "reads what attention reads: nearly the same numbers, since attention adds little to the stream", "soft small")
    return p


def cosine() -> Picture:
    layers = newest(ProfileResult, "opt-mini").result["layers"]
    p = Picture("Cosine of the residual stream before and after each layer of opt-mini", 262)
    p.text(24, 30, "How alike the residual stream is before and after a layer (opt-mini)", "head")
    p.text(24, 50, "cosine similarity: 1 is the same direction, 0 is none in common", "soft small")
    step = 640 / len(layers)
    for index, layer in enumerate(layers):
        x, height = 50 + index * step, 140 * layer["cosine"]
        p.box(x, 222 - height, step * 0.6, height, "read")
        p.text(x + step * 0.3, 214 - height, f"{layer['cosine']:.2f}", "ink", "middle")
        p.text(x + step * 0.3, 242, f"layer {index}", "ink small", "middle")
    p.path([(40, 222), (690, 222)], "line-edge thin")
    return p


def attention() -> Picture:
    tokens = [
        ("The", (0.2, 0.1), (0.1, 0.9)),
        ("lighthouse", (1.5, 0.6), (1.0, 0.2)),
        ("keeper", (1.8, 1.6), (0.4, 1.0)),
        ("slept", (0.4, 0.9), (0.2, 0.3)),
    ]
    query = (1.2, 0.8)
    scores = [sum(a * b for a, b in zip(query, key, strict=True)) for _, key, _ in tokens]
    weights = [math.exp(score) for score in scores]
    weights = [weight / sum(weights) for weight in weights]
    out = [sum(w * value[i] for w, (_, _, value) in zip(weights, tokens, strict=True)) for i in range(2)]
    p = Picture("One attention head: the query of the new token against the keys of all tokens, then a mean of their values", 318)
    p.text(24, 30, "One head, at the token “slept” (an example with 2 numbers a vector)", "head")
    p.text(24, 58, f"query of “slept”: what it looks for  ({query[0]}, {query[1]})", "back")
    for x, words in (
        (24, "token"),
        (150, "key: what it is found by"),
        (345, "query · key"),
        (445, "share"),
        (570, "value: what it gives"),
    ):
        p.text(x, 90, words, "soft small")
    for index, ((name, key, value), score, weight) in enumerate(zip(tokens, scores, weights, strict=True)):
        y = 104 + 38 * index
        p.box(18, y, 684, 32, "off", corner=4)
        p.text(28, y + 21, name, "ink")
        p.text(150, y + 21, f"({key[0]}, {key[1]})", "ink mono")
        p.text(355, y + 21, f"{score:.2f}", "ink mono")
        p.box(445, y + 8, 100 * weight, 16, "read")
        p.text(450 + 100 * weight, y + 21, _percent(weight), "ink small")
        p.text(570, y + 21, f"({value[0]}, {value[1]})", "ink mono")
    p.text(24, 282, f"what the head gives: the mean of the values, each by its share = ({out[0]:.2f}, {out[1]:.2f})", "read")
    p.text(24, 303, "the larger query · key, the larger the share; together 100 % (this step is called softmax)", "soft small")
    return p


def cache() -> Picture:
    chosen = [{0, 2}, {1, 3}, {0, 3}, {2, 3}, {0, 1}, {1, 2}]
    words = ["The", "light", "house", "keeper", "sle", "pt"]
    p = Picture("Keys and values are stored for every head, so the heads a later token selects find them", 300)
    p.text(24, 30, "The cache: a key and a value of every token for every head", "head")
    for column, word in enumerate(words):
        x = 130 + 84 * column
        p.text(x + 34, 60, word, "ink small", "middle")
        for head in range(4):
            p.box(x, 70 + 40 * head, 70, 30, "read" if head in chosen[-1] else "off", edge=True, corner=4)
            p.text(x + 35, 90 + 40 * head, "k, v", "on small" if head in chosen[-1] else "soft small", "middle")
            if head in chosen[column]:
                p.dot(x + 60, 79 + 40 * head, "back", 5)
    for head in range(4):
        p.text(24, 90 + 40 * head, f"head {head + 1}", "ink")
    p.path([(120, 61), (120, 230)], "line-edge thin")
    p.dot(30, 252, "back", 5)
    p.text(43, 257, "heads that the token itself selected", "soft small")
    p.box(300, 246, 13, 13, "read")
    p.text(319, 257, f"what the last token, “{words[-1]}”, reads now: all of its own heads", "soft small")
    needed = sum(head not in picked for picked in chosen[:-1] for head in chosen[-1])
    p.text(
        24,
        283,
        f"{needed} of the {2 * (len(words) - 1)} earlier entries it reads belong to tokens that had skipped that head themselves.",
        "ink small",
    )
    return p


def neuron() -> Picture:
    active = {2, 5, 6, 10}
    rows, cells = 12, 9
    p = Picture("An MLP: a neuron is a row of up and a row of down; rows of neurons left out are not read", 372)
    p.text(24, 30, f"An MLP with {rows} neurons, of which this token uses {len(active)}", "head")
    for x, name in ((40, "up: F rows of D weights"), (420, "down, stored transposed: F rows of D")):
        p.text(x, 102, name, "ink small")
        for row in range(rows):
            for cell in range(cells):
                p.box(x + 26 * cell, 112 + 17 * row, 23, 14, "read" if row in active else "off")
    for cell in range(cells):
        p.box(40 + 26 * cell, 60, 23, 14, "back")
        p.box(420 + 26 * cell, 330, 23, 14, "back")
    p.text(40, 54, "x: what comes in, D numbers", "back small")
    p.text(420, 361, "y: what goes out, D numbers", "back small")
    for row in range(rows):
        y = 119 + 17 * row
        if row in active:
            p.path([(278, y), (310, y)], "line-edge", arrow=True)
            p.text(318, y + 5, "a", "head small")
            p.path([(332, y), (414, y)], "line-edge", arrow=True)
    p.text(276, 98, "a = relu(up row · x)", "ink small")
    p.text(318, 119 + 5, "0", "soft small")
    p.text(338, 119 + 5, "not read", "soft small")
    p.path([(535, 318), (535, 328)], "line-back", arrow=True)
    p.legend(352, [("read", "read"), ("off", f"left out: {_percent(1 - len(active) / rows)} of the weights")])
    return p


def example() -> tuple[list[float], list[bool]]:
    """Contributions of 20 neurons of an example, and which a predictor selects."""
    contribution = [0, 0, 3.1, 0, 0, 0.4, 0, 5.6, 0, 0, 0, 1.2, 0, 0, 0.3, 0, 0, 2.2, 0, 0]
    selected = [index in (2, 4, 7, 11, 17) for index in range(20)]
    return contribution, selected


def measures() -> Picture:
    contribution, selected = example()
    total, kept = sum(contribution), sum(c for c, s in zip(contribution, selected, strict=True) if s)
    active, found = sum(c > 0 for c in contribution), sum(c > 0 and s for c, s in zip(contribution, selected, strict=True))
    p = Picture("Density, recall and mass of a selection of 5 of 20 neurons", 316)
    p.text(24, 30, "One token, 20 neurons: what each adds, and which were selected (an example)", "head")
    for index, (value, picked) in enumerate(zip(contribution, selected, strict=True)):
        x, height = 30 + 33.5 * index, 20 * value
        p.box(x, 172 - height, 24, height, "read" if picked else "back")
        p.box(x, 180, 24, 18, "read" if picked else "off", edge=True)
    p.path([(24, 172), (700, 172)], "line-edge thin")
    p.legend(222, [("read", "selected"), ("off", "left out"), ("back", "missed: it adds something, but was left out")])
    lines = [
        ("density", f"selected ÷ all = {sum(selected)} ÷ 20 = {_percent(sum(selected) / 20)}"),
        ("recall", f"selected ÷ active, among those that add anything = {found} ÷ {active} = {_percent(found / active)}"),
        ("mass", f"selected share of all that is added = {kept:.1f} ÷ {total:.1f} = {_percent(kept / total)}"),
    ]
    for index, (name, words) in enumerate(lines):
        p.text(24, 252 + 24 * index, name, "head")
        p.text(104, 252 + 24 * index, words, "ink")
    return p


class Axes:
    """A plot's frame: x from 0 to `right`, y from 0 to `top`, both shares shown as percentages."""

    def __init__(self, p: Picture, right: float, top: float, steps: tuple[float, float], names: tuple[str, str]) -> None:
        self.p, self.right, self.top, self.bottom = p, right, top, p.height - 56
        for share in range(round(top / steps[1]) + 1):
            y = self.at(0, share * steps[1])[1]
            p.path([(70, y), (690, y)], "line-off thin")
            p.text(62, y + 5, _percent(share * steps[1]), "soft small", "end")
        for share in range(round(right / steps[0]) + 1):
            p.text(self.at(share * steps[0], 0)[0], self.bottom + 20, _percent(share * steps[0]), "soft small", "middle")
        p.text(690, self.bottom + 42, names[0], "soft small", "end")
        p.text(24, 54, names[1], "soft small")

    def at(self, x: float, y: float) -> tuple[float, float]:
        return 70 + 620 * x / self.right, self.bottom - (self.bottom - 72) * y / self.top


def mass() -> Picture:
    layers = newest(ProfileResult, "opt-mini").result["layers"]
    p = Picture("How much of what an MLP adds comes from its strongest neurons, by layer of opt-mini", 320)
    p.text(24, 30, "Few parts do nearly all the work (opt-mini, mean over tokens)", "head")
    axes = Axes(
        p, 0.05, 1.0, (0.01, 0.25), ("density: share of the neurons used, the strongest first", "mass: their share of what the MLP adds")
    )
    for index, layer in enumerate(layers):
        points = [axes.at(0, 0), *(axes.at(x, y) for x, y in layer["mass_curve"] if x <= 0.0501)]
        p.path(points, "line-back" if index == 0 else "line-read")
    p.text(*axes.at(0.026, 0.62), f"orange: layer 0; blue: layers 1 to {len(layers) - 1}", "ink small")
    p.text(*axes.at(0.026, 0.52), "Which neurons these are differs from token to token.", "soft small")
    return p


def budget() -> Picture:
    profile, train = newest(ProfileResult, "opt-mini").result, newest(TrainResult, "opt-mini").result
    oracle = [(row["density"], row["ppl"] / profile["ppl_dense"] - 1) for row in profile["oracle"] if row["part"] == "mlp"]
    p = Picture("Rise of perplexity against density: an oracle's curve, the loss budget, and the trained adapter", 330)
    p.text(24, 30, "Fewer neurons, more loss: the budget says how much loss is allowed (opt-mini)", "head")
    axes = Axes(p, 0.12, 0.04, (0.02, 0.01), ("MLP density", "rise of perplexity"))
    p.path([axes.at(x, y) for x, y in oracle if y <= 0.04], "line-edge")
    for x, y in oracle:
        if y <= 0.04:
            p.dot(*axes.at(x, y), "edge", 4)
    p.text(*axes.at(0.024, 0.023), "an oracle, which knows what matters: predictors stay behind it", "soft small")
    p.path([axes.at(0, train["budget"]), axes.at(0.12, train["budget"])], "line-back dash")
    x, y = axes.at(0.03, train["budget"])
    p.text(x, y - 7, f"budget: {_percent(train['budget'], 1)}", "back")
    x, y = axes.at(train["mlp_density"], train["rise"])
    p.dot(x, y, "read", 7)
    p.text(x + 4, y - 50, f"trained predictors: density {_percent(train['mlp_density'], 1)},", "read small", "end")
    p.text(x + 4, y - 34, f"a rise of {_percent(train['rise'], 1)} on text held out", "read small", "end")
    return p


def decode() -> Picture:
    rows = [row for row in read_rows(BENCH) if row.model == "opt-6.7b" and row.dtype == "fp16" and row.dense and row.backend == "cuda"]
    step = [row for row in rows if row.op == "decode" and row.batch == 1 and row.context == 2000][-1]
    prompts = [
        row.p50_us for row in rows if (row.op, row.time, row.context) == ("prefill", step.time, step.context) and row.p50_us is not None
    ]
    assert step.p50_us is not None and step.pct_ceiling is not None
    prompt = statistics.median(prompts)
    p = Picture("Decode reads all weights for one token; prefill reads them once for all tokens of the prompt", 330)
    p.text(24, 30, "A weight is read from memory, then used", "head")
    for x, name, tokens, words in (
        (24, "decode: 1 token", 1, "read once, used once"),
        (380, "prefill: a prompt", 8, "read once, used for every token"),
    ):
        p.text(x, 60, name, "ink")
        p.box(x, 72, 96, 88, "read", corner=4)
        p.text(x + 48, 121, "weights", "on small", "middle")
        p.path([(x + 100, 116), (x + 136, 116)], "line-edge", arrow=True)
        for token in range(tokens):
            y = 116 if tokens == 1 else 78 + 11 * token
            p.box(x + 142, y - 4, 90, 8, "back")
        p.text(x, 182, words, "soft small")
    p.text(24, 220, f"{step.context} tokens of the shape of OPT-6.7B, fp16, on an {step.device}, dense", "head")
    scale = 400 / (step.context * step.p50_us)
    for y, time, words in (
        (236, step.context * step.p50_us, f"one after another: {step.p50_us / 1000:.1f} ms each"),
        (270, prompt, f"together, as a prompt: {prompt / 1000:.0f} ms in all, as long as {prompt / step.p50_us:.0f} decode steps"),
    ):
        p.box(24, y, max(2, time * scale), 20, "read")
        p.text(32 + time * scale, y + 15, words, "ink small")
    p.text(
        24,
        314,
        f"A decode step reads at {step.pct_ceiling:.0f} % of the speed of a plain read of memory: reading is what takes the time.",
        "ink small",
    )
    return p


def contexts() -> Picture:
    """How the ratio falls as the cache grows, which every step reads: what was measured at two contexts or more on an H200."""
    found: dict[str, dict[int, float]] = {}
    devices = set()
    for (model, _, context, batch, mode, kept), (row, dense) in newest_decodes("H200").items():
        way = {"dejavu sparse+heads": "MLP at 10 %, half of the heads", "dejavu sparse, input": "half of the inputs"}.get(mode)
        if batch == 1 and way is not None and kept in (0.0, -0.5):
            shape = model.split(", ", 1)[1].removesuffix("'s shape")
            words = f"{shape}: {way}"
            found.setdefault(words, {})[context] = row.speed / dense.speed
            devices.add(str(row.device))
    found = {words: ratios for words, ratios in found.items() if len(ratios) > 1}
    ticks = sorted({context for ratios in found.values() for context in ratios})
    p = Picture("How many times as fast as dense a sparse step is, by context", 340)
    p.text(24, 30, f"A sparse step beside a dense one, by context (shapes, fp16, one {' and '.join(sorted(devices))})", "head")
    top = 3.0

    def at(context: float, value: float) -> tuple[float, float]:
        return 90 + 540 * math.log(context / ticks[0]) / math.log(ticks[-1] / ticks[0]), 280 - 210 * value / top

    for value in range(int(top) + 1):
        y = at(ticks[0], value)[1]
        p.path([(60, y), (690, y)], "line-edge dash" if value == 1 else "line-off thin")
        p.text(54, y + 5, f"{value}x", "soft small", "end")
    p.text(688, at(ticks[0], 1)[1] + 17, "dense", "soft small", "end")
    for context in ticks:
        p.text(at(context, 0)[0], 300, f"{context:,}", "soft small", "middle")
    p.text(690, 324, "context: tokens in the cache", "soft small", "end")
    for kind, (words, ratios) in zip(("back", "ink", "read"), sorted(found.items(), key=lambda item: -max(item[1].values())), strict=False):
        points = [at(context, ratio) for context, ratio in sorted(ratios.items())]
        p.path(points, "line-edge" if kind == "ink" else f"line-{kind}")
        for (x, y), ratio in zip(points, (ratio for _, ratio in sorted(ratios.items())), strict=True):
            p.dot(x, y, kind, 4)
            p.text(x, y - 9, f"{ratio:.2f}", f"{kind} small", "middle")
        x, y = points[1]
        p.text(x + 16, y + (4 if len(points) == 2 else 26), words, f"{kind} small")
    return p


def sectors() -> Picture:
    rows, groups, each, share = 10, 4, 16, 0.1
    generator = random.Random(0)
    scattered = set(generator.sample(range(rows * groups * each), round(share * rows * groups * each)))
    p = Picture("Scattered values touch nearly every sector of memory; whole rows touch only their own", 372)
    p.text(24, 30, f"{rows} rows of {groups * each} fp16 values; a GPU reads sectors of {each} values (32 bytes)", "head")
    for x, name, needed in ((24, "scattered", scattered), (376, "one row", {3 * groups * each + i for i in range(groups * each)})):
        touched = {value // each for value in needed}
        for sector in range(rows * groups):
            row, group = divmod(sector, groups)
            left, top = x + 82 * group, 52 + 25 * row
            p.box(left, top, 78, 20, "read" if sector in touched else "off", corner=3)
            for value in range(each):
                if sector * each + value in needed:
                    p.box(left + 1.5 + 4.75 * value, top + 3, 3.6, 14, "on", corner=0)
        p.text(x, 322, f"{name}: {_percent(len(needed) / (rows * groups * each))} of the values needed,", "ink")
        p.text(x, 342, f"{len(touched)} of {rows * groups} sectors read: {_percent(len(touched) / (rows * groups))}", "ink")
    p.legend(364, [("read", "a sector that is read; each tick in it is a value that is needed"), ("off", "a sector left out")])
    return p


def layouts() -> Picture:
    chosen = {1, 4}
    p = Picture("Where rows lie in memory, for predicted neurons, for gates and for inputs", 330)
    p.text(24, 30, "Memory from left to right; each way to select has its own order (native engine, gated MLP)", "head")
    names = ("gate", "up", "down")

    def strip(y: float, cells: list[tuple[str, bool, bool]]) -> None:
        x = 24.0
        for word, reads, ends in cells:
            p.box(x, y, 38, 34, "read" if reads else "off", edge=True)
            p.text(x + 19, y + 21, word, "on small" if reads else "soft small", "middle")
            x += 45 if ends else 37

    p.text(24, 62, "predicted: a neuron's three rows side by side; one stretch for each neuron selected", "ink small")
    strip(70, [(name, neuron in chosen, name == "down") for neuron in range(6) for name in names][:17])
    p.text(24, 138, "exact, gate: every row of the gate first, all read in order; then up and down of each neuron", "ink small")
    strip(
        146,
        [("gate", True, neuron == 5) for neuron in range(6)] + [(n, f in chosen, n == "down") for f in range(6) for n in names[1:]][:11],
    )
    p.text(24, 214, "input: a row for each input, here of gate and up together; a row for each input that is kept", "ink small")
    strip(222, [(f"x {index + 1}", index in (0, 3, 4, 8, 9, 13), True) for index in range(15)])
    p.text(24, 278, "down and o have a row for each input in all three.", "soft small")
    p.legend(310, [("read", "read"), ("off", "left out")])
    return p


def union() -> Picture:
    generator = random.Random(4)
    neurons, hot = 32, [2, 3, 11, 20]
    rows = [sorted({*generator.sample(hot, 3), *generator.sample(range(neurons), 3)}) for _ in range(4)]
    joined = sorted({neuron for row in rows for neuron in row})
    p = Picture("Four texts select neurons each; memory is read for the union of them", 262)
    p.text(24, 30, f"Four texts at once, {neurons} neurons: each selects its own, their union is read (an example)", "head")
    for index, (name, chosen) in enumerate([*((f"text {i + 1}", row) for i, row in enumerate(rows)), ("union", joined)]):
        y = 52 + 32 * index + (12 if name == "union" else 0)
        p.text(24, y + 16, name, "head" if name == "union" else "ink")
        for neuron in range(neurons):
            p.box(96 + 16 * neuron, y, 13, 22, ("back" if name == "union" else "read") if neuron in chosen else "off")
        p.text(694, y + 16, _percent(len(chosen) / neurons), "ink", "end")
    p.text(24, 246, "Each text's result uses its own neurons alone, so it does not depend on the others.", "soft small")
    return p


Box = tuple[float, float, float, float]


def _free(x: float, y: float, width: float, taken: list[Box], within: Box) -> Box:
    """A place for a word near a point that covers no other, the nearest first."""

    def fits(box: Box) -> bool:
        inside = within[0] <= box[0] and box[2] <= within[2] and within[1] <= box[1] and box[3] <= within[3]
        return inside and not any(box[0] < o[2] and o[0] < box[2] and box[1] < o[3] and o[1] < box[3] for o in taken)

    for beside in (x + 11, x - width - 11):
        box = (beside, y - 8, beside + width, y + 8)
        if fits(box):
            return box
    for away in range(1, 12):
        for down in (10 * away, -10 * away - 16):
            for across in (-width / 2, 4, -width - 4):
                box = (x + across, y + down, x + across + width, y + down + 16)
                if fits(box):
                    return box
    return (x + 12, y - 8, x + 12 + width, y + 8)


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One way to run a model. kind: a colour of the palette. least to most: over processes."""

    words: str
    kind: str
    ppl: float
    median: float
    least: float
    most: float


KINDS = {"read": "ours, sparse", "edge": "ours, dense", "back": "other programs"}


def _kind(row: WayToRun) -> str:
    return "back" if row.peer else "read" if row.sparse else "edge"


def _front(points: Sequence[Point]) -> list[Point]:
    """Those that no other is both faster and better than, the best first."""
    found: list[Point] = []
    for point in sorted(points, key=lambda point: (point.ppl, -point.median)):
        if not found or point.median > found[-1].median:
            found.append(point)
    return found


def _speeds_and_quality(title: str, heading: str, about: str, points: Sequence[Point]) -> Picture:
    """Speed against perplexity; up and to the right is better. A dashed line joins what nothing beats in both."""
    found = sorted(points, key=lambda point: point.ppl)
    more = 10 * max(0, len(found) - 12)  # many points take a taller picture
    p = Picture(title, 404 + more)
    p.text(24, 30, heading, "head")
    p.text(24, 50, about, "soft small")
    left, right, top, bottom = 78.0, 690.0, 76.0, 326.0 + more
    most = max(point.most for point in found)
    step = next(step for step in (10, 20, 50, 100, 200, 500, 1000) if most / step <= 7)
    edge = step * math.ceil(1.02 * most / step)
    low, high = found[0].ppl, found[-1].ppl
    gap = max(high - low, 0.02 * low)
    low, high = low - 0.12 * gap, high + 0.12 * gap

    def at(speed: float, ppl: float) -> tuple[float, float]:
        return left + (right - left) * speed / edge, top + (bottom - top) * (ppl - low) / (high - low)

    for tick in range(0, edge + 1, step):
        x, _ = at(tick, low)
        p.path([(x, top), (x, bottom)], "line-off thin")
        p.text(x, bottom + 18, f"{tick:,}", "soft small", "middle")
    for index in range(5):
        ppl = low + (high - low) * (index + 0.5) / 5
        y = at(0, ppl)[1]
        p.path([(left, y), (right, y)], "line-off thin")
        p.text(left - 8, y + 5, f"{ppl:.1f}", "soft small", "end")
    p.text(right, bottom + 38, "tokens a second, one sequence", "soft small", "end")
    p.text(24, top - 6, "perplexity (the lower, the better)", "soft small")
    front = _front(found)
    corners = [at(point.median, point.ppl) for point in front]
    if len(front) > 1:
        p.path(corners, "line-edge thin dash")
    taken = [(*at(point.least, point.ppl), *at(point.most, point.ppl)) for point in found]  # left, top, right, bottom
    taken = [(x0 - 8, y0 - 8, x1 + 8, y1 + 8) for x0, y0, x1, y1 in taken]
    for (x0, y0), (x1, y1) in pairwise(corners):  # words keep off the dashed line
        parts = max(1, round(math.hypot(x1 - x0, y1 - y0) / 8))
        along = [(x0 + (x1 - x0) * part / parts, y0 + (y1 - y0) * part / parts) for part in range(parts + 1)]
        taken += [(x - 2, y - 2, x + 2, y + 2) for x, y in along]
    for point in found:
        x, y = at(point.median, point.ppl)
        p.path([at(point.least, point.ppl), at(point.most, point.ppl)], f"line-{point.kind}")
        p.dot(x, y, point.kind, 6)
        box = _free(x, y, 6.7 * len(point.words), taken, (left, top - 8, right + 20, bottom))
        taken.append(box)
        if max(box[1] - y, y - box[3]) > 20:  # too far to be seen whose it is
            p.path([(x, y), (min(max(x, box[0]), box[2]), box[1] if box[1] > y else box[3])], f"line-{point.kind} thin")
        p.text(box[0], box[3] - 3, point.words, "ink small" if point.kind == "edge" else f"{point.kind} small")
    p.legend(bottom + 60, [(kind, words) for kind, words in KINDS.items() if any(point.kind == kind for point in found)])
    p.path([(430, bottom + 55), (462, bottom + 55)], "line-edge thin dash")
    p.text(470, bottom + 60, "nothing is both faster and better", "soft small")
    return p


def _programs(model: str, name: str) -> Picture:
    """Every program and dtype that ran a model, in processes of their own."""
    found = [
        Point(
            words=f"{speed.program}, {speed.row.dtype}", kind=_kind(speed.row), ppl=speed.ppl, median=speed.median, least=speed.least,
            most=speed.most,
        )
        for speed in speeds(model)
    ]  # fmt: skip
    about = "up: foretells text better; right: writes faster. A line spans five processes or more."
    title = f"Tokens a second against perplexity of every program and dtype that ran {name}"
    return _speeds_and_quality(title, f"{name}: speed and quality of every program", about, found)


def _forms(base: str) -> Picture:
    """Every form of a model and every program that took turns with them."""
    runs = newest_runs(base, FORMS)
    if not runs:
        raise Refused(f"no forms of {base} in results/ may be shown: run recipes/forms.py on a clean commit")
    found = []
    for ways in zip(*runs, strict=True):
        row, held = ways[-1], [way.tok_s for way in ways]
        name = f"{row.mode}, {row.form}" if row.peer else f"{row.form}, sparse" if row.sparse else row.form
        found.append(
            Point(words=name, kind=_kind(row), ppl=row.ppl, median=statistics.median(held), least=min(held), most=max(held))
        )  # fmt: skip
    spans = f"A line spans {len(runs)} processes." if len(runs) > 1 else "All took turns in one process."
    about = f"up: foretells text better; right: writes faster. {spans}"
    what = "every form and program" if any(row.peer for row in runs[-1]) else "every form"
    return _speeds_and_quality(f"Tokens a second against perplexity of every form of {base}", f"{base}: {what}", about, found)


def speedmini() -> Picture:
    return _programs("opt-mini", "opt-mini")


def speedsmol() -> Picture:
    return _programs(SMOLLM2, "SmolLM2-135M-Instruct")


def formssmol() -> Picture:
    return _forms("SmolLM2-135M-Instruct")


PICTURES = (
    residual,
    cosine,
    lookahead,
    attention,
    cache,
    neuron,
    measures,
    mass,
    budget,
    decode,
    contexts,
    sectors,
    layouts,
    union,
    speedmini,
    speedsmol,
    formssmol,
)


def main() -> None:
    for picture in PICTURES:
        (IMAGES / f"{picture.__name__}.svg").write_text(picture().svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
