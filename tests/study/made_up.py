"""Noise and laws of which the truth is known, for studies that are made up. A further one is a line."""

from __future__ import annotations

from collections.abc import Callable

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
