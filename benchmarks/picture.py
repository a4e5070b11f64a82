"""The report's picture: throughput against batch size, a line per row, with its name at its end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import batch_sizes_of, rows_of, spread, values
from benchmarks.rows import EPOCH_IMAGES, LIMIT, OURS

COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#8c564b", "#7f7f7f", "#9467bd")
LABEL_GAP = 0.055  # between labels, of the axes' height


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Write the PNG: a panel for each number of processes that was measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    counts = [count for count in (1, 2) if any(_points(record, name) for name in rows_of(record, count))]
    if not counts:
        return
    figure, panels = pyplot.subplots(1, len(counts), figsize=(8.5 * len(counts), 6), squeeze=False, dpi=120,
                                     layout="constrained")
    for axes, count in zip(panels[0], counts, strict=True):
        _draw_panel(axes, record, count)
    figure.savefig(path)
    pyplot.close(figure)


def _points(record: Mapping[str, Any], name: str) -> dict[int, list[float]]:
    """Batch size to images per second, repeat by repeat."""
    sizes = sorted({m["batch_size"] for m in record["measurements"] if m["row"] == name and m["status"] == "ok"})
    return {size: [EPOCH_IMAGES / seconds for seconds in values(record, name, size).values()] for size in sizes}


def _draw_panel(axes: Any, record: Mapping[str, Any], processes: int) -> None:
    from matplotlib.ticker import LogLocator

    colors = iter(COLORS)
    ends = []
    for name in rows_of(record, processes):
        points = _points(record, name)
        if not points:
            continue
        spreads = [spread(rates) for rates in points.values()]
        medians = [each.median for each in spreads]
        bars = [[each.median - each.low for each in spreads], [each.high - each.median for each in spreads]]
        if name == LIMIT:
            look = {"color": "black", "linewidth": 1.3, "linestyle": "--", "markersize": 0}
        elif name in OURS.values():
            look = {"color": "#d62728", "linewidth": 3, "markersize": 7, "zorder": 5}
        else:
            look = {"color": next(colors, "#444444"), "linewidth": 1.3, "markersize": 4}
        axes.errorbar(list(points), medians, yerr=bars, marker="o", capsize=2.5, **look)
        ends.append((name, max(points), medians[-1], look["color"]))
    sizes = batch_sizes_of(record, processes)
    axes.set(xscale="log", yscale="log", xlabel="batch size", ylabel="images per second",
             title="one process" if processes == 1 else f"{processes} processes")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.minorticks_off()
    axes.margins(y=0.1)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    _label_ends(axes, ends)


def _label_ends(axes: Any, ends: Sequence[tuple[str, int, float, str]]) -> None:
    """Names to the right of the axes, at the heights of the ends of the lines, moved apart if they would overlap."""
    low, high = (math.log(limit) for limit in axes.get_ylim())
    ordered = sorted(ends, key=lambda end: end[2])
    heights = spread_apart([(math.log(rate) - low) / (high - low) for _, _, rate, _ in ordered], LABEL_GAP)
    for (name, size, rate, color), height in zip(ordered, heights, strict=True):
        axes.annotate(
            "limit of the machine" if name == LIMIT else name, (size, rate), (1.04, height),
            textcoords="axes fraction", va="center", color=color, fontweight="bold" if name in OURS.values() else None,
            annotation_clip=False, arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "alpha": 0.6},
        )


def spread_apart(heights: Sequence[float], gap: float) -> list[float]:
    """The ascending `heights` with `gap` between neighbours: each pushed up by the one below, groups then centred."""
    groups: list[list[float]] = []  # each [sum of what its members want of the first, number of members]
    for height in heights:
        groups.append([height, 1])
        while len(groups) > 1 and groups[-2][0] / groups[-2][1] + gap * groups[-2][1] > groups[-1][0] / groups[-1][1]:
            total, count = groups.pop()
            below = groups[-1]
            below[0] += total - gap * below[1] * count
            below[1] += count
    return [total / count + gap * place for total, count in groups for place in range(int(count))]
