"""When a run looks up: at multiples of steps, when the clock says so on any rank, at a signal, and by its own speed."""

from __future__ import annotations

import os
import signal

import pytest

from mnist_dist.config import Every
from mnist_dist.training.pauses import POLL_SECONDS, PauseSchedule


class Alone:
    """A team of one."""

    def max(self, *values):
        return list(values)


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def schedule_of(number, unit, num_batches=11, team=None):
    clock = Clock()
    return PauseSchedule(Every(number, unit), num_batches, team or Alone(), clock), clock


def pauses(schedule, clock, epoch, num_steps, seconds_per_step=0.001):
    """The steps of an epoch at which the run pauses, as the trainer's loop asks."""
    found, step = [], 0
    while step < num_steps:
        stop = min(num_steps, schedule.next_stop(epoch, step))
        clock.now += (stop - step) * seconds_per_step
        schedule.poll(stop - step)
        step = stop
        if schedule.is_pause_due(epoch, step):
            found.append(step)
            schedule.saved()
    return found


@pytest.mark.parametrize(("number", "epoch", "expected"), [
    (5, 0, [5, 10]), (5, 1, [4, 9]), (11, 0, [11]), (11, 1, [11]), (7, 0, [7]), (7, 1, [3, 10]),
    (1, 0, [*range(1, 12)]), (100, 0, []),
])
def test_multiples_of_steps_are_counted_over_the_run(number, epoch, expected):
    schedule, clock = schedule_of(number, "steps")
    assert pauses(schedule, clock, epoch, 11) == expected


def test_the_clock():
    schedule, clock = schedule_of(2, "seconds", 10_000)
    found = pauses(schedule, clock, 0, 10_000)
    assert len(found) in (4, 5) and all(1_900 <= b - a <= 2_600 for a, b in zip([0, *found], found, strict=False))


def test_a_clock_that_is_due_on_another_rank_is_due_here():
    class Other(Alone):
        def max(self, signal, due, per_step):
            return [signal, True, per_step]

    schedule, _ = schedule_of(3600, "seconds", team=Other())
    assert not schedule.is_pause_due(0, 1)
    schedule.poll(1)
    assert schedule.is_pause_due(0, 1)


def test_it_looks_up_about_every_half_second():
    schedule, clock = schedule_of(0, "epochs", 10**6)
    assert schedule.next_stop(0, 0) == 1, "its speed is not known yet"
    for steps in (1, 2, 4, 8, 16, 32, 64):
        clock.now += steps / 256
        schedule.poll(steps)
        assert schedule.next_stop(0, 0) == 2 * steps, "at most twice as far as before"
    clock.now += 128 / 256
    schedule.poll(128)
    assert schedule.next_stop(0, 1) == 1 + int(POLL_SECONDS * 256)
    clock.now += 3.0
    schedule.poll(1)
    assert schedule.next_stop(0, 1) == 2


@pytest.mark.parametrize(("number", "unit", "after"), [
    (1, "epochs", [0, 1, 2, 3]), (2, "epochs", [1, 3]), (22, "steps", [1, 3]), (5, "steps", []), (0, "epochs", []),
])
def test_after_an_epoch(number, unit, after):
    schedule, _ = schedule_of(number, unit)
    assert [epoch for epoch in range(4) if schedule.is_checkpoint_due_after(epoch)] == after
    assert schedule.is_on == (number > 0)


def test_a_signal_pauses_and_is_a_reason_to_save():
    schedule, _ = schedule_of(2, "epochs")
    with schedule.signals:
        os.kill(os.getpid(), signal.SIGUSR1)
    assert schedule.stop_signal == 0, "not before the ranks have agreed"
    schedule.poll()
    assert schedule.stop_signal == signal.SIGUSR1
    assert schedule.is_pause_due(0, 3) and schedule.is_checkpoint_due_after(0)
