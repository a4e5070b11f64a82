"""Starts the processes of a run on this machine, through torch's elastic launcher."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence

from mnist_dist.errors import MnistDistError, UserError
from mnist_dist.processes.launch import Launch, child_environment, num_cores


def runs_on_cpu(launch: Launch) -> bool:
    """Whether the processes run on the CPU: because ACCELERATE_USE_CPU asks for it, or there is no CUDA GPU."""
    import torch

    return launch.use_cpu or not torch.cuda.is_available()


def check_gpus(launch: Launch, num_local_processes: int) -> None:
    """Raises `UserError` if the run is on GPUs and this machine has fewer than processes."""
    import torch

    if not runs_on_cpu(launch) and num_local_processes > torch.cuda.device_count():
        raise UserError(
            f"{num_local_processes} processes on this machine, but {torch.cuda.device_count()} GPUs: start at most one "
            "process per GPU, or set ACCELERATE_USE_CPU=true to run on the CPU"
        )


def local_number(launch: Launch, asked: int) -> int:
    """Processes to run on this machine: `asked`, where 0 is one for each GPU, or one without GPUs."""
    if asked == 0:
        import torch

        return 1 if runs_on_cpu(launch) else torch.cuda.device_count()
    return asked


def spawn(launch: Launch, num_processes: int, arguments: Sequence[str], max_restarts: int = 0) -> int:
    """Run `mnist-dist ARGUMENTS` in `num_processes` processes on this machine and return their exit status. If one of
    them is lost, all are started again, `max_restarts` times at most.

    Each gets its share of the cores: more OpenMP threads than cores slow a small step a hundredfold. Raises
    `UserError` if there are GPUs, but too few.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    check_gpus(launch, num_processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // num_processes)))
    os.environ["ACCELERATE_USE_CPU"] = str(runs_on_cpu(launch)).lower()
    os.environ.update(child_environment())
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the processes print what went wrong
    elastic = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=num_processes, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=max_restarts, monitor_interval=0.1,
    )

    def pass_on(number: int, _frame: object) -> None:
        raise SignalException(f"got signal {number}", sigval=signal.Signals(number))

    signal.signal(signal.SIGUSR1, pass_on)  # as torch does it with SIGTERM and SIGINT
    try:
        elastic_launch(elastic, sys.executable)("-m", "mnist_dist", *arguments)
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
