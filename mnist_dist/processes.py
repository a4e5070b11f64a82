"""How the processes of a run find each other, agree and part.

`start` joins those that were launched, on GPUs where there are any and else on the CPU, and refuses a world of another
size than was asked for. It knows nothing of training.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from mnist_dist.errors import LostProcess, MnistDistError, UserError
from mnist_dist.launching import check_gpus, cpu_wanted, environment_number, launched_size

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

T = TypeVar("T")
# Setting up may wait for a download, which has time limits of its own; a process that dies is noticed at once.
SETUP_TIMEOUT = timedelta(hours=1)
ROLL_CALL_SECONDS = 3.0  # how long survivors wait for each other's sign of life before they name the lost


class Team:
    """The processes of a run: who this one is, and how they agree on the host, without touching a GPU's queue."""

    def __init__(self, accelerator: Accelerator, timeout_s: float) -> None:
        import torch.distributed as dist

        self.accelerator = accelerator
        self.size: int = accelerator.num_processes
        self.rank: int = accelerator.process_index
        self.is_main: bool = accelerator.is_main_process
        self._setup = self._host = None
        if self.size > 1:
            self._setup = dist.new_group(backend="gloo", timeout=SETUP_TIMEOUT)
            self._host = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    def highest(self, *values: float) -> list[float]:
        """The largest of each value over all processes. Collective."""
        import torch
        import torch.distributed as dist

        if self.size == 1:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=self._host)
        return numbers.tolist()

    def agree(self, task: Callable[[], T], *, where: str = "main", patient: bool = False) -> T:
        """Run `task` on the "main" process, on one per "machine", or "everywhere", and share results and errors.

        The main process's result is everyone's, except "everywhere", where each has its own. Where tasks fail all
        processes raise the first error, so that none waits for one that has left. `patient` waits longer than
        --timeout, for tasks with a time limit of their own. Collective.
        """
        import torch.distributed as dist

        here = {"main": self.is_main, "machine": self.accelerator.is_local_main_process, "everywhere": True}[where]
        result = error = None
        if here:
            try:
                result = task()
            except MnistDistError as raised:
                error = raised
        outcomes: list[Any] = [(result, error)]
        if self.size > 1:
            outcomes *= self.size
            shared = None if where == "everywhere" else result
            dist.all_gather_object(outcomes, (shared, error), group=self._setup if patient else self._host)
        for _, error in outcomes:
            if error is not None:
                raise error
        return result if where == "everywhere" else outcomes[0][0]

    def roll_call(self) -> list[int]:
        """After a failure: the ranks that give no sign of life within a few seconds. Not collective."""
        import torch.distributed as dist

        try:
            store = dist.distributed_c10d._get_default_store()
            store.set(f"mnist_dist/alive/{self.rank}", "1")
            deadline = time.monotonic() + ROLL_CALL_SECONDS
            missing = set(range(self.size))
            while missing and time.monotonic() < deadline:
                missing = {rank for rank in missing if not store.check([f"mnist_dist/alive/{rank}"])}
                time.sleep(0.1)
            return sorted(missing)
        except (RuntimeError, OSError):  # rank 0 keeps the store where no launcher does
            return [0]

    def part(self) -> None:
        """Meet a last time and end. Without the barrier one run in ten dies at exit, its work done. Collective."""
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()


def ddp_options(compression: str) -> DistributedDataParallelKwargs:
    """How DistributedDataParallel shares gradients: in what precision, by Accelerate's own hooks."""
    from accelerate.utils import DDPCommunicationHookType as Hook
    from accelerate.utils import DistributedDataParallelKwargs

    hooks = {"none": Hook.NO, "fp16": Hook.FP16, "bf16": Hook.BF16, "powersgd": Hook.POWER_SGD}
    return DistributedDataParallelKwargs(comm_hook=hooks[compression])


def start(*, timeout_s: float, kwargs_handlers: Sequence[Any] = (), **accelerator_options: Any) -> Team:
    """Join the processes of this launch. Raises `UserError` where they cannot be joined as asked. Collective."""
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    asked = launched_size()
    check_gpus(environment_number(("LOCAL_WORLD_SIZE",), 1))
    try:
        accelerator = Accelerator(
            cpu=cpu_wanted(),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_s)), *kwargs_handlers],
            **accelerator_options,
        )
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"the {asked} processes of this launch could not be joined: {reason}") from error
    if accelerator.num_processes != asked:
        raise UserError(
            f"{asked} processes were asked for, but this one finds {accelerator.num_processes}: start with "
            f"`mnist-dist train --processes {asked}`, or set ACCELERATE_USE_CPU=true for CPU processes"
        )
    return Team(accelerator, timeout_s)


class StopSignals:
    """While open, SIGTERM, SIGINT and SIGUSR1 are noted in `number` and not obeyed; a second one acts at once."""

    NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def _note(self, number: int, _frame: object) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self._before = {number: signal.signal(number, self._note) for number in self.NUMBERS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()


def lost_process(team: Team, step: int, error: BaseException) -> LostProcess | None:
    """The end of a run after a failed collective: names the processes that were lost; None where all are there."""
    missing = [rank for rank in team.roll_call() if rank != team.rank] if team.size > 1 else []
    if not missing:
        return None
    who = f"process {', '.join(map(str, missing))} of {team.size}"
    return LostProcess(f"process {team.rank} lost {who} after step {step}: {str(error).strip().splitlines()[0]}")
