"""`mnist-dist doctor`: whether a machine or a launch is fit for a study."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from mnist_dist.commands.shared import add_launch, spawned, training_config
from mnist_dist.options import SHARED, Parser, add_training
from mnist_dist.processes.launch_environment import Launch


def add_options(parser: Parser) -> None:
    """Add the command's options."""
    add_launch(parser)
    parser.add_argument("--json", action="store_true", help="print JSON, for programs; the exit status is 1 if "
                        "anything is wrong")
    add_training(parser, (*SHARED, "output_dir", "timeout", "wandb"))


def run(args: argparse.Namespace, argv: Sequence[str], launch: Launch) -> int:
    """Examine this machine, or this launch; returns the exit status. Raises `MnistDistError`."""
    config = training_config(args)
    if (status := spawned(args, argv, launch, config)) is not None:
        return status
    from mnist_dist.commands.doctor.doctor import doctor

    return doctor(config, launch, args.json)
