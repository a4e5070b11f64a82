"""The trainer's Adam is PyTorch's, and a start imports no compiler that it does not use."""

from __future__ import annotations

import copy
import sys

import torch
from support import ROOT, run

from mnist_dist.training.trainer import Adam


def test_adam_is_that_of_pytorch():
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.nn.Parameter(torch.ones(5, 3)) for _ in range(2))
    ours, theirs = (kind([weights], lr=0.1, fused=True)
                    for kind, weights in ((Adam, first), (torch.optim.Adam, second)))
    for step in range(5):
        gradient = torch.randn(5, 3, generator=generator)
        for weights, optimizer in ((first, ours), (second, theirs)):
            loss = (weights * gradient).sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if step == 2:
            ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
        assert torch.equal(first, second) and first.grad is None


def test_a_plain_run_does_not_import_the_compiler(small_dir, tmp_path):
    code = ("import sys; from mnist_dist.cli import run; run(sys.argv[1:]); "
            "print([name for name in ('torch._dynamo', 'torch._inductor', 'triton') if name in sys.modules])")
    done = run([sys.executable, "-c", code, "train", "--compile", "off", "--data-dir", small_dir, "--epochs", 2,
                "--wandb", "disabled", "--output-dir", "run"], cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
