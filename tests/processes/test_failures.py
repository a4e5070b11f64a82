"""A rank that fails tells why, and the others name it; a rank's own failure is never said to be another's."""

from __future__ import annotations

import pytest
from forked import run_forked


@pytest.mark.parametrize(("how", "own", "of_the_others"), [
    ("memory", "mnist-dist: error: process 1 of 3 has no GPU memory left after step 0: give a smaller batch", "lost"),
    ("assert", "RuntimeError: CUDA error: device-side assert triggered", "lost"),
    ("kill", "", "lost"),
    pytest.param("hang", "", "waited in vain for", marks=pytest.mark.long),
])
def test_the_failure_of_a_rank(how, own, of_the_others, small_dir, tmp_path):
    done = run_forked(["train", "--data-dir", small_dir, "--wandb", "disabled", "--timeout", "3", "--compile", "off",
                       "--output-dir", "run"], cwd=tmp_path, size=3, target="failing:main",
                      environment={"FAILS_BY": how}, patience=5)
    lines = done.stderr.splitlines()
    assert done.returncode not in (0, None)
    assert own in done.stderr and ("Traceback" in done.stderr) == (how == "assert")
    errors = [line for line in lines if line.startswith("mnist-dist: error: ")]
    assert not any("process 1 lost" in line or "process 1 waited" in line for line in errors), errors
    for rank in (0, 2):
        (line,) = [line for line in errors if f"error: process {rank} " in line]
        assert of_the_others in line and "after step 0" in line
    first = next(line for line in errors if "error: process 1 " not in line)
    assert f"{of_the_others} process 1 of 3" in first, "the first to notice names it"
