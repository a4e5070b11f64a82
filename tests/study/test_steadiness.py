"""Changes within a run are marked, steady runs are not; the drift of a machine is seen."""

from __future__ import annotations

import numpy as np
import pytest
from made_up import NOISES
from made_up import repeats as repeats_of

from mnist_dist.study.analysis.steadiness import MOST_WINDOWS, drift_over_study, steadiness


def windows_of(step_ms):
    """Windows of 7 steps of 10 samples."""
    return np.array([[7, 70, 7 * one / 1000] for one in step_ms])


def test_changes_within_a_run_are_marked():
    random = np.random.default_rng(12)
    noise = 1 + 0.02 * random.standard_normal(60)
    assert steadiness(windows_of(3 * noise)).kind == steadiness(windows_of(3 + 0 * noise)).kind == "steady"
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


def test_neighbouring_windows_of_a_long_run_are_joined():
    random = np.random.default_rng(17)
    noise = 1 + 0.02 * random.standard_normal(4001)
    jump = steadiness(windows_of(np.where(np.arange(4001) < 1000, 3.0, 3.6) * noise))
    assert jump.kind == "jump" and jump.change == pytest.approx(0.2, abs=0.02)
    assert jump.step == pytest.approx(7000, abs=7 * 4001 / MOST_WINDOWS + 7)
    assert steadiness(windows_of(3 * noise)).kind == "steady"


def test_the_drift_of_a_study_of_many_runs_is_found_in_any_order_of_its_rows():
    random = np.random.default_rng(18)
    orders = random.permutation(np.arange(1, 5001))
    drift = drift_over_study(orders, 1 + 0.04 * orders / 5000 + 0.01 * random.standard_normal(5000))
    assert drift.is_one and drift.change.low < 0.04 < drift.change.high and drift.change.n == 5000


@pytest.mark.long
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("truth", [0.0, -0.3])
def test_the_drifts_interval_holds_the_truth(truth, noise):
    """500 studies each of 4 cells with 3, 5 and 10 repeats, in rounds of random order."""
    shares = []
    for repeats in (3, 5, 10):
        random, held = np.random.default_rng(repeats), []
        for _ in range(500):
            cells, orders = np.concatenate([random.permutation(4) for _ in range(repeats)]), np.arange(4 * repeats)
            rates = repeats_of(noise, 0.02, len(orders), random) * (1 + truth * orders / (len(orders) - 1))
            for cell in range(4):
                rates[cells == cell] /= np.median(rates[cells == cell])
            change = drift_over_study(orders, rates).change
            held.append(change.low <= truth <= change.high)
        shares.append(np.mean(held))
    print(f"\n{noise}, drift {truth:g}, 3, 5, 10 repeats: {', '.join(f'{100 * share:.1f} %' for share in shares)}")
    assert min(shares) >= 0.93
