"""`mnist-dist study --quick`: a study that chooses its grid by itself and ends within ten minutes.

A first look, at the smallest and a large batch size on one process and on all devices, tells how long a step and a run
take. From that follow the batch sizes, the processes and the repeats that fit into the time. The same rows give the
same choice, so that the same command continues a study that was killed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from mnist_dist.errors import MnistDistError
from mnist_dist.study.grid import Cell, Grid, HoldOut, cell_of
from mnist_dist.study.table import Row, rate_of

SECONDS = 540.0  # of all runs: the rest of ten minutes is for the reports
LADDER = tuple(50 * 4**k for k in range(6))  # 50 to 51,200: 200, the tutorial's, is one of them
SIZES = 5  # enough for a fit of the critical batch size
SMALLEST, LARGE = LADDER[0], LADDER[4]  # those of the first look
FLAT = 8  # the largest batch size computes so many times as long as a step's fixed part, if the ladder has it
REPEATS = (5, 4, 3)
# A rate that follows the batch size, or the study would say that a larger batch does not help. The plain step at all
# batch sizes, because compiling takes as long as a run. Large batches need many epochs; a run ends at its last target.
OPTIONS = {"lr_rule": "sqrt", "target_nll": "0.4,0.3", "evaluate_every": "5000samples", "epochs": "60",
           "compile": "off", "noise_scale": True}


def first_look(devices: int) -> Grid:
    """Two batch sizes, on one process and on all devices, each once."""
    return Grid(batch_sizes=(SMALLEST, LARGE), processes=tuple(dict.fromkeys((1, devices))), repeats=1, drift=False)


def choose(rows: Sequence[Row], devices: int) -> tuple[Grid, HoldOut]:
    """The grid that fits into the time, from the rows of the first look, and the cells that check the model's fit.

    Raises `MnistDistError` if a run of the first look failed.
    """
    looks = {cell_of(row): row for row in rows if row["role"] == "repeat" and row["repeat"] == 1}
    steps, seconds = {}, {}
    for cell in first_look(devices).cells():
        row = looks.get(cell, {"status": "failed", "reason": "it was not run"})
        rate = rate_of(row)
        if rate is None:
            raise MnistDistError(f"the first look failed: {cell}: {row['reason'] or 'no step was measured'}")
        steps[cell], seconds[cell] = cell.global_batch_size / rate, row["seconds"] or 0.0
    sizes = batch_sizes(steps[Cell(SMALLEST, 1)], steps[Cell(LARGE, 1)])
    powers = tuple(2**k for k in range(devices.bit_length()) if 2**k < devices)
    every, ends = (*powers, devices), tuple(dict.fromkeys((1, devices)))
    grids = [Grid(batch_sizes=sizes, processes=processes, repeats=repeats)
             for processes in (every, ends) for repeats in REPEATS]
    grid = next((grid for grid in grids if duration(grid, seconds, devices) <= SECONDS), grids[-1])
    # two numbers of processes are too few to leave one of them out
    return grid, HoldOut({"global_batch_size": sizes[SIZES // 2]} if len(grid.processes) < 3 else {})


def batch_sizes(smallest_step: float, large_step: float) -> tuple[int, ...]:
    """Five of the ladder, from the seconds of a step at both batch sizes: up to where computing outweighs the rest."""
    per_sample = max((large_step - smallest_step) / (LARGE - SMALLEST), 1e-12)
    fixed = max(smallest_step - per_sample * SMALLEST, 0.0)
    enough = [size for size in LADDER if size >= max(FLAT * fixed / per_sample, LARGE)] or [LADDER[-1]]
    last = LADDER.index(enough[0]) + 1
    return LADDER[last - SIZES : last]


def duration(grid: Grid, seconds: dict[Cell, float], devices: int) -> float:
    """Seconds that the grid takes, with its check of drift, from those of the first look's runs: on straight lines
    between them, in the logarithms of batch sizes and processes.
    """
    def of(cell: Cell) -> float:
        along = math.log(cell.global_batch_size / SMALLEST) / math.log(LARGE / SMALLEST)
        few, many = (seconds[Cell(SMALLEST, count)] * (1 - along) + seconds[Cell(LARGE, count)] * along
                     for count in (1, devices))
        across = math.log(cell.processes) / math.log(devices) if devices > 1 else 0.0
        return few * (1 - across) + many * across

    cells = grid.cells()
    return grid.repeats * sum(map(of, cells)) + 2 * of(cells[0])
