"""The part of a report that holds the model of the step time against the study, and forecasts with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mnist_dist.study import pictures
from mnist_dist.study.analysis import CellFigures
from mnist_dist.study.fabric import Fabric
from mnist_dist.study.grid import Cell, Options
from mnist_dist.study.models import Judged
from mnist_dist.study.pages import Code, Heading, Inline, Page, Strong, Table, Text
from mnist_dist.study.pictures import MOST_LINES, Series
from mnist_dist.study.statistics import LEVEL, Interval
from mnist_dist.study.step_time import (
    FLOOR,
    LATENCY,
    LATENCY_BETWEEN,
    OUTLIER,
    PARAMETERS,
    Check,
    Model,
    Place,
    seconds,
)
from mnist_dist.study.words import cell_head, cell_words, for_options, options_alone, say, short
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
    "A step takes: fixed + computing x batch of a process (at least the floor) + 2 (n - 1) latencies + 2 (n - 1) / n "
    f"times sending the gradient, for a ring of n. Fitted to logarithms of the cells' medians, none negative; a cell "
    f"that is more than {100 * OUTLIER:.0f} % off counts less. Intervals: a bootstrap of runs.")


def add_model(page: Page, models: Mapping[Options, Judged], folder: Path, fabric: Fabric | None) -> None:
    """The section: for each value of the study's options a model, how it was checked, and its forecast; and what the
    doctor has measured of the fabric beside what the model says of it.
    """
    page.add(Heading(2, TITLE))
    fitted = {options: (judged, judged.model) for options, judged in models.items() if isinstance(judged.model, Model)}
    page.add(*(Text(("No model", *for_options(options), f": {judged.model}.")) for options, judged in models.items()
               if isinstance(judged.model, str)))
    for options, (judged, _) in fitted.items():
        _add_check(page, judged.left_out, options, judged.checked)
    if not fitted:
        return
    series = [one for options, (judged, model) in fitted.items() for one in _series(judged, options, model)]
    page.add(pictures.draw(
        folder, "model", "Milliseconds of a step against the number of processes, for each global batch: measured "
        f"medians, the model's line, and dashed, with a band, its forecast; the smallest {MOST_LINES} batches at most. "
        "Both axes are logarithmic.", series,
        x_label="processes", y_label="ms per step", say="{:.3g} ms".format))
    _add_forecast(page, fitted)
    own = {options: model for options, (_, model) in fitted.items()}
    _add_parameters(page, own, fabric)
    if fabric:
        _add_exchange(page, own, fabric)
    page.add(METHOD)


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
        "Every measured median is within its band (if the model is true, that is so in "
        f"{100 * LEVEL:.0f} % of studies)." if checked.passes else
        Strong("Not every measured median is within its band: the forecast is not to be trusted."))))
    compared = zip(left_out, checked.predicted, checked.measured, checked.errors, strict=True)
    page.add(Table(
        [*cell_head(left_out), "predicted, ms (band)", "measured, ms", "error"],
        [[*cell_words(cell, left_out), _ms(ours), number(1000 * theirs), f"{100 * error:+.1f} %"]
         for cell, ours, theirs, error in compared]))


def _ms(interval: Interval) -> str:
    return say(interval.scaled(1000))


def _series(judged: Judged, options: Options, model: Model) -> list[Series]:
    """A line for each global batch size, as many as are drawn."""
    groups: dict[int, list[tuple[CellFigures, Place]]] = {}
    for one in judged.members:
        groups.setdefault(one.cell.global_batch_size, []).append((one, judged.places[one.cell]))
    shown = sorted(groups)[:MOST_LINES]
    found = []
    for batch, ahead in judged.beyond(shown).items():
        own = [one for one, _ in groups[batch]]
        places = [*(place for _, place in groups[batch]), *ahead]
        found.append(Series(
            f"batch {batch:,}{short(options)}", [one.cell.processes for one in own], [one.step_ms for one in own],
            [list(1000 * batch / one.rates) for one in own],
            [f"{one.cell}: {say(one.step_ms)} ms per step" for one in own],
            [place.processes for place in places], [one.scaled(1000) for one in model.predict(places)]))
    return found


def _add_forecast(page: Page, fitted: dict[Options, tuple[Judged, Model]]) -> None:
    """The forecasts, and what a step is made of there."""
    lines: list[list[Inline]] = []
    every = [one.cell for judged, _ in fitted.values() for one in judged.members]
    for options, (judged, model) in fitted.items():
        batches = sorted({one.cell.global_batch_size for one in judged.members})
        for batch, places in judged.beyond(batches).items():
            for place, step in zip(places, model.predict(places), strict=True):
                shares = model.shares(place)
                lines.append([*cell_words(Cell(batch, place.processes, options), every), _ms(step),
                              number(batch / step.value), *(f"{100 * shares[name]:.0f} %" for name in SHARES)])
    if lines:
        page.add(Text((Strong("Forecast"), ", for more processes than were run, and what a step is made of there:")),
                 Table([*cell_head(every), "ms per step (band)", "samples/s", *SHARES], lines))


SHARES = ("fixed", "computing", "communication")


def _add_parameters(page: Page, fitted: dict[Options, Model], fabric: Fabric | None) -> None:
    """The parameters, with their intervals; what the cells do not tell apart is said."""
    lines: list[list[Inline]] = []
    measured = _measured(fabric) if fabric else {}
    for options, model in fitted.items():
        for index, name in enumerate(PARAMETERS):
            if index in model.absent:
                continue
            value = model.parameter(index).scaled(UNIT.get(name, 1000.0))
            lines.append([*([options_alone(options)] if any(fitted) else []), SAID[name], say(value),
                          *([number(1000 * measured[index]) if index in measured else ""] if measured else []),
                          _undecided(index) if index in model.undecided else ""])
    page.add(Table([*(["options"] if any(fitted) else []), "parameter", "value", *(["doctor"] if measured else []),
                    ""], lines))


def _measured(fabric: Fabric) -> dict[int, float]:
    """The parameters, in seconds, that the doctor has measured; none, if its ring was neither in one machine nor
    between machines with one process each.
    """
    first = {1: LATENCY, fabric.processes: LATENCY_BETWEEN}.get(fabric.machines)
    return {} if first is None else dict(zip((first, first + 1), fabric.ring, strict=True))


def _add_exchange(page: Page, fitted: dict[Options, Model], fabric: Fabric) -> None:
    """The exchange of the gradient, as the model has it and as the doctor has measured it."""
    measured = fabric.seconds(fabric.gradient_bytes)
    for options, model in fitted.items():
        both = [Place(1, fabric.processes, fabric.machines), Place(1, 1)]
        together, alone = seconds(model.values, both)
        if together > alone:
            modelled = together - alone
            page.add(Text((
                f"Exchanging the gradient over {fabric.processes} processes takes {number(1000 * modelled)} ms by the "
                "model", *for_options(options), f", and {number(1000 * measured)} ms as the doctor has measured it "
                f"({fabric.name}): {number(modelled / measured)} times as long. The model's also has what only several "
                "processes do: waiting for the slowest one, and sharing the machine.")))


def _undecided(index: int) -> str:
    return ("no cell is below it: anything up to the smallest batch" if index == FLOOR
            else "latency and sending are not told apart by one size of ring: any share of each")
