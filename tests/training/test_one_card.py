"""The ranks that tests put on one GPU are ranks as others: here on the CPU."""

from __future__ import annotations

import torch
from forked import run_forked
from safetensors.torch import load_file
from support import result_of


def test_two_ranks_that_claim_two_hosts_have_the_bits_of_two_ranks(small_dir, tmp_path):
    words = ["train", "--data-dir", small_dir, "--batch-size", 97, "--epochs", 1, "--dtype", "float64", "--compile",
             "off", "--wandb", "disabled"]
    for name, target in (("plain", "mnist_dist.cli:main"), ("card", "one_card:main")):
        done = run_forked([*words, "--output-dir", name], cwd=tmp_path, size=2, target=target)
        assert done.returncode == 0, done.stderr
    plain, card = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "card"))
    assert all(torch.equal(plain[name], card[name]) for name in plain)
    machines = [result_of(tmp_path / name)["environment"]["num_machines"] for name in ("plain", "card")]
    assert machines == [1, 2]
