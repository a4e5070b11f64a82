"""The gradient noise scale: the batch size beyond which more samples add little information (McCandlish et al. 2018,
arXiv 1812.06162). It is tr(S) / |G|^2, with the true gradient G and the covariance S of single samples' gradients.

Both follow from the mean squared norm of single samples' gradients, |G|^2 + tr(S), and the squared norm of a batch's
gradient, |G|^2 + tr(S) / B. For a linear layer the squared norm of a sample's gradient is |d|^2 (|x|^2 + 1), where x is
its input and d the gradient of its output (Gray et al. 2024, arXiv 2411.00999). So one backward pass gives both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

# The plain step takes the norm of the batch's gradient in each such step, and the norms of single samples' gradients in
# each such one: these cost most, and vary little, because they are means over a batch.
EVERY, EVERY_SAMPLES = 2, 8
LEAST_STEPS, LEAST_SAMPLES_STEPS = 10, 4  # measured ones, for an interval
Z = 1.96  # of a normal distribution, for 95 %


class NoiseScale(NamedTuple):
    """The estimate and its 95 % interval, in samples. All are None if the gradient is not larger than its noise."""

    noise_scale: float | None
    noise_scale_low: float | None
    noise_scale_high: float | None


NOT_KNOWN = NoiseScale(None, None, None)


def squared_norms(inputs_BI: Tensor, gradients_BO: Tensor) -> Tensor:
    """The sum over samples of the squared norm of the gradient of a linear layer's weights and bias: a scalar."""
    wide = torch.promote_types(gradients_BO.dtype, torch.float32)
    x_B, d_B = (torch.linalg.vector_norm(each, dim=1, dtype=wide) for each in (inputs_BI, gradients_BO))
    return (d_B.square() * (x_B.square() + 1)).sum()


class SampleNorms:
    """Adds up the squared gradient norms of single samples, in the backward passes within `measuring`."""

    def __init__(self, module: nn.Module) -> None:
        self.total: Tensor | None = None
        self._is_on = False
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                layer.register_forward_hook(self._after_forward)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """`total` is then the sum over the samples and the layers."""
        self.total, self._is_on = None, True
        yield
        self._is_on = False

    def _after_forward(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if self._is_on and output.requires_grad:
            (x,) = inputs
            output.register_hook(lambda gradient: self._add(squared_norms(x.detach(), gradient)))

    def _add(self, squares: Tensor) -> None:
        self.total = squares if self.total is None else self.total + squares


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The squared norm of all gradients together."""
    return torch.stack(torch._foreach_norm(list(gradients))).square().sum()


def noise_scale(sample_squares: Sequence[float], batch_squares: Sequence[float], counts: Sequence[int]) -> NoiseScale:
    """From the steps of an epoch: of each the sum over its samples of |gradient / B|^2, the batch's |gradient|^2, and
    its samples B. What was not measured is zero; the first is measured in some of the steps in which the second is. A
    smaller batch at the end of the epoch is left out.

    tr(S) and |G|^2 are averaged apart, and then divided: a step's own ratio is biased. The interval is Fieller's, from
    the spread of the steps (Fieller 1954, JRSS B 16(2)); without an upper end the scale is not known.
    """
    size = max(counts)
    measured = torch.tensor([(squares * size, batch) for squares, batch, count
                             in zip(sample_squares, batch_squares, counts, strict=True) if batch > 0 and count == size],
                            dtype=torch.float64).reshape(-1, 2)
    both = measured[measured[:, 0] > 0]
    n, n_both = len(measured), len(both)
    if size < 2 or n < LEAST_STEPS or n_both < LEAST_SAMPLES_STEPS:
        return NOT_KNOWN
    # of the mean squared norms of single samples' and of batches' gradients; the steps of the first are among the
    # second's, so that the covariance of the means is that of a step over the second's number
    means = torch.stack([both[:, 0].mean(), measured[:, 1].mean()])
    covariance = torch.cov(both.T) / n
    covariance[0, 0] *= n / n_both
    covariance[1, 1] = measured[:, 1].var() / n
    to_noise_and_signal = torch.tensor([[size, -size], [-1, size]], dtype=torch.float64) / (size - 1)
    noise, signal = (to_noise_and_signal @ means).tolist()
    (var_noise, cov), (_, var_signal) = (to_noise_and_signal @ covariance @ to_noise_and_signal.T).tolist()
    t = Z + (Z**3 + Z) / (4 * (n - 1))  # Student's, to the first order
    # the ratios r for which (noise - r signal)^2 <= t^2 (var_noise - 2 r cov + r^2 var_signal)
    a, b, c = signal**2 - t**2 * var_signal, noise * signal - t**2 * cov, noise**2 - t**2 * var_noise
    if signal <= 0 or a <= 0 or b * b < a * c:
        return NOT_KNOWN
    half = math.sqrt(b * b - a * c)
    return NoiseScale(max(0.0, noise / signal), max(0.0, (b - half) / a), (b + half) / a)
