"""The critical batch size: on made-up runs whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from made_up import NOISES, repeats

from mnist_dist.study.analysis.critical_batch import LEAST_BATCHES, critical
from mnist_dist.study.analysis.intervals import estimates
from mnist_dist.study.analysis.targets import reached_at

BATCHES = tuple(50 * 2**k for k in range(9))  # 50 to 12,800
CURVES = {  # the NLL after so many samples, as a part of those to the target; it is 0.3 there
    "power": lambda part: 0.3 * part**-0.6,
    "exponential": lambda part: 0.1 + 0.2 * np.exp(2 * (1 - part)),
    "power with an offset": lambda part: 0.15 + 0.15 * part**-0.9,
}


def samples_of(size, spread=0.05, count=5, least=30_000, seed=0, batches=BATCHES, noise="normal"):
    """{batch: samples to the target of each run}."""
    random = np.random.default_rng(seed)
    return {batch: least * (1 + batch / size) * repeats(noise, spread, count, random) for batch in batches}


def known(samples, doubt=0.0):
    return {batch: (estimate, doubt) for batch, estimate in
            zip(samples, estimates(list(samples.values())), strict=True)}


def evaluated(batch, samples, every, curve):
    """(row, target) of a run that takes so many samples to NLL 0.3, and is evaluated each `every` samples."""
    steps = max(1, round(every / batch))
    evaluations, step = [], 0
    while not evaluations or evaluations[-1]["test_nll"] > 0.3:
        step += steps
        evaluations.append({"step": step, "samples": step * batch,
                            "test_nll": float(CURVES[curve](step * batch / samples))})
    row = {"global_batch_size": batch, "epochs": [{"step": step + steps, "evaluations": evaluations}]}
    return row, {"target_nll": 0.3, "step": step, "samples": step * batch}


def test_without_spread_it_is_exact():
    size = critical(known(samples_of(1500, spread=0)))
    assert size.twice.value == pytest.approx(1500) and size.least.value == pytest.approx(30_000)
    assert size.more.value == pytest.approx(300)


@pytest.mark.parametrize("curve, every, count, noise, tables", [
    *(("power", every, 5, "normal", 100) for every in (1000, 5000, 10_000)),
    *(pytest.param(curve, every, 5, "normal", 500, marks=pytest.mark.long)
      for curve in CURVES for every in (1000, 5000, 10_000)),
    *(pytest.param("power with an offset", 10_000, count, noise, 500, marks=pytest.mark.long)
      for count in (3, 5, 10) for noise in NOISES if (count, noise) != (5, "normal"))])
def test_the_interval_holds_the_truth_whatever_the_grid_of_evaluations(curve, every, count, noise, tables):
    """30,000 (1 + B / 1500) samples with a spread of 3 %, at batch sizes each four times the one before."""
    batches, held, off = BATCHES[::2], [], []
    for seed in range(tables):
        samples = samples_of(1500, 0.03, count, seed=[seed, every], batches=batches, noise=noise)
        runs = {batch: [reached_at(*evaluated(batch, value, every, curve)) for value in values]
                for batch, values in samples.items()}
        sizes = dict(zip(runs, estimates([[run.samples for run in own] for own in runs.values()]), strict=True))
        size = critical({batch: (sizes[batch], float(np.median([run.doubt for run in own])))
                         for batch, own in runs.items()})
        held.append([size.twice.low <= 1500 <= size.twice.high, size.more.low <= 300 <= size.more.high])
        off.append(size.twice.value / 1500 - 1)
    print(f"{curve}, each {every:,}, {count} runs, {noise}: held {np.mean(held, axis=0)}, "
          f"off by {np.median(np.abs(off)):.1%}")
    assert np.median(np.abs(off)) < 0.1
    assert (np.mean(held, axis=0) >= 0.93 - (0.07 if tables < 500 else 0)).all()


def test_the_noise_scale_is_held_against_it():
    samples, random = samples_of(1500, spread=0.03), np.random.default_rng(1)

    def at(scale):
        return critical(known(samples), {batch: scale * repeats("normal", 0.05, 5, random) for batch in BATCHES[:4]})

    same, half = at(1500), at(750)
    assert same.noise.value == pytest.approx(1500, rel=0.05) and not same.noise_ratio.excludes(1)
    assert half.noise_ratio.value == pytest.approx(0.5, rel=0.15) and half.noise_ratio.excludes(1)
    assert critical(known(samples), {50: []}).noise is None


def test_batches_that_are_large_already_have_no_least_samples():
    reason = critical(known(samples_of(40, spread=0)))
    assert reason == "runs take more than twice the least samples at batch 50 already: run smaller ones"


def test_too_few_batch_sizes_give_a_reason():
    assert f"and {LEAST_BATCHES} are needed" in critical(known(samples_of(1500, batches=(50, 100, 200))))


def test_a_batch_that_is_never_too_large_is_below_it():
    size = critical(known(samples_of(1e6, spread=0)))
    assert np.isinf([size.twice.value, size.twice.high, size.more.value]).all() and size.noise_ratio is None
