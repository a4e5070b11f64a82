"""Noise and laws of which the truth is known, for studies that are made up. A further one is a line."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.stats import norm


def _two_humps(random, size):
    """70 % about 0 and 30 % three spreads above; the median of the mixture is subtracted."""
    return 0.3 * random.standard_normal(size) + 3 * (random.random(size) < 0.3) - TWO_HUMPS


TWO_HUMPS = brentq(lambda x: 0.7 * norm.cdf(x / 0.3) + 0.3 * norm.cdf((x - 3) / 0.3) - 0.5, -1, 3)

# In logarithms, in units of the spread, with a median of 0.
NOISES: dict[str, Callable] = {
    "normal": lambda random, size: random.standard_normal(size),
    "skewed": lambda random, size: np.exp(random.standard_normal(size)) - 1,
    "two humps": _two_humps,
    "heavy tails": lambda random, size: random.standard_t(3, size),
}


def repeats(noise: str, spread: float | np.ndarray, size: int | tuple[int, ...],
            random: np.random.Generator) -> np.ndarray:
    """Positive values with a median of 1, whose logarithms have this spread."""
    return np.exp(spread * NOISES[noise](random, size))


@dataclass(frozen=True)
class Machine:
    """What a step takes on some machine, in seconds."""

    fixed: float
    per_sample: float
    latency: float
    transfer: float
    stage: float  # of a tree

    def computing(self, batch: int, processes: int) -> float:
        """Of the largest batch of a process; at least that of 20 samples."""
        return self.per_sample * max(math.ceil(batch / processes), 20)

    def ring(self, n: int, latency: float = 1, transfer: float = 1) -> float:
        """A ring all-reduce, with so many times the latency and the transfer."""
        return 2 * (n - 1) * self.latency * latency + 2 * (n - 1) / n * self.transfer * transfer


def a_machine(random: np.random.Generator) -> Machine:
    """One in which the exchange is a part of the step that matters."""
    return Machine(random.uniform(0.2e-3, 1e-3), 10 ** random.uniform(-5.7, -4.7), 10 ** random.uniform(-5, -3.7),
                   10 ** random.uniform(-3.5, -2.7), 10 ** random.uniform(-4, -3))


LAWS: dict[str, Callable[[Machine, int, int], float]] = {  # seconds of a step: machine, global batch, processes
    "ring": lambda m, b, p: m.fixed + m.computing(b, p) + m.ring(p),
    "tree": lambda m, b, p: m.fixed + m.computing(b, p) + m.stage * math.log2(p),
    "overlap": lambda m, b, p: m.fixed + max(m.computing(b, p), m.ring(p)),
    "two levels": lambda m, b, p: m.fixed + m.computing(b, p) + m.ring(min(p, 4)) + m.ring(math.ceil(p / 4), 5, 4),
    "a straggler": lambda m, b, p: m.fixed + m.computing(b, p) * (1 + 0.1 * math.sqrt(2 * math.log(p))) + m.ring(p),
    "half the bandwidth beyond 8": lambda m, b, p: m.fixed + m.computing(b, p) + m.ring(p, transfer=1 + (p > 8)),
}
