"""The part of a report that answers: which cell reaches a target soonest, which cheapest, and whether more processes
help.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mnist_dist.study.analysis.cells import Analysis
from mnist_dist.study.analysis.fitted_models import Judged, as_timed
from mnist_dist.study.analysis.intervals import Interval
from mnist_dist.study.analysis.slowdown_causes import cause
from mnist_dist.study.analysis.step_time import Model
from mnist_dist.study.analysis.targets import Target, TimeTo, modelled
from mnist_dist.study.plan.goals import Goal
from mnist_dist.study.plan.grid import Cell, Options
from mnist_dist.study.report import charts
from mnist_dist.study.report.charts import Series
from mnist_dist.study.report.labels import as_start, cell_head, cell_words, level_of, name_of_line, say
from mnist_dist.study.report.page import Code, Heading, Inline, Page, Picture, Table, Text
from mnist_dist.tables import number
from mnist_dist.text import counted


@dataclass(frozen=True)
class Answer:
    """The choices at a target. `front` has the cells that no other one beats in both seconds and device-seconds, the
    soonest first. The knee is the one of them with the least seconds x device-seconds: beyond it, time falls by a
    smaller factor than the cost rises (for S and E of a batch size, that is at the critical one; McCandlish et al.).

    `ahead` is what the models forecast for more processes than were run: of each number the soonest batch size, and
    whether its model is to be trusted.
    """

    target: Target
    front: list[TimeTo]
    ahead: list[tuple[TimeTo, bool]]

    @property
    def soonest(self) -> TimeTo:
        """The least seconds."""
        return self.front[0]

    @property
    def cheapest(self) -> TimeTo:
        """The least device-seconds."""
        return self.front[-1]

    @property
    def knee(self) -> TimeTo:
        """The least product of both."""
        return min(self.front, key=lambda one: one.typical**2 * one.devices)


def answer(target: Target, models: Mapping[Options, Judged]) -> Answer | None:
    """The choices; None if no cell's runs all reached the target."""
    front: list[TimeTo] = []
    for one in sorted(target.times, key=lambda one: (one.typical, one.devices)):
        if not front or one.typical * one.devices < front[-1].typical * front[-1].devices:
            front.append(one)
    return Answer(target, front, _forecasts(target, models)) if front else None


def _words(found: Answer, analysis: Analysis) -> Text:
    times, soonest, cheapest, knee = found.target.times, found.soonest, found.cheapest, found.knee
    parts: list[str] = ["Soonest with ", Code(str(soonest.cell)),
                        f", {say(soonest.seconds)} s of training"]
    if len(times) > 1:
        equal = sum(one is not soonest and not found.target.ratio(one, soonest).is_above(1) for one in times)
        parts.append(f"; {equal} of {len(times) - 1} others are not shown to be slower")
    if cheapest is soonest:
        parts.append(f". It is also the cheapest, {say(soonest.cost)} device-seconds")
    else:
        parts += [". Cheapest with ", Code(str(cheapest.cell)), f", {say(cheapest.cost)} device-seconds"]
        if knee is not soonest and knee is not cheapest:
            parts += [". The knee is ", Code(str(knee.cell)), f", {say(knee.seconds)} s and {say(knee.cost)} "
                      "device-seconds"]
        else:
            parts.append(f". The knee is the {'cheapest' if knee is cheapest else 'soonest'}")
    parts += [". ", *_more_processes(found, analysis), *_ahead(found)]
    runs = min(one.seconds.n for one in times)
    worth = found.target.ratio(times[-1], times[0])
    parts.append(f" Seconds have {level_of(soonest.seconds)} intervals; those of all ratios hold together with "
                 f"{level_of(worth)}." if runs > 1 else " How sure this is, is not known: a single run has no spread.")
    return Text(parts)


def _more_processes(found: Answer, analysis: Analysis) -> list[str]:
    """Whether they help: what the soonest cell gains over the fewest processes, and if more than it has do not help,
    why.
    """
    best: dict[int, TimeTo] = {}
    for one in sorted(found.target.times, key=lambda one: -one.typical):
        best[one.cell.processes] = one
    counts, own = sorted(best), found.soonest.cell.processes
    parts: list[str] = []
    if own > counts[0]:
        gain = found.target.ratio(best[counts[0]], found.soonest)
        parts.append(f"{counted(counts[0], 'process takes', 'processes take')} {say(gain)} times as long"
                     f"{'' if gain.is_above(1) else ', which shows no gain'}. ")
    more = [count for count in counts if count > own]
    if not more:
        return [*parts, f"More than {counted(own, 'process was', 'processes were')} not run."]
    worse = best[more[0]]
    times = found.target.ratio(worse, found.soonest)
    words = "do not help" if times.is_above(1) else "are not shown to help"
    parts += [f"{more[0]} processes {words}: they take {say(times)} times as long, with ", Code(str(worse.cell)), ". "]
    return [*parts, *_why(worse.cell, analysis)]


def _why(cell: Cell, analysis: Analysis) -> list[str]:
    scaling = analysis.strong.get(cell)
    if scaling is None:
        return ["The cause is not known: its batch was not run on fewer processes."]
    found = cause(analysis.cells[cell], analysis.cells[scaling.base])
    return [f"{found}." if found else "The cause is not known: the runs do not say what their ranks wait for."]


