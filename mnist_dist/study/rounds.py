"""Repeats that adapt (`--precision`): which cells need another run until their throughput is known well enough.

A study begins with FIRST_REPEATS of each cell, the fewest that give an interval of 95 %. Then it goes on in rounds:
each cell that is not known yet runs once more. To stop as soon as the interval is narrow prefers samples that look
narrow by chance, so that the interval holds the truth less often (Anscombe 1953, JRSS B 15). Here a cell stops when
its interval was narrow in two rounds one after the other, which makes up for it. tests/study/test_rounds.py counts
how often the intervals hold the truth with this correction and without it.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence

from mnist_dist.study.grid import FIRST_REPEATS, Cell, PlannedRun, cell_of
from mnist_dist.study.statistics import median_interval, more_repeats
from mnist_dist.study.table import Row, rate_of


def is_known(rates: Sequence[float], precision: float) -> bool:
    """Whether half the median's interval is at most `precision` of it, with all repeats and with all but the last."""
    if len(rates) < FIRST_REPEATS:
        return False
    return all(median_interval(rates[:n]).half_width <= precision
               for n in {len(rates), max(FIRST_REPEATS, len(rates) - 1)})


def expected_runs(runs: Sequence[PlannedRun], rates: Mapping[Cell, Sequence[float]], precision: float
                  ) -> list[PlannedRun]:
    """The runs of a round, each as often as its cell needs further repeats, by the width of its interval now."""
    return [run for run in runs for _ in range(max(1, more_repeats(median_interval(rates[run.cell]), precision)))]


def rates_by_cell(rows: Iterable[Row]) -> dict[Cell, list[float]]:
    """The throughputs of the completed repeats, in the order of the table."""
    rates: dict[Cell, list[float]] = {}
    for row in rows:
        if row["role"] == "repeat" and (rate := rate_of(row)) is not None:
            rates.setdefault(cell_of(row), []).append(rate)
    return rates


def next_round(runs: Sequence[PlannedRun], rows: Iterable[Row], precision: float, seed: int) -> list[PlannedRun]:
    """A further run of each cell that is not known yet, in random order. A cell whose last repeat failed or measured
    nothing gets none, so that a cell that always fails does not go on for ever.
    """
    rows = list(rows)
    rates = rates_by_cell(rows)
    failed = {row["run"] for row in rows if rate_of(row) is None}
    last = {run.cell: run for run in runs if run.role == "repeat"}
    new = [PlannedRun(cell, "repeat", run.number + 1) for cell, run in last.items()
           if run.name not in failed and cell in rates and not is_known(rates[cell], precision)]
    random.Random(f"{seed} {max((run.number for run in new), default=0)}").shuffle(new)
    return new
