"""The runs of a study as job arrays of SLURM: `mnist-dist study --launcher slurm`.

For each number of processes the study submits one script, an array with a task for each run. In a task, `python -m
mnist_dist.study.run.slurm` starts the run with srun and writes how it ended, as a study on one machine does. So the
queue needs nothing of the study's command, which only waits: it can end, and the same command waits again.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mnist_dist.disk.files import make_folder
from mnist_dist.errors import UserError
from mnist_dist.processes.launch_environment import read_launch
from mnist_dist.study.plan.grid import PlannedRun
from mnist_dist.study.run.folder import Job, open_study
from mnist_dist.study.run.launches import OUTCOME, environment_for, look_at_machine, start, write_outcome
from mnist_dist.study.run.program import command_of, environment_of
from mnist_dist.text import counted

ANSWER_SECONDS = 60.0  # for a command of SLURM's to answer
POLL_SECONDS = 2.0  # between two looks at the queue
AGAIN_SECONDS = 60.0  # between two lines that say the same
NEVER_SECONDS = 30.0  # that such a reason must last: SLURM also gives one for a moment, while a node starts
AFTER_A_LOSS = ("1", "2")  # restarts of a task after which a run that fails is tried once more
REMEDY = "give fewer --processes, or another partition or limit in --sbatch"
# SLURM's reasons for which a job waits until somebody changes the job, the partition or the account
NEVER = re.compile(r"AccountNotAllowed|BadConstraints|DependencyNeverSatisfied|Invalid(Account|QOS)|MaxMemPerLimit|"
                   r"Partition(Config|NodeLimit|TimeLimit)|QOS(NotAllowed|TimeLimit|Min\w+)|"
                   r"(Assoc|QOS)Max(Wall\w+|\w+PerJob\w*)", re.ASCII)
SCRIPT = """#!/usr/bin/env bash
#SBATCH --job-name=mnist-dist-study
#SBATCH --array=0-{last}
#SBATCH --ntasks={processes}
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --output={folder}/slurm-%A_%a.txt
# Each task of the array is a run of the study in {folder}: a node to itself, as its rate is measured.
# A task that is put back into the queue does its run from the beginning.
export PYTHONPATH={path}
# since SLURM 22.05 srun does not take it from the job
if [[ ${{SLURM_CPUS_PER_TASK:-}} ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
runs=({runs})
{python} -m mnist_dist.study.run.slurm {folder} "${{runs[$SLURM_ARRAY_TASK_ID]}}" --job "$SLURM_JOB_ID" \\
    --timeout {timeout:g} -- {options}
"""


def ask(*words: str, text: str | None = None) -> str:
    """What a command of SLURM's prints. Raises `UserError`."""
    try:
        done = subprocess.run(words, input=text, text=True, capture_output=True, timeout=ANSWER_SECONDS)
    except FileNotFoundError:
        raise UserError(f"--launcher slurm needs SLURM's commands, and {words[0]} is not there: run the study on a "
                        "machine from which you submit jobs") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{words[0]} has not answered for {ANSWER_SECONDS:g} s: see `sinfo`") from None
    if done.returncode:
        raise UserError(f"{words[0]}: {' '.join(done.stderr.split()) or f'exit status {done.returncode}'}")
    return done.stdout


def scripts(runs: Iterable[PlannedRun], folder: Path, options: Sequence[str], timeout: float
            ) -> list[tuple[tuple[str, ...], str]]:
    """For each number of processes: the names of its runs, and the script that does them."""
    names: dict[int, list[str]] = {}
    for run in runs:
        names.setdefault(run.cell.processes, []).append(run.name)
    root = Path(__file__).resolve().parents[3]
    return [(tuple(of), SCRIPT.format(
        last=len(of) - 1, processes=processes, folder=shlex.quote(str(folder.resolve())), timeout=timeout,
        path=shlex.quote(str(root)) + "${PYTHONPATH:+:$PYTHONPATH}", runs=shlex.join(of),
        python=shlex.quote(sys.executable), options=shlex.join(options))) for processes, of in sorted(names.items())]


def submit(names: tuple[str, ...], script: str, options: Sequence[str]) -> Job:
    """Give a script to the queue, with further options of sbatch. Raises `UserError`."""
    said = ask("sbatch", "--parsable", *options, text=script)
    return Job(said.strip().split(";")[0], names)


def in_queue() -> dict[str, str]:
    """The tasks of arrays, as `12_3`, that this user has in the queue, each with SLURM's reason why it waits; "" for a
    task that runs. Raises `UserError`.
    """
    lines = ask("squeue", "--me", "--noheader", "--array", "--format=%F_%K|%T|%r").splitlines()
    tasks = (line.strip().split("|", 2) for line in lines if line.count("|") >= 2)
    return {task: reason if state == "PENDING" and reason != "None" else "" for task, state, reason in tasks}


class Waiting:
    """The tasks that wait in the queue: says for which reasons, when these change and once a minute."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self._said, self._said_at = "", 0.0
        self._since: dict[str, tuple[str, float]] = {}  # of each task: its reason, and when it was first seen

    def look(self, reasons: Mapping[str, str]) -> dict[str, str]:
        """Takes the tasks and why each waits; the tasks that SLURM never starts, each with its reason."""
        now = time.monotonic()
        waiting = {task: reason for task, reason in reasons.items() if reason}
        text = "; ".join(sorted({f"job {task.partition('_')[0]}: {reason}" for task, reason in waiting.items()}))
        if text and (text != self._said or now - self._said_at >= AGAIN_SECONDS):
            self.say(f"waiting for {counted(len(waiting), 'run')}: {text}")
            self._said_at = now
        self._said = text
        self._since = {task: self._since[task] if self._since.get(task, ("",))[0] == reason else (reason, now)
                       for task, reason in waiting.items()}
        return {task: reason for task, (reason, since) in self._since.items()
                if NEVER.fullmatch(reason) and now - since >= NEVER_SECONDS}


def facts(task: str) -> dict[str, str]:
    """What SLURM knows of a job or a task: `JobState`, `PreemptTime` and more. Empty if it has forgotten it, as it does
    some minutes after the end.
    """
    try:
        return dict(re.findall(r"(\w+)=(\S*)", ask("scontrol", "--oneliner", "show", "job", task)))
    except UserError:
        return {}


def ended_by_the_queue(known: Mapping[str, str]) -> str:
    """Why a task that left no result ended, if SLURM ended it: `SLURM: CANCELLED`. Else ""."""
    state = known.get("JobState", "")
    return f"SLURM: {state}" if state not in ("", "RUNNING", "COMPLETING", "COMPLETED", "FAILED") else ""


def _of_memory(reason: str) -> dict[str, Any]:
    """What the outcome says besides, if SLURM ended the task because memory ran out."""
    return {"out_of_memory": True} if reason == "SLURM: OUT_OF_MEMORY" else {}


def take_out(task: str) -> None:
    """Cancel a task that SLURM never starts, if the controller answers."""
    with contextlib.suppress(UserError):
        ask("scancel", task)


def see_to_outcome(task: str, folder: Path, command: Sequence[str], reason: str = "") -> None:
    """The task has left the queue, or never starts for a `reason`: if it could not write how its run ended, do that for
    it.
    """
    if not (folder / OUTCOME).exists():
        reason = reason or ended_by_the_queue(facts(task)) or (
            f"it left the queue without a result: see `sacct -j {task}`" if folder.exists() else
            "it left the queue before it started, as after scancel")
        make_folder(folder)
        outcome = {"status": "failed", "reason": reason, "started": None, "seconds": None}
        write_outcome(folder, {**outcome, **_of_memory(reason)}, command)


def main(argv: Sequence[str]) -> int:
    """A task of the array: does one run."""
    parser = argparse.ArgumentParser(prog="python -m mnist_dist.study.run.slurm",
                                     description="A run of a study in a job.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("run")
    parser.add_argument("--job", required=True)
    parser.add_argument("--timeout", type=float, required=True)
    end = argv.index("--")
    arguments, options = parser.parse_args(argv[:end]), argv[end + 1:]
    study = open_study(arguments.folder)
    run = next((run for run in study.runs if run.name == arguments.run), None)
    if run is None:
        parser.exit(2, f"mnist-dist: error: the study in {arguments.folder} has no run {arguments.run}: this script is "
                       "submitted by `mnist-dist study --launcher slurm`, or by hand after it has begun the study\n")
    folder = study.run_folder(run)
    machine = look_at_machine(read_launch().use_cpu)
    command = command_of(run, folder, options, study.program, "slurm")
    # SLURM sends SIGTERM to all processes of a job that it ends: srun ends of it, and this process says why
    signal.signal(signal.SIGTERM, lambda *_: None)
    environment = environment_of(run, study.program, environment_for(machine, study.mark), machine.cores)
    outcome = start(run, folder, command, environment, arguments.timeout, study.program)
    if outcome["status"] == "failed":
        known = facts(arguments.job)
        is_preempted = known.get("PreemptTime", "None") != "None"  # SLURM forgets a preempted job that ends by itself
        # after the loss of a node SLURM may end the step of the next start too: see launch/slurm.sbatch
        was_lost = known.get("JobState") == "RUNNING" and known.get("Restarts") in AFTER_A_LOSS
        if is_preempted or was_lost:
            ask("scontrol", "requeue", arguments.job)
            return 1
        if known.get("JobState") == "PENDING":  # SLURM puts it back into the queue
            return 1
        outcome["reason"] = ended_by_the_queue(known) or outcome["reason"]
        outcome |= _of_memory(outcome["reason"])
    write_outcome(folder, outcome, command)
    return 0 if outcome["status"] == "completed" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