def _ahead(found: Answer) -> list[str]:
    """The soonest of what the models forecast, and whether that is sooner."""
    if not found.ahead:
        return []
    one, trusted = min(found.ahead, key=lambda pair: pair[0].seconds.value)
    sooner = one.seconds.high < found.soonest.seconds.low
    return [" The model's forecast for ", Code(str(one.cell)), f" is {say(one.seconds)} s, which is ",
            "sooner" if sooner else "not shown to be sooner", "." if trusted else ": it is not to be trusted."]


def _forecasts(target: Target, models: Mapping[Options, Judged]) -> list[tuple[TimeTo, bool]]:
    """`ahead` of an answer."""
    found: dict[int, tuple[TimeTo, bool]] = {}
    for one in target.learnt:
        known = _judged(one.options, models)
        if known is None or not one.is_reached:
            continue
        judged, model = known
        for place in judged.beyond([one.batch])[one.batch]:
            cell = Cell(one.batch, place.processes, one.options)
            time = modelled(one, model, place, cell, judged.devices(place))
            if place.processes not in found or time.seconds.value < found[place.processes][0].seconds.value:
                found[place.processes] = time, judged.is_trusted
    return [found[processes] for processes in sorted(found)]


def _judged(options: Options, models: Mapping[Options, Judged]) -> tuple[Judged, Model] | None:
    """What is known of the step time with these options; None if there is no model."""
    judged = models.get(as_timed(Cell(1, 1, options)).options)
    return (judged, judged.model) if judged is not None and isinstance(judged.model, Model) else None


def time_picture(found: Answer, models: Mapping[Options, Judged], folder: Path) -> Picture:
    """The seconds to the target against the batch size."""
    rows = [(one, _by_model(one, found.target, models)) for one in found.target.times]
    return _picture(found.target.goal, rows, folder)


def add_answers(page: Page, answers: Iterable[Answer | None], analysis: Analysis, models: Mapping[Options, Judged],
                folder: Path) -> None:
    """The section: for each target what is soonest, what cheapest and whether more processes help, the times of all
    cells, measured and by the model, and what the model forecasts. The picture of the last target is not in it.
    """
    known = [found for found in answers if found]
    if not known:
        return
    page.add(Heading(2, "Time to a target"))
    for found in known:
        goal = found.target.goal
        rows = [(one, _by_model(one, found.target, models)) for one in found.target.times]
        page.add(Heading(3, goal.title), _words(found, analysis))
        if found is not known[-1]:
            page.add(_picture(goal, rows, folder))
        page.add(_table(found, rows))
    page.add("Seconds: the steps to the target times the time of a step on so many processes; by the model: times the "
             "time that the model has for it. Device-seconds: times the GPUs, or on a CPU the cores, that the cell "
             "occupies. Front: no other cell is both sooner and cheaper. Knee: the cell with the least seconds x "
             "device-seconds; from there to the soonest, the cost grows by more than the time falls. Forecast: for "
             "more processes than were run, the batch size that is soonest. Evaluation, start-up and compiling are "
             "outside, and batch sizes between those that were run are not looked at.")


def _by_model(one: TimeTo, target: Target, models: Mapping[Options, Judged]) -> Interval | None:
    known = _judged(one.cell.options, models)
    if known is None:
        return None
    judged, model = known
    (learnt,) = (own for own in target.learnt
                 if (own.options, own.batch) == (one.cell.options, one.cell.global_batch_size))
    return modelled(learnt, model, judged.places[as_timed(one.cell)], one.cell, one.devices).seconds


def _picture(goal: Goal, rows: Sequence[tuple[TimeTo, Interval | None]], folder: Path) -> Picture:
    groups: dict[tuple[int, Options], list[tuple[TimeTo, Interval | None]]] = {}
    for row in rows:
        groups.setdefault((row[0].cell.processes, row[0].cell.options), []).append(row)
    soonest = min((one for one, _ in rows), key=lambda one: one.typical)
    series = []
    for (processes, options), own in groups.items():
        batches = [one.cell.global_batch_size for one, _ in own]
        by_model = [model for _, model in own if model is not None]
        series.append(Series(
            name_of_line(processes, options), batches, [one.seconds for one, _ in own], [[] for _ in own],
            [f"{one.cell}: {say(one.seconds)} s" for one, _ in own],
            batches if len(by_model) == len(own) else (), by_model if len(by_model) == len(own) else ()))
    return charts.draw(
        folder, f"time-{goal.file}", f"{as_start(soonest.cell)} is soonest to {goal}",
        f"Seconds of training to {goal} against the global batch size: measured, with "
        "intervals, and the model's line, if there is one. Both axes are logarithmic.", series,
        x_label="global batch size (samples)", y_label="seconds to the target")


def _table(found: Answer, rows: Sequence[tuple[TimeTo, Interval | None]]) -> Table:
    cells = [one.cell for one, _ in rows]
    lines: list[list[Inline]] = []
    for one, model in rows:
        marks = [name for name, which in (("soonest", found.soonest), ("cheapest", found.cheapest),
                                          ("knee", found.knee)) if which is one]
        marks += ["front"] if not marks and any(one is other for other in found.front) else []
        lines.append([*cell_words(one.cell, cells), say(one.seconds), say(model) if model else "-", say(one.cost),
                      "1" if one is found.soonest else say(found.target.ratio(one, found.soonest)), ", ".join(marks)])
    for one, trusted in found.ahead:
        lines.append([*cell_words(one.cell, cells), "not run", say(one.seconds), say(one.cost),
                      number(one.seconds.value / found.soonest.seconds.value),
                      "forecast" if trusted else "forecast, not to be trusted"])
    return Table([*cell_head(cells), "seconds to it", "by the model", "device-seconds", "times the soonest", ""], lines)
