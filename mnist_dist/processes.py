"""How the processes of a run start, find each other, agree and part. The only module that reads a launcher's variables.

Under a launcher (`accelerate launch`, `torchrun`, `srun`) the processes are there already: `start` joins them, on GPUs
where there are any and else on the CPU, and refuses a world of another size than was asked for. Without one, `spawn`
starts them on this machine through torch's elastic launcher. Run nothing here directly.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mnist_dist.errors import LostProcess, MnistDistError, UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")
# Setting up may wait for a download, which has time limits of its own; a process that dies is noticed at once.
SETUP_TIMEOUT = timedelta(hours=1)
ROLL_CALL_SECONDS = 3.0  # how long survivors wait for each other's sign of life before they name the lost


def environment_number(names: Sequence[str], default: int) -> int:
    """The first of these variables that is set, as a number."""
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), default)


def launched_size() -> int:
    """Processes that a launcher says there are; 1 where there is no launcher."""
    return environment_number(("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"), 1)


def launched_rank() -> int:
    """This process's rank as its launcher says; 0 where there is no launcher."""
    return environment_number(("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"), 0)


def is_launched() -> bool:
    """Whether a launcher of several processes (perhaps of one) started this process."""
    return "LOCAL_RANK" in os.environ or launched_size() > 1


def cpu_wanted() -> bool:
    """Whether the processes run on the CPU: asked for by ACCELERATE_USE_CPU, or because there is no CUDA GPU."""
    import torch

    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes") or not torch.cuda.is_available()


def check_gpus(num_local_processes: int) -> None:
    """Raises `UserError` where there are GPUs, but fewer than processes on this machine."""
    import torch

    if not cpu_wanted() and num_local_processes > torch.cuda.device_count():
        raise UserError(
            f"{num_local_processes} processes on this machine, but {torch.cuda.device_count()} GPUs: start at most one "
            "process per GPU, or set ACCELERATE_USE_CPU=true to run on the CPU"
        )


def asked_of_accelerate() -> int | None:
    """Processes that a parent `accelerate launch` was asked for but did not start; None where there is no such thing.

    Without several GPUs `accelerate launch --num_processes 2` starts one process and says nothing. It leaves no
    variable that tells, so its command line is read, with its own parser. 0 means one for each GPU.
    """
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return None
    import psutil

    try:
        words = psutil.Process().parent().cmdline()
    except (psutil.Error, AttributeError):
        return None
    start = next((i for i, word in enumerate(words) if Path(word).name in ("launch", "launch.py", "accelerate-launch")
                  or word == "accelerate.commands.launch"), None)
    if start is None:
        return None
    from accelerate.commands.launch import launch_command_parser, load_config_from_file

    try:
        args, _ = launch_command_parser().parse_known_args(words[start + 1 :])
        if args.num_processes is not None:
            return args.num_processes
        return load_config_from_file(args.config_file).num_processes
    except (SystemExit, OSError, ValueError, AttributeError):  # no config file: what it started is what it meant
        return None


def child_environment() -> dict[str, str]:
    """The environment for `python -m mnist_dist` in another process: it runs this very code, installed or not."""
    parent = str(Path(__file__).resolve().parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [parent, os.environ.get("PYTHONPATH")]))}


def local_number(asked: int | None) -> int:
    """Processes to run on this machine: 0 is one for each GPU, or one; None, or no number at all, is one."""
    if asked == 0:
        import torch

        return 1 if cpu_wanted() else torch.cuda.device_count()
    return max(1, asked or 1)


def spawn(num_processes: int, arguments: Sequence[str]) -> int:
    """Run `mnist-dist ARGUMENTS` in `num_processes` processes on this machine and return their exit status.

    Each gets its share of the cores: OpenMP threads in excess of the cores slow a small step a hundredfold.
    Raises `UserError` where there are GPUs, but too few.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    check_gpus(num_processes)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // num_processes)))
    os.environ["ACCELERATE_USE_CPU"] = str(cpu_wanted()).lower()
    os.environ.update(child_environment())
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the processes say what went wrong
    launch = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=num_processes, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=0, monitor_interval=0.1,
    )
    try:
        elastic_launch(launch, sys.executable)("-m", "mnist_dist", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            raise MnistDistError(f"process {rank} of {num_processes} was ended by {name}; the others were stopped"
                                 ) from None
        return failure.exitcode
    except SignalException as error:
        return 128 + error.sigval
    return 0


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

    def agree(self, task: Callable[[], T], *, where: str = "main") -> T:
        """Run `task` on the "main" process, on one per "machine", or "everywhere", and share results and errors.

        The main process's result is everyone's, except "everywhere", where each has its own. Where tasks fail all
        processes raise the first error, so that none waits for one that has left. Collective.
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
            # a download may take longer than --timeout, and has time limits of its own
            dist.all_gather_object(outcomes, (shared, error), group=self._setup if where == "machine" else self._host)
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


def precision(asked: str | None) -> str:
    """The mixed precision in force: what was asked for, else the launcher's. Raises `UserError` where it cannot be."""
    wanted = asked or os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if wanted not in ("no", "fp16", "bf16"):
        raise UserError(f"the launcher's mixed precision must be no, fp16 or bf16; got {wanted!r}")
    if wanted == "fp16" and cpu_wanted():
        raise UserError("--mixed-precision fp16 needs a GPU, and this run is on the CPU: give bf16 or no")
    return wanted


def start(*, timeout_s: float, **accelerator_options: Any) -> Team:
    """Join the processes of this launch. Raises `UserError` where they cannot be joined as asked. Collective."""
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    asked = launched_size()
    check_gpus(environment_number(("LOCAL_WORLD_SIZE",), 1))
    try:
        accelerator = Accelerator(
            cpu=cpu_wanted(),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_s))],
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
