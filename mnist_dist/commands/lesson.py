"""`mnist-dist lesson`: what a mini-batch changes, measured on this machine in at most 90 seconds.

The first training takes one sample at a time, `SAMPLES` in all; its time is the time of every batch size. The
steps are those of `mnist-dist train --compile off`. Evaluations are off the clock.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mnist_dist.commands.shared import check_alone, data_config, writing_to
from mnist_dist.commands.show import open_images
from mnist_dist.config import TrainConfig
from mnist_dist.disk.files import make_folder, real, replace_synced
from mnist_dist.options import SHARED, Parser, add_training
from mnist_dist.output import say
from mnist_dist.processes.launch_environment import Launch
from mnist_dist.tables import number, table

if TYPE_CHECKING:
    from mnist_dist.data import ImageSets
    from mnist_dist.processes.team import Team
    from mnist_dist.training.trainer import Trainer

BATCH_SIZES = (1, 8, 32, 200, 1000)
SAMPLES = 10_000  # after which the batch sizes are compared
LEAST_SECONDS, MOST_SECONDS = 2.0, 12.0  # of training for each batch size: 60 in all, which leaves 30 for the rest
EVALUATIONS_PER_DOUBLING = 2  # of the samples done, for the picture
FIRST_EVALUATION = 1000  # samples


class Moment(NamedTuple):
    """An evaluation: seconds of training and samples so far, and the test NLL, in nats per image."""

    seconds: float
    samples: int
    nll: float


class Course(NamedTuple):
    """A training with one batch size."""

    batch_size: int
    moments: Sequence[Moment]
    at_samples: Moment  # the first evaluation at or after the samples of the comparison

    @property
    def last(self) -> Moment:
        """The evaluation when the time was over."""
        return self.moments[-1]

    @property
    def step_ms(self) -> float:
        """Mean time of a step."""
        return 1000 * self.last.seconds / -(-self.last.samples // self.batch_size)

    def epoch_seconds(self, num_train: int) -> float:
        """Training time of an epoch of `num_train` samples at this rate."""
        return num_train * self.last.seconds / self.last.samples


def add_options(parser: Parser) -> None:
    """Add the command's options."""
    parser.add_argument("--output-dir", metavar="DIR", default="lesson", help="folder for the picture and the text "
                        "(default: lesson)")
    add_training(parser, SHARED)


def run(args: argparse.Namespace, argv: Sequence[str], launch: Launch) -> int:
    """Give the lesson; returns the exit status. Raises `MnistDistError`."""
    config = data_config(args)
    check_alone(args, launch)
    lesson(config, launch, Path(args.output_dir))
    return 0


def lesson(config: TrainConfig, launch: Launch, output_dir: Path) -> None:
    """Train with each batch size, print the table and the sentences, and write these and the picture. Raises
    `UserError`.
    """
    from mnist_dist.processes.team import join

    begin = time.monotonic()
    sets = open_images(config)
    folder = real(output_dir)
    with writing_to(folder):
        make_folder(folder)
    team = join(launch, timeout_s=config.timeout, dynamo_backend="no")
    courses: list[Course] = []
    samples, seconds = SAMPLES, MOST_SECONDS
    say(f"{sets.name}, {team.device.type}: training with batches of {', '.join(f'{size:,}' for size in BATCH_SIZES)} "
        "samples, each for the same time")
    for batch_size in BATCH_SIZES:
        courses.append(train_for(batch_size, config, team, sets, samples, seconds))
        if batch_size == BATCH_SIZES[0]:  # a slow machine compares after fewer samples, a fast one for less time
            samples = courses[0].last.samples
            seconds = min(max(courses[0].last.seconds, LEAST_SECONDS), MOST_SECONDS)
        say(f"  {batch_size:5,d}: {courses[-1].last.samples:9,d} samples in {courses[-1].last.seconds:.1f} s, test NLL "
            f"{courses[-1].last.nll:.4f}")
    lines = report_lines(courses, samples, seconds, len(sets.train))
    from mnist_dist.record.run_pictures import draw_lesson

    with writing_to(folder):
        draw_lesson([(course.batch_size, course.moments) for course in courses], folder / "lesson.png",
                    f"{sets.name}, {team.device.type}: what a mini-batch changes")
        replace_synced(folder / "lesson.md", "\n".join(lines).encode())
    say("\n" + "\n".join(screen_lines(courses, samples, seconds, len(sets.train))))
    say(f"drawn: {folder / 'lesson.png'}; the text is in {folder / 'lesson.md'}; this took "
        f"{time.monotonic() - begin:.0f} s")


def train_for(batch_size: int, config: TrainConfig, team: Team, sets: ImageSets, samples: int, seconds: float
              ) -> Course:
    """Train for `seconds`; one sample at a time for at most `samples`. The first evaluation at or after
    `samples` is the one to compare.
    """
    from mnist_dist.training.trainer import Trainer

    trainer = Trainer(TrainConfig(batch_size=batch_size, compile="off", seed=config.seed), team, sets)
    trainer.make_step()
    moments = list(moments_of(trainer, samples, seconds))
    at_samples = next((moment for moment in moments if moment.samples >= samples), moments[-1])
    return Course(batch_size, moments, at_samples)


