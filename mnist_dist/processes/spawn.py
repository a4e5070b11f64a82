"""Starts the processes of a run on this machine, through torch's elastic launcher; other machines start theirs."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from mnist_dist.errors import MnistDistError, UserError
from mnist_dist.output import complain
from mnist_dist.processes.launch_environment import Launch, child_environment, num_cores
from mnist_dist.processes.rendezvous import Facts, Meeting
from mnist_dist.processes.stores import LOOPBACK, local_store, store_at
from mnist_dist.text import counted, cut, whole

if TYPE_CHECKING:
    from mnist_dist.processes.peer_failure_watch import Watch

PORT = 29500  # where the machines of a run meet, if no other is given


class Machines(NamedTuple):
    """The machines of a run, and this one among them. They meet at a port of machine 0."""

    number: int = 1
    rank: int = 0  # of this machine
    address: str = "localhost"  # of machine 0
    port: int = 0  # 0: a free one, if there is one machine


def read_machines(number: str | None, rank: str | None, address: str | None) -> Machines:
    """The values of --machines, --machine-rank and --address, HOST[:PORT]. Raises `UserError`."""
    if number is None and rank is None and address is None:
        return Machines()
    machines = whole(number or "")
    if not machines:
        raise UserError(f"--machines must be a whole number at least 1, got {cut(number or '')!r}: give the same on "
                        "each machine")
    machine_rank = whole(rank or "")
    if machine_rank is None or machine_rank >= machines:
        raise UserError(f"--machine-rank must be a whole number from 0 to {machines - 1} with --machines {machines}, "
                        f"got {cut(rank or '')!r}: give another one on each machine")
    if address is None:
        raise UserError("--machines needs --address HOST or HOST:PORT, which all machines reach machine 0 by: give the "
                        "same on each machine")
    host, port = address, str(PORT)
    if re.fullmatch(r"\[.*\]:.*|[^:]*:[^:]*", address):  # an IPv6 address has colons too
        host, _, port = address.rpartition(":")
    host = host.strip("[]")
    number_of_port = whole(port)
    if not host or not number_of_port or number_of_port > 65535:
        raise UserError(f"--address must be HOST or HOST:PORT with a port from 1 to 65535, got {cut(address)!r}")
    return Machines(machines, machine_rank, host, number_of_port)


def runs_on_cpu(launch: Launch) -> bool:
    """Whether the processes run on the CPU: because ACCELERATE_USE_CPU asks for it, or there is no CUDA GPU."""
    import torch

    return launch.use_cpu or not torch.cuda.is_available()


def check_gpus(launch: Launch, num_local_processes: int) -> None:
    """Raises `UserError` if the run is on GPUs and this machine has fewer GPUs than processes."""
    import torch

    if not runs_on_cpu(launch) and num_local_processes > torch.cuda.device_count():
        raise UserError(
            f"{num_local_processes} processes on this machine, but {torch.cuda.device_count()} GPUs: start at most one "
            "process per GPU, or set ACCELERATE_USE_CPU=true to run on the CPU"
        )


def too_many(launch: Launch, num_local_processes: int) -> str | None:
    """A warning if there are more processes on the CPU than cores; None if not."""
    if not runs_on_cpu(launch) or num_local_processes <= (cores := num_cores()):
        return None
    return (f"{num_local_processes} processes on {counted(cores, 'core')} take turns: a step takes longer than with "
            f"{counted(cores, 'process', 'processes')}")


def local_number(launch: Launch, asked: int) -> int:
    """Processes to run on this machine: `asked`, where 0 is one for each GPU, or one without GPUs."""
    if asked == 0:
        import torch

        return 1 if runs_on_cpu(launch) else torch.cuda.device_count()
    return asked


def _meeting_place(machines: Machines, timeout_s: float, port: int) -> dict[str, Any]:
    """How torch's launchers on the machines find each other: on one machine, at this port of a store that is there."""
    if machines.number == 1:
        return {"run_id": uuid.uuid4().hex, "rdzv_backend": "static", "rdzv_endpoint": f"{LOOPBACK}:{port}",
                "rdzv_configs": {"rank": 0, "timeout": max(1, round(timeout_s))}}
    host = f"[{machines.address}]" if ":" in machines.address else machines.address
    return {"run_id": "mnist-dist", "rdzv_backend": "static", "rdzv_endpoint": f"{host}:{machines.port}",
            "rdzv_configs": {"rank": machines.rank, "timeout": max(1, round(timeout_s))}}


def _meet(machines: Machines, options: Mapping[str, Any], timeout_s: float) -> Watch:
    """Wait for the other machines, and from then on watch them. Raises `UserError`."""
    from mnist_dist.processes.peer_failure_watch import Watch

    store = store_at(machines.address, machines.port, setting="--address", hosts_it=machines.rank == 0,
                     is_elsewhere=machines.rank > 0, timeout_s=timeout_s)
    Meeting(store, machines.rank, machines.number, timeout_s, "machine").facts(Facts(options=options))
    return Watch(store, machines.rank)


def spawn(launch: Launch, num_processes: int, arguments: Sequence[str], machines: Machines, *, max_restarts: int,
          timeout_s: float, options: Mapping[str, Any]) -> int:
    """Run `mnist-dist ARGUMENTS` in `num_processes` processes on this machine and return their exit status. If one of
    them is lost, all are started again, `max_restarts` times at most. With several `machines` each runs this with the
    same `options`, and waits `timeout_s` for the others.

    Each gets its share of the cores: more OpenMP threads than cores slow a small step a hundredfold. Raises
    `UserError` if there are GPUs, but too few, or if the machines do not find each other.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    check_gpus(launch, num_processes)
    if warning := too_many(launch, num_processes):
        complain("warning", warning)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // num_processes)))
    os.environ["ACCELERATE_USE_CPU"] = str(runs_on_cpu(launch)).lower()
    os.environ.update(child_environment())
    for name in logging.root.manager.loggerDict:  # each has its level
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # the processes print what went wrong
    local = local_store(timeout_s) if machines.number == 1 else None  # kept to the end
    elastic = LaunchConfig(
        min_nodes=machines.number, max_nodes=machines.number, nproc_per_node=num_processes,
        max_restarts=max_restarts, monitor_interval=0.1,
        **_meeting_place(machines, timeout_s, local.port if local else 0),
    )
    watch = _meet(machines, {"processes": num_processes, **options}, timeout_s) if machines.number > 1 else None
    failed = True

    def pass_on(number: int, _frame: object) -> None:
        raise SignalException(f"got signal {number}", sigval=signal.Signals(number))

    signal.signal(signal.SIGUSR1, pass_on)  # as torch does it with SIGTERM and SIGINT
    try:
        elastic_launch(elastic, sys.executable)("-m", "mnist_dist", *arguments)
        failed = False
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if watch and watch.ended:
            raise MnistDistError(watch.ended) from None
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            raise MnistDistError(f"process {rank} of {num_processes} was ended by {name}; the others were stopped"
                                 ) from None
        return failure.exitcode
    except SignalException as error:
        failed = False  # the processes end by themselves, with a checkpoint, on every machine
        return 128 + error.sigval
    except RendezvousError as error:
        raise MnistDistError(f"the machines did not meet again ({' '.join(str(error).split())}): see what machine 0, "
                             f"{machines.address}, says") from None
    finally:
        if watch:
            watch.end(failed=failed)
    return 0
