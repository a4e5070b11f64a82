"""When a run ends, and what it says of itself then."""

from __future__ import annotations

import pytest
from support import mnist_dist, result_of


def test_a_target_ends_the_run(small_dir, tmp_path):
    done = mnist_dist("train", "--data-dir", small_dir, "--lr", "1e-3", "--batch-size", 50, "--epochs", 50,
                      "--target-nll", 2.0, "--lr-rule", "sqrt", "--wandb", "disabled", "--output-dir", "run",
                      "--mixed-precision", "bf16", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = result_of(tmp_path / "run")
    *before, last = result["epochs"]
    assert last["test_nll"] <= 2.0 < min((epoch["test_nll"] for epoch in before), default=9) and len(before) < 49
    assert result["summary"]["learning_rate"] == pytest.approx(5e-4)
    assert result["summary"]["steps_to_target"] == last["step"]
    assert result["environment"]["mixed_precision"] == "bf16"
    assert result["environment"]["torch"] and result["environment"]["device"] == "cpu"
