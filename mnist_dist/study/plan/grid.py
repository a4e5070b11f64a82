"""The grid of a study: which cells there are, which of them cannot run, and in which order their runs are done.

A cell is a global batch size, a number of processes, and a value for each further axis. Weak scaling adds no other kind
of cell: a per-device batch of b on P processes is the global batch bP, so a cell that both scalings ask for runs once.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Any

from mnist_dist.errors import UserError
from mnist_dist.text import counted

SCALINGS = ("strong", "weak")
ROLES = ("repeat", "first", "last")  # of a planned run
LAUNCHERS = {"torch": "this machine", "slurm": "SLURM's queue", "ray": "Ray's cluster"}  # what starts runs, and where

FIRST_REPEATS = 6  # of a cell under --precision: the fewest that give an interval of 95 %
RATE_AT, RATE_OF = ("all", "end"), ("all", "process")  # which printed rates count, and of what they are

ENVIRONMENT = "env:"  # before the name of an axis that is an environment variable

Options = tuple[tuple[str, str], ...]  # option of training to its value, for the axes that are studied


@dataclass(frozen=True)
class Cell:
    """One operating point: its runs are repeats of each other."""

    global_batch_size: int
    processes: int
    options: Options = ()

    @property
    def name(self) -> str:
        """As a file name: `b200-p2-lr-0.001`. A value that cannot be in one, or is long, is cut and gets a hash."""
        name = f"b{self.global_batch_size}-p{self.processes}"
        for key, value in self.options:
            safe = re.sub(r"[^\w.+-]", "_", value, flags=re.ASCII)[:40]
            mark = "" if safe == value else f"-{hashlib.sha256(value.encode()).hexdigest()[:8]}"
            name += f"-{key.replace('_', '-').replace(':', '-')}-{safe}{mark}"
        return name

    @property
    def place(self) -> tuple[Any, ...]:
        """The order of cells: options, processes, batch size."""
        return self.options, self.processes, self.global_batch_size

    def as_row(self) -> dict[str, Any]:
        """The fields of the cell in a row of the table and in `study.json`; `cell_of` reads them."""
        return {"global_batch_size": self.global_batch_size, "processes": self.processes, "options": dict(self.options)}

    def __str__(self) -> str:
        others = "".join(f", {key.replace('_', ' ')} {value}" for key, value in self.options)
        return f"batch {self.global_batch_size:,} on {counted(self.processes, 'process', 'processes')}{others}"


def cell_of(row: Mapping[str, Any]) -> Cell:
    """The cell that a row belongs to."""
    options = tuple((str(key), str(value)) for key, value in (row.get("options") or {}).items())
    return Cell(row["global_batch_size"], row["processes"], options)


def arguments_of(cell: Cell) -> dict[str, str]:
    """The axes that are no environment variables, with the cell's values."""
    return {name: value for name, value in cell.options if not name.startswith(ENVIRONMENT)}


def variables_of(cell: Cell) -> dict[str, str]:
    """The environment variables that are axes, with the cell's values."""
    return {name.removeprefix(ENVIRONMENT): value for name, value in cell.options if name.startswith(ENVIRONMENT)}


def run_of(row: Mapping[str, Any]) -> PlannedRun:
    """The planned run of a row of `study.json`. Its name is that of a folder: raises `ValueError`, `TypeError` or
    `KeyError` if it could be another.
    """
    run = PlannedRun(cell_of(row), row["role"], row["number"])
    for number in (run.number, run.cell.global_batch_size, run.cell.processes):
        if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number < 2**63:
            raise ValueError(f"{number!r:.100} is not a whole number from 1 on")
    keys = [key for key, _ in run.cell.options]
    if run.role not in ROLES or not all(re.fullmatch(rf"({ENVIRONMENT})?[\w-]+", key, re.ASCII) for key in keys):
        raise ValueError(f"role {run.role!r:.100}, options {keys}")
    return run


