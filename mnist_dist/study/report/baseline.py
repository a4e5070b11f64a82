"""Whether a study is slower than a baseline by more than a limit: the lines and the JUnit file for a CI system.

Only what the repeats show counts: the whole interval of a cell's factor must be beyond the limit. The intervals of all
factors hold together, so that at most 1 of 20 comparisons of a study with itself fails.
"""

from __future__ import annotations

from xml.etree import ElementTree

from mnist_dist.study.analysis.comparison import Comparison, Difference
from mnist_dist.study.analysis.intervals import LEAST_CONCLUSIVE
from mnist_dist.study.report.labels import level_of, say
from mnist_dist.text import counted, printable


def is_slower(difference: Difference, limit: float) -> bool:
    """Whether the throughput is shown to be lower by more than this part."""
    factor = difference.throughput
    return factor.n >= LEAST_CONCLUSIVE and factor.high < 1 - limit


def lines(comparison: Comparison, limit: float) -> list[str]:
    """What to print: each cell that is too slow, and what the repeats can show."""
    percent = f"{100 * limit:g} %"
    slow = [difference for difference in comparison.differences if is_slower(difference, limit)]
    said = [f"slower by more than {percent}: {_words(slower)}" for slower in slow]
    if not slow:
        said.append(f"no cell of {len(comparison.differences)} is shown to be slower by more than {percent}")
    if comparison.visible is None:
        said.append(f"nothing can be shown: a cell needs {LEAST_CONCLUSIVE} repeats or more in each study")
    elif comparison.visible[1] > limit:
        said.append(f"these repeats can show a change of {100 * comparison.visible[1]:.2g} % in the least certain "
                    f"cell: a slow-down of {percent} may be missed, do more repeats")
    return said


def _words(difference: Difference) -> str:
    factor = difference.throughput
    return f"{printable(str(difference.cell))}: {say(factor)} times the throughput ({level_of(factor)})"


def junit(comparison: Comparison, limit: float, name: str) -> str:
    """The comparison as JUnit's XML: a test for each cell, which fails if it is too slow. Without times, so that the
    same tables give the same bytes.
    """
    slow = [is_slower(difference, limit) for difference in comparison.differences]
    few = [difference.throughput.n < LEAST_CONCLUSIVE for difference in comparison.differences]
    name = printable(name)
    suite = ElementTree.Element("testsuite", name=name, tests=str(len(slow)), failures=str(sum(slow)), errors="0",
                                skipped=str(sum(few)))
    for difference, fails, is_short in zip(comparison.differences, slow, few, strict=True):
        case = ElementTree.SubElement(suite, "testcase", classname=name, name=printable(str(difference.cell)))
        if fails:
            failure = ElementTree.SubElement(case, "failure", message=f"slower by more than {100 * limit:g} %")
            failure.text = _words(difference)
        elif is_short:
            ElementTree.SubElement(case, "skipped", message=f"it has {counted(difference.throughput.n, 'repeat')}, "
                                   f"{LEAST_CONCLUSIVE} are needed")
        else:
            ElementTree.SubElement(case, "system-out").text = _words(difference)
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"
