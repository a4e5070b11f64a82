"""`mnist-dist study`: plans a grid, does its runs one at a time, keeps the table, writes the report.

The folder of a study holds `study.json` (what was asked for, in which order), `runs/NAME/` (one folder per run),
`runs.jsonl` and `runs.csv` (the table), `study.log`, and the report. A run is done if its `result.json` is whole, so
the same command continues a study that was interrupted at any point.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
import secrets
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from mnist_dist import output, runner
from mnist_dist.config import TrainConfig
from mnist_dist.disk.files import make_folder, open_file, read_json, remove_tree, replace_json
from mnist_dist.disk.lock import FolderLock, Held
from mnist_dist.errors import MnistDistError, UserError
from mnist_dist.processes.signals import number_of
from mnist_dist.record.folder import RESULT
from mnist_dist.study import slurm
from mnist_dist.study.fabric import fabric_of, from_doctor
from mnist_dist.study.grid import MOST_PROCESSES, Cell, Grid, HoldOut, PlannedRun, cell_of, plan, possible, run_of
from mnist_dist.study.launches import (
    OUTCOME,
    Machine,
    environment_for,
    examine,
    start,
    whole_result,
    write_outcome,
)
from mnist_dist.study.program import OURS, Program, command_of, environment_of, program_of
from mnist_dist.study.quick import SECONDS, Looks, choose, first_look
from mnist_dist.study.table import Row, rate_of, unit_of, write_table
from mnist_dist.text import cause, counted

# of a run that has ended when the study was killed: its result is what counts
OF_A_KILLED_STUDY: dict[str, Any] = {"status": "completed", "reason": "", "started": None, "seconds": None}
STUDY, LOG, RUNS = "study.json", "study.log", "runs"
# For an estimate before any run: a start, and what a step and a sample cost on a CPU core pair, in seconds.
START_SECONDS, STEP_SECONDS, SAMPLE_SECONDS, UNKNOWN_SAMPLES = 6.0, 1.5e-3, 5e-6, 60_000
UNTIL_TARGET = 300_000  # samples of a run that ends at its target, roughly


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
    hold_out: HoldOut | None  # None: not said
    quick: bool
    precision: float | None = None  # repeat each cell until half its interval is at most this part; None: `grid` says
    seconds: float = math.inf  # no run is started that would end later, in seconds of runs
    tracking: TrainConfig  # its options of W&B are for the run there that holds the study's table and report
    check: Callable[[Cell], None]  # raises `UserError` for a cell that the training refuses
    sbatch: tuple[str, ...] = ()  # options of sbatch, for a study in SLURM's queue


@dataclass
class Study:
    """A study's folder: the plan so far, and which runs are done."""

    folder: Path
    mark: str = field(default_factory=lambda: f"study-{secrets.token_hex(8)}")  # carried by all processes of its runs
    program: Program = OURS
    fixed: Mapping[str, Any] = field(default_factory=dict)
    hold_out: HoldOut = MOST_PROCESSES
    precision: float | None = None
    fabric: dict[str, Any] | None = None  # see fabric.py; None if it was not measured
    grids: list[dict[str, Any]] = field(default_factory=list)  # each command, with its seed and date
    runs: list[PlannedRun] = field(default_factory=list)  # all of them, in their order
    impossible: dict[Cell, str] = field(default_factory=dict)
    jobs: list[slurm.Job] = field(default_factory=list)  # whose runs are in SLURM's queue, or not looked at since
    predicted: Callable[[Cell], float] | None = None  # seconds of a run, where a first look has told them
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
        """Where the run leaves its files."""
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
        if not re.fullmatch(r"study-[0-9a-f]{16}", values["mark"], re.ASCII):  # processes that have it are ended
            raise ValueError(f"its mark is {values['mark']!r:.100}")
        return Study(
            folder, values["mark"], program_of(values), values["fixed"],
            HoldOut(values.get("hold_out", {})), values.get("precision"), values.get("fabric"), values["grids"],
            [run_of(run) for run in values["runs"]],
            {cell_of(cell): cell["reason"] for cell in values["impossible"]},
            [slurm.job_of(job) for job in values.get("jobs", [])],
        )
    except FileNotFoundError:
        return Study(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / STUDY} cannot be read ({cause(error)}): give another --output-dir"
                        ) from None


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
    if request.hold_out is not None:
        study.hold_out = request.hold_out
    if request.precision is not None:
        study.precision = request.precision
    study.forget()  # each row says both
    new = plan(can, request.grid, request.seed, len(study.grids) + 1, (run.name for run in study.runs))
    if new:
        study.grids.append({"command": request.command, "seed": request.seed, "first_run": len(study.runs) + 1,
                            "date": datetime.now().astimezone().isoformat(timespec="seconds"),
                            "grid": request.grid.as_dict()})
        study.runs += new


