"""What a launch promises: its files, its option, its errors, and how it ends after a signal or a killed process."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import (
    ROOT,
    TORCHRUN,
    TRAIN,
    assert_one_line_error,
    check_one_run,
    mnist_dist,
    mnist_dist_launched,
    result_of,
    run,
    wait_for_epochs,
)


@pytest.mark.parametrize(("file", "words", "size"), [
    pytest.param("train.sh", [], 1, marks=pytest.mark.faults),
    pytest.param("cpu_processes.sh", [2], 2, marks=pytest.mark.long),
    pytest.param("one_gpu.sh", [], 1, marks=pytest.mark.faults),
    pytest.param("all_gpus.sh", [], 1, marks=pytest.mark.long),
])
def test_the_files_in_launch(file, words, size, no_hint, small_dir, tmp_path):
    if not distribution_is_installed():
        pytest.skip("the package is not installed here: the files would make an environment of their own")
    done = run([ROOT / "launch" / file, *words, "--data-dir", small_dir, "--max-steps", 3], cwd=tmp_path,
               VIRTUAL_ENV=sys.prefix, PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert done.returncode == 0, done.stderr
    check_one_run(tmp_path, size)


def distribution_is_installed():
    try:
        return bool(importlib.metadata.version("mnist-dist"))
    except importlib.metadata.PackageNotFoundError:
        return False


@pytest.mark.parametrize("size", [pytest.param(size, marks=pytest.mark.long if size == 3 else pytest.mark.faults)
                                  for size in (1, 2, 3)])
def test_processes_option(size, no_hint, small_dir, tmp_path):
    done = mnist_dist_launched("train", "--processes", size, "--data-dir", small_dir, "--max-steps", 3,
                      "--per-device-batch-size", 17, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    summary = check_one_run(tmp_path, size)["summary"]
    assert (summary["global_batch_size"], summary["per_device_batch_size"]) == (17 * size, 17)


def test_an_error_in_the_processes_is_one_line_and_their_exit_status(small_dir, tmp_path):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in small_dir.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    labels = damaged / "t10k-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-1])
    done = mnist_dist_launched("train", "--processes", 2, "--data-dir", damaged, "--output-dir", "out", cwd=tmp_path)
    assert_one_line_error(done, "t10k-labels-idx1-ubyte", "truncated")
    assert not (tmp_path / "out").exists()


def test_number_that_differs_from_the_launchers_is_refused(small_dir, tmp_path):
    done = run([*TORCHRUN, "--nproc-per-node=2", TRAIN, "--processes", 3, "--data-dir", small_dir], cwd=tmp_path)
    assert done.returncode != 0 and not (tmp_path / "runs").exists()
    assert done.stderr.count("mnist-dist: error: --processes 3 conflicts with the launcher, which started 2") == 1


def test_a_world_of_another_size_is_refused(small_dir, tmp_path):
    """A launcher that says there are two, of which one came, is not trained alone."""
    done = mnist_dist_launched("train", "--data-dir", small_dir, "--timeout", 1, cwd=tmp_path, WORLD_SIZE="2", RANK="0",
                      LOCAL_RANK="0", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    assert_one_line_error(done, "process 1 of 2 did not come within 1 s")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("number", "status", "size"), [
    (signal.SIGINT, 130, 1),
    pytest.param(signal.SIGTERM, 143, 1, marks=pytest.mark.faults),
    pytest.param(signal.SIGTERM, 143, 2, marks=pytest.mark.faults),
    pytest.param(signal.SIGINT, 130, 2, marks=pytest.mark.faults),
])
def test_a_signal_leaves_a_checkpoint_and_resume_goes_on(number, status, size, small_dir, tmp_path):
    words = ["--data-dir", small_dir, "--batch-size", 10, "--wandb", "disabled", "--dtype", "float64", "--processes",
             size]
    is_compiled = size == 1 and number == signal.SIGTERM
    if not is_compiled:
        words += ["--compile", "off"]
    command = [sys.executable, "-m", "mnist_dist", "train", *words, "--epochs", 100_000, "--output-dir", "cut"]
    process = subprocess.Popen([str(word) for word in command], cwd=tmp_path,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONPATH": str(ROOT)})
    metrics = tmp_path / "cut" / "metrics.jsonl"
    wait_for_epochs(tmp_path / "cut", 2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == status, errors
    assert f"stopped by {number.name}" in errors and "--resume" in errors
    assert not (tmp_path / "cut" / "result.json").exists()
    epochs = len(metrics.read_text().splitlines()) + 2
    # so many steps are compiled on one process; a resumed run stays compiled, and a shorter run needs --compile on
    for folder, more in (("cut", ["--resume"]), ("whole", ["--compile", "on"] if is_compiled else [])):
        done = mnist_dist("train", *words, "--epochs", epochs, "--output-dir", folder, *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    cut, whole = result_of(tmp_path / "cut"), result_of(tmp_path / "whole")
    assert [e["test_nll_sum"] for e in cut["epochs"]] == [e["test_nll_sum"] for e in whole["epochs"]]
    assert [e["train_loss"] for e in cut["epochs"]] == pytest.approx([e["train_loss"] for e in whole["epochs"]])
    assert len(metrics.read_text().splitlines()) == epochs, "no line is doubled or missing"
