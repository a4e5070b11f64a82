"""The launcher's variables in the environment, read once. No other module reads them.

Launchers: torchrun, `accelerate launch` and `mnist-dist train --processes` set RANK and its like, `mpirun` and
`srun` have other variables. Needs no torch.

In one file, because every variable of every launcher is here, and no other module reads one.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mnist_dist.errors import UserError
from mnist_dist.processes.addresses import address_in_slurm, first_host, tasks_per_node
from mnist_dist.text import cut

# Per launcher: rank, world size, rank on this machine, processes on this machine.
TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
)
SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
# With one of these set, Accelerate trains in another way and ignores our options.
OTHER_WAYS = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM",
              "ACCELERATE_USE_PARALLELISM_CONFIG")

BEGUN = time.monotonic()  # when this command began, after the start of Python
FINAL_STATUS = "MNIST_DIST_FINAL_STATUS"  # environment variable, set by our launcher on Ray


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
    is_one_machine: bool = False  # for certain
    has_one_output: bool = False  # what all processes print comes out in one place, as under srun
    variables: str = field(default="", compare=False)  # of another launcher, that give rank and size, with their values

    @property
    def starts_again(self) -> bool:
        """Whether the launcher starts all processes again if one is lost now."""
        return self.restart < self.max_restarts

    @property
    def says_errors(self) -> bool:
        """Whether this process prints an error that all ranks have: one process does for each terminal or log file."""
        return self.rank == 0 or (self.local_rank == 0 and not self.has_one_output)

    @property
    def num_machines(self) -> int:
        """Machines of the run, if all have as many processes as this one."""
        return -(-self.size // self.local_size)


class Place(NamedTuple):
    """What one launcher's variables say of this process: numbers, or None for a variable that is not set."""

    names: tuple[str, ...]  # of the variables, as they are in `TORCH`
    rank: int | None
    size: int | None
    local_rank: int | None
    local_size: int | None

    def shown(self, environment: Mapping[str, str]) -> str:
        """The variables that are set, with their values: `RANK=1 and WORLD_SIZE=2`."""
        words = [f"{name}={cut(environment[name])}" for name in self.names if environment.get(name)]
        return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def read_launch(environment: MutableMapping[str, str] = os.environ) -> Launch:
    """The launch that the environment describes. Raises `UserError` if its variables are incomplete or impossible.

    Under `srun` and `mpirun` the variables that torch and Accelerate read are set too: those of torchrun, and under
    `srun` the address of rank 0 and this process's share of the cores. Variables that are set already win. For a single
    process they are removed: Accelerate would wait for other processes.
    """
    for name in OTHER_WAYS:
        if environment.get(name, "").lower() in ("1", "true", "yes", "y", "t", "on"):
            raise UserError(f"{name}={environment[name]} asks for a way to train that mnist-dist does not have: unset "
                            "it, or choose multi-GPU or multi-CPU in `accelerate config`")
    if "," in environment.get("OMP_NUM_THREADS", ""):  # one number for each level of nesting; Accelerate reads only one
        environment["OMP_NUM_THREADS"] = environment["OMP_NUM_THREADS"].split(",")[0].strip()
    common: dict[str, Any] = {
        "use_cpu": environment.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"),
        "mixed_precision": environment.get("ACCELERATE_MIXED_PRECISION", "no").lower(),
        "compiles": environment.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no",
    }
    place = _place(environment)
    _check(environment, place)
    if place.size is None or place.size == 1:
        launch = Launch(**common)
        if place.size and place.local_rank is not None:
            launch = Launch(**_of_launcher(environment), is_launched=True, **common)
        for names in (TORCH, *MPI):
            for name in names:
                environment.pop(name, None)
        return launch
    if place.names == SLURM:
        _set_for_slurm(environment, place)
    # without a local size, all processes are taken to be on this machine
    launch = Launch(rank=place.rank or 0, size=place.size, local_rank=place.local_rank or 0,
                    local_size=place.local_size or place.size, is_launched=True,
                    is_one_machine=place.local_size == place.size,
                    variables="" if FINAL_STATUS in environment else place.shown(environment),
                    has_one_output=place.names != TORCH or FINAL_STATUS in environment,
                    **_of_launcher(environment), **common)
    for name, value in zip(TORCH, (launch.rank, launch.size, launch.local_rank, launch.local_size), strict=True):
        environment.setdefault(name, str(value))
    return launch


def _of_launcher(environment: Mapping[str, str]) -> dict[str, Any]:
    """Where the processes meet, and what the launcher does if one is lost."""
    return {"master_address": environment.get("MASTER_ADDR") or "localhost",
            "master_port": _number(environment, "MASTER_PORT") or 29500,
            "has_store": environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            "max_restarts": _number(environment, "TORCHELASTIC_MAX_RESTARTS") or 0,
            "restart": _number(environment, "TORCHELASTIC_RESTART_COUNT") or 0,
            "final_status": _number(environment, FINAL_STATUS) or 1}


