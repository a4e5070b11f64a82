"""Before the ranks of a launch, or its machines, begin: is everybody there, and do all run the same?

They meet in the launch's store, on machine 0. Each writes what it is, waits until all have, and compares. A store whose
machine is lost blocks whoever asks it, so every question has a time limit of its own.
"""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import socket
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import TimeoutError as FutureTimeout  # the builtin one from Python 3.11 on
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from mnist_dist import __version__
from mnist_dist.errors import UserError
from mnist_dist.output import say
from mnist_dist.processes.addresses import addresses_of, is_loopback
from mnist_dist.processes.launch_environment import BEGUN
from mnist_dist.text import cause, first_line
from mnist_dist.worker import Worker

T = TypeVar("T")
ASK_SECONDS = 10.0  # for the store's answer
POLL_SECONDS = 0.05  # between two looks whether all are there
NAME_SECONDS = 10.0  # for a name to resolve: on a cluster it may come a little after the machine
CLOCK_SECONDS = 2.0  # apart: more is said
LOOPBACK = "127.0.0.1"
NOTICE_SECONDS = 5.0  # after the command's begin: a line says for whom it waits


@functools.cache
def _versions() -> dict[str, str]:
    import torch

    digest = hashlib.sha256()
    root = Path(__file__).resolve().parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return {"mnist_dist": f"{__version__} with source {digest.hexdigest()[:8]}", "torch": torch.__version__,
            "Python": ".".join(platform.python_version_tuple()[:2])}


@dataclass(frozen=True)
class Facts:
    """What one rank, or one machine, is; what must be the same on all but for the host."""

    host: str = field(default_factory=platform.node)
    versions: Mapping[str, str] = field(default_factory=_versions)
    options: Mapping[str, Any] = field(default_factory=dict)
    clock: float = 0.0  # seconds since 1970, when all were there


class Wait:
    """A wait of at most `limit_s` seconds. If it lasts until 5 s after the command's begin, and at least 1 s, a line on
    standard error says for whom, unless that is "", or the wait ends by then.

    `why` says what makes this process wait, if a person may not know: variables that an earlier command has left.
    """

    def __init__(self, limit_s: float, for_whom: Callable[[], str], why: str = "") -> None:
        self.limit_s, self.for_whom, self.why = limit_s, for_whom, why
        self._begin, self._is_said = time.monotonic(), limit_s <= NOTICE_SECONDS
        self.notice_s = max(1.0, NOTICE_SECONDS - (self._begin - BEGUN))

    def is_over(self) -> bool:
        """Whether the time is over."""
        waited = time.monotonic() - self._begin
        if waited > self.notice_s and not self._is_said:
            self._is_said = True
            if whom := self.for_whom():
                because = f" ({self.why} say so: unset these to run one process)" if self.why else ""
                say(f"mnist-dist: {platform.node()} waits for {whom}, for {self.limit_s:g} s at most{because}",
                    is_error=True)
        return waited > self.limit_s

    @property
    def rest_s(self) -> float:
        """Seconds that are left."""
        return self._begin + self.limit_s - time.monotonic()


def within(seconds: float, task: Callable[[], T]) -> T:
    """What `task` returns. Raises `TimeoutError` if it takes longer; it is then left behind in its thread."""
    worker = Worker()
    try:
        return worker.submit(task).result(seconds)
    except FutureTimeout:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    finally:
        worker.close()


