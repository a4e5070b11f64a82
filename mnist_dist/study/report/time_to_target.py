"""The part of a report that answers: which cell reaches a target soonest, which cheapest, and whether more processes
help.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mnist_dist.study.analysis.analysis import Analysis
from mnist_dist.study.analysis.fitted_models import CheckedModel, as_timed
from mnist_dist.study.analysis.intervals import Interval
from mnist_dist.study.analysis.slowdown_causes import cause
from mnist_dist.study.analysis.step_time import Model
from mnist_dist.study.analysis.targets import Target, TimeToTarget, modelled
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
    front: list[TimeToTarget]
    ahead: list[tuple[TimeToTarget, bool]]

    @property
    def soonest(self) -> TimeToTarget:
        """The least seconds."""
        return self.front[0]

    @property
    def cheapest(self) -> TimeToTarget:
        """The least device-seconds."""
        return self.front[-1]

    @property
    def knee(self) -> TimeToTarget:
        """The least product of both."""
        return min(self.front, key=lambda time: time.typical**2 * time.devices)


def answer(target: Target, models: Mapping[Options, CheckedModel]) -> Answer | None:
    """The choices; None if no cell's runs all reached the target."""
    front: list[TimeToTarget] = []
    for time in sorted(target.times, key=lambda time: (time.typical, time.devices)):
        if not front or time.typical * time.devices < front[-1].typical * front[-1].devices:
            front.append(time)
    return Answer(target, front, _forecasts(target, models)) if front else None


def _words(choice: Answer, analysis: Analysis) -> Text:
    times, soonest, cheapest, knee = choice.target.times, choice.soonest, choice.cheapest, choice.knee
    parts: list[str] = ["Soonest with ", Code(str(soonest.cell)),
                        f", {say(soonest.seconds)} s of training"]
    if len(times) > 1:
        equal = sum(time is not soonest and not choice.target.ratio(time, soonest).is_above(1) for time in times)
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
    parts += [". ", *_more_processes(choice, analysis), *_ahead(choice)]
    runs = min(time.seconds.n for time in times)
    worth = choice.target.ratio(times[-1], times[0])
    parts.append(f" Seconds have {level_of(soonest.seconds)} intervals; those of all ratios hold together with "
                 f"{level_of(worth)}." if runs > 1 else " How sure this is, is not known: a single run has no spread.")
    return Text(parts)


def _more_processes(choice: Answer, analysis: Analysis) -> list[str]:
    """Whether they help: what the soonest cell gains over the fewest processes, and if more than it has do not help,
    why.
    """
    best: dict[int, TimeToTarget] = {}
    for time in sorted(choice.target.times, key=lambda time: -time.typical):
        best[time.cell.processes] = time
    counts, processes = sorted(best), choice.soonest.cell.processes
    parts: list[str] = []
    if processes > counts[0]:
        gain = choice.target.ratio(best[counts[0]], choice.soonest)
        parts.append(f"{counted(counts[0], 'process takes', 'processes take')} {say(gain)} times as long"
                     f"{'' if gain.is_above(1) else ', which shows no gain'}. ")
    more = [count for count in counts if count > processes]
    if not more:
        return [*parts, f"More than {counted(processes, 'process was', 'processes were')} not run."]
    worse = best[more[0]]
    times = choice.target.ratio(worse, choice.soonest)
    words = "do not help" if times.is_above(1) else "are not shown to help"
    parts += [f"{more[0]} processes {words}: they take {say(times)} times as long, with ", Code(str(worse.cell)), ". "]
    return [*parts, *_why(worse.cell, analysis)]


def _why(cell: Cell, analysis: Analysis) -> list[str]:
    scaling = analysis.strong.get(cell)
    if scaling is None:
        return ["The cause is not known: its batch was not run on fewer processes."]
    reason = cause(analysis.cells[cell], analysis.cells[scaling.base])
    return [f"{reason}." if reason else "The cause is not known: the runs do not say what their ranks wait for."]


def _ahead(choice: Answer) -> list[str]:
    """The soonest forecast, and whether it is sooner than the soonest cell."""
    if not choice.ahead:
        return []
    time, trusted = min(choice.ahead, key=lambda pair: pair[0].seconds.value)
    sooner = time.seconds.high < choice.soonest.seconds.low
    return [" The model's forecast for ", Code(str(time.cell)), f" is {say(time.seconds)} s, which is ",
            "sooner" if sooner else "not shown to be sooner", "." if trusted else ": it is not to be trusted."]


def _forecasts(target: Target, models: Mapping[Options, CheckedModel]) -> list[tuple[TimeToTarget, bool]]:
    """`ahead` of an answer."""
    soonest: dict[int, tuple[TimeToTarget, bool]] = {}
    for steps in target.learnt:
        known = _judged(steps.options, models)
        if known is None or not steps.is_reached:
            continue
        judged, model = known
        for place in judged.beyond([steps.batch])[steps.batch]:
            cell = Cell(steps.batch, place.processes, steps.options)
            time = modelled(steps, model, place, cell, judged.devices(place))
            if place.processes not in soonest or time.seconds.value < soonest[place.processes][0].seconds.value:
                soonest[place.processes] = time, judged.is_trusted
    return [soonest[processes] for processes in sorted(soonest)]


