"""The pictures of a report: each once with matplotlib, as PNG, as SVG, and as an SVG element for the HTML page.

The element takes its ink from the page, so that it is readable on dark and on light. Each point has its value as its
title, which a browser shows. Colours are Okabe and Ito's, safe for the colour-blind; lines also differ by
their markers.
"""

from __future__ import annotations

import io
import itertools
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from mnist_dist.disk.files import replace_synced
from mnist_dist.study.analysis.intervals import Interval
from mnist_dist.study.report.page import Picture

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vP*X"
INK, LINE = "#0a0b0c", "#c8c9ca"  # replaced by the page's colours
SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "mnist_dist", "text.parse_math": False, "font.size": 9,
    "font.family": "sans-serif", "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK,
    "xtick.color": INK, "ytick.color": INK, "grid.color": LINE, "legend.frameon": False, "axes.spines.top": False,
    "axes.spines.right": False, "legend.fontsize": 8,
}
BACKGROUND = "background"  # white in the files; the page has its own
MOST_LINES = 16  # of a picture: more cannot be distinguished


@dataclass(frozen=True)
class Series:
    """A line: its name, and for each x the estimate, the repeats behind it, and what the page says of it.

    With a `model`, at some more x in their order, its line takes the place of the one through the estimates: beyond the
    last estimate it is a forecast, dashed, with its intervals as a band.
    """

    name: str
    x: Sequence[float]
    estimates: Sequence[Interval]
    repeats: Sequence[Sequence[float]]
    words: Sequence[str]
    model_x: Sequence[float] = ()
    model: Sequence[Interval] = ()


