"""Repeated measurements as people read them: median with minimum and maximum, three digits, tables in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Spread(NamedTuple):
    """Median, minimum and maximum."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Of one value or more."""
    return Spread(statistics.median(values), min(values), max(values))


def number(value: float) -> str:
    """Three digits, without an exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.{2 if value >= 1 else 3 if value >= 0.1 else 4}f}" if value < 10 else f"{value:.1f}"


def cell(measured: Spread | None, otherwise: str = "-") -> str:
    """`median (minimum to maximum)`; `otherwise` if nothing was measured."""
    if measured is None:
        return otherwise
    return f"{number(measured.median)} ({number(measured.low)} to {number(measured.high)})"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of Markdown, with an empty one below."""
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *lines)] + [""]