def store_at(address: str, port: int, *, setting: str, hosts_it: bool, is_elsewhere: bool, timeout_s: float,
             why: str = "") -> Any:
    """The store at machine 0, made by this process or found. Raises `UserError`. `why`: as in `Wait`.

    `is_elsewhere`: machine 0 is another machine than this one, so that its address cannot be a loopback one. `setting`
    is the option or variable by which a user gives the address.
    """
    from torch.distributed import TCPStore

    def make() -> Any:
        if hosts_it and address == LOOPBACK:
            return _store_on_loopback(port, timeout_s)
        return TCPStore("localhost" if hosts_it else address, port, is_master=hosts_it, multi_tenant=True,
                        timeout=timedelta(seconds=timeout_s), wait_for_workers=False)

    if not hosts_it:
        reach(address, port, setting=setting, is_elsewhere=is_elsewhere, timeout_s=timeout_s, why=why)
    try:
        # with our own look at the port first: torch prints a page about a port that does not answer
        store = within(ASK_SECONDS, make)
        if hosts_it and port and address != LOOPBACK:
            _resolved(address, setting, why)
            _wait_for_port(address, port, ASK_SECONDS, why)
        return store
    except (RuntimeError, OSError) as error:
        if "EADDRINUSE" in str(error) or "in use" in str(error):
            raise UserError(f"port {port} is in use on {platform.node()}: give another one, the same on every machine"
                            ) from None
        reason = first_line(error)
        if hosts_it:
            raise UserError(f"{platform.node()} is machine 0, and does not reach itself at {address}:{port} "
                            f"({reason}): {setting} must be an address of {platform.node()}") from None
        raise UserError(f"{platform.node()} has no store at {address}:{port} ({reason}): is it another program's port?"
                        ) from None


def local_store(timeout_s: float) -> Any:
    """A store for the processes of this machine alone, at a free port of the loopback interface. Raises `OSError`.

    A launcher of torch's in this process that makes a store at that port shares this one's: torch keeps one for each
    port (`multi_tenant`). It would listen on every interface.
    """
    return _store_on_loopback(0, timeout_s)


def _store_on_loopback(port: int, timeout_s: float) -> Any:
    """A store that listens at this port of the loopback interface, or at a free one for 0. Raises `OSError`."""
    from torch.distributed import TCPStore

    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((LOOPBACK, port))
        listener.listen(1024)
        port = listener.getsockname()[1]
    except OSError:
        listener.close()
        raise
    return TCPStore(LOOPBACK, port, is_master=True, timeout=timedelta(seconds=timeout_s), multi_tenant=True,
                    wait_for_workers=False, master_listen_fd=listener.detach())


def reach(address: str, port: int, *, setting: str, is_elsewhere: bool, timeout_s: float, why: str = "") -> None:
    """Wait until machine 0 takes a connection there. Raises `UserError` after the time limit. `setting`: as above."""
    if is_loopback(_resolved(address, setting, why)) and is_elsewhere:
        raise UserError(f"machine 0's address {address} is a loopback address on {platform.node()}, which is another "
                        f"machine: {setting} must be an address that every machine reaches")
    try:
        _wait_for_port(address, port, timeout_s, why)
    except OSError as error:
        raise UserError(f"{platform.node()} does not reach machine 0 at {address}:{port} within {timeout_s:g} s "
                        f"({cause(error)}): start the run there too, check {setting}, and that the port is open"
                        ) from None


def _wait_for_port(address: str, port: int, timeout_s: float, why: str) -> None:
    """Wait until it takes a connection. Raises `OSError`, the last one, after the time limit."""
    wait = Wait(timeout_s, lambda: f"machine 0 at {address}:{port}", why)
    while True:
        try:
            socket.create_connection((address, port), timeout=max(0.1, min(5.0, wait.rest_s))).close()
            return
        except OSError:
            if wait.is_over():
                raise
            time.sleep(0.2)


def _resolved(address: str, setting: str, why: str) -> list[str]:
    wait = Wait(NAME_SECONDS, lambda: f"the address of machine 0, {address}", why)
    while not (addresses := addresses_of(address)):
        if wait.is_over():
            raise UserError(f"machine 0's address {address} does not resolve on {platform.node()}: {setting} must be "
                            "an IP address, or a name that every machine knows")
        time.sleep(0.5)
    return addresses


