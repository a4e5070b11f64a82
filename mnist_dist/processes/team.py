"""The ranks of a run: this rank, the world size, and every collective that the package uses.

Two kinds of meeting: `sum`, `gather` and `average` exchange tensors on the device; `max`, `run_on` and `barrier` agree
on the host, over gloo, without waiting for a GPU's queue. All are collective: every rank makes the same calls in the
same order. It knows nothing of training.

In one file, because every collective is here: their order on all ranks can be read in one place.
"""

from __future__ import annotations

import functools
import platform
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mnist_dist.errors import LostProcess, MnistDistError, NotJoined, UserError
from mnist_dist.processes.heartbeat import Heartbeats
from mnist_dist.processes.launch_environment import Launch
from mnist_dist.processes.network_interface import remedy
from mnist_dist.processes.rendezvous import Facts, clocks_apart
from mnist_dist.processes.restarts import RestartState
from mnist_dist.processes.spawn import check_gpus, runs_on_cpu
from mnist_dist.text import first_line

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

T = TypeVar("T")
# For tasks that have a time limit, such as a download. A process that dies is noticed at once.
PATIENT_TIMEOUT = timedelta(hours=1)
POLL_SECONDS = 50e-6  # between two looks at an event
ASK_SECONDS = 2.0  # of waiting for the device; then this rank looks for the others' signs of life