def estimate(pending: Sequence[PlannedRun], rows: Sequence[Row], fixed: Mapping[str, Any],
             predicted: Callable[[Cell], float] | None = None) -> float:
    """Seconds that the pending runs take: as the same cell took, else as all cells did in comparison with what is
    `predicted` or with a rough formula, else by that.
    """
    def rough(cell: Cell) -> float:
        samples = UNKNOWN_SAMPLES * int(fixed.get("--epochs") or 1)
        if fixed.get("--max-steps"):
            samples = min(samples, int(fixed["--max-steps"]) * cell.global_batch_size)
        if fixed.get("--target-nll"):
            samples = min(samples, UNTIL_TARGET)
        return START_SECONDS + samples / cell.global_batch_size * STEP_SECONDS + samples * SAMPLE_SECONDS

    seen: dict[Cell, list[float]] = {}
    for row in rows:
        if row["status"] == "completed" and row["seconds"]:
            seen.setdefault(cell_of(row), []).append(row["seconds"])
    known = {cell: statistics.median(seconds) for cell, seconds in seen.items()}
    expected = predicted or rough
    factor = statistics.median(seconds / expected(cell) for cell, seconds in known.items()) if known else 1.0
    return sum(known.get(run.cell, factor * expected(run.cell)) for run in pending)


def say_duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 05 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def show_plan(study: Study, machine: Machine, say: Callable[[str], None]) -> list[PlannedRun]:
    """Print what will be run, and what cannot be; returns the runs that are pending."""
    rows = study.rows()
    done = {row["run"] for row in rows if row["status"] == "completed"}
    pending = [run for run in study.runs if run.name not in done and run.cell not in study.impossible]
    cells = sorted({run.cell for run in study.runs}, key=lambda cell: cell.place)
    say(f"{counted(len(cells), 'cell')}, {counted(len(study.runs), 'run')} on {machine}, of which "
        f"{len(done)} are done; the others take about "
        f"{say_duration(estimate(pending, rows, study.fixed, study.predicted))}")
    for cell in cells:
        own = [run for run in study.runs if run.cell == cell]
        drift = sum(run.role != "repeat" for run in own)
        more = f", and {drift} more as a check of drift" if drift else ""
        say(f"  {cell}: {counted(len(own) - drift, 'repeat')}{more}")
    for cell, reason in study.impossible.items():
        say(f"  cannot run: {cell}: {reason}")
    return pending


def requests(request: Request, study: Study, machine: Machine) -> Iterator[Request]:
    """What is to be run, one grid after the other: `--quick` chooses its second one from the runs of the first."""
    if not request.quick:
        yield request
        return
    devices = machine.devices[0]
    completed = {cell_of(row) for row in study.rows() if row["status"] == "completed"}
    if not completed.issuperset(first_look(devices).cells()):
        yield replace(request, grid=first_look(devices), cell_timeout=min(request.cell_timeout, SECONDS / 4))
    study.predicted = Looks(study.rows(), devices).seconds
    grid, hold_out = choose(study.rows(), devices)
    yield replace(request, grid=grid, hold_out=request.hold_out or hold_out, seconds=SECONDS)


