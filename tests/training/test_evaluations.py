"""`--evaluate-every`: after the same samples on any number of processes, and without a trace in the training."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from support import mnist_dist, result_of

from mnist_dist.data import Images
from mnist_dist.training.sampling import share_out

# 1,009 samples in batches of 48: 22 steps per epoch
WORDS = ["--batch-size", 48, "--epochs", 3, "--dtype", "float64", "--lr", "1e-3", "--wandb", "disabled"]


def trained(folder, data_dir, name, *words, size=1, status=0):
    done = mnist_dist("train", "--processes", size, "--data-dir", data_dir, *WORDS, "--output-dir", name, *words,
                      cwd=folder)
    assert done.returncode == status, done.stderr
    return result_of(folder / name) if status == 0 else done.stderr


def points(result):
    return [(one["step"], one["samples"]) for epoch in result["epochs"] for one in epoch["evaluations"]]


@pytest.fixture(scope="module")
def by_processes(small_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluations")
    found = {size: trained(folder, small_dir, f"{size}", "--evaluate-every", "300samples", size=size)
             for size in (1, 2, 3)}
    return folder, found


def test_after_so_many_samples_rounded_up_to_steps(by_processes):
    _, found = by_processes
    expected = []
    for mark in range(300, 3 * 1009 + 1, 300):
        epoch, within = divmod(mark - 1, 1009)
        step = -(-(within + 1) // 48)
        if step < 22:  # the last step of an epoch is evaluated anyhow
            expected.append((22 * epoch + step, 1009 * epoch + 48 * step))
    assert points(found[1]) == expected
    seconds = [one["train_seconds"] for epoch in found[1]["epochs"] for one in epoch["evaluations"]]
    assert seconds == sorted(seconds) and seconds[-1] <= sum(one["train_seconds"] for one in found[1]["epochs"])


@pytest.mark.parametrize("size", [2, 3])
def test_processes_change_nothing(size, by_processes):
    _, found = by_processes
    assert points(found[size]) == points(found[1])
    for ours, theirs in zip(found[size]["epochs"], found[1]["epochs"], strict=True):
        for one, other in zip(ours["evaluations"], theirs["evaluations"], strict=True):
            assert one["test_nll"] == pytest.approx(other["test_nll"], rel=1e-10)
            assert one["test_accuracy"] == other["test_accuracy"]


def test_it_leaves_no_trace_in_the_training(by_processes, small_dir, tmp_path):
    folder, found = by_processes
    result = trained(tmp_path, small_dir, "without")
    assert points(result) == []
    with_them, without = (load_file(path / "model.safetensors") for path in (folder / "1", tmp_path / "without"))
    assert all(torch.equal(with_them[name], without[name]) for name in without)
    assert [one["train_loss"] for one in result["epochs"]] == [one["train_loss"] for one in found[1]["epochs"]]


def test_the_lowest_target_ends_the_run_within_an_epoch(by_processes, small_dir, tmp_path):
    _, found = by_processes
    within = [one for epoch in found[1]["epochs"] for one in epoch["evaluations"]]
    first, last = within[1]["test_nll"], within[4]["test_nll"]
    assert last < first
    result = trained(tmp_path, small_dir, "run", "--evaluate-every", "300samples", "--target-nll",
                     f"{last * 1.000001},{first * 1.000001},99")
    summary = result["summary"]
    assert [one["step"] for one in summary["targets"]] == [within[0]["step"], within[1]["step"], within[4]["step"]]
    assert summary["steps_to_target"] == within[4]["step"] == result["epochs"][-1]["step"]
    assert summary["seconds_to_target"] == summary["targets"][-1]["train_seconds"] > 0


@pytest.mark.parametrize("at_an_evaluation", [False, True])
def test_an_epoch_that_is_interrupted_keeps_its_evaluations(at_an_evaluation, by_processes, small_dir, tmp_path):
    _, found = by_processes
    step = found[1]["epochs"][1]["evaluations"][1]["step"] if at_an_evaluation else 30
    assert at_an_evaluation == (step in [point[0] for point in points(found[1])])
    trained(tmp_path, small_dir, "run", "--evaluate-every", "300samples", "--max-steps", step)
    result = trained(tmp_path, small_dir, "run", "--evaluate-every", "300samples", "--resume", size=2)
    assert points(result) == points(found[1])


def test_a_small_batch_and_few_samples_evaluate_after_each_step():
    batches = share_out(Images(torch.zeros(10, 1, 28, 28), torch.zeros(10)), 4, rank=0, size=1)
    assert batches.steps_of_samples(1, 0) == [1, 2]
    assert batches.steps_of_samples(7, 0) == [2] and batches.steps_of_samples(7, 1) == [1]
    assert batches.steps_of_samples(30, 0) == batches.steps_of_samples(30, 2) == []


@pytest.mark.parametrize(("words", "message"), [
    (["--evaluate-every", "10epochs"], "--evaluate-every must be a number of at least 1 with its unit"),
    (["--evaluate-every", "0samples"], "--evaluate-every must be a number of at least 1 with its unit"),
    (["--target-nll", "0.3,x"], "--target-nll must be a number above 0, or some separated by commas; got '0.3,x'"),
    (["--target-nll", "0"], "--target-nll must be a number above 0"),
])
def test_what_is_not_allowed_is_one_line(words, message, small_dir, tmp_path):
    assert message in trained(tmp_path, small_dir, "run", *words, status=2)
