"""Intervals hold the truth as often as they say, and what does not differ is not called different."""

from __future__ import annotations

import math

import numpy as np
import pytest
from made_up import NOISES, repeats
from scipy import stats

from mnist_dist.study.analysis import intervals
from mnist_dist.study.analysis.intervals import (
    CAUTIOUS,
    LEVEL,
    Interval,
    estimates,
    median_interval,
    more_repeats,
    ratio,
)

CHANCE = 0.02  # by which a share of tables may be below the level


@pytest.mark.parametrize("noise", NOISES)
def test_median_intervals_hold_the_truth(noise):
    """2,000 tables for each number of repeats."""
    random = np.random.default_rng(7)
    for n in (2, 3, 5, 6, 8, 10, 20):
        intervals = [median_interval(values) for values in repeats(noise, 0.02, (2000, n), random)]
        level = {2: 0.5, 3: 0.75, 5: 0.9375}.get(n, 0.95)
        assert {(one.level, one.n) for one in intervals} == {(level, n)}
        assert np.mean([one.low <= 1 <= one.high for one in intervals]) >= level - CHANCE, n


def test_intervals_of_few_values_say_what_they_are_worth():
    assert median_interval([3.0]) == Interval(3.0, 3.0, 3.0, 0.0, 1)
    assert median_interval([1.0, 3.0]) == Interval(2.0, 1.0, 3.0, 0.5, 2)
    assert median_interval([5.0, 1.0, 3.0]) == Interval(3.0, 1.0, 5.0, 0.75, 3)
    assert median_interval(range(20)) == Interval(9.5, 5.0, 14.0, 0.95, 20)


def spreads_of(kind, cells):
    """The spread of each cell."""
    return np.resize({"equal": [0.02], "0.5 to 5 %": [0.005, 0.005, 0.01, 0.01, 0.02, 0.02, 0.05, 0.05]}[kind], cells)


