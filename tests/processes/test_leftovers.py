"""Variables that an earlier launcher has left in the environment; and where the ports of a run listen."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid

import psutil
import pytest
from support import ROOT, assert_one_line_error, mnist_dist, mnist_dist_launched, run, wait_for_epochs

from mnist_dist import runner

OF_SLURM = {"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
            "SLURM_NODEID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "4",
            "SLURM_STEP_NODELIST": "localhost"}
OF_OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
               "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
RUNS = "1 process on"
WAITS = "waits for process 1"
SEARCHES = "waits for machine 0 at 127.0.0.1:29876"
CASES = [  # variables, and what is printed
    ({"RANK": "0"}, RUNS),
    ({"LOCAL_RANK": "0"}, RUNS),
    ({"WORLD_SIZE": "1"}, RUNS),
    ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "gone.example", "MASTER_PORT": "1"}, RUNS),
    ({"MASTER_ADDR": "gone.example", "OMP_NUM_THREADS": "4,2"}, RUNS),
    ({"SLURM_JOB_ID": "4711", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, RUNS),  # a batch script
    ({**OF_SLURM, "SLURM_PTY_PORT": "40001", "MASTER_PORT": "29875"}, WAITS),  # an srun within the shell of srun --pty
    ({**OF_SLURM, "SLURM_STEP_NUM_TASKS": "1"}, RUNS),
    ({**OF_OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, RUNS),
    ({"WORLD_SIZE": "4"}, "type `unset WORLD_SIZE`"),
    ({"RANK": "1"}, "type `unset RANK`"),
    ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "type `unset RANK WORLD_SIZE LOCAL_RANK`"),
    ({"RANK": "4", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost"}, "type `unset RANK WORLD_SIZE`"),
    ({**OF_SLURM, "WORLD_SIZE": "2"}, "disagree"),
    ({**OF_OPEN_MPI, "WORLD_SIZE": "4"}, "disagree"),
    ({"ACCELERATE_USE_DEEPSPEED": "true"}, "ACCELERATE_USE_DEEPSPEED=true"),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "29877"}, WAITS),
    ({**OF_SLURM, "MASTER_PORT": "29878"}, WAITS),
    ({**OF_OPEN_MPI, "MASTER_PORT": "29879"}, WAITS),
    ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29876"}, SEARCHES),
]


@pytest.mark.long
@pytest.mark.parametrize(("variables", "printed"), CASES)
def test_variables_that_are_left(variables, printed, small_dir, tmp_path):
    """How soon it says that it waits: ./launch/test.sh -m long -n 0 -rP tests/processes/test_leftovers.py"""
    words = ["train", "--data-dir", small_dir, "--epochs", 1, "--batch-size", 500, "--wandb", "disabled",
             "--timeout", 8, "--output-dir", "run"]
    if printed not in (WAITS, SEARCHES):
        done = (mnist_dist if printed == RUNS else mnist_dist_launched)(*words, cwd=tmp_path, **variables)
        if printed != RUNS:
            assert_one_line_error(done, printed, "unset")
            return
        assert done.returncode == 0 and RUNS in done.stdout, done.stderr
        return
    begin = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "mnist_dist", *map(str, words)], cwd=tmp_path, text=True,
                               env={**os.environ, "PYTHONPATH": str(ROOT), **variables}, stderr=subprocess.PIPE)
    notice = process.stderr.readline()
    print(f"said after {time.monotonic() - begin:.1f} s: {notice}")
    assert printed in notice
    assert re.search(r"for 8 s at most \(\S+=\d.* say so: unset these to run one process\)", notice)
    error = process.stderr.read()
    assert process.wait() == 2 and len(error.splitlines()) == 1 and error.startswith("mnist-dist: error: ")


@pytest.mark.long
@pytest.mark.skipif(shutil.which("script") is None, reason="no `script` to make a terminal")
def test_the_shell_of_srun_pty(small_dir, tmp_path):
    """`script` gives it a terminal."""
    words = [sys.executable, "-m", "mnist_dist", "train", "--data-dir", small_dir, "--max-steps", 2, "--wandb",
             "disabled", "--output-dir", "run"]
    done = run(["script", "-qec", shlex.join(map(str, words)), "/dev/null"], cwd=tmp_path, PYTHONPATH=str(ROOT),
               **OF_SLURM, SLURM_PTY_PORT="40001")
    assert done.returncode == 0 and RUNS in done.stdout, done


def test_a_command_that_starts_its_processes_itself(tmp_path):
    for command in ("study", "reproduce"):
        done = mnist_dist_launched(command, cwd=tmp_path, RANK="0", WORLD_SIZE="2")
        assert_one_line_error(done, f"mnist-dist {command} starts its processes itself", "RANK=0 and WORLD_SIZE=2")


@pytest.mark.faults
def test_the_ports_of_one_machine_are_its_own(small_dir, tmp_path):
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [sys.executable, "-m", "mnist_dist", "train", "--processes", "2", "--data-dir", str(small_dir), "--batch-size",
         "10", "--epochs", "1000", "--wandb", "disabled", "--output-dir", "run"], cwd=tmp_path,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT), runner.MARK: mark})
    wait_for_epochs(tmp_path / "run", 1)
    members = [member.pid for member in runner.tree(mark)]
    addresses = [connection.laddr.ip for connection in psutil.net_connections("inet")
                 if connection.status == psutil.CONN_LISTEN and connection.pid in members]
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert addresses and set(addresses) == {"127.0.0.1"}, addresses
