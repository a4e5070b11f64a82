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


def test_with_spread_it_is_near_and_its_interval_holds_the_truth():
    fitted, direct, held = [], [], []
    for seed in range(60):
        found = critical(runs_of(1500, seed=seed))
        fitted.append(found.fitted.value / 1500)
        direct.append(found.direct.value / (0.26 * 1500))
        held.append(found.fitted.low <= 1500 <= found.fitted.high)
        held.append(found.direct.low <= 0.26 * 1500 <= found.direct.high)
    assert abs(np.median(fitted) - 1) < 0.1 and abs(np.median(direct) - 1) < 0.1
    assert np.mean(np.abs(np.array(fitted) - 1) < 0.1) > 0.7
    assert 0.9 <= np.mean(held) <= 0.995
    print(np.std(fitted), np.std(direct), np.mean(held[::2]), np.mean(held[1::2]))


def test_runs_that_did_not_reach_the_target_are_not_left_out():
    runs = runs_of(1500, spread=0)
    runs[12_800] = [math.inf] * 5
    runs[6400][0] = math.inf
    found = critical(runs)
    assert found.fitted.value == pytest.approx(1500, rel=1e-2)


def test_too_few_batch_sizes_give_a_reason():
    assert f"and {LEAST_BATCHES} are needed" in critical(runs_of(1500, batches=(50, 100, 200)))


def test_a_batch_that_is_never_too_large_has_no_direct_size():
    assert critical(runs_of(1e6)).direct is None
