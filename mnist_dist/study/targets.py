"""From a study's runs to what a target takes: steps and samples by batch size, and seconds by cell."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from mnist_dist.study.analysis import Analysis
from mnist_dist.study.critical import DRAWS
from mnist_dist.study.grid import Cell, Options
from mnist_dist.study.statistics import Interval, interval_of_draws, resampled_medians
from mnist_dist.study.step_time import Model, Place, seconds


@dataclass
class Learnt:
    """The runs of a batch size and options, and a target: steps and samples to it, inf in runs that did not reach it,
    and the most of both that such a run had; and the noise scales of those that reached it.

    The number of processes changes nothing of what is learnt. So of runs with one seed, only the first is here.
    """

    batch: int
    options: Options
    steps: list[float] = field(default_factory=list)
    samples: list[float] = field(default_factory=list)
    most_steps: int = 0
    most_samples: int = 0
    noise_scales: list[float] = field(default_factory=list)
    seeds: set[int] = field(default_factory=set)

    @property
    def is_reached(self) -> bool:
        """Whether all runs reached the target."""
        return all(map(math.isfinite, self.steps))

    @cached_property
    def draws(self) -> np.ndarray:
        """[DRAWS] bootstrap of the median steps. All cells of the batch size share it: they do not differ by it."""
        runs = np.asarray(self.steps, dtype=float)
        return resampled_medians([runs], DRAWS, np.random.default_rng(self.batch))[:, 0]


@dataclass(frozen=True)
class TimeTo:
    """The seconds of training that a cell takes to a target, a bootstrap of them [DRAWS], and how many devices (GPUs,
    or cores of CPUs) it occupies.
    """

    cell: Cell
    seconds: Interval
    draws: np.ndarray
    devices: int

    @property
    def cost(self) -> Interval:
        """Device-seconds."""
        return self.seconds.scaled(self.devices)


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
                seed = (run.row.get("config") or {}).get("seed")
                if seed in mine.seeds:
                    continue
                if seed is not None:
                    mine.seeds.add(seed)
                if one["step"] is None:
                    steps = run.row["epochs"][-1]["step"]
                    whole = (run.row.get("dataset") or {}).get("train", math.inf) * len(run.row["epochs"])
                    mine.most_steps = max(mine.most_steps, steps)  # the last batch of an epoch may be smaller
                    mine.most_samples = max(mine.most_samples, min(steps * cell.global_batch_size, whole))
                elif (noise := _noise_scale(run.row["epochs"], one["step"])) is not None:
                    mine.noise_scales.append(noise)
                mine.steps.append(math.inf if one["step"] is None else one["step"])
                mine.samples.append(math.inf if one["samples"] is None else one["samples"])
    # a batch size that was run on several processes only is among the others
    ordered = {nll: sorted(cells.values(), key=lambda one: (one.options, one.batch)) for nll, cells in found.items()}
    return [Target(nll, learnt, times_to(analysis, learnt)) for nll, learnt in sorted(ordered.items(), reverse=True)]


def _noise_scale(epochs: Sequence[Mapping[str, Any]], step: int) -> float | None:
    """The mean over steps of the noise scales of the epochs up to the one with the step; None if one is not known."""
    total, before = 0.0, 0
    for epoch in epochs:
        if epoch.get("noise_scale") is None:
            return None
        total, before = total + epoch["noise_scale"] * (epoch["step"] - before), epoch["step"]
        if before >= step:
            break
    return total / before


def times_to(analysis: Analysis, cells: Sequence[Learnt]) -> list[TimeTo]:
    """Of each cell whose runs reached the target: the steps that its batch size takes, times its own time of a step."""
    learnt = {(one.options, one.batch): one for one in cells if one.is_reached}
    found = []
    for cell, figures in analysis.cells.items():
        if (one := learnt.get((cell.options, cell.global_batch_size))) is None:
            continue
        each = cell.global_batch_size / figures.rates
        random = np.random.default_rng([cell.global_batch_size, cell.processes])
        draws = one.draws * resampled_medians([each], DRAWS, random)[:, 0]
        found.append(TimeTo(cell, interval_of_draws(np.median(one.steps) * np.median(each), draws,
                                                    min(len(one.steps), len(each))), draws, figures.devices))
    return found


def modelled(one: Learnt, model: Model, place: Place, cell: Cell, devices: int) -> TimeTo:
    """The steps that a batch size takes, times the time of a step by the model."""
    draws = one.draws[: len(model.draws)] * seconds(model.draws, [place])[:, 0]
    value = np.median(one.steps) * seconds(model.values, [place])[0]
    return TimeTo(cell, interval_of_draws(value, draws, min(len(one.steps), model.runs)), draws, devices)