class Team:
    """This process among the `size` ranks of a run."""

    def __init__(self, accelerator: Accelerator, timeout_s: float, restart_state: RestartState | None = None,
                 facts: Sequence[Facts] = ()) -> None:
        self.accelerator = accelerator
        self.restart_state = restart_state  # if the launcher may start the processes again
        self.device: torch.device = accelerator.device
        self.size: int = accelerator.num_processes
        self.rank: int = accelerator.process_index
        self.is_main: bool = accelerator.is_main_process
        self.timeout_s = timeout_s
        self._releases: list[Callable[[], None]] = []
        # spent exchanging tensors, which is mostly waiting for slower ranks; 0 if the host does not wait
        self.exchange_seconds = 0.0
        self.signs = 0  # of this rank's main thread: it counts while it waits for the device
        self.hosts = [fact.host for fact in facts] or [platform.node()]  # of each rank
        self.clocks_apart = clocks_apart(facts) if facts else None  # which are, in a line
        if self.size > 1:
            store = dist.distributed_c10d._get_default_store()
            self.heartbeats = Heartbeats(store, self.rank, self.size)  # before the collectives that make the groups
            self._patient: Any = dist.new_group(backend="gloo", timeout=PATIENT_TIMEOUT)
            self._host: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    @property
    def is_cuda(self) -> bool:
        """Whether the host queues its work for the device and does not wait for it: on a GPU."""
        return self.device.type == "cuda"

    def sum(self, tensor: Tensor) -> Tensor:
        """All-reduce in place: `tensor` becomes the sum over ranks, on every rank, and is returned. Collective."""
        if self.size > 1:
            with self.exchanging():
                dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """All-gather: [P, *shape], the tensor of each rank, in the order of the ranks, on every rank. Collective."""
        if self.size == 1:
            return tensor.unsqueeze(0)
        gathered = tensor.new_empty(self.size, *tensor.shape)
        with self.exchanging():
            dist.all_gather(list(gathered.unbind()), tensor.contiguous())
        return gathered

    def swap(self, tensor: Tensor, partner: int) -> Tensor:
        """Send this rank's tensor to the partner and return the partner's. The lower rank sends first. Both ranks call
        it, with tensors of one shape.
        """
        received = torch.empty_like(tensor)
        sends, receives = functools.partial(dist.send, tensor, partner), functools.partial(dist.recv, received, partner)
        for task in (sends, receives) if self.rank < partner else (receives, sends):
            task()
        return received

    @contextmanager
    def exchanging(self) -> Iterator[None]:
        """The time inside counts as exchange of tensors with other ranks."""
        begin = time.perf_counter()
        yield
        self.exchanged_since(begin)

    def exchanged_since(self, begin: float) -> None:
        """Count the time since this reading of `time.perf_counter` as exchange of tensors."""
        if not self.is_cuda:
            self.exchange_seconds += time.perf_counter() - begin

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Each tensor becomes its mean over ranks, in place. Collective."""
        for tensor in tensors:
            self.sum(tensor).mul_(1 / self.size)

    def max(self, *values: float) -> list[float]:
        """The largest of each value over ranks, on the host. Collective."""
        if self.size == 1:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=self._host)
        return numbers.tolist()

    def share(self, value: T) -> list[T]:
        """The value of each rank, in the order of the ranks, on every rank. Collective."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self._host)
        return values

    def run_on(self, where: str, task: Callable[[], T], *, patient: bool = False) -> T:
        """Run `task` on the "main" rank, on one rank per "machine", or on "every" rank; share results and errors.

        Returns the main rank's result, or with "every" this rank's own. If a task raises a `MnistDistError`, every
        rank raises the first one, so that none waits for a rank that has left. `patient` waits longer than --timeout,
        for tasks that have a time limit. Collective.
        """
        here = {"main": self.is_main, "machine": self.accelerator.is_local_main_process, "every": True}[where]
        result: Any = None
        error: MnistDistError | None = None
        if here:
            try:
                result = task()
            except MnistDistError as raised:
                error = raised
        outcomes: list[Any] = [(result, error)]
        if self.size > 1:
            outcomes *= self.size
            shared = None if where == "every" else result
            dist.all_gather_object(outcomes, (shared, error), group=self._patient if patient else self._host)
        for rank, (_, error) in enumerate(outcomes):
            if type(error) in (UserError, MnistDistError) and len(set(self.hosts)) > 1:
                raise type(error)(f"on {self.hosts[rank]}: {error}")
            if error is not None:
                raise error
        return result if where == "every" else outcomes[0][0]

    def barrier(self) -> None:
        """Wait until every rank is here. Collective."""
        if self.size > 1:
            dist.barrier(group=self._host)

    def synchronize(self) -> None:
        """Wait until the device's queue is empty and every rank is here. Collective."""
        self.wait_for_device()
        self.barrier()

    def wait_for_device(self) -> None:
        """Wait until the device's queue is empty. Raises as `wait_for`."""
        if self.is_cuda:
            event = torch.cuda.Event()
            event.record()
            self.wait_for(event)

    def wait_for(self, event: torch.cuda.Event) -> None:
        """Wait until the device has come to this event. Raises `RuntimeError`, as a failed collective does, if it waits
        for a rank that is lost, or longer than --timeout.

        CUDA's own ways to wait have no time limit, and no signal ends them: a recorded all-reduce that lacks a rank
        would hold them for ever.
        """
        begin = time.monotonic()
        while not event.query():
            time.sleep(POLL_SECONDS)
            self.signs += 1
            waited = time.monotonic() - begin
            if self.size == 1 or waited < ASK_SECONDS:
                continue
            self.heartbeats.ask()
            if self.others(self.heartbeats.silent()):
                raise RuntimeError("the GPU waits for it")
            if waited > self.timeout_s:
                raise RuntimeError(f"timed out after {self.timeout_s:g} s, in which the GPU waits")
        if self.size > 1:
            self.heartbeats.rest()

    def before_end(self, release: Callable[[], None]) -> None:
        """Call `release` before the ranks part, when the device's queue is empty."""
        self._releases.append(release)

    def end(self) -> None:
        """Release what was kept, final barrier, then end Accelerate. Without the barrier one run in ten crashes at
        exit. Collective.
        """
        self.wait_for_device()
        for release in self._releases:
            release()
        self.barrier()
        if self.size > 1:
            self.heartbeats.stop()
            self.barrier()  # so that no rank's thread is in the store when it ends
        self.accelerator.end_training()

    def lost_process(self, step: int, error: RuntimeError, *, starts_again: bool = False) -> LostProcess | None:
        """After a failed collective: the error that names the lost ranks, or those that are alive and do not come;
        None if the error is this rank's own. Takes some seconds, so it names none if the launcher `starts_again`. Not
        collective.
        """
        if self.size == 1:
            return None
        reason = first_line(error)
        if starts_again and re.search("gloo|nccl|connection", reason, re.IGNORECASE):
            return LostProcess(f"process {self.rank} lost another one after step {step} ({reason}): the launcher "
                               "starts all processes again")
        self.heartbeats.is_stuck = True
        if missing := self.others(self.heartbeats.look()):
            return LostProcess(f"process {self.rank} lost {self.named(missing)} after step {step}: {reason}")
        if not re.search("timed? ?out", reason, re.IGNORECASE):
            return None
        busy = self.others(self.heartbeats.busy())
        for_whom = self.named(busy) if busy else "another process"
        return LostProcess(f"process {self.rank} timed out waiting for {for_whom}, which is still running, after step "
                           f"{step}: {reason}")

    def others(self, ranks: Iterable[int]) -> list[int]:
        """These ranks without this one, in their order."""
        return sorted(rank for rank in ranks if rank != self.rank)

    def named(self, ranks: Sequence[int]) -> str:
        """These ranks and their hosts, in words."""
        hosts = ", ".join(dict.fromkeys(self.hosts[rank] for rank in ranks))
        return f"process {', '.join(map(str, ranks))} of {self.size} on {hosts}"


