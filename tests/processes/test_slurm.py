"""A run under a real SLURM: its time limit, a preemption and a requeue change nothing."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import pytest
from slurm_cluster import Slurm, missing
from support import ROOT, epochs_of, mnist_dist, result_of

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())
EPOCHS = 30
OPTIONS = ["--reproducible", "--batch-size", 10, "--wandb", "disabled", "--epochs", EPOCHS]
BATCH = ["--cpus-per-task=1", "--ntasks-per-node=1", "--output=out.txt"]


@pytest.fixture(scope="module")
def slurm():
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, Slurm(Path(folder)) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def alone(small_dir, tmp_path_factory):
    """The model of a run on one process that nothing disturbs."""
    folder = tmp_path_factory.mktemp("alone")
    done = mnist_dist("train", *OPTIONS, "--data-dir", small_dir, "--output-dir", "run", cwd=folder)
    assert done.returncode == 0, done.stderr
    return (folder / "run" / "model.safetensors").read_bytes()


def wait_until(what, deadline=180.0):
    until = time.monotonic() + deadline
    while not what():
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.parametrize("fault", [
    pytest.param(fault, marks=pytest.mark.long if fault == "requeue" else pytest.mark.faults)
    for fault in ("none", "requeue", "time limit", "preemption")])
def test_a_job_on_two_nodes_has_the_same_bits(fault, slurm, alone, small_dir, tmp_path):
    job = slurm.submit("--nodes=2", *BATCH, ROOT / "launch" / "slurm.sbatch", *OPTIONS, "--data-dir", small_dir,
                       cwd=tmp_path)
    run = tmp_path / "runs" / f"slurm-{job}"
    if fault != "none":
        wait_until(lambda: epochs_of(run) >= 3 or not slurm.state(job))
    if fault == "requeue":
        assert slurm.ask("scontrol", "requeue", job) == ""
    elif fault == "time limit":  # SLURM sends the signal that --signal asks for
        assert slurm.ask("scancel", "--batch", "--signal=USR1", job) == ""
    elif fault == "preemption":
        other = slurm.submit("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1",
                             cwd=tmp_path)
        wait_until(lambda: not slurm.state(other))
    wait_until(lambda: not slurm.state(job))
    printed = (tmp_path / "out.txt").read_text()
    print(printed)
    result_of(run)
    assert (run / "model.safetensors").read_bytes() == alone and epochs_of(run) == EPOCHS
    assert printed.count("2 processes on") == (1 if fault == "none" else 2)
    assert ("continuing after step" in printed) == (fault != "none")
