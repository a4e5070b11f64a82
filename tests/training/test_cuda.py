"""What a run on GPUs must show: the CPU's figures, the same bits twice, no wait in the step loop, and an end.

Each test says how many GPUs it needs, and is skipped on a machine without a GPU. On one GPU the ranks of a test for
two share it (one_card.py).
"""

from __future__ import annotations

import pytest
import torch
from forked import run_forked
from safetensors.torch import load_file
from support import result_of, windows_of

from mnist_dist.config import TrainConfig
from mnist_dist.data import load
from mnist_dist.processes.launch_environment import Launch
from mnist_dist.processes.team import join
from mnist_dist.training.trainer import Trainer

KINDS = {
    "plain": ["--compile", "off"], "compiled": ["--compile", "on"], "reproducible": ["--reproducible"],
    "plain in passes": ["--compile", "off", "--gradient-accumulation-steps", 3],
    "compiled in passes": ["--compile", "on", "--gradient-accumulation-steps", 3],
}
every_kind = pytest.mark.parametrize("kind", KINDS)
FUSED = ["--compile", "fused"]  # in float32 alone


def trained(folder, data_dir, name, *words, size=1, cpu=False, target="mnist_dist.cli:main", status=0, **environment):
    if size > torch.cuda.device_count() and not cpu:
        environment["ON_ONE_CARD"], target = target, "one_card:main"
    done = run_forked(
        ["train", "--data-dir", data_dir, "--batch-size", 97, "--lr", "1e-3", "--wandb", "disabled", "--output-dir",
         name, *words], cwd=folder, size=size, timeout=200, patience=30, target=target,
        environment={"ACCELERATE_USE_CPU": str(cpu).lower(), **environment})
    assert done.returncode == status or (status is None and done.returncode), done.stderr
    return done


def weights(folder):
    return load_file(folder / "model.safetensors")


def largest_difference(some, others):
    return max((some[name] - others[name]).abs().max().item() for name in others)


@pytest.mark.cuda
@every_kind
def test_float64_has_the_cpus_figures(kind, small_dir, tmp_path):
    words = ["--epochs", 2, "--dtype", "float64", *KINDS[kind]]
    trained(tmp_path, small_dir, "gpu", *words)
    trained(tmp_path, small_dir, "cpu", *words, cpu=True)
    on_gpu, on_cpu = result_of(tmp_path / "gpu"), result_of(tmp_path / "cpu")
    assert on_gpu["environment"]["device"] == "cuda" and on_gpu["environment"]["step"] == on_cpu["environment"]["step"]
    for ours, theirs in zip(on_gpu["epochs"], on_cpu["epochs"], strict=True):
        assert ours["test_nll_sum"] == pytest.approx(theirs["test_nll_sum"], rel=1e-9)
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-9)
        assert (ours["test_count"], ours["measured_samples"]) == (211, theirs["measured_samples"])
    assert largest_difference(weights(tmp_path / "gpu"), weights(tmp_path / "cpu")) < 1e-9


@pytest.mark.cuda
@pytest.mark.parametrize("words", [*KINDS.values(), FUSED], ids=[*KINDS, "fused"])
def test_the_same_bits_twice_and_cut_in_the_middle(words, small_dir, tmp_path):
    trained(tmp_path, small_dir, "once", "--epochs", 3, *words)
    trained(tmp_path, small_dir, "cut", "--max-steps", 17, "--checkpoint-every", "5steps", *words)
    trained(tmp_path, small_dir, "cut", "--epochs", 3, "--resume", *words)
    assert largest_difference(weights(tmp_path / "once"), weights(tmp_path / "cut")) == 0


