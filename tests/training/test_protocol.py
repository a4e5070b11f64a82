"""The tutorial's batch-200 protocol, five seeds, against independent runs in plain PyTorch; and what CUDA must show."""

from __future__ import annotations

import statistics
import sys

import pytest
from support import TRAIN, mnist_dist, result_of, run

from mnist_dist.commands.reproduce import PROTOCOLS

REFERENCE = PROTOCOLS[1].reference  # epoch to (mean, deviation) of the test NLL sum


@pytest.mark.parametrize("seeds, deviations", [  # the mean of several seeds varies less than one seed's sum
    pytest.param(1, 4, marks=pytest.mark.long), pytest.param(5, 2, marks=pytest.mark.faults)])
def test_seeds_are_within_the_reference(seeds, deviations, mnist_dir, tmp_path):
    sums = {epoch: [] for epoch in REFERENCE}
    for seed in range(seeds):
        done = mnist_dist("train", "--data-dir", mnist_dir, "--seed", seed, "--epochs", 17, "--wandb", "disabled",
                          "--checkpoint-every", "never", "--output-dir", f"{seed}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        for epoch, record in enumerate(result_of(tmp_path / f"{seed}")["epochs"]):
            if epoch in REFERENCE:
                sums[epoch].append(record["test_nll_sum"])
    for epoch, (mean, deviation) in REFERENCE.items():
        print(f"epoch {epoch}: {', '.join(f'{value:.1f}' for value in sums[epoch])}; mean "
              f"{statistics.mean(sums[epoch]):.1f}, reference {mean} ± {deviation}")
    for epoch, (mean, deviation) in REFERENCE.items():
        assert all(abs(value - mean) <= 4 * deviation for value in sums[epoch]), epoch
        assert abs(statistics.mean(sums[epoch]) - mean) <= deviations * deviation, epoch


@pytest.mark.faults
def test_the_embedded_digits_are_about_as_hard(tmp_path):
    done = mnist_dist("train", "--dataset", "synthetic", "--wandb", "disabled", "--checkpoint-every", "never",
                      "--output-dir", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    accuracy = result_of(tmp_path / "run")["epochs"][19]["test_accuracy"]
    print(f"test accuracy at epoch 19: {100 * accuracy:.2f} %")
    assert 0.93 <= accuracy <= 0.98


@pytest.mark.cuda
def test_cuda_has_the_cpus_figures_in_float64(mnist_dir, tmp_path):
    for device, options in (("cpu", ["--cpu"]), ("cuda", [])):
        done = run([sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", *options, TRAIN,
                    "--data-dir", mnist_dir, "--dtype", "float64", "--epochs", 2, "--wandb", "disabled", "--output-dir",
                    device], cwd=tmp_path, timeout=300)
        assert done.returncode == 0, done.stderr
        assert result_of(tmp_path / device)["environment"]["device"] == device
    on_cpu, on_cuda = (result_of(tmp_path / device)["epochs"] for device in ("cpu", "cuda"))
    for ours, theirs in zip(on_cuda, on_cpu, strict=True):
        assert ours["test_nll"] == pytest.approx(theirs["test_nll"], rel=1e-9)


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_cuda_trains_in_half_precision(precision, mnist_dir, tmp_path):
    done = mnist_dist("train", "--data-dir", mnist_dir, "--mixed-precision", precision, "--epochs", 7, "--wandb",
                      "disabled", "--output-dir", "run", cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    result = result_of(tmp_path / "run")
    assert result["environment"]["device"] == "cuda" and result["environment"]["mixed_precision"] == precision
    for epoch in (1, 6):
        mean, deviation = REFERENCE[epoch]
        assert abs(result["epochs"][epoch]["test_nll_sum"] - mean) <= 4 * deviation
