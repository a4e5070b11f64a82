"""From a study's runs to what a target takes: steps and samples by batch size, and seconds by cell.

A run is evaluated now and then, so the target lies between two evaluations. It is placed there by interpolation of the
logarithm of the NLL: on a straight line in the samples, and in their logarithm. The truth of a learning curve is
between the two, so half of their difference is what the evaluations leave open.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mnist_dist.record.metrics import samples_at
from mnist_dist.study.analysis.analysis import Analysis
from mnist_dist.study.analysis.intervals import Estimate, Interval, estimates, median_interval, ratio
from mnist_dist.study.analysis.step_time import Model, Place
from mnist_dist.study.plan.goals import Goal, goal_of
from mnist_dist.study.plan.grid import Cell, Options

FIRST = 0.5  # a doubt, in logarithms: of a target that was reached at the first evaluation


@dataclass(frozen=True)
class Reached:
    """Where a run reached a target: steps and samples, inf if it did not. `doubt` is the part by which the evaluations
    leave the samples open, and `apart` how many samples lie between those before and after it (0: not known).
    """

    steps: float
    samples: float
    doubt: float = 0.0
    apart: float = 0.0


@dataclass
class StepsToTarget:
    """The runs of a batch size and options, and a target: where each reached it, the most steps and samples of a run
    that did not, and the noise scales of those that did.

    The number of processes changes nothing of what is learnt. So of runs with one seed, only the first is here.
    """

    batch: int
    options: Options
    runs: list[Reached] = field(default_factory=list)
    most_steps: int = 0
    most_samples: int = 0
    noise_scales: list[float] = field(default_factory=list)
    seeds: set[int] = field(default_factory=set)
    estimate: Estimate | None = None  # of the samples; None unless all runs reached the target

    @property
    def is_reached(self) -> bool:
        """Whether all runs reached the target."""
        return all(math.isfinite(run.steps) for run in self.runs)

    @property
    def steps(self) -> Interval:
        """To the target; inf is more than a run had."""
        return median_interval([run.steps for run in self.runs])

    @property
    def samples(self) -> Interval:
        """To the target; inf is more than a run had. The interval is wider by the doubt."""
        interval = median_interval([run.samples for run in self.runs])
        return interval.widened(self.doubt)

    @property
    def doubt(self) -> float:
        """The part of the samples that the evaluations leave open: the median over runs."""
        return float(np.median([run.doubt for run in self.runs]))


@dataclass(frozen=True)
class TimeToTarget:
    """The seconds of training that a cell takes to a target, and how many devices (GPUs, or cores of CPUs) it occupies.
    `parts` are what the seconds are made of: they are the product of `above` over `below`.
    """

    cell: Cell
    seconds: Interval
    devices: int
    above: tuple[Estimate, ...] = ()
    below: tuple[Estimate, ...] = ()

    @property
    def cost(self) -> Interval:
        """Device-seconds."""
        return self.seconds.scaled(self.devices)

    @property
    def typical(self) -> float:
        """Seconds: the geometric mean, by which cells are compared."""
        return math.exp(sum(estimate.mean for estimate in self.above) - sum(estimate.mean for estimate in self.below))


@dataclass(frozen=True)
class Target:
    """What it took to reach a goal, in the order of the cells."""

    goal: Goal
    learnt: list[StepsToTarget]
    times: list[TimeToTarget]

    def ratio(self, time: TimeToTarget, than: TimeToTarget) -> Interval:
        """How many times as long `time` takes as `than`. The intervals of all pairs of cells hold their truths
        together, so that the soonest cell may be compared with all others.
        """
        return ratio((*time.above, *than.below), (*time.below, *than.above), among=len(self.times))


def targets_of(analysis: Analysis) -> list[Target]:
    """The targets of the study's runs, the easiest first."""
    by_goal: dict[Goal, dict[object, StepsToTarget]] = {}
    for metrics in analysis.cells.values():
        cell = metrics.cell
        for run in metrics.repeats:
            for target in (run.row.get("summary") or {}).get("targets") or []:
                cells = by_goal.setdefault(goal_of(target), {})
                learnt = cells.setdefault((cell.options, cell.global_batch_size),
                                          StepsToTarget(cell.global_batch_size, cell.options))
                _add(learnt, run.row, target)
    targets = []
    for goal, cells in sorted(by_goal.items(), key=lambda item: item[0].place):
        # a batch size that was run on several processes only is among the others
        ordered = sorted(cells.values(), key=lambda steps: (steps.options, steps.batch))
        known = [steps for steps in ordered if steps.is_reached]
        samples = [[run.samples for run in steps.runs] for steps in known]
        for steps, estimate in zip(known, estimates(samples), strict=True):
            steps.estimate = estimate
        targets.append(Target(goal, ordered, _times(analysis, goal, ordered)))
    return targets


