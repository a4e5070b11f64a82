"""Two studies compared, cell by cell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mnist_dist.study.analysis.analysis import Analysis
from mnist_dist.study.analysis.intervals import LEAST_CONCLUSIVE, Interval, ratio
from mnist_dist.study.plan.grid import Cell


@dataclass(frozen=True)
class Difference:
    """A cell in two studies: its throughputs, and by which factor throughput and undisturbed rate (None: too few
    windows) of the second study are above those of the first.
    """

    cell: Cell
    before: Interval
    after: Interval
    throughput: Interval
    undisturbed: Interval | None


@dataclass(frozen=True)
class Comparison:
    """Two studies, cell by cell. The intervals of all factors hold their truths together: if a study is compared with
    itself, at most 1 of 20 comparisons calls anything faster or slower.
    """

    differences: Sequence[Difference]

    @property
    def visible(self) -> tuple[float, float] | None:
        """The smallest change of the throughput that a cell can show, as a part of it: in the median over cells, and in
        the cell where that is most. None with too few repeats.
        """
        factors = [difference.throughput for difference in self.differences]
        if not factors or any(factor.n < LEAST_CONCLUSIVE for factor in factors):
            return None
        changes = [1 - factor.low / factor.value for factor in factors]
        return float(np.median(changes)), max(changes)

    @property
    def slower(self) -> list[Difference]:
        """Cells whose throughput is shown to be lower in the second study."""
        return [difference for difference in self.differences if difference.throughput.is_below(1.0)]

    @property
    def faster(self) -> list[Difference]:
        """The same, higher."""
        return [difference for difference in self.differences if difference.throughput.is_above(1.0)]


def compare(before: Analysis, after: Analysis) -> Comparison:
    """The cells that both studies have."""
    common = [cell for cell in before.cells if cell in after.cells]
    quiet = [cell for cell in common if cell in before.undisturbed and cell in after.undisturbed]
    count = len(common) + len(quiet)
    throughput = {cell: ratio([after.estimates[cell]], [before.estimates[cell]], count) for cell in common}
    undisturbed = {cell: ratio([after.undisturbed[cell]], [before.undisturbed[cell]], count) for cell in quiet}
    return Comparison([Difference(cell, before.cells[cell].rate, after.cells[cell].rate, throughput[cell],
                                  undisturbed.get(cell)) for cell in common])
