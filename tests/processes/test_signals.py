"""A signal, to the launcher or to a rank, at any moment of a run: a whole checkpoint, nothing lost, no process left."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
import uuid

import pytest
from support import ROOT, mnist_dist, result_of

from benchmarks.faults import named
from mnist_dist import runner
from mnist_dist.record.checkpoint import load_newest

BATCHES, EPOCHS = 21, 3  # of 50 images
OPTIONS = ["--reproducible", "--batch-size", "50", "--epochs", str(EPOCHS), "--wandb", "disabled"]
# of a moment: the steps that are done by then, and how often a checkpoint is written without a signal
MOMENTS = {"start": (0, "1000s"), "joining": (0, "1000s"), "data": (0, "1000s"), "compiling": (0, "1000s"),
           "step": (29, "1000s"), "evaluation": (2 * BATCHES, "1000s"), "checkpoint": (10, "5steps"),
           "record": (2 * BATCHES, "1000s"), "results": (EPOCHS * BATCHES, "1epoch")}
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
EVERY_CASE = list(itertools.product(MOMENTS, SIGNALS, ("launcher", "rank")))
# each signal, to the launcher and to a rank, at some moments; the others take some minutes more
IN_CI = [("joining", SIGNALS[3], "rank"), ("step", SIGNALS[0], "launcher"), ("checkpoint", SIGNALS[2], "launcher"),
         ("record", SIGNALS[1], "rank")]
WAITS_SECONDS = 1.0


def marks(case):
    return pytest.mark.long if case in IN_CI else pytest.mark.faults


class Launched:
    """`mnist-dist train --processes 2`, whose ranks wait at a moment."""

    def __init__(self, moment, data_dir, folder):
        self.folder, self.waits_in, self.mark = folder / "run", folder / "waits", uuid.uuid4().hex
        self.waits_in.mkdir()
        self.number = 2 if moment == "start" else 1
        words = [sys.executable, "-m", "mnist_dist", "train", "--processes", "2", *OPTIONS, "--checkpoint-every",
                 MOMENTS[moment][1], "--data-dir", str(data_dir), "--output-dir", str(self.folder)]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={
            **os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'helpers' / 'moments'}", "WAITS_AT": moment,
            "WAITS_IN": str(self.waits_in), "WAITS_SECONDS": str(WAITS_SECONDS), runner.MARK: self.mark})

    def at_the_moment(self, deadline=60.0):
        """Wait until a rank is there, at the start both: before, a rank is in Python's own start. Returns the last
        rank's process.
        """
        until = time.monotonic() + deadline
        while len(list(self.waits_in.iterdir())) < self.number:
            assert self.process.poll() is None and time.monotonic() < until, "the moment did not come"
            time.sleep(0.01)
        rank = named(self.process, "rank 1")
        assert rank is not None
        return rank

    def ended(self, seconds):
        """Wait until every process is gone; returns exit status and errors."""
        until = time.monotonic() + seconds
        while left := runner.tree(self.mark):
            assert time.monotonic() < until, f"still there: {left}"
            time.sleep(0.05)
        _, errors = self.process.communicate(timeout=5)
        return self.process.returncode, errors


@pytest.fixture(scope="module")
def alone(small_dir, tmp_path_factory):
    """The epochs of a run that no signal disturbs."""
    folder = tmp_path_factory.mktemp("alone")
    done = mnist_dist("train", *OPTIONS, "--data-dir", small_dir, "--output-dir", "run", cwd=folder)
    assert done.returncode == 0, done.stderr
    return result_of(folder / "run")["epochs"]


@pytest.mark.parametrize(("moment", "number", "to"),
                         [pytest.param(*case, marks=marks(case)) for case in EVERY_CASE])
def test_a_signal_loses_nothing(moment, number, to, alone, small_dir, tmp_path):
    launched = Launched(moment, small_dir, tmp_path)
    rank = launched.at_the_moment()
    (launched.process if to == "launcher" else rank).send_signal(number)
    status, errors = launched.ended(10 + WAITS_SECONDS)
    done = MOMENTS[moment][0]
    found = load_newest(launched.folder / "checkpoints", pytest.fail)
    assert (found is not None) == (done > 0), errors
    assert "Traceback" not in errors
    if found:
        assert int(found.folder.name[5:]) >= done, "nothing is lost"
    if moment not in ("results", "start", "joining", "data", "compiling"):
        assert status == 128 + number and f"stopped by {number.name}" in errors, (status, errors)
    assert status != 0 or moment == "results"
    resumed = mnist_dist("train", *OPTIONS, "--data-dir", small_dir, "--output-dir", launched.folder, "--resume",
                         cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    ours = result_of(launched.folder)["epochs"]
    assert [epoch["test_nll_sum"] for epoch in ours] == [epoch["test_nll_sum"] for epoch in alone]
    assert [epoch["train_loss"] for epoch in ours] == [epoch["train_loss"] for epoch in alone]
    lines = (launched.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == list(range(EPOCHS)), "no line is doubled or missing"


@pytest.mark.parametrize("to", [pytest.param("launcher", marks=pytest.mark.faults),
                                pytest.param("rank", marks=pytest.mark.long)])
def test_a_second_signal_ends_it_at_once(to, small_dir, tmp_path):
    launched = Launched("evaluation", small_dir, tmp_path)
    rank = launched.at_the_moment()
    receiver = launched.process if to == "launcher" else rank
    receiver.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    receiver.send_signal(signal.SIGTERM)
    time.sleep(WAITS_SECONDS / 2)
    at_work = [process.pid for process in runner.tree(launched.mark) if "RANK" in process.environ()]
    assert rank.pid not in at_work and (not at_work if to == "launcher" else len(at_work) == 1)
    status, _ = launched.ended(10 + WAITS_SECONDS)  # torch's launcher takes a second or two to leave
    assert status not in (0, None)
