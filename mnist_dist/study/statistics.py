"""What the runs of a study say, with intervals. Pure functions of numbers; nothing here reads a file.

The run is the unit that is repeated: steps within a run depend on each other (Kalibera & Jones 2013). Nothing assumes
a normal distribution. Ratios are ratios of medians, never means of ratios (Hoefler & Belli 2015).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special, stats

LEVEL = 0.95
RESAMPLES = 4000
WINDOW_RESAMPLES = 100  # of each run, from which a resampled run draws
PRECISION = 0.05  # half an interval wider than this part of the median is too wide to conclude from
LEAST_CHANGE = 0.05  # of the step time within a run; smaller changes are not marked
LEAST_DRIFT = 0.02  # of the rates over the whole study
SIGNIFICANT = 0.001  # for a change within a run: there are many runs, and their windows depend on each other
LEAST_WINDOWS = 8
MOST_WINDOWS = 400  # of a run, and runs of a study: slopes and ranks of pairs take the square of it
LEAST_REPEATS = 5


@dataclass(frozen=True)
class Interval:
    """An estimate with an interval that holds the truth with probability `level`; `n` repeats are behind it."""

    value: float
    low: float
    high: float
    level: float
    n: int

    def scaled(self, factor: float) -> Interval:
        """Both ends and the value times `factor`, which is above 0."""
        return Interval(self.value * factor, self.low * factor, self.high * factor, self.level, self.n)

    def excludes(self, value: float) -> bool:
        """Whether the interval does not hold the value; never, if one run is behind it."""
        return self.n > 1 and not self.low <= value <= self.high

    @property
    def half_width(self) -> float:
        """Half the interval's width as a part of the value."""
        return (self.high - self.low) / 2 / self.value if self.value else math.inf


