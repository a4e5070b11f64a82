"""`mnist-dist study`: plans a grid, does its runs one at a time, keeps the table, writes the report.

The folder of a study holds `study.json` (what was asked for, in which order), `runs/NAME/` (one folder per run),
`runs.jsonl` and `runs.csv` (the table), `study.log`, and the report. A run is done if its `result.json` is whole, so
the same command continues a study that was interrupted at any point.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from mnist_dist import output, runner
from mnist_dist.disk.files import make_folder, open_file
from mnist_dist.disk.lock import FolderLock, Held
from mnist_dist.errors import MnistDistError, UserError
from mnist_dist.processes.stop_signals import number_of
from mnist_dist.record.run_folder import RESULT
from mnist_dist.study.analysis.measured_network import all_reduce_times_of, from_doctor
from mnist_dist.study.plan.grid import PlannedRun, cell_of
from mnist_dist.study.plan.quick import SECONDS, Looks, choose, first_look
from mnist_dist.study.plan.table import write_table
from mnist_dist.study.run import slurm
from mnist_dist.study.run.folder import LOG, OF_A_KILLED_STUDY, Job, Study, open_study
from mnist_dist.study.run.in_queue import do_in_queue
from mnist_dist.study.run.launches import OUTCOME, Machine, environment_for, examine, start, whole_result, write_outcome
from mnist_dist.study.run.program import command_of, environment_of
from mnist_dist.study.run.progress import add_row, estimate, say_duration, show_plan
from mnist_dist.study.run.request import Request, extend
from mnist_dist.text import counted


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
            from mnist_dist.study.report.report import write_report  # scipy and matplotlib take a second to import

            say(f"written: {', '.join(map(str, write_report(study.folder, rows, study.hold_out)))}")
        from mnist_dist.study.report.wandb_study import mirror_study

        hint = mirror_study(study.folder, rows, request.tracking, study.mark.split("-")[1], request.command, say)
        if hint:
            say(f"W&B was offline: to bring this study there, {hint}; each run's folder has its own run")
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

    def __init__(self, number: int, jobs: Sequence[Job] = ()) -> None:
        there = (f"; `scancel {' '.join(job.number for job in jobs)}` ends its runs, which stay in SLURM's queue"
                 if jobs else "")
        super().__init__(f"stopped by {signal.Signals(number).name}: the same command continues the study{there}")
        self.exit_status = 128 + number


def _do_pending(study: Study, request: Request, machine: Machine, say: Callable[[str], None]) -> None:
    """Do the planned runs that are not done. With `--precision`, then do rounds of further runs."""
    pending = show_plan(study, machine, say)
    if request.precision is None:
        _do_runs(study, pending, request, machine, say)
        return
    last = [run for run in pending if run.role == "last"]
    if not _do_runs(study, [run for run in pending if run.role != "last"], request, machine, say):
        return
    from mnist_dist.study.analysis.analysis import Analysis
    from mnist_dist.study.run.rounds import expected_runs, next_round

    cells, open_cells = set(request.grid.cells()), 0
    while True:
        rows = study.rows()
        runs, metrics = [run for run in study.runs if run.cell in cells], Analysis(rows)
        new = next_round(runs, metrics, request.precision, request.seed)
        if not new:
            break
        if len(new) != open_cells:
            open_cells = len(new)
            about = expected_runs(new, metrics, request.precision)
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
        do_in_queue(study, pending, request, machine, say)
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
    """Have the doctor measure the network of `processes` processes, if it has not yet, and say what it finds wrong. For
    our training only: the size of another training's gradient is not known.
    """
    known = all_reduce_times_of(study.fabric)
    if not study.program.is_ours or machine.launcher != "torch" or processes <= (known.processes if known else 1):
        return
    try:
        findings = examine(processes, study.folder, machine, study.mark)
    except UserError as error:
        say(f"doctor: {error}: the study continues without its measurements")
        return
    for finding in findings:
        if finding.get("problem"):
            say(f"doctor: {finding['problem']}: {finding['remedy']}")
    if fabric := from_doctor(findings, str(study.fixed.get("--dtype") or "float32")):
        study.fabric = fabric.as_row()
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
    add_row(study, run, say, place, left)
