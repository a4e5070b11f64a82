"""What the runs of a study say, with intervals. Pure functions of numbers; nothing here reads a file.

The run is the unit that is repeated: steps within a run depend on each other (Kalibera & Jones 2013). A single metric
is a median with an interval that assumes no distribution. A ratio is one of geometric means (Fleming & Wallace 1986).
Its interval is from the common spread of the cells, so that few repeats are enough.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special, stats

LEVEL = 0.95
CAUTIOUS = 0.96  # the level that is computed, to have LEVEL: the choice of a common spread costs a point
PRECISION = 0.05  # half an interval wider than this part of the median is too wide to conclude from
LEAST_CONCLUSIVE = 3  # the least repeats of a metric that is called larger or smaller than another
FAR = 0.01  # a spread is far above the others', if chance makes it so far less often
UNEQUAL = 0.05  # the same for all spreads together
ROUNDING = 1e-9  # the least half width of a ratio: equal quantities differ by rounding
FREEDOMS = (*range(1, 11), 12, 15, 20, 30, 60, math.inf)  # of the studentized range; others round down
MANY = 1e6  # degrees of freedom from which Student's distribution is the normal one
TINY = 1e-300  # in place of a spread of 0, of which there is no logarithm
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

    def widened(self, part: float) -> Interval:
        """Both ends moved outwards by this part, in logarithms."""
        return Interval(self.value, self.low * math.exp(-part), self.high * math.exp(part), self.level, self.n)

    def excludes(self, value: float) -> bool:
        """Whether the interval does not hold the value; never, if fewer than LEAST_CONCLUSIVE repeats are behind it."""
        return self.n >= LEAST_CONCLUSIVE and not self.low <= value <= self.high

    def is_above(self, value: float) -> bool:
        """Whether it is shown that the truth is above the value."""
        return self.excludes(value) and self.value > value

    def is_below(self, value: float) -> bool:
        """The same, below."""
        return self.excludes(value) and self.value < value

    @property
    def half_width(self) -> float:
        """Half the interval's width as a part of the value."""
        return (self.high - self.low) / 2 / self.value if self.value else math.inf


def median_interval(values: Sequence[float] | np.ndarray, level: float = LEVEL) -> Interval:
    """The median with the interval between two order statistics (`scipy.stats.quantile_test`).

    Fewer than 6 values cannot give 95 %: then it is their range, with the level that it has, 1 - 2 (1/2)^n.
    """
    ordered, n = np.sort(values), len(values)
    places = _order_statistics(n, level)
    low, high = places or (0, n - 1)
    return Interval(float(np.median(ordered)), float(ordered[low]), float(ordered[high]),
                    level if places else 1 - 2 * 0.5**n, n)


def interval_of_draws(value: float, draws: np.ndarray, n: int) -> Interval:
    """The percentile interval of an estimate from its draws, which may be inf; it holds the estimate."""
    low, high = np.quantile(draws, [(1 - CAUTIOUS) / 2, (1 + CAUTIOUS) / 2], method="nearest")
    return Interval(float(value), float(min(low, value)), float(max(high, value)), level_of_repeats(n), n)


@functools.cache
def _order_statistics(n: int, level: float) -> tuple[int, int] | None:
    """The places, among n sorted values, that bound the median; None if n is too small."""
    low, high = stats.quantile_test(range(n), p=0.5).confidence_interval(level)
    return None if math.isnan(low) or math.isnan(high) else (int(low), int(high))


@dataclass(frozen=True, eq=False)
class Estimate:
    """The mean of the logarithms of a quantity's `n` repeats, the variance of this mean (`error`), and the degrees of
    freedom with which that is known: 0 if it is not.

    Estimates with the same `pool` have their spread in common.
    """

    mean: float
    error: float
    n: int
    freedom: float
    pool: object


def estimates(groups: Sequence[Sequence[float] | np.ndarray]) -> list[Estimate]:
    """An estimate for each group of positive repeats. They have one relative spread, pooled over the groups.

    A group whose spread is far above the others' (an F test, corrected for their number) has its own spread. All groups
    have their own, if the other spreads are not equal (Bartlett 1937, Proceedings of the Royal Society A 160).
    """
    logarithms = [np.log(np.asarray(group, dtype=float)) for group in groups]
    squares = np.array([((values - values.mean()) ** 2).sum() for values in logarithms])
    freedom = np.array([len(values) - 1 for values in logarithms])
    pooled = _pooled(squares, freedom)
    whole, pool = freedom[pooled].sum(), object()
    variance = squares[pooled].sum() / max(1, whole)
    return [Estimate(float(values.mean()), (variance if shared else square / max(1, free)) / len(values), len(values),
                     float(whole if shared else free), pool if shared else object())
            for values, square, free, shared in zip(logarithms, squares, freedom, pooled, strict=True)]


