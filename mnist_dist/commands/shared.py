"""What several commands share: the options of a launch, their config, and starting the processes."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from mnist_dist.config import TrainConfig
from mnist_dist.errors import UserError
from mnist_dist.options import SHARED
from mnist_dist.processes.launch_environment import Launch, number_asked_of_accelerate
from mnist_dist.processes.spawn import PORT, local_number, read_machines, runs_on_cpu, spawn
from mnist_dist.processes.stop_signals import interrupting
from mnist_dist.record.config_file import from_environment, merged, read_config, read_run_config
from mnist_dist.record.run_folder import CONFIG
from mnist_dist.text import cut, whole

MOST_PROCESSES = 4096  # on a machine


@contextmanager
def writing_to(output_dir: Path) -> Iterator[None]:
    """For code that writes to the folder of --output-dir. Raises `UserError` if that fails."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--output-dir {output_dir} cannot be written ({error.strerror}): give another") from None


def check_alone(args: argparse.Namespace, launch: Launch) -> None:
    """Raises `UserError` if a launcher has started a command that starts the processes of its runs itself."""
    if launch.size > 1:
        raise UserError(f"mnist-dist {args.command} starts its processes itself, and {launch.variables} says that "
                        f"this is process {launch.rank} of {launch.size}: start it without a launcher, or unset these")


def typed_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of training that the command line has."""
    names = {option.name for option in fields(TrainConfig)}
    return {name: value for name, value in vars(args).items() if name in names}


def data_config(args: argparse.Namespace, of_run: Mapping[str, Any] | None = None) -> TrainConfig:
    """The config of a command that reads images and trains no run: the data of `of_run`, if it is given, else the
    defaults, then the environment and the command line. Raises `UserError`.
    """
    options = {name: value for name, value in typed_options(args).items() if name in (*SHARED, "wandb")}
    return merged(of_run or {}, from_environment("mirror"), options)


def add_launch(parser: argparse.ArgumentParser) -> None:
    """Add --processes, --machines, --machine-rank and --address."""
    parser.add_argument("--processes", metavar="N", help="start N processes on this machine: on its GPUs, else its CPU")
    parser.add_argument("--machines", metavar="M", help="run on M machines: the same command on each, but for "
                        "--machine-rank (default 1)")
    parser.add_argument("--machine-rank", metavar="R", help="this machine's number, 0 to M-1; the output folder is on "
                        "machine 0")
    parser.add_argument("--address", metavar="HOST[:PORT]", help="of machine 0, as all machines reach it (port "
                        f"{PORT} unless given)")


def training_config(args: argparse.Namespace) -> TrainConfig:
    """The config from defaults, the run that is continued, the environment, the file that --config names, and the
    command line. Raises `UserError`.
    """
    from_file = read_config(Path(args.config)) if getattr(args, "config", None) else {}
    flags = typed_options(args)
    return merged(_of_continued_run({**from_file, **flags}), from_environment(), from_file, flags)


def _of_continued_run(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the run that these values continue, if there is one. Raises `UserError`.

    Its --max-steps does not hold if --epochs is given: both say how long to train.
    """
    if values.get("resume") is not True or not values.get("output_dir"):
        return {}
    before = read_run_config(Path(str(values["output_dir"]), CONFIG))  # the run itself passes warnings on
    if "epochs" in values:
        before.pop("max_steps", None)
    return before


def spawned(args: argparse.Namespace, argv: Sequence[str], launch: Launch, config: TrainConfig) -> int | None:
    """Start the processes that the command line asks for, here and on other machines, if no launcher has done so; the
    exit status, or None if this process is one of the run. Raises `UserError`.
    """
    asked, wanted_restarts = args.processes, getattr(args, "max_restarts", None)
    if getattr(args, "launcher", "torch") == "ray":
        if not launch.is_launched:
            return _on_ray(args, argv, launch, config)
        asked = wanted_restarts = None  # this is a process that Ray has started
    if asked is not None and not 0 < (whole(asked) or 0) <= MOST_PROCESSES:
        raise UserError(f"--processes must be a whole number from 1 to {MOST_PROCESSES:,}, got {cut(asked)!r}")
    restarts, machines = wanted_restarts or 0, read_machines(args.machines, args.machine_rank, args.address)
    if launch.is_launched:
        started = launch.size if machines.number == 1 else launch.local_size
        if asked is not None and int(asked) != started:
            raise UserError(f"--processes {asked} conflicts with the launcher, which started {started}: remove "
                            f"--processes, or launch {asked}")
        if machines.number > 1 and launch.num_machines != machines.number:
            raise UserError(f"--machines {machines.number} conflicts with the launcher, which runs on "
                            f"{launch.num_machines}: remove --machines")
        if wanted_restarts is not None and restarts != launch.max_restarts:
            raise UserError(f"--max-restarts {restarts} conflicts with the launcher, which has {launch.max_restarts}: "
                            "give it to the launcher")
        config.global_batch_size(launch.size)  # before anything is downloaded or imported
        return None
    wanted = int(asked) if asked else number_asked_of_accelerate()
    number = local_number(launch, 1 if wanted is None else wanted)
    if number == 1 and not restarts and machines.number == 1:
        return None
    config.global_batch_size(number * machines.number)  # before any process is started
    with interrupting():
        return spawn(launch, number, argv, machines, max_restarts=restarts, timeout_s=config.timeout,
                     options=config.common)


def _on_ray(args: argparse.Namespace, argv: Sequence[str], launch: Launch, config: TrainConfig) -> int:
    """Start the processes on a Ray cluster; the exit status. Raises `UserError`."""
    from mnist_dist.processes import ray_launcher

    if (several := ray_launcher.least_and_most(args.processes or "1")) is None:
        raise UserError(f"--processes must be a whole number at least 1, or LEAST:MOST, got {cut(args.processes)!r}")
    (least, most), restarts = several, args.max_restarts or 0
    if args.machines or args.machine_rank or args.address:
        raise UserError("--launcher ray has the cluster's machines: remove --machines, --machine-rank and --address")
    if config.output_dir is None:
        raise UserError("--launcher ray needs --output-dir: a folder that all nodes of the cluster share")
    if (restarts or least < most) and not config.resume:
        raise UserError("--max-restarts and LEAST:MOST processes on Ray need --resume: each start goes on from the "
                        "newest checkpoint")
    for size in range(least, most + 1):
        config.global_batch_size(size)
    group = ray_launcher.Group(least, most, on_gpus=not runs_on_cpu(launch))
    with interrupting():
        return ray_launcher.launch(argv, group, Path(config.output_dir).resolve(), restarts, config.timeout)