def draw(folder: Path, name: str, title: str, alt: str, series: Sequence[Series], *, x_label: str, y_label: str,
         log_y: bool = True, ideal: Callable[[Any], Any] | None = None, say: Callable[[float], str] = "{:,.0f}".format,
         apart: float = 1.0) -> Picture:
    """Write NAME.png and NAME.svg into the folder. The title says what to see, the legend which points are measured and
    which lines are of a model. Repeats are small points, intervals bars, `ideal` a dashed line;
    `say` writes a repeat's value. Each line is drawn at `apart` times the x of the one before, so that bars at the same
    x do not cover each other.
    """
    with matplotlib.rc_context(STYLE):
        columns = 3 if max(len(line.name) for line in series) < 16 else 1
        kinds = [*(["measured", "model"] if any(row.model for row in series) else []), *(["ideal"] if ideal else [])]
        legend_lines = -(-(min(len(series), MOST_LINES) + len(kinds)) // columns)
        figure = Figure(figsize=(5.2, 3.4 + 0.19 * legend_lines), layout="constrained")
        axes = figure.subplots()
        values: dict[str, list[str]] = {}
        xs = sorted({x for line in series for x in (*line.x, *(x for x in line.model_x if x > max(line.x)))})
        axes.set_xscale("log")
        axes.margins(0.06)
        if log_y:
            axes.set_yscale("log")
        for number, line in enumerate(series[:MOST_LINES]):
            _draw_series(axes, replace(line, x=[x * apart**number for x in line.x]), number, values, say)
        if ideal is not None:
            axes.plot(xs, [ideal(x) for x in xs], linestyle="--", color=INK, linewidth=1, label="ideal")
        if "model" in kinds:
            axes.plot([], [], linestyle="none", color=INK, marker="o", markersize=5.5, label="measured")
            axes.plot([], [], color=INK, linewidth=1.2, label="model")
        if not log_y:
            axes.set_ylim(bottom=0)
        _ticks(axes, xs, log_y)
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.set_title("\n".join(textwrap.wrap(title, 52)), loc="left", fontsize=9.5, fontweight="bold")
        axes.grid(True, linewidth=0.5)
        axes.set_axisbelow(True)
        figure.legend(loc="outside upper left", ncols=columns, handlelength=2.2)
        figure.patch.set_gid(BACKGROUND)
        axes.patch.set_visible(False)
        svg, png = _saved(figure, "svg"), _saved(figure, "png", dpi=150)
        for kind, content in (("svg", svg), ("png", png)):
            replace_synced(folder / f"{name}.{kind}", content)
    more = f" The first {MOST_LINES} of {len(series)} lines are drawn." if len(series) > MOST_LINES else ""
    return Picture(name, alt + more, _element(svg, name, values))


def _draw_series(axes: Any, line: Series, number: int, values: dict[str, list[str]],
                 say: Callable[[float], str]) -> None:
    color = COLORS[number % len(COLORS)]
    marker = MARKERS[(number // len(COLORS) + number) % len(MARKERS)]
    # beside the median, so that its bar does not cover them
    points = [(x * 0.97, value) for x, repeats in zip(line.x, line.repeats, strict=True) for value in repeats]
    if points:
        axes.plot(*zip(*points, strict=True), linestyle="none", marker=".", markersize=5, color=color, alpha=0.5,
                  markeredgewidth=0, gid=f"repeats-{number}")
        values[f"repeats-{number}"] = [f"{line.name}: one run, {say(value)}" for _, value in points]
    middle = [estimate.value for estimate in line.estimates]
    bars = [[estimate.value - estimate.low for estimate in line.estimates],
            [estimate.high - estimate.value for estimate in line.estimates]]
    axes.errorbar(line.x, middle, yerr=bars, linestyle="none", ecolor=color, elinewidth=1.2, capsize=2.5)
    axes.plot(line.x, middle, color=color, linewidth=0 if line.model else 1.2, marker=marker, markersize=5.5,
              label=line.name, gid=f"medians-{number}")
    if line.model:
        _draw_model(axes, line, color)
    values[f"medians-{number}"] = list(line.words)


def _draw_model(axes: Any, line: Series, color: str) -> None:
    """The fitted line over what was measured; beyond it the forecast."""
    points = list(zip(line.model_x, line.model, strict=True))
    inside = [(x, at.value) for x, at in points if x <= max(line.x)]
    beyond = [(x, at) for x, at in points if x >= max(line.x)]
    axes.plot(*zip(*inside, strict=True), color=color, linewidth=1.2)
    if len(beyond) > 1:
        xs, ahead = zip(*beyond, strict=True)
        axes.plot(xs, [at.value for at in ahead], color=color, linewidth=1.2, linestyle="--")
        axes.fill_between(xs, [at.low for at in ahead], [at.high for at in ahead], color=color, alpha=0.15, linewidth=0)


def _ticks(axes: Any, xs: Sequence[float], log_y: bool) -> None:
    """A tick at each x that was measured, if they are few; numbers without exponents."""
    ys = [float(value) for line in axes.lines for value in line.get_ydata() if len(line.get_ydata())]
    if max(ys) <= min(ys) * (1 + 1e-6):  # for one value matplotlib finds no scale
        axes.set_autoscaley_on(False)
        axes.set_ylim(0.5 * min(ys), 2 * max(ys))
    plain = FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 10 else f"{value:g}")
    shown = list(itertools.islice(xs, 0, None, -(-len(xs) // 8)))
    axes.set_xticks(shown, [f"{x:,.0f}" if x >= 10 else f"{x:g}" for x in shown])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()
    if log_y:
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,)))
        axes.yaxis.set_major_formatter(plain)
        axes.yaxis.set_minor_formatter(NullFormatter())


def _saved(figure: Figure, kind: str, **options: Any) -> bytes:
    target = io.BytesIO()
    metadata = {"Date": None, "Creator": None} if kind == "svg" else None
    figure.savefig(target, format=kind, facecolor="white", metadata=metadata, **options)
    figure.set_layout_engine("none")  # it stays as the first call made it
    return target.getvalue()


def _element(svg: bytes, name: str, values: dict[str, list[str]]) -> str:
    """The SVG as an element of a page: names unique to the picture, colours of the page, values as titles of points."""
    for prefix, address in (("", SVG), ("xlink", XLINK)):
        ElementTree.register_namespace(prefix, address)
    root = ElementTree.fromstring(svg)
    for metadata in root.findall(f"{{{SVG}}}metadata"):
        root.remove(metadata)
    groups = {element.get("id"): element for element in root.iter(f"{{{SVG}}}g")}
    for path in groups[BACKGROUND]:
        path.set("style", "fill: none")
    for group, words in values.items():
        texts = groups[group]
        points = list(texts.iter(f"{{{SVG}}}use"))
        for point, word in zip(points, words, strict=True):
            ElementTree.SubElement(point, f"{{{SVG}}}title").text = word
    for element in root.iter():
        for key, value in element.attrib.items():
            if key == "id":
                element.set(key, f"{name}-{value}")
            elif key == f"{{{XLINK}}}href" and value.startswith("#"):
                element.set(key, f"#{name}-{value[1:]}")
            elif "url(#" in value:
                element.set(key, value.replace("url(#", f"url(#{name}-"))
            if key == "style":
                element.set(key, value.replace(INK, "currentColor").replace(LINE, "var(--line)"))
    for size in ("width", "height"):
        root.attrib.pop(size, None)
    root.set("role", "group")
    return ElementTree.tostring(root, encoding="unicode")
