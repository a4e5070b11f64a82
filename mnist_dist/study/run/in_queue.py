"""Runs of a study in SLURM's queue: submits them, waits for them, and adds their rows as they leave it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence

from mnist_dist.disk.files import remove_tree
from mnist_dist.errors import UserError
from mnist_dist.study.plan.grid import PlannedRun
from mnist_dist.study.run import slurm
from mnist_dist.study.run.folder import RUNS, Study
from mnist_dist.study.run.launches import Machine
from mnist_dist.study.run.program import command_of
from mnist_dist.study.run.progress import add_row
from mnist_dist.study.run.request import Request
from mnist_dist.text import counted


def _submit(study: Study, pending: Sequence[PlannedRun], request: Request, say: Callable[[str], None]
            ) -> dict[str, str]:
    """Submit the runs that are not in SLURM's queue yet. Returns the refused runs by their names, with SLURM's reasons.
    Raises `UserError` if SLURM refuses all of them and no other run is in the queue.
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


def do_in_queue(study: Study, pending: Sequence[PlannedRun], request: Request, machine: Machine,
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
        add_row(study, run, say, f"[{next(places)}/{count}]")
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
            if task not in left:  # the run's cell is out of memory
                continue
            add(task, left.pop(task), f"SLURM never starts it ({never[task]}): {slurm.REMEDY}" if task in never else "")
        there = [job for job in study.jobs if any(job.task(name) in left for name in job.runs)]
        if there != study.jobs:
            study.jobs = there
            study.save()
        if left:
            time.sleep(slurm.POLL_SECONDS)
