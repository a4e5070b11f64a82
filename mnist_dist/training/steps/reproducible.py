"""`--reproducible`: a step whose bits depend neither on the number of ranks nor on the processor.

Every sum is exact (exact_sums.py), and so has no order: in a matrix product, over the samples of a batch, and over the
ranks. The step takes the place of autograd, DistributedDataParallel's reduction and the optimizer's kernels. Each sum
over samples takes two exchanges: the largest magnitudes of its factors, which decide their rounding, and the sum.

Shapes: B samples on this rank, C = 10 classes.
"""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu

from mnist_dist.training.model import MLP, NEGATIVE_SLOPE
from mnist_dist.training.steps.exact_sums import (
    KEPT_BITS,
    Whole,
    bits_for,
    exp,
    largest,
    log,
    products,
    sqrt_,
    value,
    whole,
)
from mnist_dist.training.steps.plain import PlainStep
from mnist_dist.training.steps.step import StepParts

PIXEL_BITS, PIXEL_SCALE = 8, 255.0  # a scaled pixel is (2 p - 255) / 255
NLL_STEP = 2.0**-32  # nats: sums of up to two million nats are exact


class Forward(NamedTuple):
    """What a forward pass leaves, in float64: of each layer, the input and the output before the activation."""

    inputs: list[Tensor]  # [B, inputs]; of the first layer, 255 times the scaled pixels
    outputs: list[Tensor]  # [B, outputs]


def draw_weights(module: MLP, seed: int) -> None:
    """The weights that `MLP` has after `torch.manual_seed(seed)`, the same to the last bit on any processor.

    `uniform_` multiplies and adds in one instruction where the processor has it: then the last bit differs.
    """
    torch.manual_seed(seed)
    with torch.no_grad():
        for layer in module.linears:
            bound = 1 / math.sqrt(layer.in_features)
            for parameter in (layer.weight, layer.bias):
                parameter.copy_(torch.rand(parameter.shape).mul_(2 * bound).sub_(bound))


def forward(module: MLP, images_B1HW: Tensor) -> Forward:
    """The model's layers for uint8 images [B, 1, 28, 28]."""
    x, passed = images_B1HW.flatten(1).to(torch.float64).mul_(2.0).sub_(PIXEL_SCALE), Forward([], [])
    for n, layer in enumerate(module.linears):
        passed.inputs.append(x)
        kept, bits = KEPT_BITS[layer.weight.dtype], bits_for(layer.in_features, PIXEL_BITS if n == 0 else None)
        left = _pixels(x) if n == 0 else whole(x, largest(x, 1), bits, kept)
        right = whole(layer.weight, largest(layer.weight, 1), bits, kept).mT
        output = value(products(left, right), left, right)
        passed.outputs.append((output.mul_(1 / PIXEL_SCALE) if n == 0 else output).add_(layer.bias.to(torch.float64)))
        x = leaky_relu(passed.outputs[-1], NEGATIVE_SLOPE)
    return passed


