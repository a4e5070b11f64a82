"""A run under a real SLURM: its time limit, a preemption and a requeue change nothing."""

from __future__ import annotations

import pytest
from slurm_cluster import run_of, wait_until
from support import ROOT, epochs_of, result_of

from mnist_dist import runner

EPOCHS, MANY_EPOCHS = 20, 60  # many: until the signal has come
OPTIONS = ["--reproducible", "--batch-size", 10, "--wandb", "disabled"]
SCRIPT = ROOT / "launch" / "slurm.sbatch"
SOON = ["--time=1", "--signal=B:USR1@50"]  # the signal comes some ten seconds after the start
BATCH = ["--cpus-per-task=1", "--ntasks-per-node=1", "--output=out.txt"]


@pytest.mark.parametrize("fault", [
    pytest.param(fault, marks=pytest.mark.long if fault == "requeue" else pytest.mark.faults)
    for fault in ("none", "requeue", "time limit", "preemption")])
def test_a_job_on_two_nodes_has_the_same_bits(fault, slurm, alone, small_dir, tmp_path):
    limits, epochs = (SOON, MANY_EPOCHS) if fault == "time limit" else ([], EPOCHS)
    job = slurm.submit("--nodes=2", *BATCH, *limits, SCRIPT, *OPTIONS, "--epochs", epochs, "--data-dir", small_dir,
                       cwd=tmp_path)
    if fault != "none":
        wait_until(lambda: epochs_of(run_of(tmp_path, job)) >= 3 or not slurm.state(job))
    if fault == "requeue":
        assert slurm.ask("scontrol", "requeue", job) == ""
    elif fault == "preemption":
        other = slurm.submit("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1",
                             cwd=tmp_path)
        wait_until(lambda: not slurm.state(other))
    wait_until(lambda: not slurm.state(job), deadline=500)
    printed = (tmp_path / "out.txt").read_text()
    print(printed)
    run = run_of(tmp_path, job)
    result_of(run)
    assert len(list((tmp_path / "runs").iterdir())) == 1, "a start after the first finds the folder again"
    assert (run / "model.safetensors").read_bytes() == alone(epochs) and epochs_of(run) == epochs
    starts = printed.count("2 processes on")
    assert starts >= 2 if fault == "time limit" else starts == (1 if fault == "none" else 2)
    assert ("continuing after step" in printed) == (fault != "none")


@pytest.mark.faults
@pytest.mark.parametrize(("what", "words", "said"), [
    ("a wrong option", ["--lr", "x"], "--lr must be a number"),
    ("diverged", ["--lr", "1e30"], "training diverged: the loss is nan"),
    ("full disk", ["--checkpoint-every", "1epoch", "--dtype", "float64"], "No space left on device")])
def test_what_will_not_go_away_is_tried_once(what, words, said, slurm, small_disk, small_dir, tmp_path):
    words = [*words, *(["--output-dir", small_disk / "run"] if what == "full disk" else [])]
    job = slurm.submit("--nodes=2", *BATCH, SCRIPT, *OPTIONS, "--epochs", EPOCHS, "--data-dir", small_dir, *words,
                       cwd=tmp_path)
    wait_until(lambda: not slurm.state(job))
    printed = (tmp_path / "out.txt").read_text()
    print(printed)
    assert printed.count("mnist-dist: error: ") == 1 and said in printed
    assert printed.count("2 processes on") == (what != "a wrong option") and "Traceback" not in printed
    facts = slurm.ask("scontrol", "show", "job", job)
    assert "JobState=FAILED" in facts and "Restarts=0" in facts
    assert not [process for process in runner.tree(slurm.mark) if "mnist_dist" in process.cmdline()]
