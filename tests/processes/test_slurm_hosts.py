"""SLURM on several hosts: a job that loses one ends by itself with the bits of one process; names and environments.

`./launch/test.sh -m faults tests/processes/test_slurm_hosts.py -n 0 -s` prints how many seconds it takes until training
goes on.
"""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path

import pytest
from hosts import Hosts
from slurm_cluster import SlurmOnHosts, missing, run_of, wait_until
from support import ROOT, epochs_of, result_of

EPOCHS, MANY_EPOCHS = 25, 60  # many: until SLURM ends the processes of the next start too, 50 s after it
OPTIONS = ["--reproducible", "--batch-size", 10, "--wandb", "disabled", "--checkpoint-every", "1epoch"]
BATCH = ["--nodes=2", "--cpus-per-task=1", "--ntasks-per-node=1", "--output=out.txt", ROOT / "launch" / "slurm.sbatch"]
FIRST, SECOND, THIRD = 2, 3, 4  # hosts with a node; the batch script runs on the first. The controller is on host 1


@pytest.fixture
def slurm(tmp_path):
    """A SLURM whose first two nodes are up."""
    if missing():
        pytest.skip(missing())
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, Hosts(tmp_path, THIRD) as hosts, SlurmOnHosts(
            Path(folder), hosts) as cluster:
        for number in (FIRST, SECOND):
            cluster.boot(number)
        cluster.wait_for_nodes(2)
        yield cluster


@pytest.mark.faults
@pytest.mark.parametrize("lost", [FIRST, SECOND])
@pytest.mark.parametrize("back", [0, 5, 30, 90, "another"])
def test_a_job_that_loses_a_host_ends_with_the_same_bits(back, lost, slurm, alone, small_dir, tmp_path):
    """The host has no power for `back` seconds, or another one takes its place."""
    epochs = MANY_EPOCHS if back == 30 else EPOCHS
    job = slurm.submit(*BATCH, *OPTIONS, "--epochs", epochs, "--data-dir", small_dir, cwd=tmp_path)
    wait_until(lambda: epochs_of(run_of(tmp_path, job)) >= 2 or not slurm.state(job))
    time.sleep(moment := random.uniform(0, 12))
    slurm.kill(lost)
    killed = time.monotonic()
    before = epochs_of(run_of(tmp_path, job))
    if back != "another":
        time.sleep(back)
    slurm.boot(THIRD if back == "another" else lost)
    wait_until(lambda: epochs_of(run_of(tmp_path, job)) > before or not slurm.state(job), deadline=300)
    print(f"\nback {back}, host {lost} lost {moment:.1f} s after epoch 2, with {before} epochs: training goes on after "
          f"{time.monotonic() - killed:.0f} s")
    wait_until(lambda: not slurm.state(job), deadline=300)
    print((tmp_path / "out.txt").read_text(), slurm.ask("scontrol", "show", "job", job))
    result_of(run_of(tmp_path, job))
    printed = (tmp_path / "out.txt").read_text()
    assert len(printed.splitlines()) <= epochs + 35 and "[c10d]" not in printed and "/gloo/" not in printed
    assert (run_of(tmp_path, job) / "model.safetensors").read_bytes() == alone(epochs)
    assert epochs_of(run_of(tmp_path, job)) == epochs


@pytest.mark.faults
@pytest.mark.parametrize("names", [{}, {f"machine{FIRST}": "127.0.1.1"}])
def test_nodes_whose_names_do_not_lead_to_them(names, slurm, small_dir, tmp_path):
    slurm.hosts.resolve(SECOND, names)
    job = slurm.submit(*BATCH, "--data-dir", small_dir, "--epochs", 1, "--wandb", "disabled", cwd=tmp_path)
    wait_until(lambda: not slurm.state(job))
    print((tmp_path / "out.txt").read_text())
    assert result_of(run_of(tmp_path, job))["environment"]["num_machines"] == 2


@pytest.mark.faults
def test_nodes_without_the_environment(slurm, tmp_path):
    job = slurm.submit("--export=ALL,PATH=/usr/bin:/bin", *BATCH, cwd=tmp_path)
    wait_until(lambda: not slurm.state(job))
    printed = (tmp_path / "out.txt").read_text()
    print(printed)
    assert 1 <= printed.count(" has no python that imports mnist_dist: submit with the environment active") <= 2
    assert "Restarts=0" in (facts := slurm.ask("scontrol", "show", "job", job)) and "JobState=FAILED" in facts
