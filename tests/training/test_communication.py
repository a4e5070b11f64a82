"""Gradient compression and Local SGD: they train, they are approximate, and on one process they change nothing."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from support import mnist_dist, result_of

LINEAR = "layers.1.weight"


def trained(folder, data_dir, name, *words):
    done = mnist_dist("train", "--data-dir", data_dir, "--batch-size", 97, "--lr", "1e-3", "--epochs", 3, "--wandb",
                      "disabled", "--checkpoint-every", "never", "--output-dir", name, *words, cwd=folder)
    assert done.returncode == 0, done.stderr
    return result_of(folder / name), load_file(folder / name / "model.safetensors")[LINEAR]


@pytest.fixture(scope="module")
def exact(small_dir, tmp_path_factory):
    """What one process comes to."""
    return trained(tmp_path_factory.mktemp("exact"), small_dir, "exact")


@pytest.mark.parametrize("words", [
    ("--gradient-compression", "fp16"), ("--gradient-compression", "bf16"), ("--gradient-compression", "powersgd"),
    ("--local-sgd-steps", 4),
], ids=lambda words: str(words[1]))
def test_two_processes_train_approximately(words, exact, small_dir, tmp_path):
    (expected, weights), (result, approximate) = exact, trained(tmp_path, small_dir, "two", "--processes", 2, *words)
    assert result["environment"]["num_processes"] == 2
    assert result["epochs"][-1]["test_count"] == 211
    assert [epoch["step"] for epoch in result["epochs"]] == [epoch["step"] for epoch in expected["epochs"]]
    assert result["epochs"][-1]["test_nll"] < 0.8 * result["epochs"][0]["test_nll"], "it learns"
    assert result["epochs"][-1]["test_nll"] == pytest.approx(expected["epochs"][-1]["test_nll"], abs=0.12)
    assert not torch.allclose(approximate, weights, atol=1e-6), "else the option does nothing"


def test_on_one_process_nothing_changes(exact, small_dir, tmp_path):
    _, weights = trained(tmp_path, small_dir, "one", "--local-sgd-steps", 4, "--gradient-compression", "powersgd")
    assert torch.equal(weights, exact[1])
