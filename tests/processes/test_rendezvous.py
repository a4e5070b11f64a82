"""Those that meet are all there, and run the same: else one line names who does not."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from mnist_dist.errors import UserError
from mnist_dist.processes import rendezvous, stores
from mnist_dist.processes.rendezvous import Facts, Meeting, clocks_apart, difference
from mnist_dist.processes.stores import store_at
from mnist_dist.worker import within


@pytest.fixture
def store():
    return store_at("localhost", 0, setting="MASTER_ADDR", hosts_it=True, is_elsewhere=False, timeout_s=30.0)


def another(store):
    """The connection of another process."""
    return store_at("localhost", store.port, setting="MASTER_ADDR", hosts_it=False, is_elsewhere=False, timeout_s=30.0)


def meet(store, numbers, size, timeout_s=5.0, facts=Facts):
    def one(number):
        try:
            return Meeting(another(store), number, size, timeout_s).facts(replace(facts(), host=f"host{number}"))
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(len(numbers)) as pool:
        return list(pool.map(one, numbers))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_all_know_all(size, store):
    for found in meet(store, range(size), size):
        assert [one.host for one in found] == [f"host{n}" for n in range(size)]
        assert difference(found) is None and clocks_apart(found) is None
        assert all(abs(one.clock - time.time()) < 5.0 and "torch" in one.versions for one in found)


def test_who_does_not_come_is_named(store):
    assert meet(store, [0, 2, 4], 5, timeout_s=1.0) == [
        "process 1, 3 of 5 did not come within 1 s: start it, or see what it says (the first is 0)"] * 3


def test_a_second_start_of_the_same_number(store):
    said = meet(store, [0, 1, 1], 2)
    assert [one for one in said if isinstance(one, str)] == [
        "process 1 has been started on host1 before, and process 0 still belongs to that start: wait until it has "
        "ended too, and start all again"]


def test_two_hosts_with_one_number(store):
    meet(store, [0, 1], 2)
    with pytest.raises(UserError, match=r"process 1 is there twice, on host1 and on b: give each another number"):
        Meeting(another(store), 1, 2, 5.0).facts(Facts("b"))


def test_a_store_that_is_lost(store, monkeypatch):
    monkeypatch.setattr(rendezvous, "ASK_SECONDS", 0.3)
    guest = Meeting(store, 1, 2, 5.0)
    monkeypatch.setattr(guest, "store", type("Silent", (), {"compare_set": lambda *_: threading.Event().wait(3)})())
    with pytest.raises(UserError, match=r"lost machine 0 while it waited for the others to start .no answer"):
        guest.facts(Facts())


def test_what_is_different_is_named():
    one = Facts("a", {"torch": "2.15"}, {"lr": 0.1, "seed": 0})
    assert difference([one, one]) is None
    assert difference([one, one, replace(one, host="c", versions={"torch": "2.6"})]) == (
        "torch is 2.15 on a and 2.6 on c: install the same on every machine")
    assert difference([one, replace(one, host="b", options={"lr": 0.1, "seed": 2})]) == (
        "--seed is 0 on a and 2 on b: give the same on every machine")
    assert "--batch-size is None on a and 5 on b" in difference(
        [one, replace(one, host="b", options={**one.options, "batch_size": 5})])


def test_clocks_that_are_apart_are_named():
    one = Facts("a", clock=100.0)
    assert clocks_apart([one, replace(one, host="b", clock=101.9)]) is None
    assert "the clock of a is 7.5 s ahead of that of b" in clocks_apart([one, replace(one, host="b", clock=92.5)])


def test_a_task_that_takes_too_long_is_left_behind():
    assert within(5.0, lambda: 7) == 7
    with pytest.raises(TimeoutError, match=r"no answer within 0.1 s"):
        within(0.1, lambda: threading.Event().wait(2))


def test_an_address_that_cannot_be(monkeypatch):
    monkeypatch.setattr(stores, "NAME_SECONDS", 0.1)
    with pytest.raises(UserError, match=r"no-such-host.invalid does not resolve on .*: MASTER_ADDR must be an IP"):
        store_at("no-such-host.invalid", 1, setting="MASTER_ADDR", hosts_it=False, is_elsewhere=True, timeout_s=1.0)
    with pytest.raises(UserError, match=r"127.0.0.1 is a loopback address on .*, which is another machine"):
        store_at("127.0.0.1", 1, setting="MASTER_ADDR", hosts_it=False, is_elsewhere=True, timeout_s=1.0)


def test_ports(monkeypatch):
    monkeypatch.setattr(stores, "ASK_SECONDS", 1.0)
    with socket.socket() as taken:
        taken.bind(("", 0))
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"does not reach machine 0 at localhost:{port} within 0.3 s .*refused"):
            store_at("localhost", port, setting="MASTER_ADDR", hosts_it=False, is_elsewhere=False, timeout_s=0.3)
        taken.listen()
        with pytest.raises(UserError, match=rf"port {port} is in use on .*: give another one"):
            store_at("localhost", port, setting="MASTER_ADDR", hosts_it=True, is_elsewhere=False, timeout_s=1.0)
    with pytest.raises(UserError, match=r"is machine 0, and does not reach itself at 192.0.2.1"):
        store_at("192.0.2.1", port, setting="MASTER_ADDR", hosts_it=True, is_elsewhere=False, timeout_s=1.0)
