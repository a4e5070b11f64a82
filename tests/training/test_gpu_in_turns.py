"""What ranks with a GPU do in turns, on the CPU: compile, record, replay, evaluate, save, stop, exit.

The GPU is a stand-in (stand_in_gpu.py), in real processes with real collectives. Nothing here runs CUDA.
"""

from __future__ import annotations

import platform

import pytest
import torch
from forked import run_forked
from safetensors.torch import load_file
from stand_in_gpu import RULE_BROKEN
from support import mnist_dist, result_of, windows_of

WORDS = ["--compile", "on", "--batch-size", 97, "--lr", "1e-3", "--wandb", "disabled", "--timeout", 20]


def on_stand_in(data_dir, name, *words, cwd, size, **environment):
    return run_forked(["train", "--data-dir", data_dir, "--output-dir", name, *WORDS, *words], cwd=cwd, size=size,
                      target="stand_in_gpu:main", patience=15, environment=environment)


@pytest.mark.parametrize(("size", "words"), [
    pytest.param(1, [], marks=pytest.mark.faults), pytest.param(2, [], marks=pytest.mark.faults),
    pytest.param(3, [], marks=pytest.mark.faults),
    pytest.param(2, ["--gradient-accumulation-steps", 3], marks=pytest.mark.long),
])
def test_a_run_has_the_bits_of_the_compiled_step(size, words, small_dir, tmp_path):
    """Cut in the middle of an epoch and continued; no graph is alive when the ranks part."""
    for more in (["--max-steps", 17], ["--resume"]):
        done = on_stand_in(small_dir, "gpu", "--epochs", 3, "--checkpoint-every", "4steps", *words, *more, cwd=tmp_path,
                           size=size)
        assert done.returncode == 0, done.stderr
    done = mnist_dist("train", "--data-dir", small_dir, "--output-dir", "cpu", "--epochs", 3, "--processes", size,
                      *WORDS, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    on_cpu, on_gpu = (load_file(tmp_path / name / "model.safetensors") for name in ("cpu", "gpu"))
    assert all(torch.equal(on_gpu[name], on_cpu[name]) for name in on_cpu)
    epochs = result_of(tmp_path / "gpu")["epochs"]
    for ours, theirs in zip(epochs, result_of(tmp_path / "cpu")["epochs"], strict=True):
        assert (ours["step"], ours["test_nll_sum"]) == (theirs["step"], theirs["test_nll_sum"])
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-12)
        assert ours["step_ms_p50"] > 0
    assert sum(window[1] for window in windows_of(tmp_path / "gpu")[2]) == epochs[2]["measured_samples"] == 1009


@pytest.mark.parametrize("killed", [pytest.param(0, marks=pytest.mark.faults), pytest.param(1, marks=pytest.mark.long)])
def test_a_lost_rank_ends_the_others_though_the_queue_is_stuck(killed, small_dir, tmp_path):
    done = on_stand_in(small_dir, "run", "--batch-size", 2, "--epochs", 100, cwd=tmp_path, size=2,
                       KILL_AT=f"{killed}:700")
    assert done.returncode not in (0, RULE_BROKEN)
    errors = [line for line in done.stderr.splitlines() if line.startswith("mnist-dist: error: ")]
    assert len(errors) == 1 and errors[0].endswith("the GPU waits for it"), done.stderr
    assert f"process {1 - killed} lost process {killed} of 2 on {platform.node()} after step" in errors[0]


@pytest.mark.long
def test_a_stop_leaves_a_checkpoint(small_dir, tmp_path):
    done = on_stand_in(small_dir, "run", "--epochs", 10**6, cwd=tmp_path, size=2, STOP_AT="1:40")
    assert done.returncode == 143, done.stderr
    assert "stopped by SIGTERM after step" in done.stderr and list((tmp_path / "run" / "checkpoints").iterdir())