def _add(learnt: StepsToTarget, row: Mapping[str, Any], target: Mapping[str, Any]) -> None:
    """Add a run to the runs of its batch size."""
    seed = (row.get("config") or {}).get("seed")
    if seed in learnt.seeds:
        return
    if seed is not None:
        learnt.seeds.add(seed)
    reached = reached_at(row, target)
    if math.isinf(reached.steps):
        steps = row["epochs"][-1]["step"]
        whole = (row.get("dataset") or {}).get("train", math.inf) * len(row["epochs"])
        learnt.most_steps = max(learnt.most_steps, steps)  # the last batch of an epoch may be smaller
        learnt.most_samples = max(learnt.most_samples, min(steps * learnt.batch, whole))
    elif (noise := _noise_scale(row["epochs"], target["step"])) is not None:
        learnt.noise_scales.append(noise)
    learnt.runs.append(reached)


def reached_at(row: Mapping[str, Any], target: Mapping[str, Any]) -> Reached:
    """Where the run reached the target, between two evaluations if the row has them."""
    if target["step"] is None:
        return Reached(math.inf, math.inf)
    before: tuple[float, float, float] | None = None  # steps, samples, the metric
    goal = goal_of(target)
    for steps, samples, value in _evaluations(row, goal.key):
        if goal.is_reached(value):
            if steps != target["step"]:  # the row has not all evaluations
                break
            return _between(before, (steps, samples, value), goal)
        before = steps, samples, value
    return Reached(target["step"], target["samples"])


def _between(before: tuple[float, float, float] | None, after: tuple[float, float, float], goal: Goal) -> Reached:
    """Where the metric passes the goal between two evaluations."""
    steps, samples, value = after
    if before is None or not 0 < before[1] < samples:
        return Reached(steps, samples, FIRST, samples)
    first_steps, first, first_value = before
    part = goal.part(first_value, value)
    straight, curved = first + part * (samples - first), first * (samples / first) ** part
    middle = math.sqrt(straight * curved)
    return Reached(first_steps + (middle - first) / (samples - first) * (steps - first_steps), middle,
                   abs(math.log(straight / curved)) / 2, samples - first)


def _evaluations(row: Mapping[str, Any], key: str) -> list[tuple[float, float, float]]:
    """(steps, samples, the metric `key`) of the run's evaluations in their order, within epochs and at their ends."""
    evaluations = []
    batch, train = row["global_batch_size"], (row.get("dataset") or {}).get("train")
    for epoch in row["epochs"]:
        evaluations += [(evaluation["step"], evaluation["samples"], evaluation[key])
                        for evaluation in epoch.get("evaluations") or [] if evaluation.get(key) is not None]
        if epoch.get(key) is not None and epoch.get("step"):
            samples = samples_at(int(epoch["step"]), train, batch) if train else epoch["step"] * batch
            evaluations.append((epoch["step"], samples, epoch[key]))
    return evaluations


def _noise_scale(epochs: Sequence[Mapping[str, Any]], step: int) -> float | None:
    """The mean over steps of the noise scales of the epochs up to the one with the step; None if one is not known."""
    total, before = 0.0, 0
    for epoch in epochs:
        if epoch.get("noise_scale") is None:
            return None
        total, before = total + epoch["noise_scale"] * (epoch["step"] - before), epoch["step"]
        if before >= step:
            break
    return total / before if before else None


def _times(analysis: Analysis, goal: Goal, cells: Sequence[StepsToTarget]) -> list[TimeToTarget]:
    """The times of each cell whose runs reached the target: the samples of each run over its rate."""
    learnt = {(steps.options, steps.batch): (steps, steps.estimate) for steps in cells if steps.estimate is not None}
    doubts = {key: _exact(1.0, steps.doubt**2 / 3) for key, (steps, _) in learnt.items()}
    times = []
    for cell, metrics in analysis.cells.items():
        key = cell.options, cell.global_batch_size
        if key not in learnt:
            continue
        steps, estimate = learnt[key]
        each = []
        for run in metrics.repeats:
            targets = (run.row.get("summary") or {}).get("targets") or []
            each += [reached_at(run.row, target).samples * metrics.units_per_sample / run.rate for target in targets
                     if goal_of(target) == goal]
        if not each:  # its runs have other targets
            continue
        above = estimate, doubts[key], _exact(metrics.units_per_sample)
        times.append(TimeToTarget(cell, median_interval(each).widened(steps.doubt), metrics.devices, above,
                                  (analysis.estimates[cell],)))
    return times


def _exact(value: float, error: float = 0.0) -> Estimate:
    """An estimate of a value without repeats, with the variance of its logarithm."""
    return Estimate(math.log(value), error, sys.maxsize, math.inf, object())


def modelled(learnt: StepsToTarget, model: Model, place: Place, cell: Cell, devices: int) -> TimeToTarget:
    """The steps that a batch size takes, times the time of a step by the model."""
    assert learnt.estimate is not None
    (step,) = model.predict([place])
    steps = ratio([learnt.estimate], []).scaled(1 / learnt.batch)
    # the ends of independent factors add in squares
    low = math.hypot(math.log(step.value / step.low), math.log(steps.value / steps.low))
    high = math.hypot(math.log(step.high / step.value), math.log(steps.high / steps.value))
    value, runs = steps.value * step.value, min(steps.n, step.n)
    interval = Interval(value, value * math.exp(-low), value * math.exp(high), min(steps.level, step.level), runs)
    return TimeToTarget(cell, interval.widened(learnt.doubt), devices)
