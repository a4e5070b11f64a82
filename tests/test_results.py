"""What a run says of itself at its end: the summary's arithmetic, where it ran, and when it ends early."""

from __future__ import annotations

import pytest
from support import mnist_dist, result_of

from mnist_dist.results import summarise


def record(step, nll, seconds, warmup, rate):
    return {"step": step, "test_nll": nll, "train_seconds": seconds, "warmup_seconds": warmup,
            "samples_per_second": rate}


def test_rates_are_summed_and_divided_and_not_averaged():
    records = [record(10, 0.5, 3.0, 1.0, 100.0), record(20, 0.3, 8.0, 0.0, 50.0), record(30, 0.4, 1.0, 1.0, None)]
    summary = summarise(records, 0.3)
    assert summary["samples_per_second"] == pytest.approx((100 * 2 + 50 * 8) / 10)
    assert (summary["best_test_nll"], summary["final_test_nll"]) == (0.3, 0.4)
    assert summary["seconds_to_target"] == pytest.approx(11.0) and summary["steps_to_target"] == 20


def test_what_was_not_reached_or_measured_is_none():
    summary = summarise([record(10, 0.5, 3.0, 3.0, None)], 0.3)
    assert summary["seconds_to_target"] is None and summary["steps_to_target"] is None
    assert summary["samples_per_second"] is None
    assert summarise([], None)["best_test_nll"] is None


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
