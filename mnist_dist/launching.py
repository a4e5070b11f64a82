"""How a run's processes are launched on this machine, and what a launcher has told them. No other module reads that.

Under a launcher (`accelerate launch`, `torchrun`, `srun`) the processes are there already. Without one, `spawn` starts
them through torch's elastic launcher. It knows nothing of how they then find each other.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

from mnist_dist.errors import MnistDistError, UserError
from mnist_dist.record.environment import num_cores
from mnist_dist.runner import child_environment


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
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // num_processes)))
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


def precision(asked: str | None) -> str:
    """The mixed precision in force: what was asked for, else the launcher's. Raises `UserError` where it cannot be."""
    wanted = asked or os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if wanted not in ("no", "fp16", "bf16"):
        raise UserError(f"the launcher's mixed precision must be no, fp16 or bf16; got {wanted!r}")
    if wanted == "fp16" and cpu_wanted():
        raise UserError("--mixed-precision fp16 needs a GPU, and this run is on the CPU: give bf16 or no")
    return wanted


def compile_choice(asked: str) -> str:
    """`--compile` in force: a launcher's dynamo backend asks for it where the command line leaves it open."""
    launchers = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    return "on" if asked == "auto" and launchers != "no" else asked
