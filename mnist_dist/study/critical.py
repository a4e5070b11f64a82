"""How far a larger batch still helps learning: the samples E = S B that runs take to a target in S steps, by batch B.

    E = least (1 + B / critical)

which is (S / S_min - 1) (E / E_min - 1) = 1 with critical = E_min / S_min (McCandlish et al. 2018, arXiv 1812.06162).
Pure functions of numbers. A run that did not reach the target took more samples than it had: inf.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mnist_dist.study.statistics import LEVEL, Interval, interval_of_draws, resampled_medians

DRAWS = 400
LEAST_BATCHES = 4  # of different sizes, in which runs reached the target
TOLERANCE = 0.2  # more samples than a small batch needs, at the critical batch size as it is measured directly
REACH, GRID = 100, 500  # the fit looks so many times below and above the batch sizes, at so many places


@dataclass(frozen=True)
class Critical:
    """Three sizes of batch, in samples: from the fit; where it needs 20 % more samples than the smallest batches; and
    where the runs do, measured directly (None: not within the batch sizes that were run).
    """

    fitted: Interval
    least_samples: Interval
    direct: Interval | None


def critical(samples: Mapping[int, Sequence[float]]) -> Critical | str:
    """From the samples to the target of each run, by batch size; or the reason why there is none."""
    known = {batch: np.asarray(runs, dtype=float) for batch, runs in sorted(samples.items())
             if np.isfinite(np.median(runs))}
    if len(known) < LEAST_BATCHES:
        return f"the target was reached at {len(known)} batch sizes, and {LEAST_BATCHES} are needed"
    runs, batches = min(map(len, known.values())), np.array(list(known), dtype=float)
    logarithms = [np.log(values) for values in known.values()]
    # the first row is what was measured; a draw of runs that did not get there counts as the longest that did
    medians = np.vstack([[np.median(values) for values in logarithms],
                         resampled_medians(logarithms, DRAWS, np.random.default_rng(0))])
    medians = np.minimum(medians, medians[np.isfinite(medians)].max())
    least, size = _fit(batches, medians)
    direct = [_direct(np.log(batches), row) for row in medians]
    found = [value for value in direct[1:] if value is not None]
    return Critical(interval_of_draws(size[0], size[1:], runs), interval_of_draws(least[0], least[1:], runs),
                    interval_of_draws(direct[0], np.array(found), runs)
                    if direct[0] is not None and len(found) > LEVEL * DRAWS else None)


def _fit(batches: np.ndarray, medians: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(least, critical), each [rows]: the closest, in squares, to the logarithms `medians` [rows, batches]."""
    sizes = np.linspace(math.log(batches.min() / REACH), math.log(batches.max() * REACH), GRID)
    shapes = np.log1p(batches / np.exp(sizes)[:, None])
    shapes -= shapes.mean(axis=1, keepdims=True)
    centred = medians - medians.mean(axis=1, keepdims=True)
    # the best `least` for each size is known, so the squares depend on the size alone
    squares = (centred**2).sum(axis=1)[:, None] - 2 * centred @ shapes.T + (shapes**2).sum(axis=1)
    at = np.clip(squares.argmin(axis=1), 1, GRID - 2)
    left, middle, right = (np.take_along_axis(squares, at[:, None] + step, axis=1)[:, 0] for step in (-1, 0, 1))
    curve = left - 2 * middle + right
    part = np.clip(np.divide(left - right, 2 * curve, out=np.zeros_like(curve), where=curve > 0), -1, 1)
    size = sizes[at] + part * (sizes[1] - sizes[0])
    least = medians.mean(axis=1) - np.log1p(batches / np.exp(size)[:, None]).mean(axis=1)
    return np.exp(least), np.exp(size)


def _direct(batches: np.ndarray, medians: np.ndarray) -> float | None:
    """The batch from which on the runs take more than 20 % more samples than at the two smallest batch sizes, between
    two batch sizes by interpolation (Zhang et al. 2024, arXiv 2410.21676); None if all or none do. Of logarithms.
    """
    limit = math.log(1 + TOLERANCE) + np.median(medians[:2])
    above = medians > limit
    if above.all() or not above[-1]:
        return None
    last = len(batches) - 1 - int(np.argmin(above[::-1]))  # the largest that is not above
    part = (limit - medians[last]) / (medians[last + 1] - medians[last])
    return float(np.exp(batches[last] + part * (batches[last + 1] - batches[last])))
