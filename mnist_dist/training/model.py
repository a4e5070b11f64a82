"""The tutorial's multi-layer perceptron and its arithmetic: how many parameters, how many FLOP per sample.

It knows nothing of devices, processes or training. Shapes: B images in a batch, C = 10 classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from mnist_dist.data import NUM_CLASSES
from mnist_dist.data.idx import SIDE

IMAGE_PIXELS = SIDE * SIDE
NEGATIVE_SLOPE = 0.1


class Linear(nn.Linear):
    """PyTorch's linear layer. `function` computes it from input, weight and bias."""

    function: Callable[[Tensor, Tensor, Tensor], Tensor] = staticmethod(nn.functional.linear)

    def forward(self, x_BI: Tensor) -> Tensor:
        """[B, O]"""
        return self.function(x_BI, self.weight, self.bias)


class MLP(nn.Module):
    """784 - 256 - 10 with LeakyReLU(0.1) between, as in the tutorial; `hidden_sizes` changes width and depth.

    The tutorial ends in Softmax and takes the log for the loss, which is -inf once a probability underflows;
    `log_softmax` is the same function without that.
    """

    def __init__(self, hidden_sizes: Sequence[int] = (256,)) -> None:
        super().__init__()
        self.sizes = (IMAGE_PIXELS, *hidden_sizes, NUM_CLASSES)
        layers: list[nn.Module] = [nn.Flatten()]
        for num_inputs, num_outputs in pairwise(self.sizes):
            layers += [Linear(num_inputs, num_outputs), nn.LeakyReLU(NEGATIVE_SLOPE)]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, images_B1HW: Tensor, linear: Callable[[Linear, Tensor], Tensor] = Linear.__call__) -> Tensor:
        """Scaled images [B, 1, 28, 28] to log-probabilities [B, 10]. `linear` applies the linear layers."""
        x = images_B1HW
        for layer in self.layers:
            x = linear(layer, x) if isinstance(layer, Linear) else layer(x)
        return torch.log_softmax(x, dim=1)

    @property
    def linears(self) -> list[Linear]:
        """The layers with weights, the first one first."""
        return [layer for layer in self.layers if isinstance(layer, Linear)]

    @torch.no_grad()
    def probabilities(self, images_B1HW: Tensor) -> Tensor:
        """Scaled images [B, 1, 28, 28] to probabilities [B, 10], for people."""
        return self(images_B1HW).exp()


def num_parameters(sizes: Sequence[int]) -> int:
    """Weights and biases of a fully connected network with these layer sizes: 203,530 for 784-256-10."""
    return sum((num_inputs + 1) * num_outputs for num_inputs, num_outputs in pairwise(sizes))


def flop_per_sample(sizes: Sequence[int]) -> int:
    """Floating-point operations of one sample's forward and backward matrix products: 818,176 for 784-256-10.

    A product of n by m costs 2nm. Forward and the weights' gradient take one each per layer; the gradient of the
    layer's input takes another, except in the first layer, whose input is the image.
    """
    products = [2 * num_inputs * num_outputs for num_inputs, num_outputs in pairwise(sizes)]
    return 3 * sum(products) - products[0]
