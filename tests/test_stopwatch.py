"""The sums over samples and the stopwatch, on a clock that the tests turn."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from mnist_dist.record.rank_summary import over_ranks
from mnist_dist.stopwatch import Stopwatch, in_windows, percentile
from mnist_dist.training import evaluation
from mnist_dist.training.evaluation import batch_sums


class FakeClock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run_steps(watch, clock, counts, seconds=0.01, waited=0.0, **options):
    with watch.window(**options) as window:
        for count in counts:
            clock.now += seconds
            window.lap([count], waited)


def test_sums_are_those_of_single_samples():
    torch.manual_seed(0)
    log_probabilities = torch.log_softmax(torch.randn(101, 10), dim=1)
    labels = torch.randint(0, 10, (101,))
    nll = [-float(row[label]) for row, label in zip(log_probabilities, labels, strict=True)]
    hits = sum(int(row.argmax() == label) for row, label in zip(log_probabilities, labels, strict=True))
    sums = sum(batch_sums(log_probabilities[i : i + 7], labels[i : i + 7]) for i in range(0, 101, 7))
    metrics = evaluation.metrics_of_test(sums.tolist())
    assert metrics["test_nll_sum"] == pytest.approx(sum(nll), abs=1e-12)
    assert metrics["test_nll"] == pytest.approx(sum(nll) / 101, abs=1e-12)
    assert (metrics["test_count"], metrics["test_accuracy"]) == (101, pytest.approx(hits / 101))


def test_sums_of_an_empty_share_are_nothing():
    assert batch_sums(torch.empty(0, 10), torch.empty(0, dtype=torch.int64)).tolist() == [0, 0, 0]


def test_rate_leaves_out_warm_up_and_pauses():
    clock, calls = FakeClock(), []
    watch = Stopwatch(lambda: calls.append(clock.now), clock)
    run_steps(watch, clock, [200] * 5, seconds=1.0, warmup=True)  # compiling
    clock.now += 50  # evaluation
    run_steps(watch, clock, [200] * 100)
    clock.now += 70  # a checkpoint
    run_steps(watch, clock, [200] * 99 + [7])  # a last batch that does not divide
    metrics = watch.metrics(watch.seconds, watch.warmup_seconds, 4)
    assert len(calls) == 6, "synchronised at a window's two ends, and never within"
    assert metrics["samples_per_second"] == pytest.approx((199 * 200 + 7) / 2.0)
    assert metrics["samples_per_second_per_process"] == pytest.approx((199 * 200 + 7) / 8.0)
    assert metrics["warmup_seconds"] == pytest.approx(5.0)
    assert metrics["train_seconds"] == pytest.approx(7.0)
    assert metrics["step_ms_p50"] == pytest.approx(10.0)


def test_the_slowest_process_sets_the_rate():
    clock = FakeClock()
    watch = Stopwatch(lambda: None, clock)
    run_steps(watch, clock, [30] * 10, seconds=0.1)
    assert watch.metrics(2.0, 0.0, 3)["samples_per_second"] == pytest.approx(150)


def test_time_that_synchronising_takes_counts():
    clock = FakeClock()

    def wait_for_device():
        clock.now += 3.0

    watch = Stopwatch(wait_for_device, clock)
    run_steps(watch, clock, [10], seconds=1.0)
    assert watch.seconds == pytest.approx(4.0), "the wait at the end is the device's work; the one before it is not"


def test_waiting_for_data_and_percentiles():
    clock = FakeClock()
    watch = Stopwatch(lambda: None, clock)
    for seconds in (0.01, 0.02, 0.03, 0.04):
        run_steps(watch, clock, [1], seconds=seconds, waited=0.005)
    metrics = watch.metrics(watch.seconds, 0.0, 1)
    assert metrics["data_wait_fraction"] == pytest.approx(0.2)
    assert metrics["step_ms_p95"] == pytest.approx(float(np.percentile([10, 20, 30, 40], 95)))


def test_nothing_measured_is_none_and_not_zero():
    clock = FakeClock()
    watch = Stopwatch(lambda: None, clock)
    run_steps(watch, clock, [200], warmup=True)
    metrics = watch.metrics(watch.seconds, watch.warmup_seconds, 2)
    assert metrics["samples_per_second"] is None and metrics["samples_per_second_per_process"] is None
    assert metrics["step_ms_p50"] is None and metrics["data_wait_fraction"] is None


def test_an_interrupted_epoch_goes_on_counting():
    clock = FakeClock()
    first = Stopwatch(lambda: None, clock)
    run_steps(first, clock, [200] * 10)
    clock.now += 1e6
    second = Stopwatch(lambda: None, clock, **first.state())
    run_steps(second, clock, [100] * 10)
    assert second.metrics(second.seconds, 0.0, 1)["samples_per_second"] == pytest.approx(3000 / 0.2)


def test_a_step_that_sleeps():
    watch = Stopwatch(lambda: None)
    with watch.window() as window:
        for _ in range(20):
            time.sleep(0.02)
            window.lap([100], 0.0)
    slept = watch.seconds  # by the same clock: what sleeping really took on a busy machine
    assert slept >= 0.4 and watch.samples == 2000
    assert watch.metrics(slept, 0.0, 1)["samples_per_second"] == pytest.approx(2000 / sum(watch.step_seconds), rel=0.01)


@pytest.mark.parametrize("values", [[3.0], [1.0, 2.0], [5.0, 1.0, 4.0, 2.0, 3.0]])
@pytest.mark.parametrize("q", [0, 5, 50, 95, 100])
def test_percentile_is_numpys(values, q):
    assert percentile(values, q) == pytest.approx(float(np.percentile(values, q)))
    assert percentile([], q) is None


def test_windows_cut_the_measured_steps_into_nearly_equal_parts():
    clock = FakeClock()
    watch = Stopwatch(lambda: None, clock)
    run_steps(watch, clock, [9] * 5, warmup=True)
    run_steps(watch, clock, [10] * 60)
    clock.now += 5  # a checkpoint
    run_steps(watch, clock, [10] * 24 + [3], seconds=0.02)
    windows = watch.metrics(watch.seconds, 0.0, 1)["windows"]
    assert len(windows) == 40 and {steps for steps, _, _ in windows} == {2, 3}
    assert sum(samples for _, samples, _ in windows) == watch.samples == 843
    assert sum(seconds for _, _, seconds in windows) == pytest.approx(60 * 0.01 + 25 * 0.02)
    assert windows[0][2] == pytest.approx(0.01 * windows[0][0]) and windows[-1][1] == 10 * (windows[-1][0] - 1) + 3
    assert in_windows([], []) == [] and in_windows([5, 2], [0.5, 0.25]) == [[1, 5, 0.5], [1, 2, 0.25]]


def test_the_slowest_rank_is_the_one_that_the_others_wait_for():
    clock, exchanged = FakeClock(), [0.0]
    own = []
    for waited, exchange in ((0.001, 0.006), (0.004, 0.0), (0.002, 0.005)):
        watch = Stopwatch(lambda: None, clock, exchange_clock=lambda: exchanged[0])
        for warmup in (True, False):
            with watch.window(warmup=warmup) as window:
                for _ in range(10):
                    clock.now += 0.01
                    exchanged[0] += exchange
                    window.lap([6], waited)
        own.append({**watch.of_this_rank(), "peak_memory_bytes": 100 * len(own), "host": f"host{len(own)}"})
    assert own[0]["own_ms"] == pytest.approx(4.0) and own[0]["step_ms"] == pytest.approx(10.0)
    ranks = over_ranks(own)
    assert (ranks["count"], ranks["slowest_rank"], ranks["slowest_host"]) == (3, 1, "host1")
    assert ranks["own_ms"] == {name: pytest.approx(value) for name, value in zip(
        ("min", "median", "max"), (4.0, 5.0, 10.0), strict=True)}
    assert ranks["data_wait_ms"]["max"] == pytest.approx(4.0) and ranks["peak_memory_bytes"]["median"] == 100
