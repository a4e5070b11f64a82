"""`mnist-dist show`: the tutorial's look at the data and at the untrained model (its steps 1, 2, 3 and 5)."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mnist_dist.commands.shared import data_config, writing_to
from mnist_dist.config import REFERENCE_BATCH_SIZE, TrainConfig
from mnist_dist.console import Console
from mnist_dist.disk.files import make_folder, real
from mnist_dist.options import SHARED, Parser, add_training
from mnist_dist.output import say
from mnist_dist.processes.launch_environment import Launch

if TYPE_CHECKING:
    import torch

    from mnist_dist.data import ImageSets

ROW = 7  # counted from 1, as a person does
GRID = 25


def add_options(parser: Parser) -> None:
    """Add the command's options."""
    parser.add_argument("--output-dir", metavar="DIR", default="show", help="folder for the pictures (default: show)")
    add_training(parser, SHARED)


def run(args: argparse.Namespace, argv: Sequence[str], launch: Launch) -> int:
    """Show the data and the model; returns the exit status. Raises `UserError`."""
    show(data_config(args), Path(args.output_dir))
    return 0


def open_images(config: TrainConfig, note: Callable[[str], None] = lambda line: None) -> ImageSets:
    """The data set that the config names, for a command of one process; `note` gets a line if it is not a known set.
    Raises `UserError`.
    """
    from mnist_dist.data import check_name, load, obtain

    sets = load(obtain(config.dataset, config.data_dir, config.mirror, Console(True).warn), config.data_dir)
    check_name(sets.name, config.data_dir, sets.digest(), note)
    return sets


def _row(values: torch.Tensor) -> str:
    return "\n".join("  " + " ".join(f"{value:7.4f}" for value in part) for part in values.split(7))


def show(config: TrainConfig, output_dir: Path) -> None:
    """Print the look, and draw `digit.png` and `digits.png` into `output_dir`. Raises `UserError`."""
    import torch

    from mnist_dist.data import scale
    from mnist_dist.record.run_pictures import draw_digit, draw_grid
    from mnist_dist.training.model import MLP, flop_per_sample, num_parameters

    notes: list[str] = []
    sets = open_images(config, notes.append)
    images, labels = sets.train.images, sets.train.labels
    output_dir = real(output_dir)
    with writing_to(output_dir):
        make_folder(output_dir)
        draw_digit(images[0], int(labels[0]), output_dir / "digit.png")
        draw_grid(images[:GRID], [str(label) for label in labels[:GRID].tolist()], output_dir / "digits.png", columns=5)

    say(f"1. {sets.name}: {len(sets.train):,} training and {len(sets.test):,} test images")
    say("".join(f"   warning: {line}\n" for line in notes), end="")
    say(f"   an image is {list(images[0].shape)} in [0, 1], its label a scalar; the first label is {labels[0]}")
    say(f"   row {ROW} of the first image:\n{_row(images[0, 0, ROW - 1] / 255)}")
    say(f"   the same scaled to [-1, 1] (mean 0.5, deviation 0.5):\n{_row(scale(images[:1])[0, 0, ROW - 1])}")
    say(f"2. drawn: {output_dir / 'digit.png'} (the first image), {output_dir / 'digits.png'} (the first {GRID})")

    torch.manual_seed(config.seed)
    model = MLP()
    alone = model.probabilities(scale(images[:1]))
    say(f"3. the MLP {'-'.join(map(str, model.sizes))}: {num_parameters(model.sizes):,} parameters, "
        f"{flop_per_sample(model.sizes):,} FLOP per sample and step")
    say("   untrained, its probabilities for the first image are all near 0.1:")
    say("  " + " ".join(f"{probability:.4f}" for probability in alone[0]))

    batch = scale(images[:REFERENCE_BATCH_SIZE])
    within = model.probabilities(batch)
    say(f"4. a batch is {list(batch.shape)}, its prediction {list(within.shape)}")
    say(f"   the first image's prediction within the batch and alone differ by at most "
        f"{(within[0] - alone[0]).abs().max():.1e}")