def loss(outputs_BC: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
    """The NLL [B] in nats, and the derivative [B, C] of its sum by the model's outputs."""
    logits_BC = outputs_BC - outputs_BC.amax(1, keepdim=True)
    exps_BC = exp(logits_BC)
    total_B1 = exps_BC[:, :1].clone()
    for column in range(1, exps_BC.shape[1]):  # the order of `sum` is not fixed
        total_B1 += exps_BC[:, column : column + 1]
    picked = torch.zeros_like(logits_BC).scatter_(1, labels_B.unsqueeze(1), 1.0)
    nll_B = (log(total_B1) - logits_BC.gather(1, labels_B.unsqueeze(1))).squeeze(1)
    return nll_B, exps_BC.div_(total_B1).sub_(picked)


def backward(module: MLP, passed: Forward, last_BC: Tensor) -> list[Tensor]:
    """The loss's derivatives by the layers' outputs, float64 [B, outputs] each, from that of the last layer."""
    slopes = [last_BC]
    for layer, output in zip(module.linears[:0:-1], passed.outputs[-2::-1], strict=True):
        weight, kept, bits = layer.weight, KEPT_BITS[layer.weight.dtype], bits_for(layer.out_features)
        left = whole(slopes[0], largest(slopes[0], 1), bits, kept)
        right = whole(weight, largest(weight, 0), bits, kept)
        slope = value(products(left, right), left, right)
        slopes.insert(0, torch.where(output > 0, slope, slope * NEGATIVE_SLOPE))
    return slopes


def _pixels(x: Tensor) -> Whole:
    return Whole(x.unsqueeze(0), torch.zeros(1, 1, dtype=torch.int64, device=x.device), PIXEL_BITS)


def nll_sum(nll_B: Tensor) -> Tensor:
    """The sum, exact and so without an order, of the NLL rounded to 2^-32 nats."""
    return (nll_B * (1 / NLL_STEP)).round_().sum() * NLL_STEP


def batch_sums(module: MLP, images_B1HW: Tensor, labels_B: Tensor) -> Tensor:
    """As `evaluation.batch_sums`: [NLL sum in nats, number correct, number of samples], float64 [3]."""
    outputs_BC = forward(module, images_B1HW).outputs[-1]
    nll_B, _ = loss(outputs_BC, labels_B)
    correct_B = outputs_BC.argmax(dim=1) == labels_B
    count = torch.full((), len(labels_B), dtype=torch.float64, device=nll_B.device)
    return torch.stack([nll_sum(nll_B), correct_B.sum(dtype=torch.float64), count])


def power(base: float, exponent: int) -> float:
    """base^exponent by squaring: the C library's `pow` may differ in the last bit."""
    result = 1.0
    while exponent:
        if exponent % 2:
            result *= base
        base, exponent = base * base, exponent // 2
    return result


class ReproducibleStep(PlainStep):
    """A step with the same bits on any number of ranks."""

    kind = "exact"
    exchanges_gradients = False  # through DistributedDataParallel: this step sums them itself

    def __init__(self, parts: StepParts) -> None:
        super().__init__(parts)
        self.module = parts.module
        self.epoch = 0

    def begin(self, epoch: int, steps: range) -> None:
        """Go to these steps of the epoch."""
        super().begin(epoch, steps)
        self.epoch = epoch

    @torch.no_grad()
    def take_one(self, step: int) -> float:
        """One optimizer step; returns the seconds waited for data. Collective."""
        asked = time.perf_counter()
        images, labels = next(self.loaded)
        waited = time.perf_counter() - asked
        passed = forward(self.module, images)
        nll_B, last_BC = loss(passed.outputs[-1], labels)
        self.sums[0, step] += nll_sum(nll_B)
        gradients = self._gradients(passed.inputs, backward(self.module, passed, last_BC), self.batches.count(step))
        self._adam(gradients, self.epoch * self.batches.num_batches + step + 1)
        return waited

    def _gradients(self, inputs: list[Tensor], slopes: list[Tensor], count: int) -> list[Tensor]:
        """The mean gradient over the `count` samples of the global batch, in the order of the parameters. Collective.
        """
        columns = [*inputs[1:], *slopes]
        peaks = self.team.gather(torch.cat([largest(x, 0) for x in columns], dim=1)).amax(0)
        peaks_of = dict(enumerate(peaks.split([x.shape[1] for x in columns], dim=1)))
        kept, factors, sums = KEPT_BITS[self.dtype], [], []
        for n, (x, slope) in enumerate(zip(inputs, slopes, strict=True)):
            bits = bits_for(count, PIXEL_BITS if n == 0 else None)
            left = whole(slope, peaks_of[len(inputs) - 1 + n], bits, kept).mT
            right = _pixels(x) if n == 0 else whole(x, peaks_of[n - 1], bits, kept)
            factors.append((left, right))
            sums += [products(left, right), left.parts.sum(2, keepdim=True)]
        total = self.team.sum(torch.cat([term.flatten() for term in sums])).split([term.numel() for term in sums])
        total = [part.view_as(term) for part, term in zip(total, sums, strict=True)]
        gradients = []
        for n, (left, right) in enumerate(factors):
            ones = Whole(total[0].new_ones(1, 1, 1), torch.zeros_like(right.shift[:, :1]), 0)
            weight, bias = value(total[2 * n], left, right), value(total[2 * n + 1].flip(0), left, ones)
            gradients += [weight.mul_(1 / (count * PIXEL_SCALE if n == 0 else count)), bias.squeeze(1).mul_(1 / count)]
        return [gradient.to(self.dtype) for gradient in gradients]

    def _adam(self, gradients: list[Tensor], taken: int) -> None:
        """Adam's step number `taken` as in PyTorch's documentation, one operation after the other."""
        (group,) = self.optimizer.param_groups
        beta1, beta2 = group["betas"]
        rate = group["lr"] / (1 - power(beta1, taken))
        correction = math.sqrt(1 - power(beta2, taken))
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            state = self.optimizer.state[parameter]
            state["step"] += 1
            mean = state["exp_avg"].mul_(beta1).add_(gradient * (1 - beta1))
            square = state["exp_avg_sq"].mul_(beta2).add_(gradient.square_().mul_(1 - beta2))
            parameter.sub_((mean * rate).div_(sqrt_(square.clone()).mul_(1 / correction).add_(group["eps"])))
