"""The part of a report that holds the model of the step time against the study, and forecasts with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import compress
from pathlib import Path

from mnist_dist.study import pictures
from mnist_dist.study.analysis import CellFigures
from mnist_dist.study.grid import Cell, HoldOut
from mnist_dist.study.pages import Code, Heading, Inline, Page, Strong, Table, Text
from mnist_dist.study.pictures import MOST_LINES, Series
from mnist_dist.study.statistics import LEVEL, Interval
from mnist_dist.study.step_time import (
    FLOOR,
    OUTLIER,
    PARAMETERS,
    Cells,
    Check,
    Model,
    Place,
    check,
    fit,
)
from mnist_dist.study.words import cell_head, cell_words, counted, for_options, options_alone, say, short
from mnist_dist.tables import number

Options = tuple[tuple[str, str], ...]
TITLE = "Model of the step time"
TAKES_NO_TIME = ("lr", "lr_rule")
FURTHER = (2, 4, 8)  # times the most processes that were run: where there is a forecast
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


def add_model(page: Page, cells: dict[Cell, CellFigures], folder: Path, hold_out: HoldOut) -> None:
    """The section: for each value of the study's options a model, how it was checked, and its forecast."""
    page.add(Heading(2, TITLE))
    groups: dict[Options, list[CellFigures]] = {}
    for figures in _as_timed(cells):
        groups.setdefault(figures.cell.options, []).append(figures)
    models = {options: fit(_cells(own)) for options, own in groups.items()}
    fitted = {options: model for options, model in models.items() if isinstance(model, Model)}
    page.add(*(Text(("No model", *for_options(options), f": {model}.")) for options, model in models.items()
               if isinstance(model, str)))
    for options in fitted:
        own = [figures.cell for figures in groups[options]]
        left_out = [hold_out.leaves_out(cell, own) for cell in own]
        _add_check(page, list(compress(own, left_out)), options, check(_cells(groups[options]), left_out))
    if not fitted:
        return
    series = [one for options, model in fitted.items() for one in _series(groups[options], options, model)]
    page.add(pictures.draw(
        folder, "model", "Milliseconds of a step against the number of processes, for each global batch: measured "
        f"medians, the model's line, and dashed, with a band, its forecast; the smallest {MOST_LINES} batches at most. "
        "Both axes are logarithmic.", series,
        x_label="processes", y_label="ms per step", say="{:.3g} ms".format))
    _add_forecast(page, {options: (groups[options], model) for options, model in fitted.items()})
    _add_parameters(page, fitted)
    page.add(METHOD)


def _as_timed(cells: dict[Cell, CellFigures]) -> list[CellFigures]:
    """The cells, of which those that differ in nothing that takes time are one."""
    found: dict[Cell, CellFigures] = {}
    for cell, figures in cells.items():
        timed = replace(cell, options=tuple(option for option in cell.options if option[0] not in TAKES_NO_TIME))
        found.setdefault(timed, CellFigures(timed)).repeats.extend(figures.repeats)
    return list(found.values())


def _cells(members: Sequence[CellFigures]) -> Cells:
    return Cells(places_of(members), [one.cell.global_batch_size / one.runs.rates for one in members])


def places_of(members: Sequence[CellFigures]) -> list[Place]:
    """Where the cells are in the model. If runs say nothing of machines and threads: on one machine, all as fast."""
    environments = [one.repeats[0].row.get("environment") or {} for one in members]
    threads = [(own.get("num_threads") if own.get("device") == "cpu" else None) or 1 for own in environments]
    most = max(threads)
    return [Place(-(-one.cell.global_batch_size // one.cell.processes), one.cell.processes,
                  own.get("num_machines") or 1, count / most)
            for one, own, count in zip(members, environments, threads, strict=True)]


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


def _series(members: Sequence[CellFigures], options: Options, model: Model) -> list[Series]:
    """A line for each global batch size, as many as are drawn."""
    groups: dict[int, list[tuple[CellFigures, Place]]] = {}
    for one, place in zip(members, places_of(members), strict=True):
        groups.setdefault(one.cell.global_batch_size, []).append((one, place))
    shown = sorted(groups)[:MOST_LINES]
    found = []
    for batch, ahead in _beyond(members, shown).items():
        own = [one for one, _ in groups[batch]]
        places = [*(place for _, place in groups[batch]), *ahead]
        found.append(Series(
            f"batch {batch:,}{short(options)}", [one.cell.processes for one in own], [one.step_ms for one in own],
            [list(1000 * batch / one.runs.rates) for one in own],
            [f"{one.cell}: {say(one.step_ms)} ms per step" for one in own],
            [place.processes for place in places], [one.scaled(1000) for one in model.predict(places)]))
    return found


def _beyond(members: Sequence[CellFigures], batches: Sequence[int]) -> dict[int, list[Place]]:
    """Where there is a forecast for these global batches: more processes than were run, machines filled as before.

    Processes that share a machine's cores have fewer threads the more they are, and one at least.
    """
    measured = places_of(members)
    largest = max(measured, key=lambda place: place.processes)
    environment = members[measured.index(largest)].repeats[0].row.get("environment") or {}
    shared, threads = min(place.speed for place in measured) < 1, environment.get("num_threads") or 1
    factors = [factor for factor in FURTHER if not (shared and factor > threads)]
    return {batch: [Place(-(-batch // processes), processes, factor * largest.machines if largest.machines > 1 else 1,
                          largest.speed / factor if shared else 1.0)
                    for factor in factors if (processes := factor * largest.processes) <= batch]
            for batch in batches}


def _add_forecast(page: Page, fitted: dict[Options, tuple[Sequence[CellFigures], Model]]) -> None:
    """The forecasts, and what a step is made of there."""
    lines: list[list[Inline]] = []
    every = [one.cell for members, _ in fitted.values() for one in members]
    for options, (members, model) in fitted.items():
        batches = sorted({one.cell.global_batch_size for one in members})
        for batch, places in _beyond(members, batches).items():
            for place, step in zip(places, model.predict(places), strict=True):
                shares = model.shares(place)
                lines.append([*cell_words(Cell(batch, place.processes, options), every), _ms(step),
                              number(batch / step.value), *(f"{100 * shares[name]:.0f} %" for name in SHARES)])
    if lines:
        page.add(Text((Strong("Forecast"), ", for more processes than were run, and what a step is made of there:")),
                 Table([*cell_head(every), "ms per step (band)", "samples/s", *SHARES], lines))


SHARES = ("fixed", "computing", "communication")


def _add_parameters(page: Page, fitted: dict[Options, Model]) -> None:
    """The parameters, with their intervals; what the cells do not tell apart is said."""
    lines: list[list[Inline]] = []
    for options, model in fitted.items():
        for index, name in enumerate(PARAMETERS):
            if index in model.absent:
                continue
            value = model.parameter(index).scaled(UNIT.get(name, 1000.0))
            lines.append([*([options_alone(options)] if any(fitted) else []), SAID[name], say(value),
                          _undecided(index) if index in model.undecided else ""])
    page.add(Table([*(["options"] if any(fitted) else []), "parameter", "value", ""], lines))


def _undecided(index: int) -> str:
    return ("no cell is below it: anything up to the smallest batch" if index == FLOOR
            else "latency and sending are not told apart by one size of ring: any share of each")
