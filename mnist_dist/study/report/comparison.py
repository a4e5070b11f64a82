"""The report that compares two studies, from their tables alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from mnist_dist.disk.files import replace_synced
from mnist_dist.errors import UserError
from mnist_dist.study.analysis.analysis import Analysis
from mnist_dist.study.analysis.comparison import Comparison, compare
from mnist_dist.study.analysis.intervals import LEAST_CONCLUSIVE, LEVEL, Interval
from mnist_dist.study.analysis.measured_network import AllReduceTimes, all_reduce_times_of
from mnist_dist.study.plan.table import Row
from mnist_dist.study.report.labels import cell_head, cell_words, level_of, say
from mnist_dist.study.report.page import PICTURES, Code, Heading, Inline, Page, Table, Text
from mnist_dist.tables import number
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
    return write_page(after[0], page, stem), comparison


def write_page(folder: Path, page: Page, stem: str) -> list[Path]:
    written = []
    for suffix, text in ((".md", page.markdown(PICTURES)), (".html", page.html())):
        path = folder / f"{stem}{suffix}"
        replace_synced(path, text.encode())
        written.append(path)
    return written


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


def add_origin(page: Page, analysis: Analysis) -> None:
    """Hardware, versions, commands, dates and seeds of a study."""
    items: list[Inline] = []
    for key, count in analysis.environments.items():
        items.append(Text((f"{counted(count, 'run')}: ", Code(", ".join(f"{name} {value}" for name, value in key)))))
    studies = {(row["study"]["date"], row["study"]["command"], row["study"]["seed"]): None
               for row in analysis.rows if isinstance(row.get("study"), Mapping)}
    for date, command, seed in studies:
        items.append(Text((Code(str(date)), ": ", Code(str(command)), " (order: seed ", Code(str(seed)), ")")))
    if fabric := measured_network_of(analysis.rows):
        items.append(Text(("fabric: ", Code(fabric.name), f", {fabric.processes} processes on "
                           f"{counted(fabric.machines, 'machine')}; an all-reduce of {fabric.points[0][0]} bytes takes "
                           f"{number(1e6 * fabric.points[0][1])} µs, one of the gradient's {fabric.gradient_bytes:,} "
                           f"bytes {number(1e6 * fabric.seconds(fabric.gradient_bytes))} µs (mnist-dist doctor)")))
    datasets = {str((row.get("dataset") or {}).get("name")) for row in analysis.rows if row.get("dataset")}
    if datasets:
        items.append(Text(("data: ", Code(", ".join(sorted(datasets))))))
    page.add(items or "Nothing is known of it.")


def measured_network_of(rows: Sequence[Row]) -> AllReduceTimes | None:
    """What the doctor measured before the runs, the last time."""
    fabrics = (all_reduce_times_of(row["study"].get("fabric")) for row in reversed(rows)
               if isinstance(row.get("study"), Mapping))
    return next(filter(None, fabrics), None)
