"""The loss within an epoch: its points follow from the sums of losses, and a run that is continued has each once."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import mnist_dist, records_of, result_of

from mnist_dist.config import Every, TrainConfig
from mnist_dist.errors import UserError
from mnist_dist.training.losses import RunningLoss, ends_of_points, points
from mnist_dist.training.sampling import GlobalBatchSampler


class Sampler:
    """The part of a DistributedSampler that batches need."""

    def __init__(self, number, rank=0, size=1):
        self.dataset, self.rank, self.num_replicas = range(number), rank, size


def batches_of(number, batch, rank=0, size=1):
    return GlobalBatchSampler(Sampler(number, rank, size), batch)


EVERY = st.none() | st.builds(Every, st.integers(0, 40), st.just("steps")) | st.builds(
    Every, st.integers(1, 3000), st.just("samples"))


@given(st.integers(1, 2000), st.integers(1, 300), EVERY, st.integers(0, 3), st.data())
def test_every_step_is_in_one_point_wherever_the_sums_are_read(number, batch, every, epoch, data):
    batches = batches_of(number, batch)
    losses = [float(step + 1) for step in range(batches.num_batches)]
    looks = [*sorted(data.draw(st.sets(st.integers(0, batches.num_batches), max_size=5))), batches.num_batches]
    ends = ends_of_points(every, batches, epoch)
    since, recorded = 0, []
    for done in looks:
        new = points(ends, since, losses[:done], [], epoch, batches)
        since = new[-1]["step"] - epoch * batches.num_batches if new else since
        recorded += new
    assert recorded == points(ends, 0, losses, [], epoch, batches), "the same, however often it is looked"
    if every == Every(0, "steps") or (every and not every.number):
        assert recorded == []
        return
    assert recorded[-1]["samples"] == (epoch + 1) * number and recorded[-1]["epoch"] == epoch + 1
    samples = [point["samples"] - epoch * number for point in recorded]
    sums = [point["train_loss"] * (here - before) for point, here, before in
            zip(recorded, samples, [0, *samples], strict=False)]
    assert math.isclose(sum(sums), sum(losses), rel_tol=1e-9), "the mean of the points is the epoch's"
    if every is None:
        assert len(recorded) <= 50 and (batches.num_batches > 50 or len(recorded) == batches.num_batches)


@given(st.integers(1, 60), st.integers(0, 60))
def test_a_point_has_a_rate_if_all_of_its_steps_were_timed(num_steps, untimed):
    batches, untimed = batches_of(10 * num_steps, 10), min(untimed, num_steps)
    ends = ends_of_points(Every(4, "steps"), batches, 0)
    recorded = points(ends, 0, [1.0] * num_steps, [0.5] * (num_steps - untimed), 0, batches)
    for number, point in enumerate(recorded):
        assert point["samples_per_second"] == (None if 4 * number < untimed else pytest.approx(20.0))


@given(st.integers(1, 500), st.integers(1, 90), st.integers(1, 4), st.lists(st.integers(0, 500), max_size=6))
def test_the_running_loss_is_that_of_this_ranks_samples(number, batch, size, looks):
    for rank in range(size):
        batches = batches_of(number, batch, rank, size)
        counts = [batches.own_samples(range(step, step + 1)) for step in range(batches.num_batches)]
        sums = torch.zeros(3, batches.num_batches, dtype=torch.float64)
        sums[0] = torch.tensor([3.5 * count for count in counts])
        running, before = RunningLoss(sums, batches), 0
        for step in sorted(min(look, batches.num_batches) for look in looks):
            seen = sum(counts[before:step])
            loss, before = running.after(step), step
            assert loss == (pytest.approx(3.5) if seen else loss)


@pytest.mark.parametrize("text", ["20", "0steps", "-1steps", "2epochs", "x", "1.5samples", "steps"])
def test_a_wrong_interval_is_named(text):
    with pytest.raises(UserError, match="--log-every must be a number of at least 1 with its unit"):
        TrainConfig(log_every=text)


def test_intervals():
    expected = {"never": Every(0, "steps"), "1step": Every(1, "steps"), "20 steps": Every(20, "steps"),
                "1000samples": Every(1000, "samples"), None: None}
    assert {text: TrainConfig(log_every=text).log_interval for text in expected} == expected


def lines_of(folder, name="steps.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def without_rates(lines):
    return [{name: value for name, value in line.items() if name != "samples_per_second"} for line in lines]


@pytest.mark.parametrize("compiled", ["off", pytest.param("on", marks=pytest.mark.faults)])
def test_points_are_over_all_ranks_on_any_number_of_processes(compiled, small_dir, tmp_path):
    recorded = {}
    for size in (1, 2, 3):
        done = mnist_dist("train", "--processes", size, "--data-dir", small_dir, "--epochs", 2, "--batch-size", 48,
                          "--dtype", "float64", "--compile", compiled, "--log-every", "200samples", "--evaluate-every",
                          "700samples", "--wandb", "disabled", "--output-dir", f"on-{size}", cwd=tmp_path,
                          ACCELERATE_USE_CPU="true")
        assert done.returncode == 0, done.stderr
        recorded[size] = lines_of(tmp_path / f"on-{size}")
    assert [line["step"] for line in recorded[1]] == [5, 9, 13, 17, 21, 22, 26, 31, 35, 39, 43, 44]
    assert recorded[1][-1]["samples"] == 2018 and recorded[1][-1]["epoch"] == 2.0
    assert any(line["samples_per_second"] for line in recorded[1])
    for size in (2, 3):
        for ours, theirs in zip(recorded[size], recorded[1], strict=True):
            assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-10)
            assert without_rates([ours | {"train_loss": 0}]) == without_rates([theirs | {"train_loss": 0}])
    for name in (1, 3):
        epochs = result_of(tmp_path / f"on-{name}")["epochs"]
        assert len((tmp_path / f"on-{name}" / "result.json").read_text().splitlines()) < 200
        first = [line for line in recorded[name] if line["samples"] <= 1009]
        counts = [b["samples"] - a for a, b in zip([0, *(line["samples"] for line in first)], first, strict=False)]
        mean = sum(line["train_loss"] * count for line, count in zip(first, counts, strict=True)) / 1009
        assert mean == pytest.approx(epochs[0]["train_loss"], rel=1e-12)
        windows = lines_of(tmp_path / f"on-{name}", "windows.jsonl")
        assert [line["epoch"] for line in windows] == [0, 1] and "windows" not in epochs[0]
        for line, epoch in zip(windows, epochs, strict=True):
            assert sum(samples for _, samples, _ in line["windows"]) == epoch["measured_samples"]


@pytest.mark.long
def test_a_run_that_is_killed_and_continued_has_each_point_once(small_dir, tmp_path):
    words = ["train", "--data-dir", small_dir, "--epochs", 3, "--batch-size", 10, "--log-every", "3steps",
             "--checkpoint-every", "7steps", "--wandb", "offline"]
    done = mnist_dist(*words, "--output-dir", "alone", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    killed = tmp_path / "killed"
    done = mnist_dist(*words, "--max-steps", 150, "--keep-checkpoints", 100, "--output-dir", killed, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert lines_of(killed)[-1]["step"] == 149 and len(lines_of(killed, "windows.jsonl")) == 2
    (killed / "result.json").unlink()  # as if it were killed after its last line, and before its next checkpoint
    for checkpoint in (killed / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > 140:
            shutil.rmtree(checkpoint)
    with (killed / "steps.jsonl").open("a") as file:
        file.write('{"step": 200, "samples": 1')  # half a line
    done = mnist_dist(*words, "--resume", "--max-steps", "none", "--output-dir", killed, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    alone = lines_of(tmp_path / "alone")
    assert without_rates(lines_of(killed)) == without_rates(alone)
    assert [line["epoch"] for line in lines_of(killed, "windows.jsonl")] == [0, 1, 2]
    history = [record["item"] for record in records_of(killed, "latest-run")["history"]]
    sent = [(row["step"], row["steps/train_loss"]) for row in history if "steps/train_loss" in row]
    assert sent == [(line["step"], pytest.approx(line["train_loss"])) for line in alone]


def test_a_run_that_diverges_has_the_points_before(small_dir, tmp_path):
    done = mnist_dist("train", "--data-dir", small_dir, "--batch-size", 10, "--lr", "1e38", "--log-every", "1step",
                      "--wandb", "disabled", "--output-dir", "run", cwd=tmp_path)
    assert done.returncode == 3
    assert [line["step"] for line in lines_of(tmp_path / "run")][:1] == [1]