def print_scripts(request: Request, machine: Machine) -> None:
    """Print what the study would give to SLURM's queue, if nothing of it were there yet."""
    study = open_study(request.folder)
    extend(study, request, machine)
    for _, script in slurm.scripts(study.runs, study.folder, request.options, request.cell_timeout):
        output.say(script)


def run_study(request: Request, machine: Machine, *, dry_run: bool) -> int:
    """Run or continue the study; returns the exit status: 0, or 1 if a run failed. Raises `MnistDistError`."""
    if dry_run:
        study = open_study(request.folder)
        extend(study, next(requests(request, study, machine)), machine)
        pending = show_plan(study, machine, output.say)
        output.say("in this order: " + ", ".join(run.name for run in pending))
        if request.quick:
            output.say(f"these decide what follows; all runs together take {SECONDS:.0f} s at most")
        return 0
    try:
        make_folder(request.folder)
        lock = FolderLock(request.folder)
        lock.acquire()
        try:
            return _run(request, machine)
        finally:
            lock.release()
    except Held as error:
        raise UserError(f"--output-dir {request.folder} is in use by {error}: wait for that study, or give another "
                        "folder") from None
    except OSError as error:
        raise UserError(f"--output-dir {request.folder} cannot be written ({error.strerror}): give another") from None