def ddp_options(compression: str) -> DistributedDataParallelKwargs:
    """How DistributedDataParallel exchanges gradients: in which precision, by Accelerate's own hooks."""
    from accelerate.utils import DDPCommunicationHookType as Hook
    from accelerate.utils import DistributedDataParallelKwargs

    hooks = {"none": Hook.NO, "fp16": Hook.FP16, "bf16": Hook.BF16, "powersgd": Hook.POWER_SGD}
    return DistributedDataParallelKwargs(comm_hook=hooks[compression])


def join(launch: Launch, *, timeout_s: float, options: Mapping[str, Any] = {}, kwargs_handlers: Sequence[Any] = (),
         **accelerator_options: Any) -> Team:
    """Join the processes of this launch, which must have the same `options`. Raises `UserError` if they cannot be
    joined; on the first process of each machine it is `NotJoined`, which is always printed. Collective.
    """
    from accelerate import Accelerator

    kind = NotJoined if launch.local_rank == 0 else UserError
    check_gpus(launch, launch.local_size)
    on_cpu, restart_state, facts = runs_on_cpu(launch), None, []
    try:
        if launch.size > 1 or launch.max_restarts:
            restart_state = RestartState(launch, timeout_s)
        if restart_state and launch.size > 1:
            if not on_cpu:
                torch.cuda.set_device(launch.local_rank)
            facts = restart_state.meet(Facts(options=options), "gloo" if on_cpu else "nccl")
        accelerator = Accelerator(cpu=on_cpu, kwargs_handlers=[*kwargs_handlers], **accelerator_options)
        team = Team(accelerator, timeout_s, restart_state if launch.max_restarts else None, facts)
    except UserError as error:
        raise kind(str(error)) from error
    except (RuntimeError, ValueError, OSError) as error:
        reason = first_line(error)
        raise kind(f"the {launch.size} processes of this launch could not be joined ({reason}){remedy(launch)}"
                   ) from error
    if accelerator.num_processes != launch.size:
        raise UserError(
            f"{launch.size} processes were asked for, but this one finds {accelerator.num_processes}: start with "
            f"`mnist-dist train --processes {launch.size}`, or set ACCELERATE_USE_CPU=true for CPU processes"
        )
    return team
