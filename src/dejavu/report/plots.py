"""Figures of the report, in one style, as inline SVG.

In: plain lists and dicts of numbers. Out: a string `<svg ...>` for an HTML page: text stays text, ids carry the figure's
name so that many figures fit on one page, and colours are CSS variables (`css_variables`), so that the page's theme is the
figure's. They are narrow enough to stay readable on a phone. Colours are Okabe and Ito's; shape or dash says the same a second time.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import matplotlib as mpl
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, ScalarFormatter

from dejavu.figures import CurvePoint, LayerProfile

WIDTH, HEIGHT, DPI = 5.4, 3.5, 72  # inches; SVG has 72 units an inch
INK, MUTED, GRID = "#1f2328", "#5f6872", "#d5dae0"
SPARSE, ORACLE, IDLE, PAGE = "#0072b2", "#c85200", "#c6ccd3", "#fefefe"
STOPS = 12
RAMP = tuple(to_hex(colormaps["viridis"](0.05 + 0.75 * stop / (STOPS - 1))) for stop in range(STOPS))
RAMP_DARK = tuple(to_hex(colormaps["viridis"](0.35 + 0.63 * stop / (STOPS - 1))) for stop in range(STOPS))
LIGHT = {"ink": INK, "muted": MUTED, "grid": GRID, "sparse": SPARSE, "oracle": ORACLE, "idle": IDLE, "page": PAGE} | {
    f"ramp{stop}": colour for stop, colour in enumerate(RAMP)
}
DARK = {
    "ink": "#e6e9ed",
    "muted": "#9aa5b1",
    "grid": "#343b44",
    "sparse": "#56b4e9",
    "oracle": "#f0934f",
    "idle": "#4a535e",
    "page": "#14171b",
} | {f"ramp{stop}": colour for stop, colour in enumerate(RAMP_DARK)}
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "figure.constrained_layout.use": True,
}
PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.3g}%")
MAX_RISE, MIN_POINTS = 0.3, 4  # perplexity curves are cut at this rise, but show this many points of each kind


def css_variables(theme: dict[str, str]) -> str:
    """The colours of a theme (LIGHT or DARK) as CSS custom properties."""
    return " ".join(f"--{name}: {colour};" for name, colour in theme.items())


def _svg(name: str, label: str, draw: Callable[[Axes], None], *, height: float = HEIGHT) -> str:
    """Draw one figure. `label` is its text for those who do not see it."""
    with mpl.rc_context(STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH, height), dpi=DPI)
        figure.patch.set_visible(False)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        draw(axes)
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    return _inline(buffer.getvalue(), name, label)


def _inline(text: str, name: str, label: str) -> str:
    """A stand-alone SVG file as a part of a page."""
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)
    assert size is not None
    body = text[text.index(">", text.index("<svg")) + 1 :]
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'(xlink:)?href="#', f'href="#{name}-', body)
    body = body.replace("url(#", f"url(#{name}-")
    body = re.sub(r"font-family: [^;\"]*", "font-family: var(--font)", body)
    body = re.sub(r"<g id=\"[^\"]*\">", "<g>", body)  # nothing refers to a group
    body = re.sub(r"<[^>]+>", lambda tag: re.sub(r"\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}", tag[0]), body)  # pixels
    body = re.sub(r">\s+<", "><", body)
    for variable, colour in LIGHT.items():
        body = body.replace(colour, f"var(--{variable})")
    return f'<svg class="figure" viewBox="0 0 {size[1]} {size[2]}" role="img" aria-label="{escape(label)}">{body}'


def layer_colour(layer: int, count: int) -> str:
    """Colour of a layer: dark (or bluish) for the first, light (or yellowish) for the last."""
    return RAMP[round(layer / max(count - 1, 1) * (STOPS - 1))]


def _label(
    axes: Axes,
    text: str,
    at: tuple[float, float],
    coordinates: tuple[str, str],
    shift: tuple[float, float],
    *,
    right: bool = False,
    color: str = INK,
) -> None:
    """A direct label, `shift` points from `at`; with `right`, it ends there."""
    axes.annotate(
        text, at, xycoords=coordinates, xytext=shift, textcoords="offset points", ha="right" if right else "left", color=color, fontsize=10
    )


def _density_axis(axes: Axes, what: str) -> None:
    axes.set_xlabel(what)
    axes.xaxis.set_major_formatter(PERCENT)


def _layer_rows(axes: Axes, count: int) -> None:
    """Layers from top to bottom, one row each."""
    axes.set_ylim(count - 0.4, -0.6)
    axes.set_yticks(list(range(count)) if count <= 12 else list(range(0, count, -(-count // 12))))
    axes.set_ylabel("layer")
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _rows_height(count: int) -> float:
    return 1.25 + 0.3 * min(count, 24)


def mlp_density(layers: Sequence[LayerProfile], selected: Sequence[float] | None) -> str:
    """Dead, contextual and always-on neurons of each layer as one bar; natural and selected density as marks on it."""
    count = len(layers)
    widths = {key: [layer[key] for layer in layers] for key in ("always_on", "contextual", "dead")}

    def draw(axes: Axes) -> None:
        left = [0.0] * count
        for key, colour, alpha in (("always_on", ORACLE, 0.85), ("contextual", SPARSE, 0.3), ("dead", IDLE, 0.9)):
            axes.barh(range(count), widths[key], left=left, height=0.62, color=colour, alpha=alpha, label=key.replace("_", "-"))
            left = [a + b for a, b in zip(left, widths[key], strict=True)]
        natural = [layer["mlp_density"] for layer in layers]
        axes.plot(natural, range(count), "|", color=INK, markersize=15, markeredgewidth=2.2, label="active on a token")
        if selected is not None:
            axes.plot(
                selected, range(count), "o", color=SPARSE, markersize=7, markeredgecolor=PAGE, label="read for a token", clip_on=False
            )
        axes.set_xlim(0, 1)
        _layer_rows(axes, count)
        _density_axis(axes, "share of the layer's neurons")
        axes.grid(axis="x", visible=False)
        _key_above(axes, columns=3)

    label = f"MLP neurons of {count} layers: always-on, contextual and dead shares, natural and selected density; the table has the numbers"
    return _svg("density", label, draw, height=_rows_height(count) + 0.35)


def _key_above(axes: Axes, *, columns: int) -> None:
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=columns,
        frameon=False,
        fontsize=10,
        handlelength=1.1,
        columnspacing=1.0,
        borderpad=0.1,
    )


def layer_curves(
    name: str,
    curves: Sequence[Sequence[Sequence[float]] | None],
    *,
    x: str,
    y: str,
    chosen: Sequence[tuple[float, float] | None] | None = None,
) -> str:
    """One line a layer (None: the layer has none), all on fractions; `chosen` marks a point of each."""
    count = len(curves)

    def draw(axes: Axes) -> None:
        lowest = 1.0
        for layer, curve in enumerate(curves):
            if not curve:
                continue
            points = sorted((share, value) for share, value in curve)
            axes.plot([p[0] for p in points], [p[1] for p in points], color=layer_colour(layer, count), label=f"{layer}")
            lowest = min(lowest, points[0][1])
        for layer, point in enumerate(chosen or ()):
            if point is not None and curves[layer]:
                axes.plot(*point, "o", color=layer_colour(layer, count), markeredgecolor=PAGE, markersize=7, zorder=5)
        axes.set_xlim(0, _saturation([curve for curve in curves if curve]))
        axes.set_ylim(max(0.0, lowest - 0.05) if lowest > 0.3 else 0.0, 1.02)
        axes.yaxis.set_major_formatter(PERCENT)
        _density_axis(axes, x)
        axes.set_ylabel(y)
        handles, labels = axes.get_legend_handles_labels()
        step = -(-len(handles) // 8)
        axes.legend(
            handles[::step],
            labels[::step],
            title="layer",
            loc="lower right",
            ncols=2,
            frameon=False,
            fontsize=10,
            title_fontsize=10,
            handlelength=1.2,
        )

    return _svg(name, f"{y} against {x}, one line for each of {count} layers", draw)


def _saturation(curves: Sequence[Sequence[Sequence[float]]]) -> float:
    """Where the last of the curves reaches 99.5 %: beyond, there is nothing to see."""
    reached = [min([x for x, y in curve if y >= 0.995] or [x for x, _ in curve[-1:]]) for curve in curves]
    return max(reached)


def perplexity_curves(
    name: str, points: Sequence[CurvePoint], ppl_dense: float, *, x: str, chosen: float | None = None, join: bool = False
) -> str:
    """Perplexity against density, selected by predictors and by an oracle, and that of the dense model.

    join: draw the curves on to density 1, where nothing is skipped and the model is the dense one.
    """
    kinds = {"predicted": (SPARSE, "-o", "chosen by predictors"), "oracle": (ORACLE, "--D", "chosen in hindsight (oracle)")}
    found = {kind: sorted((point["density"], point["ppl"]) for point in points if point["kind"] == kind) for kind in kinds}
    if join:
        found = {kind: [*[p for p in curve if p[0] < 1], (1.0, ppl_dense)] for kind, curve in found.items() if curve}
    top = ppl_dense * (1 + MAX_RISE)
    for curve in found.values():
        top = max([top, *sorted(ppl for _, ppl in curve)[:MIN_POINTS]])

    seen = [point for curve in found.values() for point in curve if point[1] <= top]
    lowest = min((density for density, _ in seen), default=0.0)
    left = max(0.0, lowest - 0.1) if lowest > 0.5 else 0.0  # no empty half where all that is shown lies at the right

    def draw(axes: Axes) -> None:
        values = [ppl for _, ppl in seen] + [ppl_dense]
        if max(values) > 2 * ppl_dense:
            axes.set_yscale("log")
            axes.set_ylim(0.8 * min(values), 1.15 * max(values))
            decades = max(values) / min(values) > 20
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades else (1, 1.5, 2, 3, 4, 5, 7)))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(ScalarFormatter())
        else:
            spread = max(max(values) - min(values), 0.02 * ppl_dense)
            axes.set_ylim(min(values) - 0.2 * spread, max(values) + 0.12 * spread)
            axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.axhline(ppl_dense, color=INK, linewidth=1.2, linestyle=":")
        for kind, (colour, style, label) in kinds.items():
            curve = found.get(kind)
            if not curve:
                continue
            axes.plot([p[0] for p in curve], [p[1] for p in curve], style, color=colour, markersize=4.5, label=label)
        right = chosen is not None and chosen - left > 0.6 * (max(point["density"] for point in points) - left)
        if chosen is not None:
            axes.axvline(chosen, color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
            shift = (-4 if right else 4, -9)
            _label(axes, f"in use: {100 * chosen:.3g}%", (chosen, 1), ("data", "axes fraction"), shift, right=right, color=MUTED)
        # Below the line, on the side that the mark of what is in use leaves free.
        at, shift = (0.0, (4, -11)) if right else (1.0, (0, -11))
        _label(axes, f"dense: {ppl_dense:.2f}", (at, ppl_dense), ("axes fraction", "data"), shift, right=not right)
        axes.set_xlim(left, None)
        _density_axis(axes, x)
        axes.set_ylabel("perplexity, log scale" if axes.get_yscale() == "log" else "perplexity")
        _key_above(axes, columns=2)

    return _svg(name, f"Perplexity against {x}: by predictors, by an oracle, and dense ({ppl_dense:.2f})", draw)


def cosine(values: Sequence[float]) -> str:
    """Cosine between the residual stream before and after each layer: how little a layer turns it."""
    count = len(values)

    def draw(axes: Axes) -> None:
        low = min([*values, 0.9])
        room = 0.16 * (1 - low)
        axes.plot(values, range(count), "o", color=SPARSE, markersize=7)
        for layer, value in enumerate(values):
            _label(axes, f"{value:.3f}", (value, layer), ("data", "data"), (8, -3.5))
        axes.set_xlim(low - room / 2, 1 + room)
        _layer_rows(axes, count)
        axes.set_xlabel("cosine of the residual stream before and after the layer")

    return _svg(
        "cosine", "Residual cosine of each layer: " + ", ".join(f"{value:.3f}" for value in values), draw, height=_rows_height(count)
    )
