"""The gradient noise scale: each part against single samples' gradients, the interval against known truths."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from support import mnist_dist, result_of
from torch.utils.data import DistributedSampler

from mnist_dist.data import load
from mnist_dist.training.model import MLP
from mnist_dist.training.noise_scale import EVERY, EVERY_SAMPLES, NOT_KNOWN, SampleNorms, gradient_norm, noise_scale
from mnist_dist.training.steps.plain import loss_sum


def single_gradients(model, images, labels, dtype):
    """[N, parameters] the gradient of each sample's loss, one backward pass for each."""
    rows = []
    for i in range(len(labels)):
        loss = loss_sum(model, images[i : i + 1], labels[i : i + 1], dtype)
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    return torch.stack(rows)


def test_the_norms_are_those_of_single_samples(small_dir):
    torch.manual_seed(3)
    train, model = load("mnist", str(small_dir)).train, MLP((40, 30)).double()
    images, labels = train.images[:50], train.labels[:50]
    norms = SampleNorms(model)
    with norms.measuring():
        (loss_sum(model, images, labels, torch.float64) / 50).backward()
    single = single_gradients(model, images, labels, torch.float64)
    assert norms.total.item() == pytest.approx(single.square().sum().item() / 50**2, rel=1e-12)
    batch = gradient_norm([parameter.grad for parameter in model.parameters()])
    assert batch.item() == pytest.approx(single.mean(dim=0).square().sum().item(), rel=1e-12)
    before = norms.total
    loss_sum(model, images, labels, torch.float64).backward()
    assert norms.total is before, "nothing is added outside"


SHAPES = {  # processes, passes, kind of step
    "1": (1, 1, "off"), "2": (2, 1, "off"), "3": (3, 1, "off"), "2 in passes": (2, 3, "off"),
    "compiled": (1, 1, "on"), "2 in passes, compiled": (2, 3, "on"),
}


@pytest.fixture(scope="module")
def on_each(small_dir, tmp_path_factory):
    """The epochs of a run in float64 with a batch of 10, for a name of SHAPES; each is run once."""
    folder = tmp_path_factory.mktemp("noise")

    @functools.cache
    def epochs(name):
        size, passes, compile = SHAPES[name]
        done = mnist_dist("train", "--processes", size, "--data-dir", small_dir, "--batch-size", 10, "--epochs", 2,
                          "--dtype", "float64", "--gradient-accumulation-steps", passes, "--compile", compile,
                          "--noise-scale", "--wandb", "disabled", "--output-dir", name, cwd=folder)
        assert done.returncode == 0, done.stderr
        return result_of(folder / name)["epochs"]

    return epochs


@pytest.mark.parametrize(("some", "others"), [
    ("1", "2"), ("1", "3"), ("1", "2 in passes"),
    pytest.param("compiled", "2 in passes, compiled", marks=pytest.mark.faults),
])
def test_processes_and_passes_change_nothing(some, others, on_each):
    for ours, theirs in zip(on_each(some), on_each(others), strict=True):
        for name in NOT_KNOWN._fields:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-7)
        assert 0 < ours["noise_scale_low"] < ours["noise_scale"] < ours["noise_scale_high"]


@pytest.mark.long
def test_a_run_measures_what_the_formula_says(small_dir, on_each):
    """By hand: the same training and all gradients of each step, of which the plain step takes some."""
    train = load("mnist", str(small_dir)).train
    torch.manual_seed(0)
    model = MLP().double()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    order = torch.tensor(list(DistributedSampler(range(len(train)), num_replicas=1, rank=0, seed=0)))
    steps = []
    for rows in order.split(10):
        images, labels = train.images[rows], train.labels[rows]
        single = single_gradients(model, images, labels, torch.float64)
        batch = single.mean(dim=0)
        steps.append(((single.square().sum() / len(rows) ** 2).item(), batch.square().sum().item(), len(rows)))
        for parameter, gradient in zip(model.parameters(), batch.split([p.numel() for p in model.parameters()]),
                                       strict=True):
            parameter.grad = gradient.view_as(parameter)
        optimizer.step()
    some = [(single if step % EVERY_SAMPLES == 0 else 0.0, batch if step % EVERY == 0 else 0.0, count)
            for step, (single, batch, count) in enumerate(steps)]
    for name, taken in (("1", some), ("compiled", steps)):
        for field, value in noise_scale(*zip(*taken, strict=True))._asdict().items():
            assert on_each(name)[0][field] == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize(("every", "every_samples"), [(1, 1), (EVERY, EVERY_SAMPLES)])
def test_the_interval_holds_the_truth(every, every_samples):
    """Gradients in 20 dimensions: the scale is 300 in batches of 50, or 5 in batches of 20. The last batch of an epoch
    is smaller.
    """
    random, held = np.random.default_rng(5), []
    for truth, batch, repeats in ((300.0, 50, 400), (5.0, 20, 400)):
        signal = np.sqrt(20 / truth)  # |G| for a covariance of 1
        for _ in range(repeats):
            samples = random.standard_normal((100, batch, 20))
            samples[..., 0] += signal
            squares = np.square(samples).sum(axis=(1, 2)) / batch**2
            batches = np.square(samples.mean(axis=1)).sum(axis=1)
            step = np.arange(100)
            squares, batches = squares * (step % every_samples == 0), batches * (step % every == 0)
            found = noise_scale([*squares, 9e9], [*batches, 9e9], [batch] * 100 + [batch - 1])
            held.append(found.noise_scale is None or found.noise_scale_low <= truth <= found.noise_scale_high)
    assert 0.93 <= np.mean(held) <= 0.99


@pytest.mark.parametrize(("squares", "batches", "counts"), [
    ([1.0] * 9, [0.5] * 9, [4] * 9),  # too few steps
    ([1.0] * 3 + [0.0] * 20, [0.5] * 23, [4] * 23),  # too few with single samples
    ([1.0] * 50, [1.0] * 50, [1] * 50),  # batches of one sample
    ([0.0] * 50, [0.0] * 50, [4] * 50),  # not measured
    ([0.01] * 25 + [0.03] * 25, [0.019] * 25 + [0.021] * 25, [100] * 50),  # the gradient is less than its noise
])
def test_what_cannot_be_told_is_not_known(squares, batches, counts):
    assert noise_scale(squares, batches, counts) == NOT_KNOWN


@pytest.mark.parametrize("words", [["--reproducible"], ["--local-sgd-steps", 2], ["--batch-size", 1]])
def test_where_it_is_not_measured(words, small_dir, tmp_path):
    size = 2 if "--local-sgd-steps" in words else 1
    done = mnist_dist("train", "--processes", size, "--data-dir", small_dir, "--max-steps", 90, "--batch-size", 10,
                      "--noise-scale", "--wandb", "disabled", "--output-dir", "run", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert result_of(tmp_path / "run")["epochs"][0]["noise_scale"] is None
