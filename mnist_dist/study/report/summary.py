"""The first lines of a report: which batch size on how many processes, what is as good, what more processes do."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mnist_dist.study.analysis.analysis import Analysis
from mnist_dist.study.analysis.fitted_models import CheckedModel, worst_of
from mnist_dist.study.analysis.intervals import LEAST_CONCLUSIVE, Interval, ratio
from mnist_dist.study.plan.grid import Cell, Options
from mnist_dist.study.report.labels import level_of, options_alone, say
from mnist_dist.study.report.page import Code, Inline, Strong, Text
from mnist_dist.study.report.time_to_target import Answer
from mnist_dist.tables import number
from mnist_dist.text import counted

MOST_NAMED = 4  # groups of cells that are as good


@dataclass(frozen=True)
class Contest:
    """The cells from the best to the worst by one metric; `words` has that of the best. `worse` says how many times as
    long, or as slow, another cell is; the intervals of all pairs hold together.
    """

    cells: Sequence[Cell]
    words: str
    worse: Callable[[Cell], Interval]
    repeats: int

    @property
    def best(self) -> Cell:
        """The cell to use."""
        return self.cells[0]

    def is_worse(self, cell: Cell) -> bool:
        """Whether the cell is shown to be worse than the best."""
        return self.worse(cell).is_above(1)


def by_time(answer: Answer) -> Contest:
    """By the time to a target."""
    target, soonest = answer.target, answer.soonest
    times = {time.cell: time for time in sorted(target.times, key=lambda time: time.typical)}
    words = f"{_with_level(soonest.seconds)} s of training to {target.goal}"
    return Contest(list(times), words, lambda cell: target.ratio(times[cell], soonest),
                   min(time.seconds.n for time in target.times))


def by_rate(analysis: Analysis) -> Contest:
    """By the throughput."""
    rates = analysis.estimates
    cells = sorted(rates, key=lambda cell: -rates[cell].mean)
    words = f"{_with_level(analysis.cells[cells[0]].rate)} {analysis.unit}/s, the highest throughput"
    return Contest(cells, words, lambda cell: ratio([rates[cells[0]]], [rates[cell]], among=len(cells)),
                   min(rate.n for rate in rates.values()))


def headline(contest: Contest, analysis: Analysis) -> Text:
    """The answer, in a few sentences."""
    parts: list[str] = [Strong("Use"), " ", Code(str(contest.best)), f": {contest.words}. "]
    if len(contest.cells) > 1:
        parts += [*_as_good(contest), *_more_processes(contest, analysis)]
    return Text(parts)


def _with_level(interval: Interval) -> str:
    """`1.1 (1.0 to 1.2, 94 %)`."""
    return f"{say(interval)[:-1]}, {level_of(interval)})" if interval.n > 1 else f"{say(interval)} (one run)"


def _as_good(contest: Contest) -> list[str]:
    """The cells that are not shown to be worse than the best."""
    others = contest.cells[1:]
    if contest.repeats < LEAST_CONCLUSIVE:
        return [f"{counted(contest.repeats, 'repeat')} cannot show that another cell is slower; "
                f"{LEAST_CONCLUSIVE} can. "]
    equal = [cell for cell in others if not contest.is_worse(cell)]
    if not equal:
        return [f"{counted(len(others), 'other cell is', 'other cells are')} slower. "]
    groups: dict[tuple[int, Options], list[Cell]] = {}
    for cell in equal:
        groups.setdefault((cell.processes, cell.options), []).append(cell)
    parts: list[str] = []
    for (processes, options), members in list(groups.items())[:MOST_NAMED]:
        batches = ", ".join(f"{cell.global_batch_size:,}" for cell in sorted(members, key=lambda member: member.place))
        parts += ["; " if parts else "Not shown to be slower: batch ", batches,
                  f" on {counted(processes, 'process', 'processes')}"]
        if options != contest.best.options:
            parts += [" with ", options_alone(options)]
    more = len(groups) - MOST_NAMED
    return [*parts, f"; and cells of {more} other kinds. " if more > 0 else ". "]


def _more_processes(contest: Contest, analysis: Analysis) -> list[str]:
    """What more processes than the best cell has do, or what it gains over the fewest."""
    best = contest.best
    more = next((cell for cell in contest.cells if cell.processes > best.processes), None)
    if more is not None:
        times = contest.worse(more)
        words = ("make it {} times slower" if contest.is_worse(more) else "take {} times as long" if times.n < 2 else
                 "are not shown to be faster: they take {} times as long").format(_span(times))
        return [f"{more.processes} processes {words} (batch {more.global_batch_size:,}){_exchange(more, analysis)}."]
    fewest = min(cell.processes for cell in contest.cells)
    if fewest == best.processes:
        return [f"More than {counted(fewest, 'process was', 'processes were')} not run."]
    fewer = next(cell for cell in contest.cells if cell.processes == fewest)
    return [f"{counted(fewest, 'process takes', 'processes take')} {_span(contest.worse(fewer))} times as long "
            f"(batch {fewer.global_batch_size:,}, the best there). More than {best.processes} processes were not run."]


def _span(interval: Interval) -> str:
    """`1.2 to 2.0`; of one run, the value."""
    return f"{number(interval.low)} to {number(interval.high)}" if interval.n > 1 else number(interval.value)


def _exchange(cell: Cell, analysis: Analysis) -> str:
    """The part of a step for the exchange of gradients, if the runs have it."""
    metrics = analysis.cells[cell]
    if metrics.exchange_ms is None:
        return ""
    step = statistics.median(rank["step_ms"]["median"] for rank in metrics.ranks if rank.get("step_ms"))
    return f": the exchange takes {number(metrics.exchange_ms)} of {number(step)} ms"


def how_sure(analysis: Analysis, judged: Sequence[CheckedModel]) -> list[Inline]:
    """What makes the answer less certain; nothing if all is well."""
    notes: list[Inline] = []
    cells = analysis.cells
    if failed := sum(row["status"] == "failed" for row in analysis.failed):
        notes.append(f"{counted(failed, 'run')} failed")
    if impossible := sum(row["status"] == "impossible" for row in analysis.failed):
        notes.append(f"{counted(impossible, 'cell')} cannot run")
    if marked := {row["run"] for row, _ in analysis.marks}:
        notes.append(f"{len(marked)} of {counted(len(analysis.runs), 'run')} {'is' if len(marked) == 1 else 'are'} "
                     "marked")
    if wide := sum(metrics.more_repeats > 0 for metrics in cells.values()):
        notes.append(f"{wide} of {counted(len(cells), 'cell')} {'needs' if wide == 1 else 'need'} more repeats to be "
                     f"known to {100 * analysis.precision:g} %")
    if len(analysis.environments) > 1:
        notes.append(f"the runs were done on {len(analysis.environments)} different environments")
    if analysis.drift and analysis.drift.is_one:
        notes.append(f"the machine drifted by {100 * analysis.drift.change.value:+.1f} % during the study")
    if worst := worst_of([left_out for model in judged for left_out in model.left_one_out]):
        notes.append(f"the model of the step time is {100 * worst.error:+.0f} % off at {worst.axis} {worst.value:,}, "
                     "if it is fitted without that")
    return notes
