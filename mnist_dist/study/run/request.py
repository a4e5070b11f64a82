"""What the command line asks of a study, and how it adds to the plan in the study's folder."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from mnist_dist.config import TrainConfig
from mnist_dist.errors import UserError
from mnist_dist.study.plan.grid import Cell, Grid, HoldOut, plan, possible
from mnist_dist.study.run.folder import Study
from mnist_dist.study.run.launches import Machine
from mnist_dist.study.run.program import Program


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asks for."""

    grid: Grid
    folder: Path
    options: tuple[str, ...]  # of training, the same for all cells
    fixed: Mapping[str, Any]  # what may not change in a study's folder: by name
    program: Program
    command: str
    seed: int
    cell_timeout: float
    oversubscribe: bool
    hold_out: HoldOut | None  # None: the default
    quick: bool
    precision: float | None = None  # repeat each cell until half its interval is at most this part; None: `grid` says
    seconds: float = math.inf  # no run is started that would end later, in seconds of runs
    tracking: TrainConfig  # its options of W&B are for the run there that holds the study's table and report
    check: Callable[[Cell], None]  # raises `UserError` for a cell that the training refuses
    sbatch: tuple[str, ...] = ()  # options of sbatch, for a study in SLURM's queue


def extend(study: Study, request: Request, machine: Machine) -> None:
    """Add the request's grid to the study. Raises `UserError` if the two do not fit, or nothing of it can run."""
    if study.grids:
        asked, before = ({"--script": of.program.script, "--command": of.program.command,
                          "--rate-from": of.program.printed, **of.fixed} for of in (request, study))
        for name in dict.fromkeys([*before, *asked]):
            if before.get(name) != asked.get(name):
                raise UserError(f"--output-dir {study.folder} holds a study with {name} {before.get(name)}, this "
                                f"command has {asked.get(name)}: give the same, or another --output-dir")
    can, cannot = possible(request.grid.cells(), *machine.devices, request.oversubscribe, request.check)
    if not can:
        raise UserError(f"no cell of the grid can run: {next(iter(cannot.values()))}")
    for cell in can:
        study.impossible.pop(cell, None)
    study.impossible |= cannot
    study.program, study.fixed = request.program, dict(request.fixed)
    said = (request.hold_out or study.hold_out, request.precision or study.precision)
    if said != (study.hold_out, study.precision):  # each row has both
        study.hold_out, study.precision = said
        study.forget()
    new = plan(can, request.grid, request.seed, len(study.grids) + 1, (run.name for run in study.runs))
    if new:
        study.grids.append({"command": request.command, "seed": request.seed, "first_run": len(study.runs) + 1,
                            "date": datetime.now().astimezone().isoformat(timespec="seconds"),
                            "grid": request.grid.as_dict()})
        study.runs += new
