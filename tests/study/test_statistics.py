"""Intervals hold the truth as often as they say; what does not differ is not called different; changes are marked."""

from __future__ import annotations

import numpy as np
import pytest

from mnist_dist.study import statistics
from mnist_dist.study.statistics import (
    Interval,
    Runs,
    are_different,
    drift_over_study,
    factor_interval,
    median_interval,
    more_repeats,
    ratio_interval,
    steadiness,
)

NO_WINDOWS = np.empty((0, 3))


def draw(kind, size, random):
    """Values whose median is 100."""
    if kind == "normal":
        return 100 + 3 * random.standard_normal(size)
    if kind == "skewed":
        return 97 + 3 * np.exp(random.standard_normal(size))
    # two humps: 70 % about 100 and 30 % about 110; the median of the mixture was found numerically
    return np.where(random.random(size) < 0.3, 110.0, 100.0) + random.standard_normal(size) - TWO_HUMPS


def _median_of_two_humps():
    from scipy.optimize import brentq
    from scipy.stats import norm

    return brentq(lambda x: 0.7 * norm.cdf(x - 100) + 0.3 * norm.cdf(x - 110) - 0.5, 95, 112) - 100


TWO_HUMPS = _median_of_two_humps()


def runs(values, windows=None):
    """Repeats with these rates."""
    return Runs(np.asarray(values, dtype=float), windows or [NO_WINDOWS] * len(values))


@pytest.mark.parametrize("kind", ["normal", "skewed", "two humps"])
def test_median_intervals_hold_the_truth(kind):
    """2,000 tables for each number of repeats from 5 to 20: 94 % of them at least, where 95 % is possible at all."""
    random = np.random.default_rng(7)
    for n in range(5, 21):
        held = [(interval := median_interval(values)).low <= 100 <= interval.high
                for values in draw(kind, (2000, n), random)]
        assert interval.level == (0.9375 if n == 5 else 0.95) and interval.n == n
        # 5 repeats give 93.75 %; three standard errors of 2,000 tables are 1.6 %
        assert np.mean(held) >= (0.921 if n == 5 else 0.94), n


def test_intervals_of_few_values_say_what_they_are_worth():
    assert median_interval([3.0]) == Interval(3.0, 3.0, 3.0, 0.0, 1)
    assert median_interval([1.0, 3.0]) == Interval(2.0, 1.0, 3.0, 0.5, 2)
    assert median_interval([5.0, 1.0, 3.0]) == Interval(3.0, 1.0, 5.0, 0.75, 3)
    assert median_interval(range(20)) == Interval(9.5, 5.0, 14.0, 0.95, 20)


@pytest.mark.parametrize("kind", ["normal", pytest.param("skewed", marks=pytest.mark.long),
                                  pytest.param("two humps", marks=pytest.mark.long)])
def test_ratio_intervals_hold_the_truth(kind):
    random = np.random.default_rng(8)
    for n in (5, 8, 20):
        pairs = [(runs(2 * draw(kind, n, random)), runs(draw(kind, n, random))) for _ in range(200)]
        held = [(interval := ratio_interval(*pair)).low <= 2 <= interval.high
                for pair in pairs]
        assert np.mean(held) >= 0.94 and interval.level == 0.95, n
    few = ratio_interval(runs([1, 2, 3]), runs([1, 2, 3]))
    assert few.level == pytest.approx(0.9)
    assert ratio_interval(runs([4]), runs([2, 2])) == Interval(2.0, 2.0, 2.0, 0.0, 1)


def test_windows_within_runs_widen_the_interval():
    random = np.random.default_rng(9)
    windows = [np.stack([np.ones(30), np.full(30, 10.0), np.exp(0.5 * random.standard_normal(30))], axis=1)
               for _ in range(6)]
    rates = [100.0] * 6
    alone, both = ratio_interval(runs(rates), runs(rates)), ratio_interval(runs(rates, windows), runs(rates))
    assert (alone.low, alone.high) == (1, 1) and both.low < 0.95 and both.high > 1.05 and both.value == 1


@pytest.mark.parametrize("n, cells", [(5, 4), (8, 6), (20, 4)])
def test_at_most_one_of_twenty_studies_of_the_same_thing_finds_a_difference(n, cells):
    random, found = np.random.default_rng(10), 0
    for _ in range(60):
        pairs = [(draw("normal", n, random), draw("normal", n, random)) for _ in range(cells)]
        found += any(are_different(pairs, [factor_interval(*pair) for pair in pairs]))
    assert found <= 3


def test_a_slow_down_of_three_percent_is_found():
    """20 repeats that spread by 2 %, 20 studies of one cell that is slower and two that are not."""
    random, hits = np.random.default_rng(11), 0
    for _ in range(20):
        pairs = [(factor * np.exp(0.02 * random.standard_normal(20)), np.exp(0.02 * random.standard_normal(20)))
                 for factor in (0.97, 1.0, 1.0)]
        hits += are_different(pairs, [factor_interval(*pair) for pair in pairs])[0]
    assert hits >= 19


def test_one_run_cannot_differ():
    pairs = [(np.array([1.0]), np.array([9.0]))]
    assert are_different(pairs, [factor_interval(*pairs[0])]) == [False] and are_different([], []) == []


@pytest.mark.parametrize("kind", ["normal", "skewed", "two humps"])
def test_factor_intervals_hold_the_truth(kind):
    random = np.random.default_rng(15)
    for n, m in ((4, 4), (5, 5), (5, 9), (20, 20)):
        intervals = [factor_interval(2 * draw(kind, n, random), draw(kind, m, random)) for _ in range(1000)]
        assert np.mean([one.low <= 2 <= one.high for one in intervals]) >= 0.935, (n, m)
    few = factor_interval(np.array([2.0, 4.0]), np.array([1.0, 2.0]))
    assert (few.value, few.low, few.high, few.level, few.n) == (2.0, 1.0, 4.0, pytest.approx(2 / 3), 2)