@dataclass(frozen=True)
class Runs:
    """The repeats of a cell: `rates` [n] in samples/s, and of each run its windows [w, 3]: steps, samples, seconds."""

    rates: np.ndarray
    windows: Sequence[np.ndarray]

    @functools.cached_property
    def medians(self) -> np.ndarray:
        """[RESAMPLES] medians of resampled runs of resampled windows: a two-level bootstrap. The same at every call."""
        random, n = np.random.default_rng(0), len(self.rates)
        factors = np.stack([_window_factors(windows, random) for windows in self.windows])
        which = random.integers(n, size=(RESAMPLES, n))
        drawn = self.rates[which] * factors[which, random.integers(WINDOW_RESAMPLES, size=(RESAMPLES, n))]
        drawn.sort(axis=1)  # of few values a sort is five times as fast as np.median
        return (drawn[:, (n - 1) // 2] + drawn[:, n // 2]) / 2


def median_interval(values: Sequence[float] | np.ndarray, level: float = LEVEL) -> Interval:
    """The median with the interval between two order statistics (`scipy.stats.quantile_test`).

    Fewer than 6 values cannot give 95 %: then it is their range, with the level that it has, 1 - 2 (1/2)^n.
    """
    ordered, n = np.sort(values), len(values)
    places = _order_statistics(n, level)
    low, high = places or (0, n - 1)
    return Interval(float(np.median(ordered)), float(ordered[low]), float(ordered[high]),
                    level if places else 1 - 2 * 0.5**n, n)


def resampled_medians(runs: Sequence[np.ndarray], draws: int, random: np.random.Generator) -> np.ndarray:
    """[draws, cells] medians of runs that are drawn with replacement, one array of runs for each cell."""
    found = []
    for values in runs:
        drawn = np.median(values[random.integers(len(values), size=(draws, len(values)))], axis=1)
        if len(values) == 2:  # their median is their mean, whose bootstrap is too narrow by this factor
            middle = np.median(values)
            drawn = middle + math.sqrt(2) * (drawn - middle)
        found.append(drawn)
    return np.stack(found, axis=1)


def interval_of_draws(value: float, draws: np.ndarray, n: int) -> Interval:
    """The percentile interval of an estimate from its bootstrap draws; it holds the estimate."""
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(value), float(min(low, value)), float(max(high, value)), LEVEL, n)


@functools.cache
def _order_statistics(n: int, level: float) -> tuple[int, int] | None:
    """The places, among n sorted values, that bound the median; None if n is too small."""
    low, high = stats.quantile_test(range(n), p=0.5).confidence_interval(level)
    return None if math.isnan(low) or math.isnan(high) else (int(low), int(high))


def ratio_interval(top: Runs, bottom: Runs, level: float = LEVEL) -> Interval:
    """Median rate of `top` over that of `bottom`, with an interval by a two-level bootstrap: runs are drawn with
    replacement, then the windows within each. With one run on a side the interval has no width and a level of 0.

    A percentile interval of few runs is too narrow; its percentiles are moved outwards as in Hesterberg (2015, The
    American Statistician 69(4)), equation 5. The level of 2 or 3 runs on each side is at most that with which their
    ranges do not separate by chance.
    """
    n, ratio = min(len(top.rates), len(bottom.rates)), float(np.median(top.rates) / np.median(bottom.rates))
    if n < 2:
        return Interval(ratio, ratio, ratio, 0.0, n)
    # both are drawn from one seed: the same place would pair draws that are alike, neighbours are independent
    ratios = top.medians / np.roll(bottom.medians, 1)
    tail = float(stats.norm.cdf(math.sqrt(n / (n - 1)) * stats.t.ppf((1 - level) / 2, n - 1)))
    low, high = np.quantile(ratios, [tail, 1 - tail])
    separate = 2 / math.comb(len(top.rates) + len(bottom.rates), len(top.rates))
    return Interval(ratio, float(low), float(high), min(level, 1 - separate), n)


def _window_factors(windows: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """[WINDOW_RESAMPLES] rates of resampled windows, as parts of the rate of all."""
    count = len(windows)
    if count < 2:
        return np.ones(WINDOW_RESAMPLES)
    samples, seconds = windows[:, 1], windows[:, 2]
    which = random.integers(count, size=(WINDOW_RESAMPLES, count))
    return samples.take(which).sum(axis=1) / seconds.take(which).sum(axis=1) / (samples.sum() / seconds.sum())


def factor_interval(after: np.ndarray, before: np.ndarray, level: float = LEVEL) -> Interval:
    """By which factor the rates `after` [n] are above those `before` [m]: the median of all n x m ratios of two runs
    (Hodges & Lehmann 1963), with the interval of those factors that a Mann-Whitney test does not refuse (Bauer 1972).

    It holds for rates of any distribution, and needs fewer runs than an interval of the medians' ratio. Too few runs
    for the level give the range of the ratios, with the level that it has.
    """
    ratios = np.sort(np.divide.outer(after, before).ravel())
    n, m = len(after), len(before)
    below = _mann_whitney(n, m)
    cut = int(np.searchsorted(below, (1 - level) / 2, side="right"))  # so many ratios are cut off at each end
    low, high = (cut - 1, len(ratios) - cut) if cut else (0, len(ratios) - 1)
    return Interval(float(np.median(ratios)), float(ratios[low]), float(ratios[high]),
                    level if cut else float(1 - 2 * below[0]), min(n, m))


@functools.cache
def _mann_whitney(n: int, m: int) -> np.ndarray:
    """P(U <= u) for u = 0, 1, ... n m, if both samples have the same distribution: the counts of partitions."""
    counts = np.zeros(n * m + 1)
    counts[0] = 1.0
    for i in range(1, n + 1):  # times (1 - q^(m + i)) / (1 - q^i)
        if m + i <= n * m:
            counts[m + i :] -= counts[: -(m + i)].copy()
        for u in range(i, n * m + 1):
            counts[u] += counts[u - i]
    return np.cumsum(counts) / math.comb(n + m, n)


def are_different(pairs: Sequence[tuple[np.ndarray, np.ndarray]], intervals: Sequence[Interval]) -> list[bool]:
    """Whether the rates of each pair of cells differ. A difference is called one if its interval does not hold 1, and a
    Mann-Whitney test says so among all pairs with a false discovery rate of 5 % (Benjamini & Hochberg 1995).

    If no pair differs, at most 1 study in 20 reports one that does.
    """
    p = [float(stats.mannwhitneyu(a, b).pvalue) for a, b in pairs]
    order = sorted(range(len(p)), key=lambda i: p[i])
    passing = max((k for k, i in enumerate(order, 1) if p[i] <= (1 - LEVEL) * k / len(p)), default=0)
    found = set(order[:passing])
    return [i in found and interval.excludes(1.0) for i, interval in enumerate(intervals)]


def more_repeats(interval: Interval) -> int:
    """How many more repeats make the interval narrow enough to conclude from; 0 if it is. The width falls with the
    square root of their number; fewer than 6 give no 95 % interval at all, and fewer than 5 are too few.
    """
    wanted = LEAST_REPEATS
    if interval.half_width > PRECISION:
        wanted = max(6, math.ceil(interval.n * (interval.half_width / PRECISION) ** 2))
    return max(0, wanted - interval.n)


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
    residuals. Neighbouring windows depend on each other, so that n of them are worth n (1 - r) / (1 + r), where r is
    the correlation of neighbouring residuals of the fit.
    """
    if len(windows) > MOST_WINDOWS:  # neighbours are joined
        windows = np.add.reduceat(windows, _evenly(len(windows)))
    n = len(windows)
    if n < LEAST_WINDOWS:
        return Steadiness("too short to tell")
    times, steps, place = windows[:, 2] / windows[:, 0], windows[:, 0], np.arange(n)
    ranks, after = _ranks(times), np.arange(1, n)
    z = (np.cumsum(ranks)[:-1] - after * (n + 1) / 2) / np.sqrt(after * (n - after) * (n + 1) / 12)
    at = int(np.argmax(np.abs(z))) + 1  # windows before the jump
    before, behind = float(np.median(times[:at])), float(np.median(times[at:]))
    off_jump = times - np.where(place < at, before, behind)
    jump, z_jump = behind / before - 1, float(np.abs(z).max())
    first, second = np.triu_indices(n, 1)
    differences = times[second] - times[first]
    z_drift = abs(_kendall(differences)) / math.sqrt(2 * (2 * n + 5) / (9 * n * (n - 1)))
    # dependence only lowers a statistic: what is not significant without it needs no look at the residuals
    is_jump = abs(jump) >= LEAST_CHANGE and _p(z_jump, n - 1) < SIGNIFICANT and (
        _p(z_jump * _worth(off_jump), n - 1) < SIGNIFICANT)
    if _p(z_drift) >= SIGNIFICANT:
        is_drift = False
    else:
        slope = float(np.median(differences / (second - first)))  # Theil and Sen's
        intercept = float(np.median(times)) - slope * (n - 1) / 2
        off_line = times - (intercept + slope * place)
        drift = slope * (n - 1) / intercept if intercept > 0 else math.inf
        is_drift = abs(drift) >= LEAST_CHANGE and _p(z_drift * _worth(off_line)) < SIGNIFICANT
    if is_jump and (not is_drift or np.abs(off_jump).sum() <= np.abs(off_line).sum()):
        done = int(steps[:at].sum())
        return Steadiness("jump", jump, done, done if jump < 0 and at < n / 2 else 0)
    return Steadiness("drift", drift) if is_drift else Steadiness("steady")


def _evenly(count: int) -> np.ndarray:
    """The places of at most MOST_WINDOWS of so many, the first among them."""
    return np.unique(np.linspace(0, count, min(count, MOST_WINDOWS), endpoint=False).astype(int))


def _ranks(values: np.ndarray) -> np.ndarray:
    """From 1, the mean of them for ties."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]


def _kendall(differences: np.ndarray) -> float:
    """Kendall's tau-b of values and their places, which have no ties, from the differences of all pairs."""
    untied = np.count_nonzero(differences)
    return float(np.sign(differences).sum() / math.sqrt(untied * len(differences))) if untied else 0.0


def _p(z: float, places: int = 1) -> float:
    """The two-sided probability of a normal value, by Bonferroni's bound for the largest of so many."""
    return 2 * places * float(special.ndtr(-z))


def _worth(residuals: np.ndarray) -> float:
    """The factor by which a statistic shrinks if windows depend on each other: the root of the part that counts."""
    ranks = _ranks(residuals)
    if np.ptp(ranks) == 0:
        return 1.0
    correlation = float(np.clip(np.corrcoef(ranks[:-1], ranks[1:])[0, 1], 0.0, 0.95))
    return math.sqrt((1 - correlation) / (1 + correlation))


@dataclass(frozen=True)
class Drift:
    """How the machine changed during the study: the rates' change over all its runs, relative to its start, with an
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