@pytest.mark.cuda
@pytest.mark.parametrize("batch_size", [1, 7, 97, 200, 512, 2000])
def test_the_fused_step_agrees_with_the_plain_one(batch_size, small_dir, tmp_path):
    """Both round in float32, which Adam amplifies: the bound of the weights is a tenth of the steps times the rate."""
    for name, compile in (("fused", "fused"), ("plain", "off")):
        trained(tmp_path, small_dir, name, "--epochs", 3, "--batch-size", batch_size, "--lr", "1e-4", "--compile",
                compile)
    ours, theirs = (result_of(tmp_path / name) for name in ("fused", "plain"))
    assert ours["environment"]["step"] == "fused"
    for epoch, other in zip(ours["epochs"], theirs["epochs"], strict=True):
        assert epoch["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)
        assert epoch["test_nll_sum"] == pytest.approx(other["test_nll_sum"], rel=1e-3)
    bound = 0.1 * 1e-4 * ours["epochs"][-1]["step"]
    assert largest_difference(weights(tmp_path / "fused"), weights(tmp_path / "plain")) < bound


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_reproducible_has_the_bits_of_the_cpu(dtype, small_dir, tmp_path):
    for name in ("gpu", "cpu"):
        trained(tmp_path, small_dir, name, "--epochs", 3, "--reproducible", "--dtype", dtype, cpu=name == "cpu")
    assert largest_difference(weights(tmp_path / "gpu"), weights(tmp_path / "cpu")) == 0


@pytest.mark.cuda
@pytest.mark.parametrize(("precision", "compile"), [("fp16", "off"), ("bf16", "off"), ("bf16", "on")])
def test_half_precision(precision, compile, small_dir, tmp_path):
    for name, words in (("half", ["--mixed-precision", precision, "--compile", compile]), ("whole", [])):
        trained(tmp_path, small_dir, name, "--epochs", 4, *words)
    half, whole = result_of(tmp_path / "half"), result_of(tmp_path / "whole")
    assert half["environment"]["mixed_precision"] == precision
    assert half["epochs"][-1]["test_nll"] == pytest.approx(whole["epochs"][-1]["test_nll"], rel=0.05)


@pytest.mark.cuda
@pytest.mark.parametrize("words", [KINDS["plain"], KINDS["compiled"], FUSED], ids=["plain", "compiled", "fused"])
def test_the_times_are_those_of_the_device(words, small_dir, tmp_path):
    trained(tmp_path, small_dir, "run", "--epochs", 8, *words)
    both = zip(result_of(tmp_path / "run")["epochs"], windows_of(tmp_path / "run"), strict=True)
    for epoch, windows in list(both)[1:]:
        assert sum(samples for _, samples, _ in windows) == epoch["measured_samples"] == 1009
        in_windows = sum(seconds for *_, seconds in windows)
        assert 0.3 * epoch["measured_seconds"] < in_windows <= 1.05 * epoch["measured_seconds"]
        assert 0 < epoch["step_ms_p50"] <= epoch["step_ms_p95"]
        rate = epoch["measured_samples"] / epoch["measured_seconds"]
        assert epoch["samples_per_second"] == pytest.approx(rate)
        assert 0 <= epoch["data_wait_fraction"] < 1 and 0 < epoch["peak_memory_bytes"] < 2**30


@pytest.fixture(scope="module")
def team():
    """This process alone, on the first GPU."""
    return join(Launch(), timeout_s=60, mixed_precision="no", dynamo_backend="no")


def trainer_with(team, data_dir, **options):
    made = Trainer(TrainConfig(batch_size=97, lr=1e-3, **options), team, load("mnist", str(data_dir)))
    made.make_step()
    return made


@pytest.mark.cuda
@pytest.mark.parametrize("options", [
    {"compile": "off"}, {"compile": "on"}, {"compile": "off", "gradient_accumulation_steps": 3}, {"reproducible": True},
    {"compile": "fused"},
])
def test_nothing_in_the_step_loop_waits_for_the_device(options, team, small_dir):
    trainer = trainer_with(team, small_dir, **options)
    trainer.module.train()
    trainer.step.begin(0, range(trainer.batches.num_batches))
    trainer.step.take(range(1))  # copies the epoch's order, once
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.step.take(range(1, trainer.batches.num_batches))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    trainer.step.flush(trainer.batches.num_batches)
    assert trainer.train_loss(0, trainer.batches.num_batches) > 0


@pytest.mark.cuda(2)
@every_kind
def test_two_gpus_are_one(kind, small_dir, tmp_path):
    """DistributedDataParallel over NCCL, the all-reduce within the graph, and the gathered shards; and it ends."""
    words = ["--epochs", 2, "--dtype", "float64", *KINDS[kind]]
    for size in (1, 2):
        trained(tmp_path, small_dir, f"{size}", *words, size=size)
    one, two = (result_of(tmp_path / f"{size}") for size in (1, 2))
    assert (two["environment"]["device"], two["environment"]["num_processes"]) == ("cuda", 2)
    assert two["environment"]["num_machines"] == (2 if torch.cuda.device_count() == 1 else 1), "on one card, or on two"
    assert two["epochs"][-1]["test_nll_sum"] == pytest.approx(one["epochs"][-1]["test_nll_sum"], rel=1e-9)
    assert largest_difference(weights(tmp_path / "1"), weights(tmp_path / "2")) < 1e-9


@pytest.mark.cuda(2)
@pytest.mark.parametrize("how", ["kill", "memory", "stop"])
@pytest.mark.parametrize("kind", ["plain", "compiled"])
def test_a_lost_gpu_is_named(kind, how, small_dir, tmp_path):
    done = trained(tmp_path, small_dir, "run", "--epochs", 100, *KINDS[kind], size=2, target="failing:main",
                   status=None, FAILS_BY=how)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("mnist-dist: error: process 0")]
    assert "lost process 1 of 2" in line


@pytest.mark.cuda(2)
@pytest.mark.long
def test_twenty_starts_and_ends(small_dir, tmp_path):
    for number in range(20):
        trained(tmp_path, small_dir, f"{number}", "--max-steps", 3, *KINDS["compiled"], size=2)
        assert result_of(tmp_path / f"{number}")["environment"]["step"] == "compiled"
