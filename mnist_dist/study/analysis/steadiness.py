"""Whether a machine and its runs are steady: jumps and drifts of the step times in a run, and of the rates in a study.

Pure functions of numbers: rank tests, which assume no distribution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special, stats

from mnist_dist.study.analysis.intervals import LEVEL, Interval

LEAST_CHANGE = 0.05  # of the step time within a run; smaller changes are not marked
LEAST_DRIFT = 0.02  # of the rates over the whole study
SIGNIFICANT = 0.001  # for a change within a run: there are many runs, and their windows depend on each other
LEAST_WINDOWS = 8
MOST_WINDOWS = 400  # of a run, and runs of a study: slopes and ranks of pairs take the square of it


@dataclass(frozen=True)
class Steadiness:
    """Whether a run's step times are steady: `kind` is "steady", "jump", "drift" or "too short to tell"."""

    kind: str
    change: float = 0.0  # of the step time: 0.1 is 10 % slower at the end
    step: int = 0  # of a jump: measured steps before it
    warmup_steps: int = 0  # measured steps that still belong to the warm-up: a first part that is slower


def steadiness(windows: np.ndarray) -> Steadiness:
    """Look for a jump or a drift in the step times of a run's windows [w, 3].

    A jump is found by the largest rank sum statistic over all places of the jump (Lausen & Schumacher 1992, Biometrics
    48(1)) with Bonferroni's bound, a drift by Kendall's; which of the two it is, by the fit with the smaller absolute
    residuals. Neighbouring windows depend on each other. So n windows count as n (1 - r) / (1 + r), where r is the
    correlation of neighbouring residuals of the fit.
    """
    if len(windows) > MOST_WINDOWS:  # neighbours are joined
        windows = np.add.reduceat(windows, _evenly(len(windows)))
    n = len(windows)
    if n < LEAST_WINDOWS:
        return Steadiness("too short to tell")
    times, steps, place = windows[:, 2] / windows[:, 0], windows[:, 0], np.arange(n)
    ranks, after = stats.rankdata(times), np.arange(1, n)
    z = (np.cumsum(ranks)[:-1] - after * (n + 1) / 2) / np.sqrt(after * (n - after) * (n + 1) / 12)
    at = int(np.argmax(np.abs(z))) + 1  # windows before the jump
    before, behind = float(np.median(times[:at])), float(np.median(times[at:]))
    off_jump = times - np.where(place < at, before, behind)
    jump, z_jump = behind / before - 1, float(np.abs(z).max())
    tau = stats.kendalltau(place, times).statistic  # not a number, if all times are equal
    z_drift = abs(np.nan_to_num(tau)) / math.sqrt(2 * (2 * n + 5) / (9 * n * (n - 1)))
    # dependence only lowers a statistic: if it is not significant without dependence, the residuals are not needed
    is_jump = abs(jump) >= LEAST_CHANGE and _p(z_jump, n - 1) < SIGNIFICANT and (
        _p(z_jump * _worth(off_jump), n - 1) < SIGNIFICANT)
    if _p(z_drift) >= SIGNIFICANT:
        is_drift = False
    else:
        slope, intercept, *_ = stats.theilslopes(times, place)
        off_line = times - (intercept + slope * place)
        drift = slope * (n - 1) / intercept if intercept > 0 else math.inf
        is_drift = abs(drift) >= LEAST_CHANGE and _p(z_drift * _worth(off_line)) < SIGNIFICANT
    if is_jump and (not is_drift or np.abs(off_jump).sum() <= np.abs(off_line).sum()):
        done = int(steps[:at].sum())
        return Steadiness("jump", jump, done, done if jump < 0 and at < n / 2 else 0)
    return Steadiness("drift", drift) if is_drift else Steadiness("steady")


def _evenly(count: int) -> np.ndarray:
    """At most MOST_WINDOWS places from 0 to `count`, evenly apart, with 0 among them."""
    return np.unique(np.linspace(0, count, min(count, MOST_WINDOWS), endpoint=False).astype(int))


def _p(z: float, places: int = 1) -> float:
    """The two-sided probability of a normal value, by Bonferroni's bound for the largest of `places`."""
    return 2 * places * float(special.ndtr(-z))


def _worth(residuals: np.ndarray) -> float:
    """The factor by which a statistic shrinks because neighbouring windows depend on each other (see `steadiness`)."""
    ranks = stats.rankdata(residuals)
    if np.ptp(ranks) == 0:
        return 1.0
    correlation = float(np.clip(np.corrcoef(ranks[:-1], ranks[1:])[0, 1], 0.0, 0.95))
    return math.sqrt((1 - correlation) / (1 + correlation))


@dataclass(frozen=True)
class Drift:
    """The change of the machine during the study: of the rates over all its runs, relative to the start, with an
    interval.
    """

    change: Interval
    is_one: bool


def drift_over_study(orders: Sequence[float], relative_rates: Sequence[float]) -> Drift | None:
    """The change of the rates, each over its cell's median, from the first run to the last, relative to the first: by
    Theil and Sen's line through at most MOST_WINDOWS runs evenly over the study. None with fewer than 8 runs.
    """
    if len(orders) < LEAST_WINDOWS:
        return None
    if np.ptp(relative_rates) == 0:
        return Drift(Interval(0.0, 0.0, 0.0, LEVEL, len(orders)), False)
    places = np.argsort(orders)[_evenly(len(orders))]
    rates, times = np.take(relative_rates, places), np.take(orders, places)
    line = stats.theilslopes(rates, times, LEVEL)
    span, middle = max(orders) - min(orders), float(np.median(times)) - min(orders)

    def change_of(slope: float) -> float:
        """Of a line of this slope through the medians, over its value at the start."""
        start = float(np.median(rates)) - slope * middle
        return slope * span / start if start > 0 else math.inf

    change = Interval(change_of(line.slope), change_of(line.low_slope), change_of(line.high_slope), LEVEL, len(orders))
    return Drift(change, abs(change.value) >= LEAST_DRIFT and change.excludes(0.0))
