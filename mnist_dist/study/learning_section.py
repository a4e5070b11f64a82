"""The part of a report that says how far a larger batch still helps learning: steps and samples to a target."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mnist_dist.study.analysis import Analysis
from mnist_dist.study.critical import DRAWS, TOLERANCE, Critical, critical
from mnist_dist.study.grid import Cell
from mnist_dist.study.pages import Code, Heading, Inline, Page, Table, Text
from mnist_dist.study.statistics import LEVEL, Interval, interval_of_draws, median_interval, resampled_medians
from mnist_dist.study.words import cell_head, cell_words, for_options, options_of, say

TITLE = "What a larger batch buys in learning"
RATE, RULE = "lr", "lr_rule"


@dataclass
class Learnt:
    """The runs of a batch size (on any number of processes, which change nothing) and options, and a target: steps and
    samples to it, inf in runs that did not reach it, and the most of both that such a run had; and the noise scales of
    their last epochs.
    """

    batch: int
    options: tuple[tuple[str, str], ...]
    steps: list[float] = field(default_factory=list)
    samples: list[float] = field(default_factory=list)
    most_steps: int = 0
    most_samples: int = 0
    noise_scales: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class TimeTo:
    """The seconds of training that a cell takes to a target, and a bootstrap of them [DRAWS]."""

    cell: Cell
    seconds: Interval
    draws: np.ndarray


@dataclass(frozen=True)
class Target:
    """What it took to reach a test NLL, in the order of the cells."""

    nll: float
    learnt: list[Learnt]
    times: list[TimeTo]


def targets_of(analysis: Analysis) -> list[Target]:
    """The targets of the study's runs, the highest first."""
    found: dict[float, dict[object, Learnt]] = {}
    for figures in analysis.cells.values():
        cell = figures.cell
        for run in figures.repeats:
            for one in (run.row.get("summary") or {}).get("targets") or []:
                cells = found.setdefault(one["target_nll"], {})
                mine = cells.setdefault((cell.options, cell.global_batch_size),
                                        Learnt(cell.global_batch_size, cell.options))
                if one["step"] is None:
                    steps = run.row["epochs"][-1]["step"]
                    whole = (run.row.get("dataset") or {}).get("train", math.inf) * len(run.row["epochs"])
                    mine.most_steps = max(mine.most_steps, steps)  # the last batch of an epoch may be smaller
                    mine.most_samples = max(mine.most_samples, min(steps * cell.global_batch_size, whole))
                if (noise := run.row["epochs"][-1].get("noise_scale")) is not None:
                    mine.noise_scales.append(noise)
                mine.steps.append(math.inf if one["step"] is None else one["step"])
                mine.samples.append(math.inf if one["samples"] is None else one["samples"])
    return [Target(nll, list(cells.values()), times_to(analysis, list(cells.values())))
            for nll, cells in sorted(found.items(), reverse=True)]


def add_learning(page: Page, targets: Sequence[Target]) -> None:
    """The section: a table for each target, and the critical batch size where it can be told."""
    page.add(Heading(2, TITLE))
    if not targets:
        page.add(Text(("Not measured: the runs have no target. ", Code("--target-nll 0.3,0.2 --evaluate-every "
                       "10000samples"), " measures how many samples a larger batch needs to reach the same test NLL.")))
        return
    for target in targets:
        page.add(Heading(3, f"Test NLL {target.nll:g}"), _table(target.learnt))
        for options, own in _by_line(target.learnt).items():
            page.add(_critical(options, own))
        if target.times:
            page.add(_times(target.times))
    page.add("Medians over repeats, which have seeds of their own, with the interval between two order statistics; "
             "the number of processes changes nothing of them. A run that did not reach the target counts as more than "
             "it had (>). Noise scale: that of the runs' last epoch, if they measure it (--noise-scale). Seconds: "
             "the steps to the target times the time of a step on so many processes; device-seconds: times the "
             "processes. Evaluation, start-up and compiling are outside.")


def times_to(analysis: Analysis, cells: Sequence[Learnt]) -> list[TimeTo]:
    """Of each cell whose runs reached the target: the steps that its batch size takes, times its own time of a step."""
    steps = {(one.options, one.batch): np.asarray(one.steps, dtype=float) for one in cells}
    found = []
    for cell, figures in analysis.cells.items():
        taken = steps.get((cell.options, cell.global_batch_size))
        if taken is None or not np.isfinite(taken).all():
            continue
        each = cell.global_batch_size / figures.runs.rates
        # cells of the same batch size share its steps, so they share the draws of these: else they would differ by them
        seeds = [cell.global_batch_size], [cell.global_batch_size, cell.processes]
        draws = np.prod([resampled_medians([runs], DRAWS, np.random.default_rng(seed))[:, 0]
                         for runs, seed in zip((taken, each), seeds, strict=True)], axis=0)
        found.append(TimeTo(cell, interval_of_draws(np.median(taken) * np.median(each), draws,
                                                    min(len(taken), len(each))), draws))
    return found