class Meeting:
    """One process, or machine, among the `number` that meet in the store. Every method raises `UserError`."""

    def __init__(self, store: Any, own_number: int, number: int, timeout_s: float, kind: str = "process", why: str = "",
                 ) -> None:
        from torch.distributed import PrefixStore

        self.store = PrefixStore(f"mnist_dist/{kind}", store)
        self.own, self.number, self.timeout_s, self.kind, self.why = own_number, number, timeout_s, kind, why
        self.worker = Worker()

    def facts(self, facts_here: Facts) -> list[Facts]:
        """Bring this one's facts; those of all, in their order, once all are there and like each other."""
        name = f"{facts_here.host} {uuid.uuid4().hex}"
        first = self._ask(lambda: self.store.compare_set(f"{self.own}/name", "", name)).decode()
        if first != name:
            raise UserError(self._twice(first.rpartition(" ")[0], facts_here.host))
        self._bring("facts", [facts_here.host, dict(facts_here.versions), dict(facts_here.options)])
        facts_of_all = self._all("facts")
        self._bring("clock", time.time())  # all write it at the same time
        clocks = self._all("clock")
        self._bring("read", True)
        if self.own == 0:
            self._all("read")  # the store may end with this process
        self.worker.close()
        all_facts = [Facts(host, versions, options, clock)
                     for (host, versions, options), clock in zip(facts_of_all, clocks, strict=True)]
        if problem := difference(all_facts):
            raise UserError(problem)
        return all_facts

    def _twice(self, first: str, host: str) -> str:
        """What to do on `host` if one with this number has come before, from the host `first`."""
        if first == host:
            return (f"{self.kind} {self.own} has been started on {host} before, and {self.kind} 0 still belongs to "
                    "that start: wait until it has ended too, and start all again")
        return f"{self.kind} {self.own} is there twice, on {first} and on {host}: give each another number"

    def _ask(self, task: Callable[[], T]) -> T:
        try:
            return self.worker.submit(task).result(ASK_SECONDS)
        except (RuntimeError, FutureTimeout) as error:
            reason = first_line(error) if str(error) else "no answer"
            raise UserError(f"{platform.node()} lost machine 0 while it waited for the others to start "
                            f"({reason}): see what machine 0 says") from None

    def _bring(self, name: str, value: object) -> None:
        self._ask(lambda: self.store.set(f"{self.own}/{name}", json.dumps(value)))
        self._ask(lambda: self.store.add(name, 1))

    def _all(self, name: str) -> list[Any]:
        wait = Wait(self.timeout_s, lambda: self._missing(name) if self._is_first(name) else "", self.why)
        while self._ask(lambda: self.store.add(name, 0)) < self.number:
            if wait.is_over():
                raise UserError(f"{self._missing(name)} did not come within {self.timeout_s:g} s: start it, or see "
                                "what it says (the first is 0)")
            time.sleep(POLL_SECONDS)
        names = [f"{n}/{name}" for n in range(self.number)]
        return [json.loads(text) for text in self._ask(lambda: self.store.multi_get(names))]

    def _missing(self, name: str) -> str:
        missing = ", ".join(str(n) for n in range(self.number) if not self._has(n, name))
        return f"{self.kind} {missing} of {self.number}"

    def _is_first(self, name: str) -> bool:
        """Whether nobody with a lower number is there."""
        return not any(self._has(n, name) for n in range(self.own))

    def _has(self, number: int, name: str) -> bool:
        return self._ask(lambda: self.store.check([f"{number}/{name}"]))


def clocks_apart(all_facts: Sequence[Facts]) -> str | None:
    """Which hosts' clocks are apart, in one line; None if none are."""
    low, high = (choose(all_facts, key=lambda facts: facts.clock) for choose in (min, max))
    apart = high.clock - low.clock
    if apart <= CLOCK_SECONDS:
        return None
    return (f"the clock of {high.host} is {apart:.1f} s ahead of that of {low.host}: set them by one time server "
            "(the training does not need it, but times in the record would be wrong)")


def difference(all_facts: Sequence[Facts]) -> str | None:
    """What is not the same on all, in one line; None if nothing is."""
    first = all_facts[0]
    for other in all_facts[1:]:
        for kind in ("versions", "options"):
            ours, theirs = getattr(first, kind), getattr(other, kind)
            for name in {**ours, **theirs}:
                if ours.get(name) != theirs.get(name):
                    what = name if kind == "versions" else f"--{name.replace('_', '-')}"
                    remedy = ("install the same on every machine" if kind == "versions"
                              else "give the same on every machine")
                    return (f"{what} is {ours.get(name)} on {first.host} and {theirs.get(name)} on {other.host}: "
                            f"{remedy}")
    return None
