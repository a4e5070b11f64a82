"""`mnist-dist train`: one run, on one process or several."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from dataclasses import fields

from mnist_dist.commands.shared import add_launch, spawned, training_config
from mnist_dist.config import TrainConfig
from mnist_dist.options import Parser, add_training, reader, whole_from
from mnist_dist.processes.launch_environment import Launch
from mnist_dist.record.run_folder import check_place


def add_options(parser: Parser) -> None:
    """Add the command's options."""
    add_launch(parser)
    parser.add_argument("--launcher", choices=("torch", "ray"), default="torch", help="what starts the processes: "
                        "torch or Ray, on the cluster that RAY_ADDRESS names, else on this machine; there --processes "
                        "is of the whole cluster, N or LEAST:MOST (default torch)")
    parser.add_argument("--max-restarts", metavar="N", type=reader(whole_from(0)), help="if a process is lost, start "
                        "all again, N times at most; they continue from the newest checkpoint (default 0)")
    parser.add_argument("--config", metavar="FILE", help="a run's config.yaml; flags on the command line win")
    add_training(parser, [option.name for option in fields(TrainConfig)])


def run(args: argparse.Namespace, argv: Sequence[str], launch: Launch) -> int:
    """Train, in this process or in new ones; returns the exit status. Raises `MnistDistError`."""
    # imported modules stay: searching them for garbage, again and again, takes a tenth of the start-up
    gc.set_threshold(100_000, 50, 100)
    config = training_config(args)
    check_place(config)  # before any process is started, or anything downloaded
    if (status := spawned(args, argv, launch, config)) is not None:
        return status
    from mnist_dist.training.run import train

    train(config, launch)
    return 0
