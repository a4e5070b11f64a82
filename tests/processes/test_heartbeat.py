"""Signs of life: a rank that ends is silent, one that hangs is not, and a store that blocks blocks nobody."""

from __future__ import annotations

import threading
import time

import pytest

from mnist_dist.processes import heartbeat
from mnist_dist.processes.heartbeat import Heartbeats


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
    begin = time.monotonic()
    assert ranks[1].silent() == [] and time.monotonic() - begin < 0.1
    time.sleep(0.8)
    assert ranks[1].silent() == [0]
