"""Repeats that adapt (`--precision`): which cells need another run until their throughput is known well enough.

A study begins with FIRST_REPEATS of each cell, the fewest that give an interval of 95 %. Then it goes on in rounds:
each cell that is not known yet runs once more. If a cell stops as soon as its interval is narrow, samples that are
narrow by chance are preferred. Then the interval holds the truth less often (Anscombe 1953, JRSS B 15). Here a cell
stops when its interval was narrow in two rounds one after the other, which makes up for it. tests/study/test_rounds.py
counts how often the intervals hold the truth with this correction and without it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from mnist_dist.study.analysis.analysis import Analysis
from mnist_dist.study.analysis.intervals import median_interval, more_repeats
from mnist_dist.study.plan.grid import FIRST_REPEATS, PlannedRun


def is_known(rates: Sequence[float] | np.ndarray, precision: float) -> bool:
    """Whether half the median's interval is at most `precision` of it, with all repeats and with all but the last."""
    if len(rates) < FIRST_REPEATS:
        return False
    return all(median_interval(rates[:n]).half_width <= precision
               for n in {len(rates), max(FIRST_REPEATS, len(rates) - 1)})


def expected_runs(runs: Sequence[PlannedRun], analysis: Analysis, precision: float) -> list[PlannedRun]:
    """The runs of a round, each as often as its cell needs further repeats, by the width of its interval now."""
    return [run for run in runs for _ in range(max(1, more_repeats(analysis.cells[run.cell].rate, precision)))]


def next_round(runs: Sequence[PlannedRun], analysis: Analysis, precision: float, seed: int) -> list[PlannedRun]:
    """A further run of each cell that is not known yet, in random order. A cell whose last repeat has no rate gets
    none: it failed, or memory ran out before. So the rounds end.
    """
    measured = {run.row["run"] for run in analysis.runs}
    last = {run.cell: run for run in runs if run.role == "repeat"}
    new = [PlannedRun(cell, "repeat", run.number + 1) for cell, run in last.items()
           if run.name in measured and not is_known(analysis.cells[cell].rates, precision)]
    random.Random(f"{seed} {max((run.number for run in new), default=0)}").shuffle(new)
    return new