def _run(request: Request, machine: Machine) -> int:
    study = open_study(request.folder)
    if machine.launcher != "slurm":
        runner.end_tree(study.mark)  # of a study that was killed, runs may be left
    grids = requests(request, study, machine)
    grid = next(grids)
    extend(study, grid, machine)
    study.save()
    if machine.launcher != "slurm":
        _write_outcomes(study, request, machine)
    with open(open_file(study.folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "a", encoding="utf-8",
              errors="backslashreplace") as log:
        def say(line: str) -> None:
            output.say(line)
            log.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {line}\n")
            log.flush()

        say(request.command)
        try:
            _do_pending(study, grid, machine, say)
            for further in grids:
                extend(study, further, machine)
                study.save()
                _do_pending(study, further, machine, say)
        except KeyboardInterrupt as stop:
            raise Interrupted(number_of(stop), study.jobs) from None
        finally:
            rows = study.rows()
            write_table(study.folder, rows)
            from mnist_dist.study.report import write_report  # scipy and matplotlib take a second to import

            say(f"written: {', '.join(map(str, write_report(study.folder, rows, study.hold_out)))}")
        from mnist_dist.study.mirror import mirror_study

        hint = mirror_study(study.folder, rows, request.tracking, study.mark.split("-")[1], request.command, say)
        if hint:
            say(f"W&B was offline: to bring this study there, {hint}; each run's folder has a run of its own")
        failed = [row for row in rows if row["status"] == "failed"]
        for row in failed:
            say(f"failed: {row['run']}: {row['reason']}")
    return MnistDistError.exit_status if failed else 0


def _write_outcomes(study: Study, request: Request, machine: Machine) -> None:
    """Write the outcome of a run that has ended when the study was killed."""
    for run in study.runs:
        folder = study.run_folder(run)
        if (folder / RESULT).exists() and not (folder / OUTCOME).exists():
            with contextlib.suppress(UserError):
                whole_result(run, folder)
                command = command_of(run, folder, request.options, request.program, machine.launcher)
                write_outcome(folder, OF_A_KILLED_STUDY, command)
                study.forget(run)


class Interrupted(MnistDistError):
    """Ctrl-C or SIGTERM ended the study."""

    def __init__(self, number: int, jobs: Sequence[slurm.Job] = ()) -> None:
        there = (f"; `scancel {' '.join(job.number for job in jobs)}` ends its runs, which stay in SLURM's queue"
                 if jobs else "")
        super().__init__(f"stopped by {signal.Signals(number).name}: the same command continues the study{there}")
        self.exit_status = 128 + number


def _do_pending(study: Study, request: Request, machine: Machine, say: Callable[[str], None]) -> None:
    """The runs that are planned and not done, and with `--precision` those that follow from them."""
    pending = show_plan(study, machine, say)
    if request.precision is None:
        _do_runs(study, pending, request, machine, say)
        return
    last = [run for run in pending if run.role == "last"]
    if not _do_runs(study, [run for run in pending if run.role != "last"], request, machine, say):
        return
    from mnist_dist.study import rounds  # scipy takes a second to import

    cells, open_cells = set(request.grid.cells()), 0
    while True:
        rows = study.rows()
        new = rounds.next_round([run for run in study.runs if run.cell in cells], rows, request.precision, request.seed)
        if not new:
            break
        if len(new) != open_cells:
            open_cells = len(new)
            about = rounds.about_missing(new, rounds.rates_by_cell(rows), request.precision)
            say(f"{counted(open_cells, 'cell is', 'cells are')} not known to {100 * request.precision:g} % yet: about "
                f"{counted(len(about), 'further run')}, {say_duration(estimate(about, rows, study.fixed))}")
        study.runs = [*(run for run in study.runs if run not in last), *new, *last]
        study.save()
        if not _do_runs(study, new, request, machine, say):
            return
    _do_runs(study, last, request, machine, say)


def _do_runs(study: Study, pending: Sequence[PlannedRun], request: Request, machine: Machine,
             say: Callable[[str], None]) -> bool:
    """These runs, as long as there is time for them; returns whether it was enough."""
    if machine.launcher == "slurm":
        _do_in_queue(study, pending, request, machine, say)
        return True
    _look_at_fabric(study, max((run.cell.processes for run in pending), default=1), machine, say)
    for done, run in enumerate(pending, 1):
        if run.cell in study.impossible:  # memory ran out in another run of it
            continue
        left = request.seconds
        if math.isfinite(left):
            rows = study.rows()
            left -= sum(row.get("seconds") or 0.0 for row in rows)
            # without any run there is nothing to estimate from, and the limit of this one is what is left
            if left <= 0 or (rows and estimate([run], rows, study.fixed, study.predicted) > left):
                many = counted(sum(run.cell not in study.impossible for run in pending[done - 1:]), "run")
                say(f"the {say_duration(request.seconds)} of {'--quick' if request.quick else '--budget'} are over: "
                    f"{many} left out")
                return False
        _do(study, run, replace(request, cell_timeout=min(left, request.cell_timeout)), machine, say,
            f"[{done}/{len(pending)}]", [other for other in pending[done:] if other.cell not in study.impossible])
        study.drop_if_out_of_memory(run)
    return True


def _look_at_fabric(study: Study, processes: int, machine: Machine, say: Callable[[str], None]) -> None:
    """Have the doctor measure what joins so many processes, if it has not yet, and pass on what it finds wrong. For our
    own training only: the size of another one's gradient is not known.
    """
    known = fabric_of(study.fabric)
    if not study.program.is_ours or machine.launcher != "torch" or processes <= (known.processes if known else 1):
        return
    try:
        findings = examine(processes, study.folder, machine, study.mark)
    except UserError as error:
        say(f"doctor: {error}: the study goes on without its figures")
        return
    for one in findings:
        if one.get("problem"):
            say(f"doctor: {one['problem']}: {one['remedy']}")
    if found := from_doctor(findings, str(study.fixed.get("--dtype") or "float32")):
        study.fabric = found.as_row()
        study.save()
        study.forget()


def _do(study: Study, run: PlannedRun, request: Request, machine: Machine, say: Callable[[str], None], place: str,
        left: Sequence[PlannedRun]) -> None:
    """One run: its outcome is written, its row added, and a line printed."""
    folder = study.run_folder(run)
    command = command_of(run, folder, request.options, request.program, machine.launcher)
    outcome: dict[str, Any] = {"status": "failed", "reason": "stopped by a signal", "started": None,
                               "seconds": None}
    if sys.stdout.isatty():
        output.say(f"{place} {run.name} …", end="\r")
    try:
        environment = environment_of(run, request.program, environment_for(machine, study.mark), machine.cores)
        outcome = start(run, folder, command, environment, request.cell_timeout, request.program)
    finally:
        write_outcome(folder, outcome, command)
        study.forget(run)
    _add_row(study, run, say, place, left)


def _add_row(study: Study, run: PlannedRun, say: Callable[[str], None], place: str, left: Sequence[PlannedRun] = ()
             ) -> None:
    """The run is over: write the table with it, and a line."""
    rows = study.rows()
    write_table(study.folder, rows)
    row = next(row for row in rows if row["run"] == run.name)
    if row["status"] == "completed":
        rate = rate_of(row)
        what = "nothing measured" if rate is None else f"{rate:,.0f} {unit_of(row)}/s"
    else:
        what = f"failed: {row['reason']}"
    took = "" if row["seconds"] is None else f", {row['seconds']:.1f} s"
    rest = f"; about {say_duration(estimate(left, rows, study.fixed, study.predicted))} left" if left else ""
    say(f"{place} {run.name}: {what}{took}{rest}")


def _submit(study: Study, pending: Sequence[PlannedRun], request: Request, say: Callable[[str], None]
            ) -> dict[str, str]:
    """Submit the runs that are not in SLURM's queue. Returns the names of those that SLURM refuses, each with the
    reason. Raises `UserError` if it refuses all of them and no other run is in the queue.
    """
    submitted = {name for job in study.jobs for name in job.runs}
    new = [run for run in pending if run.name not in submitted]
    refused: dict[str, str] = {}
    for names, script in slurm.scripts(new, study.folder, request.options, request.cell_timeout):
        for name in names:
            remove_tree(study.folder / RUNS / name)
        study.forget()
        try:
            study.jobs.append(slurm.submit(names, script, request.sbatch))
        except UserError as error:
            refused.update(dict.fromkeys(names, str(error)))
            continue
        study.save()
        say(f"SLURM's job {study.jobs[-1].number}: {counted(len(names), 'run')}")
    if refused and not study.jobs:
        raise UserError(next(iter(refused.values())))
    return refused


def _do_in_queue(study: Study, pending: Sequence[PlannedRun], request: Request, machine: Machine,
                 say: Callable[[str], None]) -> None:
    """Submit the runs that are not in SLURM's queue, and wait for all. What has failed since another command of this
    study submitted it gets its row; the next command submits it again.
    """
    refused = _submit(study, pending, request, say)
    by_name = {run.name: run for run in study.runs}
    left = {job.task(name): by_name[name] for job in study.jobs for name in job.runs}
    problem, waiting = "", slurm.Waiting(say)
    count, places = len(refused) + len(left), itertools.count(1)

    def add(task: str, run: PlannedRun, reason: str) -> None:
        folder = study.run_folder(run)
        command = command_of(run, folder, request.options, request.program, machine.launcher)
        slurm.see_to_outcome(task, folder, command, reason)
        study.forget(run)
        _add_row(study, run, say, f"[{next(places)}/{count}]")
        study.drop_if_out_of_memory(run)
        for other in [other for other, run in left.items() if run.cell in study.impossible]:
            slurm.take_out(other)
            del left[other]

    for name, reason in refused.items():
        add("", by_name[name], reason)
    while left:
        try:
            reasons = slurm.in_queue()
        except UserError as error:
            if str(error) != problem:
                say(f"{error}: the study waits")
            problem = str(error)
            time.sleep(slurm.POLL_SECONDS)
            continue
        problem = ""
        never = waiting.look({task: reason for task, reason in reasons.items() if task in left})
        for task in never:
            slurm.take_out(task)
        for task in [task for task in left if task not in reasons or task in never]:
            if task not in left:  # its cell is out of memory
                continue
            add(task, left.pop(task), f"SLURM never starts it ({never[task]}): {slurm.REMEDY}" if task in never else "")
        there = [job for job in study.jobs if any(job.task(name) in left for name in job.runs)]
        if there != study.jobs:
            study.jobs = there
            study.save()
        if left:
            time.sleep(slurm.POLL_SECONDS)
