"""The part of a report that says how far a larger batch still helps learning: steps and samples to a target."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mnist_dist.study.analysis.critical_batch import MORE, TWICE, Critical, critical
from mnist_dist.study.analysis.intervals import Interval, median_interval
from mnist_dist.study.analysis.targets import StepsToTarget, Target
from mnist_dist.study.plan.grid import Cell, Options
from mnist_dist.study.report import charts
from mnist_dist.study.report.charts import Series
from mnist_dist.study.report.labels import at_level, cell_words, for_options, level_of, options_of, say, short
from mnist_dist.study.report.page import Code, Heading, Inline, Page, Picture, Table, Text

TITLE = "Batch size and learning"
RATE, RULE = "lr", "lr_rule"
METHOD = (
    "Medians over repeats, which have seeds that follow on, with the interval between two order statistics. The number "
    "of processes changes nothing of them, so runs of one seed count once. A run that did not reach the target counts "
    "as more than it had (>). A target lies between two evaluations, and is placed there by the logarithm of the NLL "
    "(of an accuracy: of the error rate). "
    "The critical batch size is where runs take twice the least samples (McCandlish et al. 2018); Zhang et al. (2024) "
    "take 1.2 times. Both are on straight lines between batch sizes. The least samples are those of a batch of 0, on "
    "the line through the two smallest. Noise scale: its mean over the epochs up to the one that reached the target, "
    "if the runs measure it (--noise-scale).")


def add_learning(page: Page, targets: Sequence[Target], folder: Path) -> None:
    """The section: a table for each target, and the critical batch size where it is known."""
    page.add(Heading(2, TITLE))
    if not targets:
        page.add(Text(("Not measured: the runs have no target. ", Code("--target-nll 0.3,0.2 --evaluate-every "
                       "10000samples"), " measures how many samples a larger batch needs to reach the same test NLL.")))
        return
    lines = [(target, line) for target in targets for line in _lines(target)]
    if any(line.reached for _, line in lines):
        page.add(_samples_picture(lines, folder))
    sizes = [(target, line, line.critical) for target, line in lines
             if isinstance(line.critical, Critical) and not line.is_knee and math.isfinite(line.critical.more.value)]
    if sizes:
        page.add(_sizes_picture(sizes, folder))
    for target in targets:
        page.add(Heading(3, target.goal.title), _table(target.learnt), _resolution(target.learnt))
        page.add(*(_critical(line) for known_target, line in lines if known_target is target))
    page.add(METHOD)


@dataclass(frozen=True)
class Line:
    """The best rate at each batch size, with the rates that were tried, the best first; and what follows of critical
    batch sizes, or the reason why it is not known. At one fixed rate it is a knee: a larger batch wants a larger rate.
    """

    options: Options
    tried: Sequence[Sequence[StepsToTarget]]
    critical: Critical | str

    @property
    def is_tuned(self) -> bool:
        """Whether several rates were tried."""
        return any(len(rates) > 1 for rates in self.tried)

    @property
    def is_knee(self) -> bool:
        """Whether the rate is one fixed one."""
        return not self.is_tuned and dict(self.options).get(RULE, "none") == "none"

    @property
    def reached(self) -> list[StepsToTarget]:
        """Where at least half the runs reached the target."""
        return [rates[0] for rates in self.tried if math.isfinite(rates[0].samples.value)]


def _lines(target: Target) -> list[Line]:
    lines = []
    for options, tried in _by_line(target.learnt).items():
        best = [rates[0] for rates in tried]
        lines.append(Line(options, tried, critical(
            {size.batch: (size.estimate, size.doubt) for size in best if size.estimate is not None},
            {size.batch: size.noise_scales for size in best if len(size.noise_scales) > len(size.runs) / 2})))
    return lines


def _samples_picture(lines: Sequence[tuple[Target, Line]], folder: Path) -> Picture:
    series = []
    for target, line in lines:
        if not line.reached:
            continue
        name = f"{target.goal}{short(line.options)}"
        medians = [_finite(learnt.samples) for learnt in line.reached]
        series.append(Series(
            name, [learnt.batch for learnt in line.reached], medians,
            [[run.samples for run in learnt.runs if math.isfinite(run.samples)] for learnt in line.reached],
            [f"{name}, batch {learnt.batch:,}: {_say(median, 0)} samples"
             for learnt, median in zip(line.reached, medians, strict=True)]))
    return charts.draw(
        folder, "samples", _growth(lines),
        "Samples to reach a target against the global batch size: medians, intervals, and each run "
        "that reached it as a point. Both axes are logarithmic.", series,
        x_label="global batch size (samples)", y_label="samples to the target")


def _growth(lines: Sequence[tuple[Target, Line]]) -> str:
    """By how much the samples to the hardest target grow with the batch size."""
    target, line = [(target, line) for target, line in lines if line.reached][-1]
    first, last = line.reached[0], line.reached[-1]
    times = last.samples.value / first.samples.value
    return (f"To {target.goal} batch {last.batch:,} takes {times:.2g} times the samples of batch {first.batch:,}"
            f"{short(line.options)}")


def _sizes_picture(sizes: Sequence[tuple[Target, Line, Critical]], folder: Path) -> Picture:
    groups: dict[str, list[tuple[float, Interval, str]]] = {}
    for target, line, size in sizes:
        for way, interval in ((f"{TWICE:g} times the least samples", size.twice),
                              (f"{MORE:g} times the least samples", size.more), ("noise scale", size.noise)):
            if interval is not None and math.isfinite(interval.value):
                groups.setdefault(f"{way}{short(line.options)}", []).append(
                    (target.goal.value, _finite(interval),
                     f"{target.goal}, {way}{short(line.options)}: {_say(interval, 0)} samples"))
    series = []
    for name, points in groups.items():
        nlls, intervals, words = zip(*points, strict=True)
        series.append(Series(name, nlls, intervals, [[] for _ in points], words))
    return charts.draw(
        folder, "critical", "Beyond the critical batch size a larger batch saves few steps",
        f"The batch size at which runs take {TWICE:g} and {MORE:g} times the least samples, and the noise "
        "scale, against the target, with intervals. Both axes are logarithmic.", series,
        x_label=f"{sizes[-1][0].goal.metric} of the target", y_label="batch size (samples)", apart=1.015)


def _finite(interval: Interval) -> Interval:
    """For a picture: an end that is not known is drawn no further than the value."""
    return replace(interval, high=interval.high if math.isfinite(interval.high) else interval.value)


def _table(cells: Sequence[StepsToTarget]) -> Table:
    named = [Cell(learnt.batch, 1, learnt.options) for learnt in cells]
    lines: list[list[Inline]] = []
    for learnt, cell in zip(cells, named, strict=True):
        reached = sum(math.isfinite(run.samples) for run in learnt.runs)
        batch, _, *options = cell_words(cell, named)
        lines.append([batch, *options, f"{reached} of {len(learnt.runs)}", _say(learnt.steps, learnt.most_steps),
                      _say(learnt.samples, learnt.most_samples), level_of(learnt.samples),
                      _say(median_interval(learnt.noise_scales), 0) if learnt.noise_scales else "-"])
    return Table(["batch size", *(Code(name) for name in options_of(named)), "runs that reached it", "steps",
                  "samples", "level", "noise scale, samples"], lines)


def _resolution(cells: Sequence[StepsToTarget]) -> str:
    """The samples between the evaluations around the target, and the doubt that they leave."""
    apart = [run.apart for cell in cells for run in cell.runs if math.isfinite(run.samples) and run.apart]
    if not apart:
        return "The runs do not say between which evaluations they reached it: samples are those of an evaluation."
    doubt = max((cell.doubt for cell in cells if math.isfinite(cell.samples.value)), default=0.0)
    distance = f"{min(apart):,.0f}" if min(apart) == max(apart) else f"{min(apart):,.0f} to {max(apart):,.0f}"
    return (f"The evaluations around the target are {distance} samples apart. Interpolation leaves {100 * doubt:.1g} % "
            "or less of the samples open, which the intervals hold.")


def _say(interval: Interval, limit: int) -> str:
    """An interval whose ends may be unknown: above the limit."""
    ends = (interval.value, interval.low, interval.high)
    value, low, high = (f"{end:,.0f}" if math.isfinite(end) else f"> {limit:,}" for end in ends)
    return f"{value} ({low} to {high})" if interval.n > 1 and low != high else value


def _by_line(cells: Sequence[StepsToTarget]) -> dict[Options, list[list[StepsToTarget]]]:
    """For each value of the options without the rate, the rates that were tried at each batch size, the best first."""
    lines: dict[Options, dict[int, list[StepsToTarget]]] = {}
    for cell in cells:
        options = tuple(option for option in cell.options if option[0] != RATE)
        lines.setdefault(options, {}).setdefault(cell.batch, []).append(cell)
    return {options: [sorted(tried, key=lambda size: size.samples.value) for tried in batches.values()]
            for options, batches in lines.items()}


def _critical(line: Line) -> Text:
    """The critical batch size in words, and the noise scale beside it."""
    name = "the critical batch size" if not line.is_knee else (
        "the knee of this fixed learning rate (no critical batch size: a larger batch wants a larger rate)")
    where = for_options(line.options)
    best = (". The best rate of those tried, by batch size: ", Code(", ".join(map(_best, line.tried)))
            ) if line.is_tuned else ()
    size = line.critical
    if isinstance(size, str):
        return Text((f"{name[0].upper()}{name[1:]}", *where, f" is not known: {size}", *best, "."))
    largest = line.reached[-1].batch
    noise = "" if line.is_knee else f". {_noise(size)}"
    return Text((f"{name[0].upper()}{name[1:]}", *where, f" is {_say(size.twice, largest)} samples"
                 f"{at_level(size.twice)}: there, runs take {TWICE:g} times the least samples to the target, "
                 f"{_say(size.least, 0)}. They take {MORE:g} times as many at batch {_say(size.more, largest)}{noise}",
                 *best, "."))


def _best(rates: Sequence[StepsToTarget]) -> str:
    """`200: 0.001`; a rate at the edge of what was tried may not be the best there is."""
    values = [float(dict(rate.options)[RATE]) for rate in rates]
    edge = " (at the edge)" if len(values) > 1 and values[0] in (min(values), max(values)) else ""
    return f"{rates[0].batch:,}: {values[0]:g}{edge}"


def _noise(size: Critical) -> str:
    if size.noise is None:
        return "The noise scale is not known"
    if size.noise_ratio is None:
        return f"The noise scale is {_say(size.noise, 0)}"
    word = "which differs from it" if size.noise_ratio.excludes(1) else "of which no difference from it is shown"
    return (f"The noise scale is {_say(size.noise, 0)}, {say(size.noise_ratio)} times the critical batch size"
            f"{at_level(size.noise_ratio)}, {word}")
