"""Sums without an order: right, and the same bits in any order, on any number of ranks, with any instructions."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys

import pytest
import torch
from support import ROOT
from torch.utils._python_dispatch import TorchDispatchMode

from mnist_dist.config import TrainConfig
from mnist_dist.data import load
from mnist_dist.processes.launch_environment import Launch
from mnist_dist.processes.team import join
from mnist_dist.training.model import MLP
from mnist_dist.training.steps import reproducible
from mnist_dist.training.steps.exact_sums import (
    bits_for,
    exp,
    largest,
    log,
    power_of_two,
    products,
    sqrt_,
    value,
    whole,
)
from mnist_dist.training.trainer import Trainer

GENERATOR = torch.Generator().manual_seed(0)


def drawn(*shape, dtype=torch.float32):
    """Numbers of very different sizes."""
    return (torch.randn(shape, generator=GENERATOR) * 10 ** (4 * torch.rand(shape, generator=GENERATOR) - 3)).to(dtype)


def product(a, b, kept):
    bits = bits_for(a.shape[1])
    left = whole(a, largest(a, 1), bits, kept)
    right = whole(b, largest(b, 0), bits, kept)
    return value(products(left, right), left, right)


@pytest.mark.parametrize("terms", [1, 2, 255, 256, 257, 60_000])
@pytest.mark.parametrize("kept", [22, 53])
def test_a_product_is_right_and_has_no_order(terms, kept):
    a, b = drawn(3, terms, dtype=torch.float64), drawn(terms, 5, dtype=torch.float64)
    found = product(a, b, kept)
    size = largest(a, 1) * largest(b, 0) * terms
    assert ((found - a @ b).abs() / size).max() < max(2.0 ** (2 - kept), 1e-15)
    for _ in range(5):
        order = torch.randperm(terms, generator=GENERATOR)
        assert torch.equal(product(a[:, order], b[order], kept), found)


@pytest.mark.parametrize("terms", [2, 200, 784, 60_000, 10**6])
def test_sums_of_the_largest_whole_numbers_are_exact(terms):
    for bits, other in ((bits_for(terms), bits_for(terms)), (bits_for(terms, 8), 8)):
        assert terms * 2**bits * 2**other <= 2**53 < terms * 2 ** (bits + 2) * 2**other * 2


def test_parts_of_ranks_add_up():
    """Three ranks with 5, 0 and 3 of the samples."""
    a, b = drawn(8, 4), drawn(8, 6)
    peaks = largest(a, 0), largest(b, 0)
    bits = bits_for(8)
    total, factors = 0, None
    for rows in (slice(0, 5), slice(5, 5), slice(5, 8)):
        factors = whole(a[rows], peaks[0], bits, 22).mT, whole(b[rows], peaks[1], bits, 22)
        total += products(*factors)
    alone = whole(a, peaks[0], bits, 22).mT, whole(b, peaks[1], bits, 22)
    assert torch.equal(value(total, *factors), value(products(*alone), *alone))
    assert largest(a[5:5], 0).tolist() == [[0.0] * 4]


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_stays_so(bad):
    a, b = drawn(2, 7), drawn(7, 2)
    a[0, 3] = bad
    found = product(a, b, 22)
    assert not found[0].isfinite().any() and found[1].isfinite().all()


def test_zeros_and_tiny_numbers():
    for factor in (0.0, 1e-45, 1e-30, 1e30):
        a = drawn(2, 7) * factor
        assert torch.allclose(product(a, torch.eye(7), 22), a.double(), rtol=0, atol=float(a.abs().max()) * 2.0**-21)


def test_powers_of_two():
    exponents = torch.arange(-1022, 1024)
    assert power_of_two(exponents).tolist() == [math.ldexp(1.0, n) for n in exponents.tolist()]


def test_exp_and_log():
    x = torch.linspace(-690.0, 0.0, 20_001, dtype=torch.float64)
    assert ((exp(x) / x.exp() - 1).abs() < 1e-13).all() and exp(x[-1:]) == 1.0
    near = torch.linspace(-20.0, 0.0, 20_001, dtype=torch.float64)
    assert ((exp(near) / near.exp() - 1).abs() < 4e-15).all()
    assert exp(torch.tensor([-1e300, -math.inf], dtype=torch.float64)).max() < 1e-300
    y = torch.linspace(0.01, 10.0, 20_001, dtype=torch.float64)
    assert torch.allclose(log(y), y.log(), rtol=1e-15, atol=4e-16) and log(torch.ones(1, dtype=torch.float64)) == 0.0


def test_the_weights_are_pytorchs_but_for_the_last_bit():
    torch.manual_seed(3)
    theirs, ours = MLP(), MLP()
    reproducible.draw_weights(ours, 3)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (one - other).abs().max() <= 2.0**-24 * 2 / math.sqrt(one.shape[-1] if one.ndim > 1 else 10)


@pytest.mark.parametrize("size", [1, 7, 200])
def test_a_forward_pass_and_its_gradients_are_autograds(size):
    torch.manual_seed(0)
    model = MLP((32, 16)).double()
    images = torch.randint(0, 256, (size, 1, 28, 28), dtype=torch.uint8)
    labels = torch.randint(0, 10, (size,))
    outputs = [None] * 3
    for n, layer in enumerate(model.linears):
        layer.register_forward_hook(lambda layer, given, found, n=n: outputs.__setitem__(n, found))
    nll_B = -model(images.double() / 127.5 - 1).gather(1, labels.unsqueeze(1)).squeeze(1)
    wanted = torch.autograd.grad(nll_B.sum(), outputs)
    with torch.no_grad():
        passed = reproducible.forward(model, images)
        found_B, last = reproducible.loss(passed.outputs[-1], labels)
        slopes = reproducible.backward(model, passed, last)
    assert torch.allclose(found_B, nll_B, rtol=1e-12)
    for slope, right in zip(slopes, wanted, strict=True):
        assert torch.allclose(slope, right, rtol=1e-10, atol=1e-14)


def test_the_nll_of_any_order_is_the_same():
    nll = drawn(1000, dtype=torch.float64).abs()
    assert {reproducible.nll_sum(nll[torch.randperm(1000, generator=GENERATOR)]).item() for _ in range(20)} == {
        reproducible.nll_sum(nll).item()}
    assert reproducible.nll_sum(nll).item() == pytest.approx(math.fsum(nll.tolist()), abs=1000 * reproducible.NLL_STEP)


@pytest.mark.parametrize("exponent", [0, 1, 2, 1023, 10**6])
def test_power(exponent):
    assert reproducible.power(0.999, exponent) == pytest.approx(0.999**exponent, rel=1e-9)


ROUNDED_DIFFERENTLY = {"addcmul", "addcdiv", "lerp", "addmm", "baddbmm", "exp", "log", "sqrt", "_log_softmax", "mean"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_square_root_is_rounded_correctly(dtype):
    """Python's is; and float32's of it too, as twice rounded from 53 to 24 bits is once rounded for a square root."""
    x = torch.cat([drawn(100_000, dtype=dtype).abs(), torch.tensor([0.0, 1e-45, 1e-310, math.inf], dtype=dtype)])
    wanted = torch.tensor([math.sqrt(one) for one in x.tolist()], dtype=torch.float64).to(dtype)
    assert torch.equal(sqrt_(x), wanted)


class Divisions(TorchDispatchMode):
    """Takes note of each division by a number, and of each operation of which devices round the result differently."""

    def __init__(self):
        super().__init__()
        self.bad, self.seen = [], set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.seen.add(name)
        by_number = name in ("div", "div_") and not all(isinstance(one, torch.Tensor) and one.ndim for one in args)
        if by_number or name.rstrip("_") in ROUNDED_DIFFERENTLY:
            self.bad.append(function)
        return function(*args, **(kwargs or {}))


def trainer_at_its_first_step(data_dir, **options):
    """This process alone."""
    team = join(Launch(), timeout_s=60, mixed_precision="no", dynamo_backend="no")
    config = TrainConfig(batch_size=97, compile="off", reproducible=True, **options)
    made = Trainer(config, team, load("mnist", str(data_dir)))
    made.make_step()
    made.step.begin(0, range(11))
    return made


def test_every_operation_is_one_that_all_devices_round_alike(small_dir):
    """A GPU multiplies by the reciprocal of a number of Python's, and adds a product without rounding it. MKL's square
    root is not rounded correctly.
    """
    trainer = trainer_at_its_first_step(small_dir)
    with Divisions() as divisions:
        trainer.step.take(range(1))
    assert divisions.bad == []
    assert {"mm", "div_", "mul_", "round"} <= divisions.seen


@pytest.mark.parametrize(("dtype", "digest"), [("float32", "7c45ff2339d0a1a9"), ("float64", "dd5518ec99d6cfcb")])
def test_the_bits_are_those_of_other_machines(dtype, digest, small_dir):
    """Written down on one machine: others, with other processors and versions of torch, must come to the same."""
    trainer = trainer_at_its_first_step(small_dir, dtype=dtype)
    for step in range(11):
        trainer.step.take(range(step, step + 1))
    found = hashlib.sha256()
    for weight in trainer.module.parameters():
        found.update(weight.detach().cpu().numpy().tobytes())
    assert found.hexdigest()[:16] == digest


TRAINED = """
import sys; sys.path.insert(0, "tests/helpers")
import hashlib
from thread_team import Meeting, run_ranks
from processes.test_team import train
from mnist_dist.data import load
sets = load("mnist", sys.argv[1])
((weights, loss, figures),) = run_ranks(Meeting(1, 20.0), lambda team: train(team, sets))
print(hashlib.sha256(weights.numpy().tobytes()).hexdigest(), loss, figures)
"""


@pytest.mark.faults  # in CI the SHA-256 above, which any processor must come to
def test_the_processors_instructions_change_nothing(small_dir):
    """PyTorch's kernels for different instructions, MKL's, and several threads; the plain step has other bits then."""
    found = {}
    for name, setting in (("", ""), ("ATEN_CPU_CAPABILITY", "default"), ("ATEN_CPU_CAPABILITY", "avx2"),
                          ("MKL_CBWR", "COMPATIBLE"), ("OMP_NUM_THREADS", "2")):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **({name: setting} if name else {}),
                       "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", TRAINED, small_dir], cwd=ROOT, env=environment, text=True,
                              capture_output=True, timeout=120)
        assert done.returncode == 0, done.stderr
        found[name, setting] = done.stdout
    assert len(set(found.values())) == 1, found
