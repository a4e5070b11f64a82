"""A rank that fails tells why, and the others name it; a rank's own failure is never said to be another's."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time

import pytest
from forked import run_forked
from support import ROOT

from benchmarks.faults import named


@pytest.mark.parametrize(("how", "own", "of_the_others"), [
    ("memory", "mnist-dist: error: process 1 of 3 has no GPU memory left after step", "lost"),
    ("assert", "RuntimeError: CUDA error: device-side assert triggered", "lost"),
    ("kill", "", "lost"),
    pytest.param("hang", "", "timed out waiting for", marks=pytest.mark.long),
])
def test_the_failure_of_a_rank(how, own, of_the_others, small_dir, tmp_path):
    done = run_forked(["train", "--data-dir", small_dir, "--wandb", "disabled", "--timeout", "3", "--compile", "off",
                       "--output-dir", "run"], cwd=tmp_path, size=3, target="failing:main",
                      environment={"FAILS_BY": how}, patience=5)
    lines = done.stderr.splitlines()
    assert done.returncode not in (0, None)
    assert own in done.stderr and ("Traceback" in done.stderr) == (how == "assert")
    errors = [line for line in lines if line.startswith("mnist-dist: error: ")]
    assert not any("process 1 lost" in line or "process 1 timed out" in line for line in errors), errors
    for rank in (0, 2):
        (line,) = [line for line in errors if f"error: process {rank} " in line]
        assert of_the_others in line and re.search("after step [0-5]", line), "the last one in which all took part"
    first = next(line for line in errors if "error: process 1 " not in line)
    assert f"{of_the_others} process 1 of 3 on {platform.node()}" in first, "the first to notice names it, and its host"


@pytest.mark.long
def test_a_rank_that_is_stopped_is_named(small_dir, tmp_path):
    """SIGSTOP: it neither ends nor answers. torch's launcher waits 30 s for it, then kills it."""
    words = [sys.executable, "-m", "mnist_dist", "train", "--processes", "2", "--data-dir", str(small_dir), "--epochs",
             "100000", "--compile", "off", "--wandb", "disabled", "--timeout", "4", "--output-dir", "run"]
    launcher = subprocess.Popen(words, cwd=tmp_path, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={
        **os.environ, "PYTHONPATH": str(ROOT)})
    until = time.monotonic() + 60
    while not (tmp_path / "run" / "metrics.jsonl").exists() or not (tmp_path / "run" / "metrics.jsonl").read_text():
        assert time.monotonic() < until
        time.sleep(0.05)
    rank = named(launcher, "rank 1")
    rank.suspend()
    _, errors = launcher.communicate(timeout=200)
    assert launcher.returncode == 1 and not rank.is_running()
    (line,) = [line for line in errors.splitlines() if line.startswith("mnist-dist: error: process 0 ")]
    assert f"process 1 of 2 on {platform.node()}" in line and re.search(r"after step \d+", line)