@dataclass(frozen=True)
class PlannedRun:
    """One run of a cell: `role` is "repeat", or "first" and "last" for the base case's runs that check for drift."""

    cell: Cell
    role: str
    number: int  # of the repeat, or of the grid that the drift check belongs to; from 1

    @property
    def name(self) -> str:
        """The run's folder below the study's `runs/`."""
        return f"{self.cell.name}-{self.role}-{self.number}"


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What one `mnist-dist study` command asks for."""

    batch_sizes: tuple[int, ...]
    processes: tuple[int, ...] = (1,)
    scaling: tuple[str, ...] = ("strong",)
    repeats: int = 5
    axes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # option of training to its values
    drift: bool = True  # whether the base case is also the first and the last run

    def cells(self) -> list[Cell]:
        """Every cell once: batch sizes in their order, then processes, then the further axes."""
        others = [tuple(zip(self.axes, values, strict=True)) for values in product(*self.axes.values())]
        cells = {
            Cell(size * (count if how == "weak" else 1), count, options): None
            for how in self.scaling for size in self.batch_sizes for count in self.processes for options in others
        }
        return list(cells)

    def as_dict(self) -> dict[str, Any]:
        """The grid as JSON."""
        return {**asdict(self), "axes": {key: list(values) for key, values in self.axes.items()}}


@dataclass(frozen=True)
class HoldOut:
    """Which cells are left out of a fit: those that have all of these values. Without any: those with the most
    processes.
    """

    values: Mapping[str, int] = field(default_factory=dict)  # a field of `Cell` to its value

    def leaves_out(self, cell: Cell, cells: Iterable[Cell]) -> bool:
        """Whether the cell, one of `cells`, is left out."""
        wanted = self.values or {"processes": max(other.processes for other in cells)}
        return all(getattr(cell, name) == value for name, value in wanted.items())


MOST_PROCESSES = HoldOut()


def base_of(cells: Sequence[Cell]) -> Cell:
    """The cell whose runs check for drift: the fewest processes, at the batch size that is named first."""
    return min(cells, key=lambda cell: cell.processes)


def plan(cells: Sequence[Cell], grid: Grid, seed: int, number: int, done: Iterable[str] = ()) -> list[PlannedRun]:
    """The runs of these cells that are not `done` (names), in their order: for each repeat every cell once, in random
    order, so that a slow hour of the machine falls on all cells. The base case is also the first and the last run of
    the grid, which has this number.
    """
    shuffled, known = random.Random(seed), set(done)
    runs = []
    for repeat in range(1, grid.repeats + 1):
        new = [run for cell in cells if (run := PlannedRun(cell, "repeat", repeat)).name not in known]
        shuffled.shuffle(new)
        runs += new
    if not runs or not grid.drift:
        return runs
    base = base_of(cells)
    return [PlannedRun(base, "first", number), *runs, PlannedRun(base, "last", number)]


def possible(cells: Iterable[Cell], devices: int, kind: str, oversubscribe: bool,
             check: Callable[[Cell], None]) -> tuple[list[Cell], dict[Cell, str]]:
    """(cells that can run, the others with the reason) on a machine with these devices of `kind`, "GPUs" or "cores".

    `check` raises `UserError` for a cell that the training refuses.
    """
    can, cannot = [], {}
    for cell in cells:
        if cell.global_batch_size < cell.processes:
            cannot[cell] = f"a batch of {cell.global_batch_size} is smaller than {cell.processes} processes"
        elif cell.processes > devices and kind == "GPUs":
            cannot[cell] = (f"{cell.processes} processes, and this machine has {counted(devices, 'GPU')}: each process "
                            "needs one")
        elif cell.processes > devices and not oversubscribe:
            cannot[cell] = (f"{cell.processes} processes, and this machine has {counted(devices, 'core')}: "
                            "--oversubscribe runs it all the same")
        else:
            try:
                check(cell)
                can.append(cell)
            except UserError as error:
                cannot[cell] = str(error)
    return can, cannot
