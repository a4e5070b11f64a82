"""How far a larger batch still helps learning: the critical batch size, from the samples that runs take to a target.

It is measured by interpolation, without a law: the batch size where runs take twice the least samples (McCandlish et
al. 2018, arXiv 1812.06162, equation 2.11: E = E_min (1 + B / B_crit)), and where they take 1.2 times as many (Zhang et
al. 2024, arXiv 2410.21676). Pure functions of numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mnist_dist.study.analysis.intervals import Estimate, Interval, draw, estimates, interval_of_draws

DRAWS = 2000
LEAST_BATCHES = 4  # of different sizes, in which runs reached the target
TWICE, MORE = 2.0, 1.2  # times the least samples


@dataclass(frozen=True)
class Critical:
    """The critical batch size, in samples.

    `twice` is the batch size at which runs take twice the `least` samples to the target, `more` where they take 1.2
    times as many. An end is inf if it is above the batch sizes that were run. `least` is what a batch of 0 takes, on a
    straight line through the two smallest batch sizes.

    `noise` is the gradient noise scale, an estimate of the critical batch size (McCandlish et al. 2018). `noise_ratio`
    is `noise` over `twice`. What is not known is None.
    """

    twice: Interval
    more: Interval
    least: Interval
    noise: Interval | None = None
    noise_ratio: Interval | None = None


def critical(samples: Mapping[int, tuple[Estimate, float]], noise_scales: Mapping[int, Sequence[float]] | None = None
             ) -> Critical | str:
    """From the samples to the target by batch size, each with the part by which the evaluations leave it open, and the
    noise scales of runs by batch size; or the reason why there is none.

    The noise scale is the geometric mean over batch sizes.
    """
    if len(samples) < LEAST_BATCHES:
        return f"all runs reached the target at {len(samples)} batch sizes, and {LEAST_BATCHES} are needed"
    batches = np.array(sorted(samples), dtype=float)
    known, doubts = zip(*(samples[batch] for batch in sorted(samples)), strict=True)
    random = np.random.default_rng(0)
    # the first row is what was measured
    rows = np.exp(np.vstack([[estimate.mean for estimate in known],
                             draw(known, DRAWS, random) + random.uniform(-1, 1, (DRAWS, len(known))) * doubts]))
    leasts = rows[:, 0] - (rows[:, 1] - rows[:, 0]) * batches[0] / (batches[1] - batches[0])
    if not 0.5 * rows[0, 0] <= leasts[0]:
        return f"runs take more than twice the least samples at batch {batches[0]:,.0f} already: run smaller ones"
    leasts = np.maximum(leasts, 0.01 * rows[:, 0])
    runs = min(estimate.n for estimate in known)

    def interval(values: np.ndarray, runs: int = runs) -> Interval:
        return interval_of_draws(values[0], values[1:], runs)

    twice, more = (_where(batches, rows, leasts, times * leasts) for times in (TWICE, MORE))
    noises: dict[str, Interval] = {}
    if scales := [values for values in (noise_scales or {}).values() if len(values)]:
        measured = estimates(scales)
        means = [estimate.mean for estimate in measured]
        noise = np.exp(np.vstack([means, draw(measured, DRAWS, random)]).mean(axis=1))
        fewest = min(estimate.n for estimate in measured)
        noises["noise"] = interval(noise, fewest)
        if math.isfinite(twice[0]):
            noises["noise_ratio"] = interval(noise / twice, min(fewest, runs))
    return Critical(interval(twice), interval(more), interval(leasts), **noises)


def _where(batches: np.ndarray, samples: np.ndarray, leasts: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """[rows] the largest batch up to which the samples [rows, batches] are within the limit, on straight lines between
    batch sizes; inf if they are within it at the largest one.
    """
    batches, samples = np.append(0.0, batches), np.column_stack([leasts, samples])
    inside = samples <= limits[:, None]
    last = len(batches) - 1 - inside[:, ::-1].argmax(axis=1)
    following = np.minimum(last + 1, len(batches) - 1)
    before, after = (np.take_along_axis(samples, place[:, None], axis=1)[:, 0] for place in (last, following))
    with np.errstate(divide="ignore", invalid="ignore"):
        crossing = batches[last] + (limits - before) / (after - before) * (batches[following] - batches[last])
    return np.where(last == following, np.inf, crossing)
