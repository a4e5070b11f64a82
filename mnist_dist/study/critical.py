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
MISFIT, BY_CHANCE = 0.1, 3.0  # a part of the samples; standard errors of a median
LEAST_BATCHES = 4  # of different sizes, in which runs reached the target
TOLERANCE = 0.2  # more samples than a small batch needs, at the critical batch size as it is measured directly
REACH, GRID = 100, 500  # the fit looks so many times below and above the batch sizes, at so many places


@dataclass(frozen=True)
class Critical:
    """The critical batch size, estimated three times, in samples. None is what is not known.

    `fitted` and `least_samples` are of the fit; `off` is by which part the medians differ from it at most, and
    `describes` whether it describes them: not if one of them is more than MISFIT off, and by more than chance.

    `direct` is the batch from which on the runs take 20 % more samples than at the two smallest batch sizes (Zhang et
    al. 2024, arXiv 2410.21676), as it is measured, without the fit: not known if these two are not small, or if it is
    not within the batch sizes. `expected` is where the fit has that.

    `noise` is the noise scale, which is to be the critical batch size (McCandlish et al. 2018); `noise_expected` is
    where the runs then take 20 % more. `direct_ratio` compares `direct` with `expected`, and `noise_ratio` compares
    `noise` with `fitted`.
    """

    fitted: Interval
    least_samples: Interval
    expected: Interval
    off: float
    describes: bool
    direct: Interval | None = None
    direct_ratio: Interval | None = None
    noise: Interval | None = None
    noise_expected: Interval | None = None
    noise_ratio: Interval | None = None


def critical(samples: Mapping[int, Sequence[float]], noise_scales: Mapping[int, Sequence[float]] | None = None
             ) -> Critical | str:
    """From the samples to the target and the noise scales of runs, each by batch size; or the reason why there is none.

    The noise scale is the median over batch sizes of the median over the runs of a batch size.
    """
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
    expected = _expected(batches, size)
    direct = np.array([_direct(batches, np.exp(row)) for row in medians])

    def interval(values: np.ndarray, runs: int = runs) -> Interval:
        return interval_of_draws(values[0], values[1:][np.isfinite(values[1:])], runs)

    found: dict[str, Interval] = {}
    if _are_small(batches, np.exp(medians[0])) and np.isfinite(direct[0]) and np.isfinite(direct[1:]).mean() > LEVEL:
        found = {"direct": interval(direct), "direct_ratio": interval(direct / expected)}
    if scales := [np.asarray(values, dtype=float) for values in (noise_scales or {}).values() if len(values)]:
        noise = np.median(np.vstack([[np.median(values) for values in scales],
                                     resampled_medians(scales, DRAWS, np.random.default_rng(1))]), axis=1)
        fewest = min(map(len, scales))
        found |= {"noise": interval(noise, fewest), "noise_expected": interval(_expected(batches, noise), fewest),
                  "noise_ratio": interval(noise / size, min(fewest, runs))}
    off = medians[0] - np.log(least[0] * (1 + batches / size[0]))
    errors = medians[1:].std(axis=0)  # none, if there is one run of each
    is_off = (np.abs(off) > math.log1p(MISFIT)) & (np.abs(off) > BY_CHANCE * errors)
    return Critical(interval(size), interval(least), interval(expected), float(np.expm1(np.abs(off).max())),
                    not is_off.any(), **found)


def _expected(batches: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The batch from which on runs take 20 % more samples than at the two smallest, for these critical sizes."""
    small = np.sqrt((1 + batches[0] / sizes) * (1 + batches[1] / sizes))
    return sizes * ((1 + TOLERANCE) * small - 1)


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


def _are_small(batches: np.ndarray, medians: np.ndarray) -> bool:
    """Whether the two smallest batch sizes take little more than a batch of 0 on a straight line through them."""
    at_zero = medians[0] - (medians[1] - medians[0]) * batches[0] / (batches[1] - batches[0])
    return bool(math.sqrt(medians[0] * medians[1]) <= (1 + TOLERANCE) * at_zero)


def _direct(batches: np.ndarray, medians: np.ndarray) -> float:
    """The batch from which on the runs take more than 20 % more samples than at the two smallest batch sizes, between
    two batch sizes on a straight line, as E is in B; NaN if all or none do.
    """
    limit = (1 + TOLERANCE) * math.sqrt(medians[0] * medians[1])
    above = medians > limit
    if above.all() or not above[-1]:
        return math.nan
    last = len(batches) - 1 - int(np.argmin(above[::-1]))  # the largest that is not above
    part = (limit - medians[last]) / (medians[last + 1] - medians[last])
    return float(batches[last] + part * (batches[last + 1] - batches[last]))
