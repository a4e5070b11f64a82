"""Launchers that start all processes again: after `kill -9` of a rank, the run ends as the one that was left alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import psutil
import pytest
from safetensors.torch import load_file
from support import ROOT, TORCHRUN, TRAIN, assert_one_line_error, mnist_dist, result_of, run

from benchmarks.faults import named
from mnist_dist.processes.launch_environment import Launch, read_launch
from mnist_dist.processes.restarts import RestartState

OURS = [sys.executable, "-m", "mnist_dist", "train", "--processes", "2", "--max-restarts", "1"]
TORCHS = [*TORCHRUN, "--max-restarts=5", "--monitor-interval=0.1", "--nproc-per-node=2", TRAIN]
ACCELERATES = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines=1",
               "--num_processes=2", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0",
               "--max_restarts=5", "--monitor_interval=0.1", TRAIN]
EPOCHS = 6
OPTIONS = ["--reproducible", "--batch-size", "10", "--epochs", str(EPOCHS), "--checkpoint-every", "10steps",
           "--wandb", "disabled"]


@pytest.fixture(scope="module")
def alone(small_dir, tmp_path_factory):
    """The folder of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("alone")
    done = mnist_dist("train", *OPTIONS, "--data-dir", small_dir, "--output-dir", "run", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def kill_after(folder, launcher, number, *, checkpoints, deadline=60.0):
    """`kill -9` of a rank when there are more checkpoints than these; returns the newest one's name when the ranks of
    this start are gone.
    """
    until = time.monotonic() + deadline
    while not (found := set(names(folder)) - checkpoints) or (process := named(launcher, f"rank {number}")) is None:
        assert launcher.poll() is None and time.monotonic() < until, "the run did not get under way"
        time.sleep(0.02)
    ranks = [rank for n in range(2) if (rank := named(launcher, f"rank {n}"))]
    process.kill()
    psutil.wait_procs(ranks, timeout=deadline)
    return max(found)


def names(folder):
    return [path.name for path in (folder / "checkpoints").glob("step-*")] if folder.exists() else []


def launch(command, folder, data_dir):
    """The launcher of a run in this folder, with what it prints in pipes."""
    words = [*command, *OPTIONS, "--data-dir", str(data_dir), "--output-dir", str(folder)]
    return subprocess.Popen(words, cwd=folder.parent, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.mark.long
def test_a_killed_rank_is_started_again_as_often_as_was_asked_for(alone, small_dir, tmp_path):
    """Once; the second kill ends the launch, and the run continues on one process."""
    folder = tmp_path / "run"
    launcher = launch(OURS, folder, small_dir)
    for victim in (1, 0):
        kill_after(folder, launcher, victim, checkpoints=set(names(folder)))
    printed, errors = launcher.communicate(timeout=200)
    assert launcher.returncode == 1 and "was ended by SIGKILL" in errors and "Traceback" not in errors
    assert printed.count("continuing after step") == 1
    done = mnist_dist("train", *OPTIONS, "--resume", "--data-dir", small_dir, "--output-dir", folder, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same(folder, alone)


@pytest.mark.parametrize(("command", "victims"), [
    pytest.param(TORCHS, (0, 1), marks=pytest.mark.faults, id="torchrun"),
    pytest.param(ACCELERATES, (1,), marks=pytest.mark.long, id="accelerate")])
def test_other_launchers_start_again_too(command, victims, alone, small_dir, tmp_path):
    """A rank in the first start, the other one in the second: the last start ends the run."""
    folder = tmp_path / "run"
    launcher = launch(command, folder, small_dir)
    for victim in victims:
        kill_after(folder, launcher, victim, checkpoints=set(names(folder)))
    printed, errors = launcher.communicate(timeout=200)
    assert launcher.returncode == 0, errors
    assert printed.count("continuing after step") == len(victims), "each start takes up the newest checkpoint"
    assert_same(folder, alone)


def assert_same(folder, alone):
    """The run of this folder learnt what the one that was left alone did, and recorded it once."""
    ours, theirs = load_file(folder / "model.safetensors"), load_file(alone / "model.safetensors")
    assert all(bool((ours[name] == theirs[name]).all()) for name in theirs)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(EPOCHS)), "no line is doubled or missing"
    for ours, theirs in zip(result_of(folder)["epochs"], result_of(alone)["epochs"], strict=True):
        assert [ours[name] for name in ("train_loss", "test_nll_sum")] == [
            theirs[name] for name in ("train_loss", "test_nll_sum")]


@pytest.mark.long
def test_a_killed_launcher_leaves_a_checkpoint_and_no_process(alone, small_dir, tmp_path):
    folder = tmp_path / "run"
    launcher = launch(OURS[:-2], folder, small_dir)
    while not names(folder):
        time.sleep(0.02)
    ranks = [named(launcher, f"rank {number}") for number in range(2)]
    before = max(names(folder))
    launcher.kill()
    launcher.wait()
    gone, left = psutil.wait_procs(ranks, timeout=10)
    assert not left and len(gone) == 2
    assert max(names(folder)) >= before
    done = mnist_dist("train", *OPTIONS, "--data-dir", small_dir, "--resume", "--output-dir", folder, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same(folder, alone)


@pytest.mark.long
def test_an_end_that_another_start_does_not_change_is_not_repeated(small_dir, tmp_path):
    """The folder holds a run of another launch: no later start may continue it."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    done = run([*OURS, *OPTIONS, "--data-dir", small_dir, "--output-dir", "run"], cwd=tmp_path,
               PYTHONPATH=str(ROOT))
    assert done.returncode == 2 and "already holds a run" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == "{}\n"


@pytest.mark.parametrize("words", [["--max-restarts", "-1"], ["--max-restarts", "many"]])
def test_a_number_is_needed(words, tmp_path):
    done = mnist_dist("train", *words, cwd=tmp_path)
    assert_one_line_error(done, "--max-restarts must be a whole number at least 0")


def test_what_the_launcher_says_of_restarts():
    launch = read_launch({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
                          "MASTER_ADDR": "host0", "MASTER_PORT": "1234", "TORCHELASTIC_USE_AGENT_STORE": "True",
                          "TORCHELASTIC_MAX_RESTARTS": "2", "TORCHELASTIC_RESTART_COUNT": "1"})
    assert (launch.master_port, launch.has_store, launch.max_restarts, launch.restart) == (1234, True, 2, 1)
    assert launch.starts_again and not Launch(max_restarts=2, restart=2).starts_again and not Launch().starts_again


def test_a_later_start_knows_of_the_earlier_ones():
    first = RestartState(Launch(master_address="localhost", master_port=0, max_restarts=2), 20.0)
    assert first.folder is None and first.end is None
    port = first._store.port
    launch_again = Launch(master_address="localhost", master_port=port, max_restarts=2, restart=1, has_store=True)
    later = RestartState(launch_again, 20.0)
    assert later.folder is None and later.end is None
    first.folder, first.end = "runs/one", (3, "training diverged: at step 7")
    assert later.folder == "runs/one" and later.end == (3, "training diverged: at step 7")
    assert first.folder is None, "a first start continues nothing"