def _judged(options: Options, models: Mapping[Options, CheckedModel]) -> tuple[CheckedModel, Model] | None:
    """The checked model of the step time with these options; None if there is no model."""
    judged = models.get(as_timed(Cell(1, 1, options)).options)
    return (judged, judged.model) if judged is not None and isinstance(judged.model, Model) else None


def time_picture(choice: Answer, models: Mapping[Options, CheckedModel], folder: Path) -> Picture:
    """The seconds to the target against the batch size."""
    rows = [(time, _by_model(time, choice.target, models)) for time in choice.target.times]
    return _picture(choice.target.goal, rows, folder)


def add_answers(page: Page, answers: Iterable[Answer | None], analysis: Analysis,
                models: Mapping[Options, CheckedModel], folder: Path) -> None:
    """The section: for each target what is soonest, what cheapest and whether more processes help, the times of all
    cells, measured and by the model, and what the model forecasts. The picture of the last target is not in it.
    """
    known = [choice for choice in answers if choice]
    if not known:
        return
    page.add(Heading(2, "Time to a target"))
    for choice in known:
        goal = choice.target.goal
        rows = [(time, _by_model(time, choice.target, models)) for time in choice.target.times]
        page.add(Heading(3, goal.title), _words(choice, analysis))
        if choice is not known[-1]:
            page.add(_picture(goal, rows, folder))
        page.add(_table(choice, rows))
    page.add("Seconds: the steps to the target times the time of a step on this number of processes; by the model: "
             "times the step time of the model. Device-seconds: times the GPUs, or on a CPU the cores, that the cell "
             "occupies. Front: no other cell is both sooner and cheaper. Knee: the cell with the least seconds x "
             "device-seconds; from there to the soonest, the cost grows by more than the time falls. Forecast: for "
             "more processes than were run, the batch size that is soonest. Evaluation, start-up and compiling are "
             "outside, and batch sizes between those that were run are not looked at.")


def _by_model(time: TimeToTarget, target: Target, models: Mapping[Options, CheckedModel]) -> Interval | None:
    known = _judged(time.cell.options, models)
    if known is None:
        return None
    judged, model = known
    (learnt,) = (steps for steps in target.learnt
                 if (steps.options, steps.batch) == (time.cell.options, time.cell.global_batch_size))
    return modelled(learnt, model, judged.places[as_timed(time.cell)], time.cell, time.devices).seconds


def _picture(goal: Goal, rows: Sequence[tuple[TimeToTarget, Interval | None]], folder: Path) -> Picture:
    groups: dict[tuple[int, Options], list[tuple[TimeToTarget, Interval | None]]] = {}
    for row in rows:
        groups.setdefault((row[0].cell.processes, row[0].cell.options), []).append(row)
    soonest = min((time for time, _ in rows), key=lambda time: time.typical)
    series = []
    for (processes, options), of_line in groups.items():
        batches = [time.cell.global_batch_size for time, _ in of_line]
        by_model = [model for _, model in of_line if model is not None]
        series.append(Series(
            name_of_line(processes, options), batches, [time.seconds for time, _ in of_line], [[] for _ in of_line],
            [f"{time.cell}: {say(time.seconds)} s" for time, _ in of_line],
            batches if len(by_model) == len(of_line) else (), by_model if len(by_model) == len(of_line) else ()))
    return charts.draw(
        folder, f"time-{goal.file}", f"{as_start(soonest.cell)} is soonest to {goal}",
        f"Seconds of training to {goal} against the global batch size: measured, with "
        "intervals, and the model's line, if there is one. Both axes are logarithmic.", series,
        x_label="global batch size (samples)", y_label="seconds to the target")


def _table(choice: Answer, rows: Sequence[tuple[TimeToTarget, Interval | None]]) -> Table:
    cells = [time.cell for time, _ in rows]
    lines: list[list[Inline]] = []
    for time, model in rows:
        marks = [name for name, which in (("soonest", choice.soonest), ("cheapest", choice.cheapest),
                                          ("knee", choice.knee)) if which is time]
        marks += ["front"] if not marks and any(time is other for other in choice.front) else []
        lines.append([*cell_words(time.cell, cells), say(time.seconds), say(model) if model else "-", say(time.cost),
                      "1" if time is choice.soonest else say(choice.target.ratio(time, choice.soonest)),
                      ", ".join(marks)])
    for time, trusted in choice.ahead:
        lines.append([*cell_words(time.cell, cells), "not run", say(time.seconds), say(time.cost),
                      number(time.seconds.value / choice.soonest.seconds.value),
                      "forecast" if trusted else "forecast, not to be trusted"])
    return Table([*cell_head(cells), "seconds to it", "by the model", "device-seconds", "times the soonest", ""], lines)