def answers(targets: Sequence[Target]) -> list[Text]:
    """For each target, in words: the soonest cell and the cheapest one, and how many are not shown to be worse."""
    found = []
    for target in targets:
        if not (times := target.times):
            found.append(Text((f"Test NLL {target.nll:g}: not known, because at no batch size all runs reached it.",)))
            continue
        soonest = min(times, key=lambda one: one.seconds.value)
        cheapest = min(times, key=lambda one: one.seconds.value * one.cell.processes)
        equal = sum(one is not soonest and not _is_slower(one, soonest) for one in times)
        others = f"; {equal} of {len(times) - 1} others are not shown to be slower" if len(times) > 1 else ""
        found.append(Text((
            f"Test NLL {target.nll:g}: soonest with ", Code(str(soonest.cell)),
            f", {say(soonest.seconds)} s of training{others}. Cheapest with ", Code(str(cheapest.cell)),
            f", {say(cheapest.seconds.scaled(cheapest.cell.processes))} device-seconds.")))
    return found


def _is_slower(one: TimeTo, than: TimeTo) -> bool:
    """Whether that is shown; single runs show nothing."""
    return min(one.seconds.n, than.seconds.n) > 1 and float(
        np.quantile(one.draws / than.draws, (1 - LEVEL) / 2)) > 1


def _times(times: Sequence[TimeTo]) -> Table:
    cells = [one.cell for one in times]
    return Table([*cell_head(cells), "seconds to it", "device-seconds"],
                 [[*cell_words(one.cell, cells), say(one.seconds), say(one.seconds.scaled(one.cell.processes))]
                  for one in times])


def _table(cells: Sequence[Learnt]) -> Table:
    named = [Cell(one.batch, 1, one.options) for one in cells]
    lines: list[list[Inline]] = []
    for one, cell in zip(cells, named, strict=True):
        reached = sum(math.isfinite(value) for value in one.samples)
        batch, _, *options = cell_words(cell, named)
        lines.append([batch, *options, f"{reached} of {len(one.samples)}",
                      _say(median_interval(one.steps), one.most_steps),
                      _say(median_interval(one.samples), one.most_samples),
                      _say(median_interval(one.noise_scales), 0) if one.noise_scales else "-"])
    return Table(["batch size", *(Code(name) for name in options_of(named)), "runs that reached it", "steps",
                  "samples", "noise scale, samples"], lines)


def _say(interval: Interval, limit: int) -> str:
    """An interval whose ends may be unknown: above the limit."""
    ends = (interval.value, interval.low, interval.high)
    value, low, high = (f"{end:,.0f}" if math.isfinite(end) else f"> {limit:,}" for end in ends)
    return f"{value} ({low} to {high})" if interval.n > 1 and low != high else value


def _by_line(cells: Sequence[Learnt]) -> dict[tuple[tuple[str, str], ...], list[list[Learnt]]]:
    """For each value of the options without the rate, the rates that were tried at each batch size, the best first."""
    found: dict[tuple[tuple[str, str], ...], dict[int, list[Learnt]]] = {}
    for one in cells:
        options = tuple(option for option in one.options if option[0] != RATE)
        found.setdefault(options, {}).setdefault(one.batch, []).append(one)
    return {options: [sorted(tried, key=_median) for tried in batches.values()] for options, batches in found.items()}


def _median(one: Learnt) -> float:
    return median_interval(one.samples).value


def _critical(options: tuple[tuple[str, str], ...], tried: Sequence[Sequence[Learnt]]) -> Text:
    """The critical batch size in words. At one fixed rate it is none: a larger batch wants a larger rate."""
    own = [rates[0] for rates in tried]
    rule = dict(options).get(RULE, "none")
    tuned = any(len(rates) > 1 for rates in tried)
    name = "the critical batch size" if tuned or rule != "none" else (
        "the knee of this fixed learning rate (no critical batch size: a larger batch wants a larger rate)")
    where = for_options(options)
    best = (". The best rate of those tried, by batch size: ", Code(", ".join(map(_best, tried)))) if tuned else ()
    found = critical({one.batch: one.samples for one in own})
    if isinstance(found, str):
        return Text((f"{name[0].upper()}{name[1:]}", *where, f" is not known: {found}", *best, "."))
    return Text((f"By the fit E = least (1 + B / critical), {name}", *where, " is "
                 f"{_say(found.fitted, 0)} samples, with at least {_say(found.least_samples, 0)} samples to the target"
                 f". {_direct(found)}", *best, "."))


def _best(rates: Sequence[Learnt]) -> str:
    """`200: 0.001`; a rate at the edge of what was tried may not be the best there is."""
    values = [float(dict(one.options)[RATE]) for one in rates]
    edge = " (at the edge)" if len(values) > 1 and values[0] in (min(values), max(values)) else ""
    return f"{rates[0].batch:,}: {values[0]:g}{edge}"


def _direct(found: Critical) -> str:
    percent = f"{100 * TOLERANCE:.0f} %"
    if found.direct is None:
        return f"Where runs take {percent} more samples than at the two smallest batch sizes is not within those run"
    return (f"Measured directly, runs take {percent} more samples than at the two smallest batch sizes from batch "
            f"{_say(found.direct, 0)} on")