@pytest.mark.parametrize("kind", ["equal", "0.5 to 5 %"])
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("n, cells, tables", [(3, 8, 150), (10, 4, 250), *(
    pytest.param(n, cells, max(500, 4000 // cells), marks=pytest.mark.long) for n in (2, 3, 5, 10)
    for cells in (2, 8, 20, 40))])
def test_ratios_hold_the_truth(n, cells, tables, noise, kind):
    """Of neighbouring cells, which are alike: the interval of each ratio alone has its level."""
    random, held = np.random.default_rng([n, cells]), []
    level = {2: 2 / 3, 3: 0.9}.get(n, 0.95)
    for _ in range(tables):
        values = estimates(repeats(noise, spreads_of(kind, cells)[:, None], (cells, n), random))
        for first, second in zip(values[::2], values[1::2], strict=True):
            interval = ratio([first], [second])
            held.append(interval.low <= 1 <= interval.high)
            assert interval.level == pytest.approx(level)
    assert np.mean(held) >= level - CHANCE - 0.02 * (tables < 500)


def false_alarms(noise, n, cells, tables):
    """The share of comparisons of the same thing with itself that call a cell faster or slower."""
    random, wrong = np.random.default_rng([n, cells]), 0
    for _ in range(tables):
        before, after = (estimates(repeats(noise, 0.02, (cells, n), random)) for _ in range(2))
        wrong += any(ratio([a], [b], cells).excludes(1) for a, b in zip(after, before, strict=True))
    return wrong / tables


@pytest.mark.parametrize("n", [3, 5, 10])
@pytest.mark.parametrize("cells, tables", [(8, 200), *(
    pytest.param(cells, 1500, marks=pytest.mark.long) for cells in (2, 8, 20, 50))])
def test_at_most_one_of_twenty_comparisons_of_the_same_thing_finds_a_difference(n, cells, tables):
    share = false_alarms("normal", n, cells, tables)
    print(f"\nnormal, {n} repeats of {cells} cells: {100 * share:.1f} % of {tables} comparisons call a cell another")
    assert share <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / tables)


@pytest.mark.long
@pytest.mark.parametrize("noise, n, cells, most", [
    ("skewed", 3, 8, 0.12), ("heavy tails", 3, 8, 0.08), ("two humps", 3, 8, 0.13), ("two humps", 3, 20, 0.3),
    ("skewed", 5, 8, 0.06), ("heavy tails", 5, 8, 0.06), ("two humps", 5, 8, 0.09)])
def test_other_noise_has_more_false_alarms(noise, n, cells, most):
    share = false_alarms(noise, n, cells, 1000)
    print(f"\n{noise}, {n} repeats of {cells} cells: {100 * share:.1f} % of comparisons call a cell faster or slower")
    assert share <= most


@pytest.mark.parametrize("factor", [10, 1.2, 1.05])
@pytest.mark.parametrize("n", [3, 5, 10])
@pytest.mark.parametrize("cells", [1, 8, *(pytest.param(cells, marks=pytest.mark.long) for cells in (2, 20, 50))])
def test_a_slow_cell_is_found_among_many(n, factor, cells):
    """As often as Student's test with one common spread finds it; now and then a cell counts as far above the others'
    spread, and has to show its difference alone.
    """
    random, hits = np.random.default_rng(11), 0
    for _ in range(100):
        before, after = (estimates(repeats("normal", 0.02, (cells, n), random)
                                   / (factor if slow else 1) ** (np.arange(cells) == 0)[:, None]) for slow in (0, 1))
        hits += ratio([after[0]], [before[0]], cells).excludes(1)
    print(f"\n{factor:g} times slower, {n} repeats of {cells} cells: found in {hits} of 100")
    freedom, level = 2 * cells * (n - 1), LEVEL if cells == 1 else CAUTIOUS
    power = stats.nct.sf(stats.t.isf((1 - level ** (1 / cells)) / 2, freedom), freedom,
                         math.log(factor) / (0.02 * math.sqrt(2 / n))) if factor < 10 else 1.0
    assert hits >= 96 * power - 300 * math.sqrt(power * (1 - power) / 100)


def test_a_cell_whose_spread_is_far_above_the_others_has_its_own():
    random = np.random.default_rng(3)
    groups = repeats("normal", 0.02, (6, 5), random)
    groups[2] = repeats("normal", 0.5, 5, random)
    values = estimates(groups)
    assert len({one.pool for one in values}) == 2 and values[2].pool is not values[0].pool
    assert values[2].freedom == 4 and values[0].freedom == 5 * 4
    assert ratio([values[2]], [values[0]]).half_width > 5 * ratio([values[1]], [values[0]]).half_width


def test_pooled_estimates_are_those_of_an_analysis_of_variance():
    groups = [np.array([1.0, 1.1, 1.3]), np.array([2.0, 2.2, 2.3, 2.1])]
    first, second = estimates(groups)
    logs = [np.log(group) for group in groups]
    test = stats.ttest_ind(*logs).confidence_interval(0.95)
    assert first.freedom == 5 and [one.n for one in (first, second)] == [3, 4]
    interval = ratio([first], [second])
    assert (interval.low, interval.high) == pytest.approx((np.exp(test.low), np.exp(test.high)))
    welch = ratio(estimates(groups[:1]), estimates(groups[1:]))
    test = stats.ttest_ind(*logs, equal_var=False).confidence_interval(0.95)
    assert (welch.low, welch.high) == pytest.approx((np.exp(test.low), np.exp(test.high)))
    assert intervals._bartlett(np.array([x.var() * len(x) for x in logs]), np.array([2, 3])) == pytest.approx(
        stats.bartlett(*logs).pvalue)


def test_what_is_in_both_quantities_cancels():
    one, two, three = estimates([[1.0, 1.5, 2.0], [2.0, 2.1, 2.6], [4.0, 3.0, 3.6]])
    assert ratio([one, two], [one, three]) == ratio([two], [three])


@pytest.mark.parametrize("groups", [[[1.0], [9.0]], [[1.0, 1.1], [9.0, 9.3]], [[1.0], [9.0, 9.1, 9.2]]])
def test_fewer_than_three_repeats_show_nothing(groups):
    first, second = estimates(groups)
    interval = ratio([first], [second])
    assert not interval.excludes(1.0) and interval.level < 0.7


def test_equal_repeats_are_not_different_by_rounding():
    first, second, third = estimates([[0.1 + 0.2] * 3, [0.3] * 3, [0.31] * 3])
    assert not ratio([first], [second]).excludes(1.0) and ratio([third], [second]).excludes(1.0)


def test_repeats_that_are_missing():
    assert more_repeats(Interval(100, 99, 101, 0.9375, 5)) == 0
    assert more_repeats(Interval(100, 90, 110, 0.9375, 5)) == 15, "twice as wide as wanted: four times as many"
    assert more_repeats(Interval(100, 80, 121, 0.5, 2)) == 32
    assert more_repeats(Interval(100, 94.9, 105.1, 0.9375, 5)) == 1


def test_the_order_statistics_are_scipys():
    intervals._order_statistics.cache_clear()
    assert intervals._order_statistics(5, 0.95) is None and intervals._order_statistics(6, 0.95) == (0, 5)
