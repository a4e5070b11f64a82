"""Ranks as threads of one process: a `Team` for tests, in which a chosen rank fails, hangs or is slow at a chosen step.

It stands in for the real one wherever only `Team` joins the ranks: the exact step and the evaluation. A step is one
`gather` of a rank. DistributedDataParallel needs real processes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from mnist_dist.errors import MnistDistError
from mnist_dist.processes.team import Team


class Fault(NamedTuple):
    """What happens to `rank` at its `step`-th step, counted from 0: "fail", "hang" or "slow"."""

    rank: int
    step: int
    kind: str


class Meeting:
    """The meeting point of the threads of a run: a barrier with a time limit, and the value of each thread."""

    def __init__(self, size: int, timeout_s: float, faults: Sequence[Fault] = ()) -> None:
        self.size, self.timeout_s, self.faults = size, timeout_s, faults
        self.barrier = threading.Barrier(size)
        self.brought: list[Any] = [None] * size
        self.released = threading.Event()  # ends those that hang

    def exchange(self, rank: int, value: Any) -> list[Any]:
        """The values of all ranks. Raises `RuntimeError` if one does not come, as a collective does."""
        try:
            self.brought[rank] = value
            self.barrier.wait(self.timeout_s)
            brought = list(self.brought)
            self.barrier.wait(self.timeout_s)
            return brought
        except threading.BrokenBarrierError:
            raise RuntimeError(f"a rank did not come within {self.timeout_s:g} s") from None


class ThreadTeam(Team):
    """One rank of a `Meeting`."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.accelerator = Accelerator(cpu=True)
        self.device = torch.device("cpu")
        self.meeting, self.rank, self.size, self.is_main = meeting, rank, meeting.size, rank == 0
        self.steps = 0

    def _step(self) -> None:
        for fault in self.meeting.faults:
            if (fault.rank, fault.step) == (self.rank, self.steps):
                if fault.kind == "fail":
                    self.meeting.barrier.abort()  # as a connection that is closed
                    raise MnistDistError(f"rank {self.rank} fails at step {self.steps}")
                if fault.kind == "hang":
                    self.meeting.released.wait()
                    raise MnistDistError("released")
                time.sleep(0.3)
        self.steps += 1

    def sum(self, tensor: Tensor) -> Tensor:
        total = torch.stack(self.meeting.exchange(self.rank, tensor.clone())).sum(dim=0)
        return tensor.copy_(total)

    def gather(self, tensor: Tensor) -> Tensor:
        self._step()
        return torch.stack(self.meeting.exchange(self.rank, tensor.clone()))

    def max(self, *values: float) -> list[float]:
        return [max(column) for column in zip(*self.meeting.exchange(self.rank, values), strict=True)]

    def run_on(self, where: str, task: Callable[[], Any], *, patient: bool = False) -> Any:
        result = error = None
        if where == "every" or self.is_main:
            try:
                result = task()
            except MnistDistError as raised:
                error = raised
        outcomes = self.meeting.exchange(self.rank, (result, error))
        for _, error in outcomes:
            if error is not None:
                raise error
        return result if where == "every" else outcomes[0][0]

    def barrier(self) -> None:
        self.meeting.exchange(self.rank, None)


def run_ranks(meeting: Meeting, work: Callable[[ThreadTeam], Any]) -> list[Any]:
    """`work` on every rank at once; the result of each, or the exception that ended it. Hanging ranks are released."""
    outcomes: list[Any] = [None] * meeting.size

    def one(team: ThreadTeam) -> None:
        try:
            outcomes[team.rank] = work(team)
        except Exception as error:
            outcomes[team.rank] = error

    threads = [threading.Thread(target=one, args=(ThreadTeam(meeting, rank),)) for rank in range(meeting.size)]
    hung = {fault.rank for fault in meeting.faults if fault.kind == "hang"}
    for thread in threads:
        thread.start()
    for rank, thread in enumerate(threads):
        if rank not in hung:
            thread.join()
    meeting.released.set()
    for thread in threads:
        thread.join()
    return outcomes
