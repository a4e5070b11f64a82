"""Before the ranks of a launch, or its machines, begin: is everybody there, and do all run the same?

They meet in the launch's store (stores.py). Each writes what it is, waits until all have, and compares.
"""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mnist_dist import __version__
from mnist_dist.errors import UserError
from mnist_dist.processes.stores import ASK_SECONDS, Wait
from mnist_dist.text import first_line
from mnist_dist.worker import T, Worker

POLL_SECONDS = 0.05  # between two looks whether all are there
CLOCK_SECONDS = 2.0  # difference of two clocks from which there is a warning


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
    """The facts of a rank or a machine. All but the host must be the same on all."""

    host: str = field(default_factory=platform.node)
    versions: Mapping[str, str] = field(default_factory=_versions)
    options: Mapping[str, Any] = field(default_factory=dict)
    clock: float = 0.0  # seconds since 1970, when all were there


class Meeting:
    """One process, or machine, among the `number` that meet in the store. Every method raises `UserError`."""

    def __init__(self, store: Any, own_number: int, number: int, timeout_s: float, kind: str = "process", why: str = "",
                 ) -> None:
        from torch.distributed import PrefixStore

        self.store = PrefixStore(f"mnist_dist/{kind}", store)
        self.own, self.number, self.timeout_s, self.kind, self.why = own_number, number, timeout_s, kind, why
        self.worker = Worker()

    def facts(self, facts_here: Facts) -> list[Facts]:
        """Write these facts; returns the facts of all, in their order, once all are there and equal."""
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
