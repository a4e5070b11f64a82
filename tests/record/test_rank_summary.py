"""The meter for any training: what it writes is what a study reads."""

from __future__ import annotations

import json

import pytest

from mnist_dist.record import Meter
from mnist_dist.study.plan.table import read_contract


class Clock:
    """A clock that only moves when it is told to."""

    now = 100.0

    def __call__(self):
        return self.now


def test_warm_up_and_what_is_between_epochs_is_left_out(tmp_path):
    clock, waits = Clock(), []

    def wait():
        waits.append(clock.now)
        clock.now += 0.5  # the device works off its queue

    meter = Meter(warmup_steps=3, synchronize=wait, clock=clock)
    for _ in range(2):
        with meter:
            for samples in (10, 10, 10, 10, 10, 4):
                clock.now += 1.0
                meter.step(samples)
        clock.now += 60  # an evaluation
    tmp_path /= "a/folder/that/is/not/there"
    meter.write(tmp_path, global_batch_size=10, num_processes=3, torch="2.6")
    first, second = meter.epochs
    assert (first["measured_samples"], first["measured_seconds"]) == (24, 3.5), "the wait at its end is the steps' work"
    assert (second["measured_samples"], second["measured_seconds"]) == (54, 6.5)
    assert first["windows"] == [[1, 10, 1.0], [1, 10, 1.0], [1, 4, 1.0]] and len(waits) == 6
    result = read_contract(tmp_path)
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert result["environment"]["num_processes"] == 3 and result["environment"]["torch"] == "2.6"
    assert result["environment"]["device_name"] and result["epochs"] == meter.epochs


def test_a_training_of_nothing_but_warm_up_measures_nothing():
    meter = Meter(warmup_steps=5)
    with meter:
        meter.step(7)
    assert meter.epochs == [{"measured_samples": 0, "measured_seconds": 0.0, "windows": []}]


def test_an_epoch_that_fails_is_not_hidden():
    meter = Meter()
    with pytest.raises(RuntimeError, match="out of memory"), meter:
        raise RuntimeError("out of memory")