def moments_of(trainer: Trainer, samples: int, seconds: float) -> Iterator[Moment]:
    """Evaluate at numbers of samples that double, at `samples`, and when the time is over. One sample at a time ends at
    `samples`.
    """
    most = samples if trainer.global_batch_size == 1 else math.inf
    batches, step, team = trainer.batches, trainer.step, trainer.team
    done, spent, epoch, next_look = 0, 0.0, 0, float(FIRST_EVALUATION)
    while True:
        trainer.module.train()
        step.begin(epoch, range(batches.num_batches))
        begin = time.perf_counter()
        for number_of_step in range(batches.num_batches):
            step.take(range(number_of_step, number_of_step + 1))
            done += batches.count(number_of_step)
            is_over = spent + time.perf_counter() - begin >= seconds or done >= most
            if is_over or done >= next_look:
                step.flush(number_of_step + 1)
                team.wait_for_device()
                spent += time.perf_counter() - begin
                yield Moment(spent, done, trainer.evaluate()["test_nll"])
                if is_over:
                    return
                while next_look <= done:
                    step_up = next_look * 2 ** (1 / EVALUATIONS_PER_DOUBLING)
                    next_look = samples if next_look < samples < step_up else step_up
                trainer.module.train()
                begin = time.perf_counter()
        step.flush(batches.num_batches)
        spent += time.perf_counter() - begin
        trainer.sums.zero_()
        epoch += 1


def report_lines(courses: Sequence[Course], samples: int, seconds: float, num_train: int) -> list[str]:
    """The table and five sentences, as Markdown."""
    rows = [_cells(course, num_train) for course in courses]
    head = ["batch size", "step, ms", "epoch, s", f"test NLL after {samples:,} samples",
            f"test NLL after {seconds:.1f} s"]
    return ["# What a mini-batch changes", "", *table(head, rows),
            *[f"{place}. {line}" for place, line in enumerate(sentences(courses, samples, seconds, num_train), 1)], ""]


def screen_lines(courses: Sequence[Course], samples: int, seconds: float, num_train: int) -> list[str]:
    """The same for a terminal of 60 columns."""
    widths = (10, 9, 9, 15, 10)
    rows = [("", "", "", "test NLL after", ""),
            ("batch size", "step, ms", "epoch, s", f"{samples:,} samples", f"{seconds:.1f} s"),
            *(_cells(course, num_train) for course in courses)]
    table_lines = ["".join(f"{text:>{width + 1}}" for text, width in zip(row, widths, strict=True)).rstrip()
                   for row in rows]
    return [*table_lines, "", *sentences(courses, samples, seconds, num_train)]


def _cells(course: Course, num_train: int) -> tuple[str, str, str, str, str]:
    return (f"{course.batch_size:,}", f"{course.step_ms:.2f}", number(course.epoch_seconds(num_train)),
            f"{course.at_samples.nll:.3f}", f"{course.last.nll:.3f}")


def sentences(courses: Sequence[Course], samples: int, seconds: float, num_train: int) -> list[str]:
    """What the metrics say, in five sentences."""
    alone, largest = courses[0], courses[-1]
    of_samples = min(courses, key=lambda course: course.at_samples.nll)
    of_seconds = min(courses, key=lambda course: course.last.nll)
    ratio = alone.epoch_seconds(num_train) / largest.epoch_seconds(num_train)
    return [
        f"An epoch of {num_train:,} images takes {number(alone.epoch_seconds(num_train))} s one sample at a time and "
        f"{number(largest.epoch_seconds(num_train))} s in batches of {largest.batch_size:,}: {number(ratio)} times as "
        "fast.",
        f"The reason: a step takes {alone.step_ms:.2f} ms with one sample and {largest.step_ms:.2f} ms with "
        f"{largest.batch_size:,}, which is {number(largest.step_ms / alone.step_ms)} times as long.",
        f"After the same {samples:,} samples {_words(of_samples)} the lowest test NLL, "
        f"{of_samples.at_samples.nll:.3f}, and batches of {largest.batch_size:,} have {largest.at_samples.nll:.3f}: "
        "a larger batch takes fewer steps.",
        f"After the same {seconds:.1f} s {_words(of_seconds)} the lowest test NLL, {of_seconds.last.nll:.3f}, and one "
        f"sample at a time has {alone.last.nll:.3f}.",
        "All batch sizes have the same learning rate here; `mnist-dist study --quick` measures which batch size on how "
        "many processes serves best.",
    ]


def _words(course: Course) -> str:
    return "one sample at a time has" if course.batch_size == 1 else f"batches of {course.batch_size:,} have"
