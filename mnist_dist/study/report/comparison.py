"""The report that compares two studies, from their tables alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from mnist_dist.errors import UserError
from mnist_dist.study.analysis.analysis import Analysis
from mnist_dist.study.analysis.comparison import Comparison, compare
from mnist_dist.study.analysis.intervals import LEAST_CONCLUSIVE, LEVEL, Interval
from mnist_dist.study.plan.table import Row
from mnist_dist.study.report.labels import cell_head, cell_words, level_of, say
from mnist_dist.study.report.origin import add_origin
from mnist_dist.study.report.page import Code, Heading, Page, Table, Text
from mnist_dist.text import counted

COMPARED = (
    "A factor is the ratio of geometric means over the repeats, with Student's interval. All cells of a study have one "
    "relative spread in common, except a cell whose spread is far above the others'; if the spreads are not equal, "
    f"each cell has its own. The intervals of all factors together hold their truths in {100 * LEVEL:.0f} % of "
    "comparisons, and a cell is called faster or slower if its interval does not hold 1. Throughput is what a run had. "
    "Undisturbed is the rate of the 10th percentile of its step times, which other load on the machine changes least.")


def write_comparison(before: tuple[Path, Sequence[Row]], after: tuple[Path, Sequence[Row]]
                     ) -> tuple[list[Path], Comparison]:
    """Write the comparison of two studies (folder and rows) into the folder of the second; returns its two files, and
    what they hold.
    """
    first, second = Analysis(before[1]), Analysis(after[1])
    comparison, unit = compare(first, second), first.unit
    if second.unit != unit:
        raise UserError(f"{before[0]} counts {unit} and {after[0]} counts {second.unit}: they cannot be compared")
    names = [folder.resolve().name for folder, _ in (before, after)]
    page = Page(f"{names[1]} compared with {names[0]}")
    page.add(_verdict(comparison))
    if comparison.differences:
        page.add(Table(
            [*cell_head(second.cells), f"first, {unit}/s", f"second, {unit}/s", "throughput, second / first", "level",
             "shown", "undisturbed, second / first", "shown"],
            [[*cell_words(difference.cell, second.cells), say(difference.before), say(difference.after),
              say(difference.throughput), level_of(difference.throughput), shown(difference.throughput),
              say(difference.undisturbed) if difference.undisturbed else "too few windows",
              shown(difference.undisturbed) if difference.undisturbed else ""]
             for difference in comparison.differences]), COMPARED)
    for name, analysis, other in ((names[0], first, second), (names[1], second, first)):
        only = [cell for cell in analysis.cells if cell not in other.cells]
        if only:
            page.add(Text(("Only in ", Code(name), ": ", Code("; ".join(map(str, only))), ".")))
    for title, analysis in zip(("The first", "The second"), (first, second), strict=True):
        page.add(Heading(2, title))
        add_origin(page, analysis)
    stem = "compared-with-" + re.sub(r"[^\w.+-]", "_", names[0], flags=re.ASCII)[:60]
    return page.write(after[0], stem), comparison


def _verdict(comparison: Comparison) -> str:
    """The result of a comparison in words: what differs, and what these repeats can show."""
    count = len(comparison.differences)
    both = f"{counted(count, 'cell is', 'cells are')} in both studies. "
    if not count:
        return both
    if comparison.visible is None:
        return both + f"Nothing is shown: a cell needs {LEAST_CONCLUSIVE} repeats or more in each study."
    usual, most = (f"{100 * change:.2g} %" for change in comparison.visible)
    shown = " and ".join(f"{len(cells)} {word}" for cells, word in ((comparison.slower, "slower"),
                                                                    (comparison.faster, "faster")) if cells)
    repeats = min(difference.throughput.n for difference in comparison.differences)
    can = f"{counted(repeats, 'repeat')} of {counted(count, 'cell')} can show a change of {usual}"
    least = "" if usual == most else f", and of {most} in the least certain cell"
    none = f" No change of more than {most} is shown."
    return f"{both}{f'Shown: {shown}. ' if shown else ''}{can}{least}.{'' if shown else none}"


def shown(factor: Interval) -> str:
    """What the factor shows: a word, or nothing."""
    if not factor.excludes(1.0):
        return ""
    return f"{100 * abs(factor.value - 1):.1f} % {'faster' if factor.value > 1 else 'slower'}"
