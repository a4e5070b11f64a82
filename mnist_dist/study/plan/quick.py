"""`mnist-dist study --quick`: a study that chooses its grid by itself and ends within ten minutes.

A first look, at a small and a large batch size on one process and on all devices, tells how long a step and a run
take. From that follow the batch sizes, the processes and the repeats that fit into the time; every cell has three
repeats at least. The same rows give the same choice, so that the same command continues a study that was killed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from mnist_dist.errors import MnistDistError
from mnist_dist.study.plan.grid import Cell, Grid, HoldOut, base_of, cell_of
from mnist_dist.study.plan.table import Row, rate_of

SECONDS = 540.0  # of all runs: the rest of ten minutes is for the reports
LADDER = tuple(50 * 4**k for k in range(6))  # 50 to 51,200: 200, the tutorial's, is one of them
SIZES = 5  # enough for a fit of the critical batch size
SMALL, LARGE = LADDER[1], LADDER[4]  # those of the first look
SHORTER = ((200, 800, 3200, 12_800), (200, 1600, 12_800), (SMALL, LARGE))  # of batch sizes, if five take too long
FLAT = 8  # the largest batch size computes this many times as long as a step's fixed part, if the ladder has it
REPEATS = (5, 4, 3)
# A rate that follows the batch size, or the study would say that a larger batch does not help. The plain step at all
# batch sizes, because compiling takes as long as a run. Large batches need many epochs; a run ends at its last target.
OPTIONS = {"lr_rule": "sqrt", "target_nll": "0.4,0.3", "evaluate_every": "5000samples", "epochs": "60",
           "compile": "off", "noise_scale": True}


def first_look(devices: int) -> Grid:
    """Two batch sizes, on one process and on all devices, each once."""
    return Grid(batch_sizes=(SMALL, LARGE), processes=tuple(dict.fromkeys((1, devices))), repeats=1, drift=False)


def choose(rows: Sequence[Row], devices: int) -> tuple[Grid, HoldOut]:
    """The grid that fits into the time, from the rows of the first look, and the cells that check the model's fit.

    Raises `MnistDistError` if a run of the first look failed.
    """
    looks = Looks(rows, devices)
    sizes = batch_sizes(*(looks.step_seconds(Cell(size, 1)) for size in (SMALL, LARGE)))
    powers = tuple(2**k for k in range(devices.bit_length()) if 2**k < devices)
    every, ends = (*powers, devices), tuple(dict.fromkeys((1, devices)))
    choices = [(sizes, every), (sizes, ends), *((shorter, ends) for shorter in SHORTER)]
    grids = [Grid(batch_sizes=chosen, processes=processes, repeats=repeats)
             for chosen, processes in choices for repeats in REPEATS]
    grids.append(replace(grids[-1], drift=False))
    grid = next((grid for grid in grids if duration(grid, looks) <= SECONDS), grids[-1])
    # two numbers of processes are too few to leave one of them out, and so are three batch sizes
    is_small = len(grid.processes) < 3 and len(grid.batch_sizes) > 3
    return grid, HoldOut({"global_batch_size": grid.batch_sizes[len(grid.batch_sizes) // 2]} if is_small else {})


def batch_sizes(small_step: float, large_step: float) -> tuple[int, ...]:
    """Five of the ladder, from the seconds of a step at both batch sizes: up to where computing outweighs the rest."""
    per_sample = max((large_step - small_step) / (LARGE - SMALL), 1e-12)
    fixed = max(small_step - per_sample * SMALL, 0.0)
    enough = [size for size in LADDER if size >= max(FLAT * fixed / per_sample, LARGE)] or [LADDER[-1]]
    last = LADDER.index(enough[0]) + 1
    return LADDER[last - SIZES : last]


class Looks:
    """Estimates of other runs from the runs of the first look. Raises `MnistDistError` if one of them failed."""

    def __init__(self, rows: Sequence[Row], devices: int) -> None:
        self.devices = devices
        self._rows = {cell_of(row): row for row in rows if row["role"] == "repeat" and row["repeat"] == 1}
        for cell in first_look(devices).cells():
            row = self._rows.get(cell, {"status": "failed", "reason": "it was not run"})
            if rate_of(row) is None:
                raise MnistDistError(f"the first look failed: {cell}: {row['reason'] or 'no step was measured'}")

    def seconds(self, cell: Cell) -> float:
        """Seconds of a run: its steps, at the time of a step, and the rest, such as the start."""
        steps = self._between(cell, _samples) / cell.global_batch_size
        rest = self._between(cell, lambda row: max(0.0, (row["seconds"] or 0.0) - _samples(row) / rate(row)))
        return rest + steps * self.step_seconds(cell)

    def step_seconds(self, cell: Cell) -> float:
        """Seconds of a step: a straight line in the batch size, for each number of processes."""
        def of(processes: int) -> float:
            small, large = (size / rate(self._rows[Cell(size, processes)]) for size in (SMALL, LARGE))
            slope = max(0.0, (large - small) / (LARGE - SMALL))
            return max(small - slope * SMALL, 0.0) + slope * cell.global_batch_size

        return self._across(cell, of(1), of(self.devices))

    def _between(self, cell: Cell, metric: Callable[[Row], float]) -> float:
        """A metric of the rows, on straight lines between them in the logarithm of the batch size, and constant below
        the small one.
        """
        along = max(0.0, math.log(cell.global_batch_size / SMALL) / math.log(LARGE / SMALL))
        few, many = (metric(self._rows[Cell(SMALL, count)]) * (1 - along)
                     + metric(self._rows[Cell(LARGE, count)]) * along for count in (1, self.devices))
        return self._across(cell, few, many)

    def _across(self, cell: Cell, few: float, many: float) -> float:
        """Between one process and all devices, on a straight line in the logarithm of their number."""
        across = math.log(cell.processes) / math.log(self.devices) if self.devices > 1 else 0.0
        return few * (1 - across) + many * across


def rate(row: Row) -> float:
    """Samples per second of a run that measured a step."""
    value = rate_of(row)
    assert value is not None
    return value


def _samples(row: Row) -> float:
    """Samples of a run, of which the epochs say how many were measured in how much of their time."""
    return sum(rate(row) * (epoch.get("train_seconds") or epoch["measured_seconds"]) for epoch in row["epochs"])


def duration(grid: Grid, looks: Looks) -> float:
    """Seconds that the grid takes, with its check of drift."""
    cells = grid.cells()
    return grid.repeats * sum(map(looks.seconds, cells)) + (2 * looks.seconds(base_of(cells)) if grid.drift else 0.0)
