"""The part of a report that says how far a larger batch still helps learning: steps and samples to a target."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from mnist_dist.study.analysis import Analysis
from mnist_dist.study.critical import TOLERANCE, Critical, critical
from mnist_dist.study.grid import Cell
from mnist_dist.study.pages import Code, Heading, Inline, Page, Table, Text
from mnist_dist.study.statistics import Interval, median_interval
from mnist_dist.study.words import cell_words, options_of, short

TITLE = "What a larger batch buys in learning"
RATE, RULE = "lr", "lr_rule"


@dataclass
class Learnt:
    """The runs of a batch size (on any number of processes, which change nothing) and options, and a target: steps and
    samples to it, inf in runs that did not reach it, and the most of both that such a run had.
    """

    batch: int
    options: tuple[tuple[str, str], ...]
    steps: list[float] = field(default_factory=list)
    samples: list[float] = field(default_factory=list)
    most_steps: int = 0
    most_samples: int = 0


def learnt(analysis: Analysis) -> dict[float, list[Learnt]]:
    """What each target took, in the order of the cells."""
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
                mine.steps.append(math.inf if one["step"] is None else one["step"])
                mine.samples.append(math.inf if one["samples"] is None else one["samples"])
    return {target: list(cells.values()) for target, cells in sorted(found.items(), reverse=True)}


def add_learning(page: Page, analysis: Analysis) -> None:
    """The section: a table for each target, and the critical batch size where it can be told."""
    page.add(Heading(2, TITLE))
    targets = learnt(analysis)
    if not targets:
        page.add(Text(("Not measured: the runs have no target. ", Code("--target-nll 0.3,0.2 --evaluate-every "
                       "10000samples"), " measures how many samples a larger batch needs to reach the same test NLL.")))
        return
    for target, cells in targets.items():
        page.add(Heading(3, f"Test NLL {target:g}"), _table(cells))
        for options, own in _by_line(cells).items():
            page.add(_critical(options, own))
    page.add("Medians over repeats, which have seeds of their own, with the interval between two order statistics; "
             "the number of processes changes nothing here. A run that did not reach the target counts as more than it "
             "had (>).")


def _table(cells: Sequence[Learnt]) -> Table:
    named = [Cell(one.batch, 1, one.options) for one in cells]
    lines: list[list[Inline]] = []
    for one, cell in zip(cells, named, strict=True):
        reached = sum(math.isfinite(value) for value in one.samples)
        batch, _, *options = cell_words(cell, named)
        lines.append([batch, *options, f"{reached} of {len(one.samples)}",
                      _say(median_interval(one.steps), one.most_steps),
                      _say(median_interval(one.samples), one.most_samples)])
    return Table(["batch size", *(Code(name) for name in options_of(named)), "runs that reached it", "steps",
                  "samples"], lines)


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


def _critical(options: Sequence[tuple[str, str]], tried: Sequence[Sequence[Learnt]]) -> Text:
    """The critical batch size in words. At one fixed rate it is none: a larger batch wants a larger rate."""
    own = [rates[0] for rates in tried]
    rule = dict(options).get(RULE, "none")
    tuned = any(len(rates) > 1 for rates in tried)
    name = "the critical batch size" if tuned or rule != "none" else (
        "the knee of this fixed learning rate (no critical batch size: a larger batch wants a larger rate)")
    where = (" for ", Code(short(tuple(options))[2:])) if options else ()
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
