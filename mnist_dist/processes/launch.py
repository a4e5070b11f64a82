"""The launcher's variables in the environment, read once. No other module reads them.

Launchers: torchrun, `accelerate launch` and `mnist-dist train --processes` set RANK and its like, `mpirun` and
`srun` have variables of their own. Needs no torch.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Per launcher: rank, world size, rank on this machine, processes on this machine.
TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
MPI = (
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
)

FINAL_STATUS = "MNIST_DIST_FINAL_STATUS"  # environment variable, set by our own launchers


@dataclass(frozen=True, kw_only=True)
class Launch:
    """This process among those that its launcher started; without a launcher, the only one."""

    rank: int = 0
    size: int = 1  # the world size
    local_rank: int = 0
    local_size: int = 1
    master_address: str = "localhost"  # of the machine where the processes find each other
    master_port: int = 29500
    has_store: bool = False  # the launcher keeps the store in which they do
    max_restarts: int = 0  # how often the launcher starts all processes again if one is lost
    restart: int = 0  # how often it has done so
    final_status: int = 1  # exit status for an error that stays the same in another start, if the launcher asks for one
    is_launched: bool = False  # by a launcher that starts the processes of a run (perhaps one)
    use_cpu: bool = False  # although there may be a GPU
    mixed_precision: str = "no"  # as the launcher says it, not checked: an option may replace it
    compiles: bool = False

    @property
    def starts_again(self) -> bool:
        """Whether the launcher starts all processes again if one is lost now."""
        return self.restart < self.max_restarts

    @property
    def num_machines(self) -> int:
        """Machines of the run, if all have as many processes as this one."""
        return -(-self.size // self.local_size)


def read_launch(environment: MutableMapping[str, str] = os.environ) -> Launch:
    """The launch that the environment describes.

    Under `srun` and `mpirun` the variables that torch and Accelerate read are set too: those of torchrun, and under
    `srun` the address of rank 0 and this process's share of the cores. Variables that are set already win.
    """
    common: dict[str, Any] = {
        "use_cpu": environment.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"),
        "mixed_precision": environment.get("ACCELERATE_MIXED_PRECISION", "no").lower(),
        "compiles": environment.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no",
    }
    for names in (TORCH, *MPI):
        rank, size, local_rank, local_size = (_number(environment, name) for name in names)
        if size is not None and (size > 1 or local_rank is not None):
            break
    else:
        rank, size, local_rank, local_size = _slurm(environment)
    if size is None or (size == 1 and local_rank is None):
        return Launch(**common)
    # without a local size, all processes are taken to be on this machine
    launch = Launch(rank=rank or 0, size=size, local_rank=local_rank or 0, local_size=local_size or size,
                    master_address=environment.get("MASTER_ADDR", "localhost"),
                    master_port=_number(environment, "MASTER_PORT") or 29500,
                    has_store=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
                    max_restarts=_number(environment, "TORCHELASTIC_MAX_RESTARTS") or 0,
                    restart=_number(environment, "TORCHELASTIC_RESTART_COUNT") or 0,
                    final_status=_number(environment, FINAL_STATUS) or 1, is_launched=True, **common)
    for name, value in zip(TORCH, (launch.rank, launch.size, launch.local_rank, launch.local_size), strict=True):
        environment.setdefault(name, str(value))
    return launch


def num_cores() -> int:
    """Cores that this process may use: those of its affinity, and no more than its container's share."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = cores_of_container()
    return allowed if share is None else max(1, min(allowed, math.floor(share)))


def cores_of_container(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """The processor time that this process's cgroup may use, in cores; None without a limit. Version 2, then 1."""
    try:
        places = [line.rsplit(":", 1)[1].lstrip("/") for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        places = []
    for folder in dict.fromkeys([*(root / place for place in places), root, root / "cpu"]):
        try:
            if (folder / "cpu.max").exists():
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        except (OSError, ValueError):
            continue
        if quota != "max" and int(quota) > 0:
            return int(quota) / int(period)
    return None


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name, "")
    return int(text) if text.isdigit() else None


def _slurm(environment: MutableMapping[str, str]) -> tuple[int | None, ...]:
    """`srun python train.py`: (rank, size, local rank, local size) of this task; None for each outside of a step.

    SLURM_NTASKS and SLURM_PROCID are set in a batch script too, which is one process; SLURM_STEP_NUM_TASKS is not.
    """
    rank, size, local_rank, node, job, step = (_number(environment, f"SLURM_{name}") for name in (
        "PROCID", "STEP_NUM_TASKS", "LOCALID", "NODEID", "JOB_ID", "STEP_ID"))
    if rank is None or size is None or size == 1:
        return None, None, None, None
    local_size = tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))[node or 0]
    environment.setdefault("MASTER_ADDR", first_host(environment.get("SLURM_STEP_NODELIST", "localhost")))
    # another port for each step of each job, the same for all tasks of a step
    environment.setdefault("MASTER_PORT", str(20_000 + (7 * (job or 0) + (step or 0)) % 10_000))
    cores = _number(environment, "SLURM_CPUS_PER_TASK") or num_cores() // local_size
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores)))
    return rank, size, local_rank, local_size


def tasks_per_node(text: str) -> list[int]:
    """SLURM's list of tasks on each node: `2(x3),1` is [2, 2, 2, 1]."""
    pairs = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, times in pairs for _ in range(int(times or 1))] or [1]


def first_host(nodes: str) -> str:
    """The first host of SLURM's list of nodes: `gpu[07-09,12],login` has gpu07 first."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", nodes)
    return "".join(part or "" for part in match.groups()) if match else "localhost"


def number_asked_of_accelerate(environment: Mapping[str, str] = os.environ) -> int | None:
    """Processes that a parent `accelerate launch` was asked for but did not start; None if there is no such parent.

    Without several GPUs `accelerate launch --num_processes 2` starts one process without a warning. No
    variable holds the number, so its command line is read, with its own parser. 0 means one for each GPU.
    """
    if "ACCELERATE_MIXED_PRECISION" not in environment:
        return None
    import psutil

    try:
        words = psutil.Process().parent().cmdline()  # type: ignore[union-attr]
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


def variables_of(*, rank: int, size: int, local_rank: int, local_size: int, address: str, port: int, restart: int,
                 max_restarts: int, on_cpu: bool, final_status: int) -> dict[str, str]:
    """What torchrun sets, for a process that another launcher starts. Its processes make a store of their own."""
    values = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": local_size,
              "MASTER_ADDR": address, "MASTER_PORT": port, "TORCHELASTIC_RESTART_COUNT": restart,
              "TORCHELASTIC_MAX_RESTARTS": max_restarts, FINAL_STATUS: final_status,
              "ACCELERATE_USE_CPU": str(on_cpu).lower()}
    return {name: str(value) for name, value in values.items()}


def child_environment() -> dict[str, str]:
    """The environment for `python -m mnist_dist` in another process: it runs this code, installed or not."""
    parent = str(Path(__file__).resolve().parents[2])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [parent, os.environ.get("PYTHONPATH")]))}
