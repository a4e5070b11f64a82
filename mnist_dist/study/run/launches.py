"""Starts the runs of a study, one at a time, each with a time limit, and says how each ended.

What a run starts is in program.py. What it prints goes to `output.txt` in its folder.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mnist_dist import runner
from mnist_dist.disk.files import make_folder, remove_tree, replace_json, write_synced
from mnist_dist.errors import UserError
from mnist_dist.processes.launch_environment import child_environment, num_cores
from mnist_dist.record.environment import git_commit, processor_name
from mnist_dist.record.run_folder import RESULT
from mnist_dist.study.plan.grid import LAUNCHERS, PlannedRun
from mnist_dist.study.plan.table import read_contract
from mnist_dist.study.run.printed_rate import result_from
from mnist_dist.study.run.program import Program
from mnist_dist.text import without_passwords

OUTPUT, OUTCOME = "output.txt", "outcome.json"
# what PyTorch, NumPy, JAX, C++ and the system say when memory runs out, on a GPU and on the CPU
OUT_OF_MEMORY = re.compile(r"out of memory|OutOfMemory|no GPU memory left|(?:can't|cannot) allocate memory|MemoryError|"
                           r"std::bad_alloc|RESOURCE_EXHAUSTED", re.IGNORECASE)
WAS_KILLED, KILLED = re.compile(r"SIGKILL|[Ss]ignal 9|Killed"), (-signal.SIGKILL, 128 + signal.SIGKILL)
DOCTOR_SECONDS = 180.0  # the doctor takes less than 60


@dataclass(frozen=True)
class Machine:
    """What a study may use: a process on each of its GPUs, or without GPUs on its cores; or what a launcher gives it,
    which only the launcher knows.
    """

    gpus: int
    cores: int
    launcher: str = "torch"

    @property
    def devices(self) -> tuple[int, str]:
        """The number and the kind: (8, "GPUs") or (2, "cores")."""
        if self.launcher != "torch":
            return sys.maxsize, "cores"
        return (self.gpus, "GPUs") if self.gpus else (self.cores, "cores")

    def __str__(self) -> str:
        count, kind = self.devices
        return f"{count} {kind}" if self.launcher == "torch" else LAUNCHERS[self.launcher]


def look_at_machine(use_cpu: bool) -> Machine:
    """This machine. Its GPUs are counted in another process, so that this one never touches them."""
    count = 0
    if not use_cpu:
        code = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"
        words = [sys.executable, "-c", code]
        done = runner.run(words, timeout=120.0)
        last = (done.stdout.split() or [""])[-1]
        if done.returncode or not last.isdigit():
            raise UserError(f"the GPUs could not be counted ({runner.last_error(done.stderr)}): see whether "
                            "`python -c 'import torch'` works")
        count = int(last)
    return Machine(count, num_cores())


def environment_for(machine: Machine, mark: str) -> dict[str, str]:
    """The environment of a run's processes, which all carry the study's `mark`."""
    marks = [os.environ.get(runner.MARK), mark]  # the study may run within another study or test
    # each run has its name in W&B
    environment = {**child_environment(), runner.MARK: ":".join(filter(None, marks)), "WANDB_NAME": ""}
    if not machine.gpus and machine.launcher == "torch":
        environment["ACCELERATE_USE_CPU"] = "true"
    return environment


@functools.cache
def facts_of_machine() -> dict[str, str]:
    """What a row says of the machine if the program does not: host, device, driver, torch, and the commit of the folder
    in which it is started. What cannot be found out is left out.
    """
    facts: dict[str, str | None] = {"host": socket.gethostname(), "device": "cpu", "device_name": processor_name(),
                                    "git_commit": git_commit(Path.cwd())}
    with contextlib.suppress(PackageNotFoundError):
        facts["torch"] = version("torch")
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = runner.run(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"], timeout=20.0)
        name, comma, driver = (done.stdout.splitlines() or [""])[0].rpartition(", ")
        if comma and not done.returncode:
            facts |= {"device": "cuda", "device_name": name, "driver": driver}
    return {name: value for name, value in facts.items() if value}


def examine(processes: int, folder: Path, machine: Machine, mark: str) -> list[dict[str, Any]]:
    """What `mnist-dist doctor` finds on `processes` processes. Raises `UserError` if it finds nothing."""
    words = [sys.executable, "-m", "mnist_dist", "doctor", "--json", f"--processes={processes}", "--dataset=synthetic",
             "--wandb=disabled", f"--output-dir={folder}"]
    try:
        done = runner.run(words, timeout=DOCTOR_SECONDS, environment=environment_for(machine, mark))
        return list(json.loads(done.stdout)["findings"])
    except subprocess.TimeoutExpired:
        raise UserError(f"no result after {DOCTOR_SECONDS:g} s") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(runner.last_error(done.stderr) or f"exit status {done.returncode}") from None


def start(run: PlannedRun, folder: Path, command: Sequence[str], environment: dict[str, str],
          timeout: float, program: Program) -> dict[str, Any]:
    """Do the run in its folder, from nothing; returns its status, the reason of a failure, its begin and seconds, and
    of another program than ours the machine; `out_of_memory` if that was the reason.
    """
    remove_tree(folder)
    make_folder(folder)
    begun, clock = datetime.now(timezone.utc), time.monotonic()
    reason, kills, is_out_of_memory = "", _kills_for_memory(), False
    try:
        done = runner.run(command, timeout=timeout, environment=environment)
        printed, status = done.stdout + done.stderr, done.returncode
        if status:
            reason = runner.last_error(done.stderr) or f"exit status {status}"
            is_out_of_memory = OUT_OF_MEMORY.search(printed) is not None or (
                _kills_for_memory() > kills and (status in KILLED or WAS_KILLED.search(printed) is not None))
            if status < 0:
                reason = f"ended by {signal.Signals(-status).name}" + (
                    ", perhaps because memory ran out" if status == -signal.SIGKILL and not is_out_of_memory else "")
            reason = f"out of memory: {reason}" if is_out_of_memory else reason
    except subprocess.TimeoutExpired:
        printed, reason = "", f"no result after {timeout:g} s (--cell-timeout): ended"
    if folder.is_dir():
        write_synced(folder / OUTPUT, printed.encode(errors="replace"))
    if not reason:
        try:
            if program.printed is not None:
                replace_json(folder / RESULT, result_from(printed, program.printed, run.cell))
            whole_result(run, folder)
        except UserError as error:
            reason = str(error)
    return {"status": "failed" if reason else "completed", "reason": " ".join(reason.split())[:500],
            "started": begun.isoformat(timespec="seconds"), "seconds": round(time.monotonic() - clock, 3),
            **({"out_of_memory": True} if is_out_of_memory else {}),
            **({} if program.is_ours else {"machine": facts_of_machine()})}


def _kills_for_memory() -> int:
    """How many processes the kernel has killed since it started because memory ran out; 0 if it does not say."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def write_outcome(folder: Path, outcome: dict[str, Any], command: Sequence[str]) -> None:
    """Write down how a run ended, with its command: without paths of this machine, or a password."""
    typed = shlex.join("python" if word == sys.executable else word for word in command)
    replace_json(folder / OUTCOME, {**outcome, "command": without_passwords(typed)})


def whole_result(run: PlannedRun, folder: Path) -> dict[str, Any]:
    """The result that the run has left. Raises `UserError` with what is wrong if it is not whole or not of its cell."""
    values = read_contract(folder)
    if values["status"] != "completed":
        raise UserError(f"its status is {values['status']}")
    for what, value, wanted in (
        ("processes", values["environment"]["num_processes"], run.cell.processes),
        ("samples in a global batch", values["summary"]["global_batch_size"], run.cell.global_batch_size),
    ):
        if value != wanted:
            raise UserError(f"its result.json is of {value} {what}, not of {wanted}")
    return values