def _place(environment: Mapping[str, str]) -> Place:
    """This process, from torchrun's variables, or those of MPI or SLURM. Raises `UserError` if they disagree."""
    torchs, *of_mpi = (Place(names, *(_number(environment, name) for name in names)) for names in (TORCH, *MPI))
    if torchs.rank is None and environment.get("SLURM_PTY_PORT") and has_terminal():
        # the shell of `srun --pty`: one shell, whatever the number of tasks. The tasks of an srun that is typed
        # there inherit the variable, and have no terminal
        place = Place(SLURM, None, None, None, None)
    elif torchs.rank is None:
        others = [place for place in (*of_mpi, _slurm(environment)) if place.size is not None]
        # SLURM sets PMI's rank and size too, without the local ones
        place = next((place for place in others if place.local_rank is not None), others[0] if others else torchs)
    else:
        place = torchs
    if place.size is not None and torchs.size not in (None, place.size):
        raise _impossible(environment, "disagree", torchs, place)
    if place.size is None and torchs.size is not None and torchs.size > 1:
        place = torchs
    return place


def _check(environment: Mapping[str, str], place: Place) -> None:
    """Raises `UserError` if the variables of this launcher are incomplete or impossible."""
    rank, size = place.rank, place.size
    if size is None:
        if rank or place.local_rank:
            raise _impossible(environment, f"without {place.names[1]}", place)
    elif size > 1 and rank is None:
        raise _impossible(environment, f"without {place.names[0]}", place)
    elif size == 0 or (rank or 0) >= size:
        raise _impossible(environment, "cannot be: ranks begin with 0", place)
    elif place.local_size == 0 or (place.local_rank or 0) >= (place.local_size or size) or (
            place.local_size or 1) > size:
        raise _impossible(environment, "cannot be: a local rank is below the local size, and that is at most the size",
                          place)
    elif rank and not environment.get("MASTER_ADDR") and (
            place.names == TORCH or (place.names != SLURM and (place.local_size or size) < size)):
        raise _impossible(environment, "without MASTER_ADDR, the host of rank 0", place)


def _impossible(environment: Mapping[str, str], problem: str, *places: Place) -> UserError:
    names = [name for place in places for name in place.names if environment.get(name)]
    shown = " and ".join(filter(None, (place.shown(environment) for place in places)))
    return UserError(f"{shown} {problem}: to run one process, type `unset {' '.join(names)}`; for several, start with "
                     "mnist-dist train --processes, torchrun, mpirun or srun, which set all of them")


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


def has_terminal() -> bool:
    """Whether this process belongs to a terminal, also if its input and output do not."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _number(environment: Mapping[str, str], name: str) -> int | None:
    """The variable's value; None if it is not set, or empty, or -1, Accelerate's word for that. Raises `UserError`."""
    text = environment.get(name, "").strip()
    if text in ("", "-1"):
        return None
    if not re.fullmatch(r"\d{1,18}", text, re.ASCII):
        raise UserError(f"the environment variable {name} must be a whole number at least 0, got {cut(text)!r}: unset "
                        "it, or start with torchrun, mpirun or srun, which set it")
    return int(text)


def _slurm(environment: Mapping[str, str]) -> Place:
    """`srun python train.py`: this task; None for each number outside of a step, and in a step of one task.

    SLURM_NTASKS and SLURM_PROCID are set in a batch script too, which is one process; SLURM_STEP_NUM_TASKS is not.
    """
    rank, size, local_rank, node = (_number(environment, f"SLURM_{name}") for name in (
        "PROCID", "STEP_NUM_TASKS", "LOCALID", "NODEID"))
    if rank is None or size is None or size == 1:
        return Place(SLURM, None, None, None, None)
    local_sizes = tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return Place(SLURM, rank, size, local_rank, local_sizes[min(node or 0, len(local_sizes) - 1)])


def _set_for_slurm(environment: MutableMapping[str, str], place: Place) -> None:
    """Where the tasks of this step meet, and how many threads each has, unless that is set."""
    job, step, cores = (_number(environment, f"SLURM_{name}") for name in ("JOB_ID", "STEP_ID", "CPUS_PER_TASK"))
    if not environment.get("MASTER_ADDR"):
        host = first_host(environment.get("SLURM_STEP_NODELIST", "localhost"))
        environment["MASTER_ADDR"] = address_in_slurm(host, is_elsewhere=environment.get("SLURM_NODEID", "0") != "0")
    # another port for each step of each job, the same for all tasks of a step
    environment.setdefault("MASTER_PORT", str(20_000 + (7 * (job or 0) + (step or 0)) % 10_000))
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores or num_cores() // (place.local_size or 1))))


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
    except (SystemExit, OSError, ValueError, AttributeError):  # no config file: it started as many as asked
        return None


def variables_of(*, rank: int, size: int, local_rank: int, local_size: int, address: str, port: int, restart: int,
                 max_restarts: int, on_cpu: bool, final_status: int) -> dict[str, str]:
    """What torchrun sets, for a process that another launcher starts. Its processes make the store."""
    values = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": local_size,
              "MASTER_ADDR": address, "MASTER_PORT": port, "TORCHELASTIC_RESTART_COUNT": restart,
              "TORCHELASTIC_MAX_RESTARTS": max_restarts, FINAL_STATUS: final_status,
              "ACCELERATE_USE_CPU": str(on_cpu).lower()}
    return {name: str(value) for name, value in values.items()}


def child_environment() -> dict[str, str]:
    """The environment for `python -m mnist_dist` in another process: it runs this code, installed or not."""
    parent = str(Path(__file__).resolve().parents[2])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [parent, os.environ.get("PYTHONPATH")]))}
