"""Trains in other processes and reads the result, for `reproduce`, studies, benchmarks and tests.

A command's processes carry a mark in their environment, which their children inherit. So the whole tree can be ended,
also ranks whose launcher has died: these are in other sessions, without a parent. Needs no torch.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import psutil

from mnist_dist.errors import Diverged, UserError
from mnist_dist.processes.launch_environment import child_environment
from mnist_dist.record.result import RunResult, read_result

MARK = "MNIST_DIST_PROCESS_TREES"  # environment variable: the marks of all trees that a process belongs to
GRACE_SECONDS = 30.0  # after Ctrl-C, for a run to leave a checkpoint
ERROR_LINE = re.compile(r"(?:\[rank\d+\]:\s*)?((?:[\w.]+(?:Error|Exception)|mnist-dist: error): .+)")
# of the rank that failed first
TORCHRUNS = re.compile(r"Root Cause .*?\brank +: (\d+).*?\bexitcode +: (-?\d+)", re.DOTALL)


class Outcome(NamedTuple):
    """How a training ended: the exit status of its process (negative: the signal that ended it), its result if it left
    one, and what went wrong in one line ("" if nothing did).
    """

    status: int
    result: RunResult | None
    note: str


def train(options: Sequence[object], folder: Path, *, processes: int = 1, timeout: float | None = None,
          environment: Mapping[str, str] | None = None, show: bool = False) -> Outcome:
    """Run `mnist-dist train OPTIONS --output-dir FOLDER` in new processes; a failure is an outcome, not an error.

    After `timeout` seconds all its processes are killed. `environment` is added to this process's; with `show` the
    output goes to the terminal.
    """
    command = [sys.executable, "-m", "mnist_dist", "train", *options, "--output-dir", folder]
    if processes > 1:
        command += ["--processes", processes]
    try:
        done = run(command, timeout=timeout, environment={**child_environment(), **(environment or {})}, show=show)
    except subprocess.TimeoutExpired:
        return Outcome(-signal.SIGKILL, None, f"no result after {timeout:g} s: ended")
    note = last_error(done.stderr or "") or f"exit status {done.returncode}" if done.returncode else ""
    try:
        # with another exit status, a result in the folder is from an earlier run
        result = read_result(folder) if done.returncode in (0, Diverged.exit_status) else None
    except UserError as error:
        return Outcome(done.returncode, None, note or str(error))
    return Outcome(done.returncode, result, note)


def run(command: Sequence[object], *, timeout: float | None = None, environment: Mapping[str, str] | None = None,
        cwd: Path | None = None, show: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a command with no keyboard and return what it printed, or with `show` let it print to the terminal.

    However this ends, no process of the command is left. Raises `subprocess.TimeoutExpired`.
    """
    mark = uuid.uuid4().hex
    inherited = {**os.environ, **(environment or {})}
    marks = ":".join(filter(None, [inherited.get(MARK), mark]))
    # files, not pipes: a process that the command leaves behind would hold a pipe open
    with _text_file() as printed, _text_file() as errors:
        process = subprocess.Popen(
            [str(word) for word in command], env={**inherited, MARK: marks}, cwd=cwd, stdin=subprocess.DEVNULL,
            stdout=None if show else printed, stderr=None if show else errors,
            start_new_session=not show,  # a command that is shown gets the terminal's Ctrl-C
        )
        try:
            process.wait(timeout)
        except KeyboardInterrupt:
            if show:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE_SECONDS)
            raise
        finally:
            end_tree(mark)
            process.wait()
        printed.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(process.args, process.returncode, printed.read(), errors.read())


def _text_file() -> IO[str]:
    return tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")


def tree(mark: str) -> list[psutil.Process]:
    """Every process that carries the mark."""
    return [process for process in psutil.process_iter() if mark in _marks(process)]


def end_tree(mark: str) -> None:
    """Kill every process that carries the mark, until there is none."""
    while members := tree(mark):
        for process in members:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(members, timeout=1.0)


def _marks(process: psutil.Process) -> list[str]:
    try:
        # a process that has ended, but that its parent has not waited for, has no environment
        return process.environ().get(MARK, "").split(":")
    except (psutil.Error, OSError):
        return []


def last_error(stderr: str) -> str:
    """The last line that names an error (launchers write more below it), else what torchrun says of the first process
    that failed, else the last line.
    """
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    named = [match[1] for match in map(ERROR_LINE.match, lines) if match]
    if not named and (match := TORCHRUNS.search(stderr)):
        return f"rank {match[1]} ended with exit status {match[2]} and without a message"
    return (named or lines or [""])[-1]
