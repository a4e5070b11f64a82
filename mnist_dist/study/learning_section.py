"""The part of a report that says how far a larger batch still helps learning: steps and samples to a target."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mnist_dist.study import pictures
from mnist_dist.study.critical import TOLERANCE, Critical, critical
from mnist_dist.study.grid import Cell, Options
from mnist_dist.study.pages import Code, Heading, Inline, Page, Picture, Strong, Table, Text
from mnist_dist.study.pictures import Series
from mnist_dist.study.statistics import Interval, median_interval
from mnist_dist.study.targets import Learnt, Target
from mnist_dist.study.words import cell_words, for_options, options_of, say, short

TITLE = "What a larger batch buys in learning"
RATE, RULE = "lr", "lr_rule"
LEAST_DIFFERENCE = 0.02  # between estimates: runs that reach a target at the same evaluation have no spread
_PERCENT = f"{100 * TOLERANCE:.0f} %"


def add_learning(page: Page, targets: Sequence[Target], folder: Path) -> None:
    """The section: a table for each target, and the critical batch size where it can be told."""
    page.add(Heading(2, TITLE))
    if not targets:
        page.add(Text(("Not measured: the runs have no target. ", Code("--target-nll 0.3,0.2 --evaluate-every "
                       "10000samples"), " measures how many samples a larger batch needs to reach the same test NLL.")))
        return
    found = [(target, line) for target in targets for line in _lines(target)]
    if any(line.reached for _, line in found):
        page.add(_samples_picture(found, folder))
    sizes = [(target, line) for target, line in found if isinstance(line.found, Critical) and not line.is_knee]
    if sizes:
        page.add(_sizes_picture(sizes, folder))
    for target in targets:
        page.add(Heading(3, f"Test NLL {target.nll:g}"), _table(target.learnt))
        page.add(*(_critical(line) for one, line in found if one is target))
    page.add("Medians over repeats, which have seeds of their own, with the interval between two order statistics; "
             "the number of processes changes nothing of them, so runs of one seed count once. A run that did not "
             "reach the target counts as more than it had (>). Noise scale: its mean over the epochs up to the one "
             "that reached the target, if the runs measure it (--noise-scale). "
             f"Directly: the batch from which on runs take {_PERCENT} more samples than at the two smallest batch "
             "sizes, on a straight line between two batch sizes. If E = least (1 + B / critical) held, and the noise "
             "scale were the critical batch size, all three would agree.")


@dataclass(frozen=True)
class Line:
    """The best rate at each batch size, with the rates that were tried, the best first; and what follows of critical
    batch sizes, or the reason why it is not known. At one fixed rate it is a knee: a larger batch wants a larger rate.
    """

    options: Options
    tried: Sequence[Sequence[Learnt]]
    found: Critical | str

    @property
    def is_tuned(self) -> bool:
        """Whether several rates were tried."""
        return any(len(rates) > 1 for rates in self.tried)

    @property
    def is_knee(self) -> bool:
        """Whether the rate is one fixed one."""
        return not self.is_tuned and dict(self.options).get(RULE, "none") == "none"

    @property
    def reached(self) -> list[Learnt]:
        """Where at least half the runs reached the target."""
        return [rates[0] for rates in self.tried if math.isfinite(_median(rates[0]))]


def _lines(target: Target) -> list[Line]:
    lines = []
    for options, tried in _by_line(target.learnt).items():
        own = [rates[0] for rates in tried]
        lines.append(Line(options, tried, critical(
            {one.batch: one.samples for one in own},
            {one.batch: one.noise_scales for one in own if len(one.noise_scales) > len(one.samples) / 2})))
    return lines


def _samples_picture(found: Sequence[tuple[Target, Line]], folder: Path) -> Picture:
    series = []
    for target, line in found:
        if not (own := line.reached):
            continue
        name = f"NLL {target.nll:g}{short(line.options)}"
        fit = line.found if isinstance(line.found, Critical) else None
        batches = list(np.geomspace(own[0].batch, own[-1].batch, 40)) if fit else []
        fitted = [fit.least_samples.scaled(1 + batch / fit.fitted.value) for batch in batches] if fit else []
        medians = [_finite(median_interval(one.samples)) for one in own]
        series.append(Series(
            name, [one.batch for one in own], medians,
            [[value for value in one.samples if math.isfinite(value)] for one in own],
            [f"{name}, batch {one.batch:,}: {_say(median, 0)} samples"
             for one, median in zip(own, medians, strict=True)], batches, fitted))
    return pictures.draw(
        folder, "samples", "Samples to reach a test NLL against the global batch size: medians, intervals, each run "
        "that reached it as a point, and where there is a fit, its line. Both axes are logarithmic.", series,
        x_label="global batch size (samples)", y_label="samples to the target")


def _sizes_picture(found: Sequence[tuple[Target, Line]], folder: Path) -> Picture:
    groups: dict[str, list[tuple[float, Interval, str]]] = {}
    for target, line in found:
        sizes = line.found
        assert isinstance(sizes, Critical)
        for way, size in (("by the fit", sizes.expected), ("directly", sizes.direct),
                          ("by the noise scale", sizes.noise_expected)):
            if size is not None:
                groups.setdefault(f"{way}{short(line.options)}", []).append(
                    (target.nll, size, f"NLL {target.nll:g}, {way}{short(line.options)}: {_say(size, 0)} samples"))
    series = []
    for name, points in groups.items():
        nlls, sizes_of_it, words = zip(*points, strict=True)
        series.append(Series(name, nlls, sizes_of_it, [[] for _ in points], words))
    return pictures.draw(
        folder, "critical", f"The batch size from which on runs take {_PERCENT} more samples than at the two smallest, "
        "against the target, in three ways, with intervals. They agree if the bars of a target overlap. Both axes are "
        "logarithmic.", series, x_label="test NLL of the target", y_label="batch size (samples)", apart=1.015)


def _finite(interval: Interval) -> Interval:
    """For a picture: an end that is not known is drawn no further than the value."""
    return replace(interval, high=interval.high if math.isfinite(interval.high) else interval.value)


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


def _by_line(cells: Sequence[Learnt]) -> dict[Options, list[list[Learnt]]]:
    """For each value of the options without the rate, the rates that were tried at each batch size, the best first."""
    found: dict[Options, dict[int, list[Learnt]]] = {}
    for one in cells:
        options = tuple(option for option in one.options if option[0] != RATE)
        found.setdefault(options, {}).setdefault(one.batch, []).append(one)
    return {options: [sorted(tried, key=_median) for tried in batches.values()] for options, batches in found.items()}


def _median(one: Learnt) -> float:
    return median_interval(one.samples).value


def _critical(line: Line) -> Text:
    """The critical batch size in words, in three ways, and whether they agree."""
    name = "the critical batch size" if not line.is_knee else (
        "the knee of this fixed learning rate (no critical batch size: a larger batch wants a larger rate)")
    where = for_options(line.options)
    best = (". The best rate of those tried, by batch size: ", Code(", ".join(map(_best, line.tried)))
            ) if line.is_tuned else ()
    found = line.found
    if isinstance(found, str):
        return Text((f"{name[0].upper()}{name[1:]}", *where, f" is not known: {found}", *best, "."))
    doubt = () if found.describes else (": ", Strong("it does not describe them, and is not to be trusted"))
    noise = "" if line.is_knee else f". {_by_noise(found)}"
    return Text((f"By the fit E = least (1 + B / critical), {name}", *where,
                 f" is {_say(found.fitted, 0)} samples, with at least {_say(found.least_samples, 0)} samples to the "
                 f"target. The runs are {100 * found.off:.0f} % off it at most", *doubt,
                 f". {_direct(found)}{noise}", *best, "."))


def _best(rates: Sequence[Learnt]) -> str:
    """`200: 0.001`; a rate at the edge of what was tried may not be the best there is."""
    values = [float(dict(one.options)[RATE]) for one in rates]
    edge = " (at the edge)" if len(values) > 1 and values[0] in (min(values), max(values)) else ""
    return f"{rates[0].batch:,}: {values[0]:g}{edge}"


def _direct(found: Critical) -> str:
    more = f"{_PERCENT} more samples than at the two smallest batch sizes"
    if found.direct is None or found.direct_ratio is None:
        return (f"Where runs take {more} is not known: these two are not small enough, or it is not within the batch "
                "sizes that were run")
    return (f"Measured directly, runs take {more} from batch {_say(found.direct, 0)} on, by the fit from "
            f"{_say(found.expected, 0)} on: {_agreement(found.direct_ratio)}")


def _by_noise(found: Critical) -> str:
    if found.noise is None or found.noise_ratio is None or found.noise_expected is None:
        return "The noise scale is not known"
    return (f"The noise scale is {_say(found.noise, 0)}: {_agreement(found.noise_ratio)}; by it runs take {_PERCENT} "
            f"more samples from batch {_say(found.noise_expected, 0)} on")


def _agreement(ratio: Interval) -> str:
    """Whether an estimate agrees with the fit, from their ratio."""
    if ratio.n < 2:
        return f"{say(ratio)} times the fit's, of which single runs do not say whether that agrees"
    is_one = ratio.excludes(1) and abs(ratio.value - 1) > LEAST_DIFFERENCE
    word = "they do not agree" if is_one else "no difference is shown"
    return f"{say(ratio)} times the fit's, so {word}"
