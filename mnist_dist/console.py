"""What a person sees during a run: an introduction, a table of epochs, a progress bar on a terminal.

Only the main process prints; the others have a console that prints nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mnist_dist.config import TrainConfig
from mnist_dist.output import complain, say
from mnist_dist.record.environment import Environment
from mnist_dist.record.figures import EpochRecord, RunSummary
from mnist_dist.record.folder import CURVES, METRICS, MODEL, PREDICTIONS, RESULT

COLUMNS = (  # heading, width, how the epoch's record fills it
    ("epoch", 5, lambda r: f"{r.epoch}"),
    ("step", 8, lambda r: f"{r.step:,}"),
    ("train loss", 11, lambda r: f"{r.train_loss:.5f}"),
    ("test NLL", 9, lambda r: f"{r.test_nll:.5f}"),
    ("NLL sum", 9, lambda r: f"{r.test_nll_sum:.1f}"),
    ("accuracy", 9, lambda r: f"{100 * r.test_accuracy:.2f} %"),
    ("samples/s", 11, lambda r: "-" if r.samples_per_second is None else f"{r.samples_per_second:,.0f}"),
    ("train s", 8, lambda r: f"{r.train_seconds:.2f}"),
    ("test s", 7, lambda r: f"{r.eval_seconds:.2f}"),
)
LOG_SECONDS = 30.0  # between two lines of a long epoch, if there is no terminal for a bar


class Console:
    """Prints if `speaks`; on every rank but the main one it prints nothing."""

    def __init__(self, speaks: bool) -> None:
        self.speaks = speaks
        self._bar: Any = None
        self._last_line = time.monotonic()

    def say(self, line: str = "") -> None:
        """One line on standard output; takes the progress bar away first."""
        if self.speaks:
            self.hide_bar()
            say(line)

    def warn(self, line: str) -> None:
        """One line on standard error."""
        if self.speaks:
            self.hide_bar()
            complain("warning", line)

    def introduce(self, place: Environment, config: TrainConfig, dataset: Mapping[str, Any], notes: Sequence[str],
                  global_batch_size: int, per_device_batch_size: int, num_batches: int, learning_rate: float) -> None:
        """What runs, where, on which data (`notes` are about these), and into which folder."""
        size = place.num_processes
        self.say(f"{size} {'process' if size == 1 else 'processes'} on {place.device_name} ({place.device}), "
                 f"{place.num_threads} threads each; {dataset['name']}: {dataset['train']:,} training and "
                 f"{dataset['test']:,} test images{''.join(f' (warning: {line})' for line in notes)}")
        at_most = "at most " if global_batch_size % size else ""
        self.say(f"global batch {global_batch_size} = {at_most}{per_device_batch_size} per process, {num_batches:,} "
                 f"steps per epoch, Adam at {learning_rate:g}, {config.dtype}, mixed precision {place.mixed_precision}")
        self.say(f"writing to {config.output_dir}")

    def say_checkpoints(self, summary: RunSummary) -> None:
        """What the checkpoints of a run took."""
        if summary.checkpoint_pause_seconds is not None and summary.checkpoint_seconds is not None:
            number = "1 checkpoint" if summary.checkpoints == 1 else f"{summary.checkpoints} checkpoints"
            self.say(f"{number}: each kept the training for "
                     f"{1000 * summary.checkpoint_pause_seconds:.1f} ms, and was whole after "
                     f"{1000 * summary.checkpoint_seconds:.1f} ms (medians)")

    def say_where(self, folder: Path) -> None:
        """What a completed run has left."""
        self.say(f"everything is in {folder}: {RESULT}, {METRICS}, {MODEL}, {PREDICTIONS}, {CURVES}")

    def table_head(self) -> None:
        """The headings of the table of epochs."""
        self.say(" ".join(heading.rjust(width) for heading, width, _ in COLUMNS))

    def table_row(self, record: EpochRecord) -> None:
        """An epoch's line."""
        self.say(" ".join(fill(record).rjust(width) for _, width, fill in COLUMNS))

    def progress(self, epoch: int, step: int, num_steps: int) -> None:
        """`step` of the epoch's `num_steps` are done: a bar on a terminal, else a line on standard error."""
        if not self.speaks:
            return
        if sys.stderr.isatty():
            if self._bar is None:
                from tqdm import tqdm

                self._bar = tqdm(total=num_steps, unit="step", leave=False, desc=f"epoch {epoch}")
            self._bar.update(step - self._bar.n)
        elif time.monotonic() - self._last_line > LOG_SECONDS:
            self._last_line = time.monotonic()
            # under the table's first two columns, so that a log of both outputs stays one table
            say(f"{epoch:>5} {epoch * num_steps + step:>8,}  {step:,} of the epoch's {num_steps:,} steps",
                is_error=True)

    def hide_bar(self) -> None:
        """Remove the bar from the terminal; the next `progress` draws another."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
