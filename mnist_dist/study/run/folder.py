"""The folder of a study: `study.json` holds the plan, `runs/NAME/` what each run left.

A run is done if its `result.json` is whole.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mnist_dist.disk.files import read_json, replace_json
from mnist_dist.errors import UserError
from mnist_dist.study.plan.grid import MOST_PROCESSES, Cell, HoldOut, PlannedRun, cell_of, run_of
from mnist_dist.study.plan.table import Row
from mnist_dist.study.run.launches import OUTCOME, whole_result
from mnist_dist.study.run.program import OURS, Program, program_of
from mnist_dist.text import cause

# of a run that has ended when the study was killed: its result is what counts
OF_A_KILLED_STUDY: dict[str, Any] = {"status": "completed", "reason": "", "started": None, "seconds": None}
STUDY, LOG, RUNS = "study.json", "study.log", "runs"


@dataclass(frozen=True)
class Job:
    """An array in the queue: its number, and the run of each of its tasks."""

    number: str
    runs: tuple[str, ...]

    def task(self, run: str) -> str:
        """The task of this run, as SLURM's commands name it."""
        return f"{self.number}_{self.runs.index(run)}"


def job_of(values: Mapping[str, Any]) -> Job:
    """The job of an entry of `study.json`. Its number is handed to commands: raises `ValueError` if it is none."""
    if not re.fullmatch(r"\d+", values["number"], re.ASCII):
        raise ValueError(f"{values['number']!r:.100} is not the number of a job")
    return Job(values["number"], tuple(values["runs"]))


@dataclass
class Study:
    """A study's folder: the plan so far, and which runs are done."""

    folder: Path
    mark: str = field(default_factory=lambda: f"study-{secrets.token_hex(8)}")  # carried by all processes of its runs
    program: Program = OURS
    fixed: Mapping[str, Any] = field(default_factory=dict)
    hold_out: HoldOut = MOST_PROCESSES
    precision: float | None = None
    fabric: dict[str, Any] | None = None  # measured_network.py; None if it was not measured
    grids: list[dict[str, Any]] = field(default_factory=list)  # each command, with its seed and date
    runs: list[PlannedRun] = field(default_factory=list)  # all runs, in their order
    impossible: dict[Cell, str] = field(default_factory=dict)
    jobs: list[Job] = field(default_factory=list)  # whose runs are in SLURM's queue, or have left it unseen
    predicted: Callable[[Cell], float] | None = None  # seconds of a run, from a first look
    _rows: dict[str, Row] = field(default_factory=dict)  # as read: a study of many runs reads each once

    def save(self) -> None:
        """Write `study.json`."""
        values = {
            "mark": self.mark, **self.program.as_row(), "fixed": self.fixed, "grids": self.grids,
            "hold_out": self.hold_out.values, "precision": self.precision, "fabric": self.fabric,
            "runs": [{**run.cell.as_row(), "role": run.role, "number": run.number} for run in self.runs],
            "jobs": [{"number": job.number, "runs": job.runs} for job in self.jobs],
            "impossible": [{**cell.as_row(), "reason": reason} for cell, reason in self.impossible.items()],
        }
        replace_json(self.folder / STUDY, values)

    def run_folder(self, run: PlannedRun) -> Path:
        """The folder of the run."""
        return self.folder / RUNS / run.name

    def row(self, order: int, run: PlannedRun) -> Row | None:
        """The run's row of the table; None if it was not run yet."""
        folder = self.run_folder(run)
        try:
            values = whole_result(run, folder)
        except UserError:
            values = None
        try:
            outcome = read_json(folder / OUTCOME)
        except (OSError, ValueError):
            if values is None:
                return None
            outcome = OF_A_KILLED_STUDY
        grid = max((g for g in self.grids if g["first_run"] <= order), key=lambda g: g["first_run"])
        machine = outcome.pop("machine", {})
        if values is not None:
            values["environment"] = {**machine, **values["environment"]}
        return {
            "run": run.name, "role": run.role, "repeat": run.number, "order": order, **run.cell.as_row(),
            **outcome, "status": "failed" if values is None else "completed",
            "study": {"command": grid["command"], "seed": grid["seed"], "date": grid["date"],
                      "script": self.program.script, "hold_out": self.hold_out.values,
                      "precision": self.precision, "fabric": self.fabric},
            **{name: value for name, value in (values or {}).items() if name != "status"},
        }

    def rows(self) -> list[Row]:
        """The table: runs in their order, then the cells that cannot run."""
        for order, run in enumerate(self.runs, 1):
            if run.name not in self._rows and (row := self.row(order, run)):
                self._rows[run.name] = row
        rows = [self._rows[run.name] for run in self.runs if run.name in self._rows]
        return rows + [{"run": cell.name, "role": "none", "repeat": None, "order": None, **cell.as_row(),
                        "status": "impossible", "reason": reason} for cell, reason in self.impossible.items()]

    def drop_if_out_of_memory(self, run: PlannedRun) -> None:
        """If memory ran out in this run, this command does no other run of its cell."""
        row = self._rows.get(run.name)
        if row is not None and row.get("out_of_memory"):
            self.impossible[run.cell] = f"out of memory in {run.name}"
            self.save()

    def forget(self, run: PlannedRun | None = None) -> None:
        """The run is done anew, so its row is read again; without one, all are."""
        if run is None:
            self._rows.clear()
        else:
            self._rows.pop(run.name, None)


def open_study(folder: Path) -> Study:
    """The study in the folder, or a new one. Raises `UserError` if its `study.json` cannot be read."""
    try:
        values = read_json(folder / STUDY)
        if not re.fullmatch(r"study-[0-9a-f]{16}", values["mark"], re.ASCII):  # processes that carry it are ended
            raise ValueError(f"its mark is {values['mark']!r:.100}")
        return Study(
            folder, values["mark"], program_of(values), values["fixed"],
            HoldOut(values.get("hold_out", {})), values.get("precision"), values.get("fabric"), values["grids"],
            [run_of(run) for run in values["runs"]],
            {cell_of(cell): cell["reason"] for cell in values["impossible"]},
            [job_of(job) for job in values.get("jobs", [])],
        )
    except FileNotFoundError:
        return Study(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / STUDY} cannot be read ({cause(error)}): give another --output-dir"
                        ) from None
