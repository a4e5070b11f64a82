"""The part of a report that checks the model of the step time with the study, and forecasts with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mnist_dist.study.analysis.cells import CellMetrics
from mnist_dist.study.analysis.fitted_models import CheckedModel, worst_of
from mnist_dist.study.analysis.intervals import Interval
from mnist_dist.study.analysis.measured_network import AllReduceTimes
from mnist_dist.study.analysis.step_time import (
    FIXED,
    FLOOR,
    LATENCY,
    LATENCY_BETWEEN,
    PARAMETERS,
    Model,
    Place,
    seconds,
)
from mnist_dist.study.analysis.step_time_check import Check
from mnist_dist.study.analysis.step_time_fit import MODEL_ERROR, WORSE
from mnist_dist.study.plan.grid import Cell, Options
from mnist_dist.study.report import charts
from mnist_dist.study.report.charts import MOST_LINES, Series
from mnist_dist.study.report.labels import cell_head, cell_words, for_options, level_of, options_alone, say, short
from mnist_dist.study.report.page import Code, Heading, Inline, Page, Strong, Table, Text
from mnist_dist.tables import number
from mnist_dist.text import counted

TITLE = "Model of the step time"
SAID = {
    "fixed": "fixed, ms", "per_sample": "computing, µs per sample", "floor": "floor, samples",
    "latency": "latency of a message, ms", "transfer": "sending the gradient once, ms",
    "latency_between": "latency between machines, ms", "transfer_between": "sending it between machines, ms",
}
UNIT = {"per_sample": 1e6, "floor": 1.0}  # the others are in milliseconds
METHOD = (
    "A step takes: fixed + computing x batch of a process (at least the floor) + the exchange of n processes, less "
    "what the computing hides of it. A ring takes 2 (n - 1) latencies + 2 (n - 1) / n times sending the gradient, a "
    "tree log2(n) latencies. Each is fitted with 0, 25, 50, 75 and 100 % of the computing hiding it. No parameter is "
    "negative. Distances are those of the logarithms, in standard errors of the cells, to which "
    f"{100 * MODEL_ERROR:g} % that no law explains are added. Laws less than {WORSE:g} squared standard errors worse "
    "than the closest are left, and the band spans them. "
    "Beyond the most processes that were run it also spans a ring with half the bandwidth.")


def add_model(page: Page, models: Mapping[Options, CheckedModel], folder: Path, fabric: AllReduceTimes | None,
              unit: str) -> None:
    """The section: for each value of the study's options a model, how it was checked, and its forecast, also in `unit`
    per second; and what the doctor has measured of the fabric beside what the model says of it.
    """
    page.add(Heading(2, TITLE))
    fitted = {options: (judged, judged.model) for options, judged in models.items() if isinstance(judged.model, Model)}
    page.add(*(Text(("No model", *for_options(options), f": {judged.model}.")) for options, judged in models.items()
               if isinstance(judged.model, str)))
    for options, (judged, model) in fitted.items():
        _add_laws(page, options, model)
        _add_check(page, judged.left_out, options, judged.checked)
        _add_left_one_out(page, options, judged)
    if not fitted:
        return
    series = [line for options, (judged, model) in fitted.items() for line in _series(judged, options, model)]
    page.add(charts.draw(
        folder, "model", _title(fitted),
        "Milliseconds of a step against the number of processes, for each global batch: measured "
        f"times, the model's line, and dashed, with a band, its forecast; the smallest {MOST_LINES} batches at most. "
        "Both axes are logarithmic.", series,
        x_label="processes", y_label="ms per step", say="{:.3g} ms".format))
    _add_forecast(page, fitted, unit)
    models_of_options = {options: model for options, (_, model) in fitted.items()}
    _add_parameters(page, models_of_options, fabric)
    if fabric:
        _add_exchange(page, models_of_options, fabric)
    levels = ", ".join(dict.fromkeys(level_of(model.parameter(FIXED)) for _, model in fitted.values()))
    page.add(f"{METHOD} Level of the intervals and bands: {levels}.")


def _add_laws(page: Page, options: Options, model: Model) -> None:
    """Which hypotheses are left, and whether they describe the cells."""
    names = "; ".join(str(fit.hypothesis) for fit in model.fits)
    parts: list[str] = ["The exchange", *for_options(options), " is described by: ", Code(names), ". "]
    if not model.describes:
        parts.append(Strong("It is further from the cells than chance makes it: the forecast is not to be trusted."))
    elif len(model.laws) > 1:
        parts.append("The cells do not refute any of these laws, so the forecast goes to twice the most processes "
                     "that were run.")
    page.add(Text(parts))


def _add_left_one_out(page: Page, options: Options, judged: CheckedModel) -> None:
    """How far off the model is for each batch size and each number of processes, if it is fitted without them."""
    if (worst := worst_of(judged.left_one_out)) is None:
        return
    page.add(Text(("Each batch size and each number of processes left out in turn", *for_options(options),
                   f": the largest error is {100 * worst.error:+.1f} %, without {worst.axis} {worst.value:,}.")),
             Table(["left out", "largest error without it"],
                   [[f"{left_out.axis} {left_out.value:,}",
                     Code(left_out.reason) if left_out.reason else f"{100 * left_out.error:+.1f} %"]
                    for left_out in judged.left_one_out]))


def _add_check(page: Page, left_out: Sequence[Cell], options: Options, checked: Check | str) -> None:
    """Predicted against measured, for the cells that were left out, and whether the forecast is to be trusted."""
    if isinstance(checked, str):
        page.add(Text((
            "The model", *for_options(options), f" is not checked: {checked}. ",
            Strong("Its forecast is not to be trusted."), " To leave out others: ",
            Code("mnist-dist report STUDY_DIR --hold-out batch-size=N"), ".")))
        return
    page.add(Text((
        "The model", *for_options(options), f" was fitted without {counted(len(left_out), 'cell')}, and predicts what "
        f"was left out. The largest error is {100 * max(checked.errors, key=abs):+.1f} %. ",
        _verdict(checked))))
    compared = zip(left_out, checked.predicted, checked.measured, checked.errors, strict=True)
    page.add(Table(
        [*cell_head(left_out), "predicted, ms (band)", "measured, ms", "error"],
        [[*cell_words(cell, left_out), _ms(ours), number(1000 * theirs), f"{100 * error:+.1f} %"]
         for cell, ours, theirs, error in compared]))


def _verdict(checked: Check) -> str:
    if not checked.holds:
        return Strong("Not every measured time is within its band: the forecast is not to be trusted.")
    if not checked.passes:
        return Strong(f"The bands are {100 * checked.width:.0f} % wide to each side, which is no check: the forecast "
                      "is not to be trusted.")
    return f"Every measured time is within its band ({level_of(checked.predicted[0])} together, if a law is true)."


def _ms(interval: Interval) -> str:
    return say(interval.scaled(1000))


def _title(fitted: Mapping[Options, tuple[CheckedModel, Model]]) -> str:
    """The title of the picture: the largest error of the model."""
    worst = worst_of([left_out for judged, _ in fitted.values() for left_out in judged.left_one_out])
    if worst is None:
        return "The model's line through the measured points"
    return (f"The model is at most {100 * abs(worst.error):.0f} % off what is left out of it "
            f"({worst.axis} {worst.value:,})")


def _series(judged: CheckedModel, options: Options, model: Model) -> list[Series]:
    """A line for each global batch size, as many as are drawn."""
    groups: dict[int, list[tuple[CellMetrics, Place]]] = {}
    for member in judged.members:
        groups.setdefault(member.cell.global_batch_size, []).append((member, judged.places[member.cell]))
    shown = sorted(groups)[:MOST_LINES]
    series = []
    for batch, ahead in judged.beyond(shown).items():
        members = [member for member, _ in groups[batch]]
        places = [*(place for _, place in groups[batch]), *ahead]
        series.append(Series(
            f"batch {batch:,}{short(options)}", [member.cell.processes for member in members],
            [member.step_ms for member in members], [list(member.steps_ms) for member in members],
            [f"{member.cell}: {say(member.step_ms)} ms per step" for member in members],
            [place.processes for place in places], [step.scaled(1000) for step in model.predict(places)]))
    return series


def _add_forecast(page: Page, fitted: dict[Options, tuple[CheckedModel, Model]], unit: str) -> None:
    """The forecasts, and what a step is made of there."""
    lines: list[list[Inline]] = []
    every = [member.cell for judged, _ in fitted.values() for member in judged.members]
    for options, (judged, model) in fitted.items():
        batches = sorted({member.cell.global_batch_size for member in judged.members})
        for batch, places in judged.beyond(batches).items():
            for place, step in zip(places, model.predict(places), strict=True):
                shares = model.shares(place)
                lines.append([*cell_words(Cell(batch, place.processes, options), every), _ms(step),
                              number(batch * judged.members[0].units_per_sample / step.value),
                              *(f"{100 * shares[name]:.0f} %" for name in SHARES)])
    if lines:
        page.add(Text((Strong("Forecast"), ", for more processes than were run, and what a step is made of there:")),
                 Table([*cell_head(every), "ms per step (band)", f"{unit}/s", *SHARES], lines))


SHARES = ("fixed", "computing", "communication")


def _add_parameters(page: Page, fitted: dict[Options, Model], fabric: AllReduceTimes | None) -> None:
    """The parameters, with their intervals, and which of them the cells do not decide."""
    lines: list[list[Inline]] = []
    measured = _measured(fabric) if fabric else {}
    for options, model in fitted.items():
        for index, name in enumerate(PARAMETERS):
            if index in model.best.absent:
                continue
            value = model.parameter(index).scaled(UNIT.get(name, 1000.0))
            lines.append([*([options_alone(options)] if any(fitted) else []), SAID[name], say(value),
                          *([number(1000 * measured[index]) if index in measured else ""] if measured else []),
                          _undecided(index) if index in model.best.undecided else ""])
    page.add(Table([*(["options"] if any(fitted) else []), "parameter", "value", *(["doctor"] if measured else []),
                    ""], lines))


def _measured(fabric: AllReduceTimes) -> dict[int, float]:
    """The parameters, in seconds, that the doctor has measured; none, if its ring was neither in one machine nor
    between machines with one process each.
    """
    first = {1: LATENCY, fabric.processes: LATENCY_BETWEEN}.get(fabric.machines)
    return {} if first is None else dict(zip((first, first + 1), fabric.ring, strict=True))


def _add_exchange(page: Page, fitted: dict[Options, Model], fabric: AllReduceTimes) -> None:
    """The exchange of the gradient, as the model has it and as the doctor has measured it."""
    measured = fabric.seconds(fabric.gradient_bytes)
    for options, model in fitted.items():
        both = [Place(1, fabric.processes, fabric.machines), Place(1, 1)]
        together, alone = seconds(model.best.values, both, model.best.hypothesis)
        if together > alone:
            modelled = together - alone
            page.add(Text((
                f"Exchanging the gradient over {fabric.processes} processes takes {number(1000 * modelled)} ms by the "
                "model", *for_options(options), f", and {number(1000 * measured)} ms as the doctor has measured it "
                f"({fabric.name}): {number(modelled / measured)} times as long. The model's also has what only several "
                "processes do: waiting for the slowest one, and sharing the machine.")))


def _undecided(index: int) -> str:
    return ("no cell is below it: anything up to the smallest batch" if index == FLOOR
            else "one size of ring does not separate latency from sending: any share of each is possible")