def _pooled(squares: np.ndarray, freedom: np.ndarray) -> np.ndarray:
    """[groups] whether a group has the spread in common with others, from sums of squares and degrees of freedom."""
    pooled = np.full(len(squares), True)
    known = freedom > 0
    while (inside := np.flatnonzero(pooled & known)).size > 1:
        square, free = squares[inside], freedom[inside]
        rest, rest_free = square.sum() - square, free.sum() - free
        ratios = np.divide(square / free, rest / rest_free, out=np.where(square > 0, np.inf, 0.0), where=rest > 0)
        chances = np.where(np.isinf(ratios), 0.0, special.fdtrc(free, rest_free, ratios)) * len(inside)
        if chances.min() > FAR:
            break
        pooled[inside[chances.argmin()]] = False
    if inside.size > 1 and _bartlett(squares[inside], freedom[inside]) < UNEQUAL:
        pooled[:] = False
    return pooled


def _bartlett(squares: np.ndarray, freedom: np.ndarray) -> float:
    """The probability that samples with equal variances have spreads that differ as much."""
    variances, whole = np.maximum(squares / freedom, TINY), freedom.sum()
    statistic = whole * math.log((freedom * variances).sum() / whole) - (freedom * np.log(variances)).sum()
    scale = 1 + ((1 / freedom).sum() - 1 / whole) / (3 * (len(freedom) - 1))
    return float(special.chdtrc(len(freedom) - 1, statistic / scale))


def ratio(top: Sequence[Estimate], bottom: Sequence[Estimate], comparisons: int = 1, among: int = 2) -> Interval:
    """The product of the quantities of `top` over that of `bottom` (none: 1), by their geometric means, with Student's
    interval. What is in both cancels. Spreads of several pools are joined as by Welch (1947) and Satterthwaite (1946).

    The interval is one of `comparisons` that hold their truths all together (Sidak 1967, JASA 62: the bound holds for
    t statistics that share a spread), or of all pairs of `among` quantities (Tukey; Games & Howell 1976 for
    spreads that differ). So the best of them may be compared with the others.

    Its level is at most that at which the ranges of two samples of so few repeats separate by chance, which needs no
    assumption. With one repeat it has no width, and a level of 0.
    """
    above = [estimate for estimate in top if estimate not in bottom]
    below = [estimate for estimate in bottom if estimate not in top]
    value = math.exp(sum(estimate.mean for estimate in above) - sum(estimate.mean for estimate in below))
    errors: dict[object, float] = {}
    freedoms: dict[object, float] = {}
    for estimate in (*above, *below):
        errors[estimate.pool] = errors.get(estimate.pool, 0.0) + estimate.error
        freedoms[estimate.pool] = estimate.freedom
    n, error = min(estimate.n for estimate in (*top, *bottom)), sum(errors.values())
    if n < 2 or not all(freedoms.values()):
        return Interval(value, value, value, 0.0, 1)
    freedom = error**2 / max(TINY, sum(part**2 / freedoms[pool] for pool, part in errors.items()))
    half = max(ROUNDING, math.sqrt(error) * _quantile(freedom, comparisons, among))
    return Interval(value, value * math.exp(-half), value * math.exp(half), level_of_repeats(n), n)


def level_of_repeats(n: int) -> float:
    """The most that an interval of a ratio is worth without an assumption on the noise: the probability that the ranges
    of two samples of n repeats do not separate by chance.
    """
    return min(LEVEL, 1 - 2 / math.comb(2 * n, n))


def draw(quantities: Sequence[Estimate], count: int, random: np.random.Generator) -> np.ndarray:
    """[count, quantities] logarithms, drawn from Student's distributions about the means. Estimates of one pool share
    the draw of its spread.
    """
    drawn = np.empty((count, len(quantities)))
    spreads: dict[object, np.ndarray] = {}
    for place, estimate in enumerate(quantities):
        if estimate.pool not in spreads:  # with one repeat the error is 0
            freedom = estimate.freedom or math.inf
            is_known = freedom == math.inf
            spreads[estimate.pool] = np.ones(count) if is_known else np.sqrt(freedom / random.chisquare(freedom, count))
        spread = math.sqrt(estimate.error) * spreads[estimate.pool]
        drawn[:, place] = estimate.mean + spread * random.standard_normal(count)
    return drawn


def _quantile(freedom: float, comparisons: int, among: int) -> float:
    """How many standard errors an interval of `ratio` reaches to each side."""
    if among > 2:
        return _of_range(among, max(known for known in FREEDOMS if known <= max(1.0, freedom)))
    tail = -math.expm1(math.log(LEVEL if comparisons == 1 else CAUTIOUS) / comparisons) / 2
    return float(-special.ndtri(tail) if freedom > MANY else -special.stdtrit(max(1.0, freedom), tail))


@functools.cache
def _of_range(among: int, freedom: float) -> float:
    """The same for all pairs of `among` quantities, from the studentized range. It takes scipy 0.3 s."""
    return float(stats.studentized_range.isf(1 - CAUTIOUS, among, freedom)) / math.sqrt(2)


def more_repeats(interval: Interval, precision: float = PRECISION) -> int:
    """How many more repeats make half the interval narrower than this part of the value; 0 if it is. The width falls
    with the square root of their number; fewer than 6 give no 95 % interval at all, and fewer than 5 are too few.
    """
    wanted = LEAST_REPEATS
    if interval.half_width > precision:
        wanted = max(6, math.ceil(interval.n * (interval.half_width / precision) ** 2))
    return max(0, wanted - interval.n)
