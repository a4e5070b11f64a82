"""The critical batch size: on made-up runs whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mnist_dist.study.critical import LEAST_BATCHES, critical

BATCHES = tuple(50 * 2**k for k in range(9))  # 50 to 12,800


def runs_of(size, spread=0.05, repeats=5, least=30_000, seed=0, batches=BATCHES):
    random = np.random.default_rng(seed)
    return {batch: list(least * (1 + batch / size) * np.exp(random.normal(0, spread, repeats))) for batch in batches}


def test_without_spread_both_are_exact():
    found = critical(runs_of(1500, spread=0))
    assert found.fitted.value == pytest.approx(1500, rel=1e-3)
    assert found.least_samples.value == pytest.approx(30_000, rel=1e-3)
    # the two smallest batches need 5 % more than the least, so that 20 % above them is 26 % above it
    assert found.direct.value == pytest.approx(0.26 * 1500, rel=0.02)


@pytest.mark.parametrize(("batches", "tables"), [
    (BATCHES[::2], 60), *(pytest.param(batches, 200, marks=pytest.mark.long) for batches in (BATCHES, BATCHES[::2]))])
def test_with_spread_it_is_near_and_its_interval_holds_the_truth(batches, tables):
    """Tables of 5 runs with a spread of 3 %; the small batches' own samples are 5 % or 8 % above the least."""
    small = math.sqrt((1 + batches[0] / 1500) * (1 + batches[1] / 1500))
    truth = {"fitted": 1500, "direct": 1500 * (1.2 * small - 1)}
    off, held = {name: [] for name in truth}, {name: [] for name in truth}
    for seed in range(tables):
        found = critical(runs_of(1500, seed=seed, spread=0.03, batches=batches))
        for name, true in truth.items():
            if (interval := getattr(found, name)) is None:  # chance makes the smallest batches look large
                continue
            off[name].append(interval.value / true - 1)
            held[name].append(interval.low <= true <= interval.high)
    for name in truth:
        print(f"{name}: median {np.median(off[name]):+.1%}, absolute {np.median(np.abs(off[name])):.1%}, within 10 %: "
              f"{np.mean(np.abs(off[name]) < 0.1):.0%}, held {np.mean(held[name]):.1%}")
        assert len(off[name]) >= 0.95 * tables and np.median(np.abs(off[name])) < 0.1
        assert 0.9 <= np.mean(held[name]) <= (0.995 if tables == 200 else 1)


def test_the_noise_scale_is_held_against_the_fit():
    runs, random = runs_of(1500, spread=0.03), np.random.default_rng(1)

    def at(scale):
        return critical(runs, {batch: list(scale * np.exp(0.05 * random.standard_normal(5))) for batch in BATCHES[:4]})

    same, half = at(1500), at(750)
    assert same.noise.value == pytest.approx(1500, rel=0.05) and not same.noise_ratio.excludes(1)
    assert same.noise_expected.value == pytest.approx(same.expected.value, rel=0.06)
    assert half.noise_ratio.value == pytest.approx(0.5, rel=0.08) and half.noise_ratio.excludes(1)
    assert not half.direct_ratio.excludes(1) and half.direct_ratio.value == pytest.approx(1, rel=0.2)
    assert critical(runs, {50: []}).noise is None


def test_runs_that_did_not_reach_the_target_are_not_left_out():
    runs = runs_of(1500, spread=0)
    runs[12_800] = [math.inf] * 5
    runs[6400][0] = math.inf
    found = critical(runs)
    assert found.fitted.value == pytest.approx(1500, rel=1e-2)


def test_a_fit_that_does_not_describe_the_runs_says_so():
    """Samples that grow as a power of the batch have no critical size, and no limit of small batches."""
    random = np.random.default_rng(2)

    def power(exponent):
        return {batch: list(60_000 * (batch / 50) ** exponent * np.exp(random.normal(0, 0.03, 5))) for batch in BATCHES}

    steep = critical(power(0.37))
    assert not steep.describes and steep.off > 0.2 and steep.direct is None
    found = [critical(runs_of(1500, spread=0.03, seed=seed)).describes for seed in range(40)]
    assert np.mean(found) > 0.97
    assert critical(runs_of(1500, spread=0)).describes


def test_the_smallest_batches_must_be_small():
    """At a critical size of 100 even a batch of 50 takes half as many samples more."""
    assert critical(runs_of(100, spread=0)).direct is None and critical(runs_of(1500, spread=0)).direct is not None


def test_too_few_batch_sizes_give_a_reason():
    assert f"and {LEAST_BATCHES} are needed" in critical(runs_of(1500, batches=(50, 100, 200)))


def test_a_batch_that_is_never_too_large_has_no_direct_size():
    assert critical(runs_of(1e6)).direct is None
