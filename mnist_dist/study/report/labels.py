"""How a report names cells, intervals and numbers of things."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from mnist_dist.study.plan.grid import Cell, Options
from mnist_dist.study.report.page import Code, Inline
from mnist_dist.tables import number
from mnist_dist.text import counted

if TYPE_CHECKING:  # the command and the runner need no numpy
    from mnist_dist.study.analysis.intervals import Interval


def say(interval: Interval) -> str:
    """`41,200 (40,900 to 41,700)`; of one run, the value alone."""
    if interval.n < 2:
        return number(interval.value)
    return f"{number(interval.value)} ({number(interval.low)} to {number(interval.high)})"


def level_of(interval: Interval) -> str:
    """The level of the interval, in percent."""
    return f"{100 * interval.level:.0f} %" if interval.n > 1 else "-"


def at_level(interval: Interval) -> str:
    """` (94 % interval)`, after a number in a sentence; of one run, that it has none."""
    return f" ({level_of(interval)} interval)" if interval.n > 1 else " (one run, so no interval)"


def as_start(cell: Cell) -> str:
    """The cell at the start of a sentence: `Batch 800 on 1 process`."""
    words = str(cell)
    return words[:1].upper() + words[1:]


def options_of(cells: Iterable[Cell]) -> list[str]:
    """The further axes of a study."""
    return list(dict.fromkeys(name for cell in cells for name, _ in cell.options))


def cell_head(cells: Iterable[Cell]) -> list[Inline]:
    """The head of the columns that `cell_words` fills."""
    return ["batch size", "processes", *(Code(name) for name in options_of(cells))]


def cell_words(cell: Cell, cells: Iterable[Cell]) -> list[Inline]:
    """Batch size, processes, and the options that any of `cells` has."""
    values = dict(cell.options)
    return [f"{cell.global_batch_size:,}", f"{cell.processes}",
            *(Code(values.get(name, "")) for name in options_of(cells))]


def listed(cells: Sequence[Cell]) -> str:
    """Batch sizes of cells, with their options if the study has any."""
    return Code(", ".join(f"{cell.global_batch_size:,}" + "".join(f" ({name} {value})" for name, value in cell.options)
                          for cell in cells))


def name_of_line(processes: int, options: Options) -> str:
    """`2 processes, lr 0.001`: of a line in a picture."""
    return counted(processes, "process", "processes") + short(options)


def options_alone(options: Options) -> Code:
    """The options of a cell alone."""
    return Code(short(options).removeprefix(", "))


def for_options(options: Options) -> tuple[str, ...]:
    """Parts of a sentence: ` for lr 0.001`, if the study varies an option."""
    return (" for ", options_alone(options)) if options else ()


def short(options: Options) -> str:
    """The options of a line in a picture, which has little room."""
    return "".join(f", {name.replace('_', ' ')} {value[:24]}" for name, value in options)
