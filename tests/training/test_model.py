"""The MLP: its shapes, its arithmetic, and that a batch changes no prediction."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mnist_dist.training.model import MLP, flop_per_sample, num_parameters


@pytest.mark.parametrize(("hidden", "parameters", "flop"), [
    ((256,), 203_530, 818_176),
    ((), 7_850, 2 * 2 * 784 * 10),
    ((32, 16), 784 * 32 + 32 + 32 * 16 + 16 + 16 * 10 + 10, 6 * (784 * 32 + 32 * 16 + 160) - 2 * 784 * 32),
])
def test_parameters_and_flop(hidden, parameters, flop):
    model = MLP(hidden)
    assert num_parameters(model.sizes) == parameters == sum(p.numel() for p in model.parameters())
    assert flop_per_sample(model.sizes) == flop


def test_is_the_tutorials_network():
    torch.manual_seed(0)
    model = MLP()
    torch.manual_seed(0)
    tutorial = nn.Sequential(nn.Linear(784, 256), nn.LeakyReLU(0.1), nn.Linear(256, 10), nn.Softmax(dim=1))
    images = torch.rand(7, 1, 28, 28)
    assert torch.allclose(model.probabilities(images), tutorial(images.flatten(1)), atol=1e-7)


def test_untrained_probabilities_are_near_a_tenth():
    torch.manual_seed(0)
    probabilities = MLP().probabilities(torch.rand(5, 1, 28, 28) * 2 - 1)
    assert probabilities.sum(dim=1).tolist() == pytest.approx([1.0] * 5, abs=1e-6)
    assert 0.03 < probabilities.min() < probabilities.max() < 0.3


def test_a_prediction_within_a_batch_is_the_one_alone():
    torch.manual_seed(0)
    model, images = MLP().double(), torch.rand(200, 1, 28, 28, dtype=torch.float64)
    within = model.probabilities(images)
    assert within.shape == (200, 10)
    for index in (0, 77, 199):
        alone = model.probabilities(images[index : index + 1])
        assert torch.allclose(within[index], alone[0], rtol=0, atol=1e-14)


def test_log_probabilities_stay_finite_where_softmax_underflows():
    model = MLP(())
    with torch.no_grad():
        model.layers[1].weight.zero_()
        model.layers[1].bias.copy_(torch.tensor([1000.0] + [0.0] * 9))
    log_probabilities = model(torch.zeros(1, 1, 28, 28))
    assert torch.isfinite(log_probabilities).all() and log_probabilities[0, 1] == -1000