def test_the_distribution_of_mann_whitneys_u_is_scipys():
    from scipy.stats import mannwhitneyu

    for n, m in ((3, 3), (4, 6), (7, 5)):
        below = statistics._mann_whitney(n, m)
        for first in ([0.5 + i for i in range(n)], [i - 0.5 for i in range(n)], [10 + i for i in range(n)]):
            test = mannwhitneyu(first, range(m), method="exact", alternative="less")
            assert below[int(test.statistic)] == pytest.approx(test.pvalue)


def test_repeats_that_are_missing():
    assert more_repeats(Interval(100, 99, 101, 0.9375, 5)) == 0
    assert more_repeats(Interval(100, 90, 110, 0.9375, 5)) == 15, "twice as wide as wanted: four times as many"
    assert more_repeats(Interval(100, 80, 121, 0.5, 2)) == 32
    assert more_repeats(Interval(100, 94.9, 105.1, 0.9375, 5)) == 1


def windows_of(step_ms):
    """Windows of 7 steps of 10 samples."""
    return np.array([[7, 70, 7 * one / 1000] for one in step_ms])


def test_changes_within_a_run_are_marked():
    random = np.random.default_rng(12)
    noise = 1 + 0.02 * random.standard_normal(60)
    assert steadiness(windows_of(3 * noise)).kind == "steady"
    jump = steadiness(windows_of(np.where(np.arange(60) < 40, 3.0, 3.6) * noise))
    assert jump.kind == "jump" and abs(jump.step - 280) <= 14 and jump.change == pytest.approx(0.2, abs=0.03)
    assert jump.warmup_steps == 0
    drift = steadiness(windows_of(np.linspace(3, 3.6, 60) * noise))
    assert drift.kind == "drift" and drift.change == pytest.approx(0.2, abs=0.05)
    warm = steadiness(windows_of(np.where(np.arange(60) < 12, 4.0, 3.0) * noise))
    assert warm.kind == "jump" and abs(warm.warmup_steps - 84) <= 14, "12 windows of 7 steps"
    assert steadiness(windows_of(3 * noise[:7])).kind == "too short to tell"
    assert steadiness(windows_of(np.where(np.arange(60) < 40, 3.0, 3.06) * noise)).kind == "steady", "2 % is little"


def test_steady_runs_are_not_marked():
    random = np.random.default_rng(13)
    kinds = [steadiness(windows_of(3 + 0.3 * random.standard_normal(n))).kind for n in (8, 20, 80) for _ in range(100)]
    assert kinds.count("steady") >= 298


def test_the_machines_drift_is_seen():
    random = np.random.default_rng(14)
    noise = 1 + 0.01 * random.standard_normal(40)
    orders = range(1, 41)
    assert not drift_over_study(orders, noise).is_one
    drift = drift_over_study(orders, noise * np.linspace(1.0, 0.9, 40))
    assert drift.is_one and drift.change.value == pytest.approx(-0.1, abs=0.02)
    assert drift_over_study(range(7), noise[:7]) is None


@pytest.mark.parametrize("end", [0.1, 0.5, 0.9, 1.1, 2.0, 5.0])
@pytest.mark.parametrize("number", [8, 41, 500])
def test_a_drift_is_relative_to_the_start(end, number):
    """Rates from 1 to `end`, of which the study knows each over the median of its cell."""
    rates = np.linspace(1.0, end, number) * (1 + 0.001 * np.random.default_rng(0).standard_normal(number))
    change = drift_over_study(range(number), rates / np.median(rates)).change
    assert change.value == pytest.approx(end - 1, abs=0.02) and change.low <= change.value <= change.high


def test_the_order_statistics_are_scipys():
    statistics._order_statistics.cache_clear()
    assert statistics._order_statistics(5, 0.95) is None and statistics._order_statistics(6, 0.95) == (0, 5)


def test_ranks_and_kendalls_tau_are_scipys():
    from scipy.stats import kendalltau, rankdata

    random = np.random.default_rng(16)
    for values in (random.random(40), random.integers(5, size=33).astype(float), np.array([1.0, 2.0, 2.0, 1.0])):
        first, second = np.triu_indices(len(values), 1)
        assert statistics._ranks(values) == pytest.approx(rankdata(values))
        tau = statistics._kendall(values[second] - values[first])
        assert tau == pytest.approx(kendalltau(range(len(values)), values).statistic)
    assert statistics._kendall(np.zeros(6)) == 0.0


def test_neighbouring_windows_of_a_long_run_are_joined():
    random = np.random.default_rng(17)
    noise = 1 + 0.02 * random.standard_normal(4001)
    jump = steadiness(windows_of(np.where(np.arange(4001) < 1000, 3.0, 3.6) * noise))
    assert jump.kind == "jump" and jump.change == pytest.approx(0.2, abs=0.02)
    assert jump.step == pytest.approx(7000, abs=7 * 4001 / statistics.MOST_WINDOWS + 7)
    assert steadiness(windows_of(3 * noise)).kind == "steady"


def test_the_drift_of_a_study_of_many_runs_is_found_in_any_order_of_its_rows():
    random = np.random.default_rng(18)
    orders = random.permutation(np.arange(1, 5001))
    drift = drift_over_study(orders, 1 + 0.04 * orders / 5000 + 0.01 * random.standard_normal(5000))
    assert drift.is_one and drift.change.low < 0.04 < drift.change.high and drift.change.n == 5000
