"""Signs of life: a rank that ends is silent, one that hangs is not, and a store that blocks blocks nobody.

What waits for the device ends when a rank is silent, or after the time limit.
"""

from __future__ import annotations

import threading
import time

import pytest

from mnist_dist.processes import heartbeat, team
from mnist_dist.processes.heartbeat import Heartbeats
from mnist_dist.processes.team import Team


class Store:
    """A store in memory; `lost` makes it block, as one on a machine that is gone."""

    def __init__(self):
        self.values, self.lost = {}, threading.Event()
        self.found = threading.Event()

    def set(self, key, value):
        self._block()
        self.values[key] = value.encode()

    def multi_get(self, keys):
        self._block()
        return [self.values[key] for key in keys]

    def _block(self):
        if self.lost.is_set():
            self.found.wait()


@pytest.fixture
def ranks(monkeypatch):
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(heartbeat, "SILENT_SECONDS", 0.5)
    store = Store()
    made = [Heartbeats(store, rank, 3) for rank in range(3)]
    yield made
    store.found.set()
    for one in made:
        one.stop()


def test_all_are_alive(ranks):
    assert ranks[0].silent() == [], "nobody has asked"
    ranks[0].ask()
    time.sleep(0.8)
    assert ranks[0].silent() == [] and sorted(ranks[0].busy()) == [0, 1, 2]


def test_a_rank_that_has_ended_is_silent(ranks):
    ranks[2].stop()
    for looking in ranks[:2]:
        looking.ask()
    assert ranks[0].silent() == [], "not yet"
    time.sleep(0.8)
    assert ranks[0].silent() == ranks[1].silent() == [2]
    ranks[0].rest()
    assert ranks[0].silent() == []
    ranks[0].ask()
    assert ranks[0].silent() == [], "counted anew"


def test_a_rank_that_is_stuck_says_so(ranks):
    ranks[0].is_stuck = ranks[1].is_stuck = True
    ranks[0].ask()
    time.sleep(0.3)
    assert ranks[0].busy() == [2]


def test_a_store_that_does_not_answer_is_rank_0s(ranks):
    ranks[1].ask()
    time.sleep(0.1)
    ranks[1].store.lost.set()
    assert ranks[1].silent() == [], "nor does asking block"
    time.sleep(0.8)
    assert ranks[1].silent() == [0]


class Event:
    """An event that the device comes to after so many seconds."""

    def __init__(self, seconds=10.0):
        self.at = time.monotonic() + seconds

    def query(self):
        return time.monotonic() > self.at


def waiting(ranks, timeout_s):
    """A team of rank 0, without the collectives."""
    made = Team.__new__(Team)
    made.rank, made.size, made.timeout_s, made.heartbeats = 0, len(ranks), timeout_s, ranks[0]
    made.hosts, made.signs = len(ranks) * ["attic"], 0
    return made


def test_waiting_for_the_device_ends_when_it_has_come(ranks):
    waiting(ranks, 5.0).wait_for(Event(0.01))
    alone = waiting(ranks[:1], 0.0)
    alone.wait_for(Event(0.5))  # one rank waits for no other, so that there is no time limit
    assert ranks[0].silent() == []


def test_waiting_for_the_device_ends_when_a_rank_is_lost_or_takes_too_long(ranks, monkeypatch):
    monkeypatch.setattr(team, "ASK_SECONDS", 0.1)
    with pytest.raises(RuntimeError, match="timed out after 1 s"):
        waiting(ranks, 1.0).wait_for(Event())
    lost = waiting(ranks, 1.0).lost_process(7, RuntimeError("timed out"))
    assert ("timed out waiting for process 1, 2 of 3 on attic, which is still running, after step 7: timed out"
            in str(lost))
    assert waiting(ranks, 1.0).lost_process(7, RuntimeError("an error of this rank")) is None
    ranks[1].stop()
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match="waits for it"):
        waiting(ranks, 60.0).wait_for(Event())
    assert time.monotonic() - begin < 5
    lost = waiting(ranks, 60.0).lost_process(7, RuntimeError("the GPU waits for it"))
    assert "process 0 lost process 1 of 3 on attic after step 7" in str(lost)
