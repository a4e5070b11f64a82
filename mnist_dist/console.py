"""What a person sees during a run: an introduction, a table of epochs, one bar for the whole run, a closing line.

Only the main process prints; the others have a console that prints nothing. The bar is tqdm's, which Accelerate
needs too: it draws one line where it is called, while Rich redraws from a thread that would take time from the steps.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mnist_dist.config import TrainConfig
from mnist_dist.output import columns, complain, say
from mnist_dist.record.environment import Environment
from mnist_dist.record.metrics import EpochRecord, RunSummary
from mnist_dist.text import counted

EARLIER_EPOCHS = 2  # whose lines a resume prints again
LOG_SECONDS = 10.0  # between two lines of progress at least, if there is no terminal for a bar


class Column(NamedTuple):
    """A column of the table. In a narrow terminal those with the highest `rank` are left out."""

    heading: str
    metric: str  # of an epoch's record, or of an evaluation within one
    width: int
    form: str
    rank: int = 0
    is_share: bool = False  # shown in percent


COLUMNS = (  # 78 characters
    Column("epoch", "epoch", 5, "d"),
    Column("step", "step", 9, ",d"),
    Column("train loss", "train_loss", 10, ".5f", 1),
    Column("test NLL", "test_nll", 8, ".5f"),
    Column("NLL sum", "test_nll_sum", 8, ".1f", 3),
    Column("accuracy", "test_accuracy", 8, ".2f", is_share=True),
    Column("samples/s", "samples_per_second", 9, ",.0f"),
    Column("train s", "train_seconds", 7, ".2f", 2),
    Column("test s", "eval_seconds", 6, ".2f", 4),
)


def fitting(width: int) -> list[Column]:
    """The columns that fit in `width` characters."""
    chosen = list(COLUMNS)
    while sum(column.width + 1 for column in chosen) > width and any(column.rank for column in chosen):
        chosen.remove(max(chosen, key=lambda column: column.rank))
    return chosen


def cell(column: Column, metrics: Mapping[str, Any]) -> str:
    """A metric as wide as its column, blank if there is none. A number that is too long has an exponent."""
    value = metrics.get(column.metric)
    if value is None:
        return " " * column.width
    text = f"{100 * value:{column.form}} %" if column.is_share else f"{value:{column.form}}"
    digits = column.width
    while len(text) > column.width and digits:
        digits -= 1
        text = f"{value:.{digits}e}".replace("e+0", "e").replace("e+", "e")
    return text.rjust(column.width)


class Console:
    """Prints if `speaks`; on every rank but the main one it prints nothing. A quiet one prints warnings and the closing
    line alone.
    """

    def __init__(self, speaks: bool, quiet: bool = False) -> None:
        self.speaks, self.quiet = speaks, quiet
        self._bar: Any = None
        self._last_line = time.monotonic()
        self._columns: Sequence[Column] = COLUMNS

    def say(self, line: str = "") -> None:
        """Lines on standard output."""
        if not self.quiet:
            self._print(line)

    def _print(self, line: str) -> None:
        if self.speaks:
            self._clear_bar()
            say(line)

    def warn(self, line: str) -> None:
        """One line on standard error."""
        if self.speaks:
            self._clear_bar()
            complain("warning", line)

    def introduce(self, place: Environment, config: TrainConfig, dataset: Mapping[str, Any], notes: Sequence[str],
                  global_batch_size: int, per_device_batch_size: int, num_batches: int, learning_rate: float) -> None:
        """What runs, where, on which data (`notes` are about these), and into which folder."""
        size = place.num_processes
        self.say(f"{counted(size, 'process', 'processes')} on {place.device_name} ({place.device}), "
                 f"{counted(place.num_threads, 'thread')}{' each' if size > 1 else ''}; {dataset['name']}: "
                 f"{dataset['train']:,} training and {dataset['test']:,} test images"
                 f"{''.join(f' (warning: {line})' for line in notes)}")
        at_most = "at most " if global_batch_size % size else ""
        self.say(f"global batch {global_batch_size} = {at_most}{per_device_batch_size} per process, "
                 f"{counted(num_batches, 'step')} per epoch, Adam at {learning_rate:g}, {config.dtype}, mixed "
                 f"precision {place.mixed_precision}")
        self.say(f"writing to {config.output_dir}")

    def close(self, folder: Path, summary: RunSummary, records: Sequence[EpochRecord]) -> None:
        """The closing line: the result, the speed, and where everything is."""
        self.hide_bar()
        last = records[-1]
        rate = "" if summary.samples_per_second is None else f"{summary.samples_per_second:,.0f} samples/s, "
        self._print(f"test NLL {last.test_nll:.5f}, accuracy {100 * last.test_accuracy:.2f} %; {rate}"
                    f"{counted(len(records), 'epoch')} in {sum(record.epoch_seconds for record in records):.1f} s; "
                    f"everything is in {folder}")

    def table_head(self) -> None:
        """The headings of the table of epochs, as wide as the terminal allows."""
        self._columns = fitting(columns())
        self._last_line = time.monotonic()  # the start of a run may take longer than `LOG_SECONDS`
        self.say(" ".join(column.heading.rjust(column.width) for column in self._columns))

    def earlier_rows(self, records: Sequence[EpochRecord], path: Path) -> None:
        """The lines of the last epochs before a resume, and where those before them are."""
        if hidden := len(records[:-EARLIER_EPOCHS]):
            self.say(f"{counted(hidden, 'earlier epoch')}: {path}")
        for record in records[hidden:]:
            self.epoch_rows(record)

    def epoch_rows(self, record: EpochRecord) -> None:
        """The lines of the evaluations within an epoch, and the epoch's."""
        for evaluation in record.evaluations:
            self.evaluation_row(record.epoch, evaluation)
        self.epoch_row(record)

    def epoch_row(self, record: EpochRecord) -> None:
        """An epoch's line."""
        self._table_row(vars(record))

    def evaluation_row(self, epoch: int, evaluation: Mapping[str, Any]) -> None:
        """The line of an evaluation within an epoch: the other columns are of the whole epoch, and stay blank."""
        self._table_row({"epoch": epoch, **{name: evaluation[name] for name in ("step", "test_nll", "test_accuracy")}})

    def _table_row(self, metrics: Mapping[str, Any]) -> None:
        self.say(self._row(metrics))
        self._last_line = time.monotonic()

    def _row(self, metrics: Mapping[str, Any]) -> str:
        return " ".join(cell(column, metrics) for column in self._columns).rstrip()

    def progress(self, epoch: int, num_epochs: int, step: int, num_steps: int, *, loss: float | None = None,
                 samples_per_second: float | None = None, is_share: bool = False) -> None:
        """`step` of the run's `num_steps` are done, with this mean loss and speed since the last time: a bar on a
        terminal, else a line on standard error. `is_share` says that the loss is of this rank's samples alone.
        """
        if not self.speaks or self.quiet:
            return
        if not sys.stderr.isatty():
            if time.monotonic() - self._last_line > LOG_SECONDS:
                self._last_line = time.monotonic()
                # a row of the table, so that a log of both outputs stays one
                row = self._row({"epoch": epoch, "step": step, "train_loss": loss,
                                 "samples_per_second": samples_per_second})
                say(f"{row}  of {counted(num_steps, 'step')}{', loss of rank 0' if is_share else ''}", is_error=True)
            return
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(total=num_steps, initial=step, leave=False,
                             bar_format="{desc} |{bar}|{postfix}, {remaining} left")
        self._bar.ncols = columns()  # tqdm itself would not read COLUMNS
        self._bar.set_description_str(f"epoch {epoch} of {num_epochs}", refresh=False)
        parts = [f"{samples_per_second:,.0f} samples/s"] if samples_per_second else []
        parts += [f"{'rank 0: ' if is_share else ''}loss {loss:.4f}"] if loss is not None else []
        self._bar.set_postfix_str(", ".join(parts), refresh=False)
        self._bar.update(step - self._bar.n)

    def _clear_bar(self) -> None:
        """Make room for a line; the next `progress` draws the bar again, below it."""
        if self._bar is not None:
            self._bar.clear()

    def hide_bar(self) -> None:
        """Remove the bar from the terminal."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
