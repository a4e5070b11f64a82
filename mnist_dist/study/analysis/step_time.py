"""Models of the time of a step, fitted to what a study measured. Pure functions of numbers.

    t = fixed + computing + max(0, exchange - hidden x computing)
    computing = per_sample max(batch, floor) / speed
    exchange = law(processes of a machine) + law(machines)

`batch` is the largest batch of a process; a batch below `floor` takes as long as `floor`. `speed` is 1 on GPUs. On a
CPU it is the threads of a process, as a part of the most threads of a process. A law has other parameters between
machines. There are two: a ring all-reduce, 2 (n - 1) latency + 2 (n - 1) / n transfer, where `transfer` is the time to
send the whole gradient once, and a tree, log2(n) latency (Thakur et al. 2005, IJHPCA 19(1)). `hidden` is the part of
the computing during which an exchange costs nothing (0: none, as with one message; 1: all; compare gamma in Pollux,
OSDI 2021). Each law with each `hidden` is a hypothesis. The hypotheses that the cells do not refute predict together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from mnist_dist.study.analysis.intervals import CAUTIOUS, Interval, interval_of_draws, level_of_repeats

PARAMETERS = ("fixed", "per_sample", "floor", "latency", "transfer", "latency_between", "transfer_between")
FIXED, PER_SAMPLE, FLOOR, LATENCY, TRANSFER, LATENCY_BETWEEN, TRANSFER_BETWEEN = range(len(PARAMETERS))
LINEAR = [LATENCY, TRANSFER, LATENCY_BETWEEN, TRANSFER_BETWEEN]


class Place(NamedTuple):
    """Where a step is timed: the largest batch of a process, the processes, the machines that they are on, and the
    speed of a process as a part of the fastest one's.
    """

    batch: int
    processes: int
    machines: int = 1
    speed: float = 1.0


@dataclass(frozen=True)
class Law:
    """How the time of an exchange grows with n processes: the factors [..., 2] of a latency and of a transfer."""

    name: str
    factors: Callable[[Any], tuple[Any, Any]]
    parameters: int  # 1: latency alone


LAWS = (
    Law("ring", lambda n: (2 * (n - 1), 2 * (n - 1) / n), 2),
    Law("tree", lambda n: (np.log2(n), 0.0 * n), 1),
)
HIDDEN = (0.0, 0.25, 0.5, 0.75, 1.0)


class Hypothesis(NamedTuple):
    """A law, and the part of the computing that hides an exchange."""

    law: Law
    hidden: float

    def __str__(self) -> str:
        return self.law.name + (f", behind {100 * self.hidden:.0f} % of the computing" if self.hidden else "")


HYPOTHESES = tuple(Hypothesis(law, hidden) for law in LAWS for hidden in HIDDEN)
PLAIN = HYPOTHESES[0]


@dataclass(frozen=True)
class Fit:
    """A hypothesis with its parameters: `values` [7] in the order of PARAMETERS, in seconds (`floor` in samples), and
    `draws` [n, 7] of them from the spread of the cells; `distance` are squared standard errors.

    A parameter of which the cells say nothing is 0 (`absent`). What they cannot tell apart is `undecided`: latency from
    transfer if there is one size of ring, and a floor below the smallest batch. The draws then differ by all that is
    possible, and so do the predictions.
    """

    hypothesis: Hypothesis
    values: np.ndarray
    draws: np.ndarray
    undecided: frozenset[int]
    absent: frozenset[int]
    distance: float


@dataclass(frozen=True)
class Model:
    """The hypotheses that the cells do not refute, the closest first; `describes` is whether it is as close as chance
    makes it. `runs` are behind the cell with the fewest, `processes` is the most that were run.
    """

    fits: Sequence[Fit]
    describes: bool
    runs: int
    processes: int

    @property
    def best(self) -> Fit:
        """The closest hypothesis."""
        return self.fits[0]

    @property
    def laws(self) -> list[str]:
        """The laws that are left."""
        return sorted({fit.hypothesis.law.name for fit in self.fits})

    def parameter(self, index: int) -> Interval:
        """A parameter of the closest hypothesis, with an interval that spans all hypotheses of the same law."""
        intervals = [interval_of_draws(self.best.values[index], fit.draws[:, index], self.runs) for fit in self.fits
                     if fit.hypothesis.law == self.best.hypothesis.law]
        return replace(intervals[0], low=min(interval.low for interval in intervals),
                       high=max(interval.high for interval in intervals))

    def draws(self, places: Sequence[Place]) -> np.ndarray:
        """[n, places] seconds of a step, from all hypotheses."""
        return np.concatenate([seconds(fit.draws, places, fit.hypothesis) for fit in self.fits])

    def predict(self, places: Sequence[Place]) -> list[Interval]:
        """Seconds of a step at these places, by the closest hypothesis, in a band that spans all. On more processes
        than were run it also spans a ring whose links have half the bandwidth there.
        """
        values = seconds(self.best.values, places, self.best.hypothesis)
        ends = [np.quantile(drawn, [(1 - CAUTIOUS) / 2, (1 + CAUTIOUS) / 2], axis=0)
                for fit in self.fits for drawn in self._scenarios(fit, places)]
        lows, highs = np.min([low for low, _ in ends], axis=0), np.max([high for _, high in ends], axis=0)
        level = level_of_repeats(self.runs)
        return [Interval(float(value), float(min(low, value)), float(max(high, value)), level, self.runs)
                for value, low, high in zip(values, lows, highs, strict=True)]

    def _scenarios(self, fit: Fit, places: Sequence[Place]) -> list[np.ndarray]:
        drawn = [seconds(fit.draws, places, fit.hypothesis)]
        if fit.hypothesis.law.parameters == 2:
            halved = fit.draws.copy()
            halved[:, [TRANSFER, TRANSFER_BETWEEN]] *= 2
            beyond = np.array([place.processes > self.processes for place in places])
            drawn.append(np.where(beyond, seconds(halved, places, fit.hypothesis), drawn[0]))
        return drawn

    def shares(self, place: Place) -> dict[str, float]:
        """What a step's time is made of by the closest hypothesis: parts of 1."""
        alone = place._replace(processes=1, machines=1)
        total, without = seconds(self.best.values, [place, alone], self.best.hypothesis)
        shares = {"fixed": self.best.values[FIXED] / total, "communication": float(total - without) / total}
        return {**shares, "computing": 1 - sum(shares.values())}


def seconds(values: np.ndarray, places: Sequence[Place], hypothesis: Hypothesis = PLAIN) -> np.ndarray:
    """[..., places] times of a step with parameters [..., 7]."""
    return Shape(places, hypothesis).seconds(values)


class Shape:
    """The places as arrays: `batch` and `speed` [places], and `factors` [places, 4] of LINEAR's parameters."""

    def __init__(self, places: Sequence[Place], hypothesis: Hypothesis) -> None:
        self.batch, processes, machines, self.speed = np.array(places, dtype=float).reshape(-1, len(Place._fields)).T
        self.hidden = hypothesis.hidden
        self.factors = np.stack([factor for n in (processes / machines, machines)
                                 for factor in hypothesis.law.factors(n)], axis=1)

    def seconds(self, values: np.ndarray) -> np.ndarray:
        computing = values[..., PER_SAMPLE, None] * np.maximum(self.batch, values[..., FLOOR, None]) / self.speed
        seen = np.maximum(0, values[..., LINEAR] @ self.factors.T - self.hidden * computing)
        return values[..., FIXED, None] + computing + seen

    def slopes(self, values: np.ndarray) -> np.ndarray:
        """[places, 7] by how much the seconds change with each parameter [7]."""
        slopes = np.zeros((len(self.batch), len(PARAMETERS)))
        size = np.maximum(self.batch, values[FLOOR]) / self.speed
        is_seen = self.factors @ values[LINEAR] > self.hidden * values[PER_SAMPLE] * size
        left = 1 - self.hidden * is_seen
        slopes[:, FIXED] = 1
        slopes[:, PER_SAMPLE] = left * size
        slopes[:, FLOOR] = left * values[PER_SAMPLE] * (self.batch < values[FLOOR]) / self.speed
        slopes[:, LINEAR] = self.factors * is_seen[:, None]
        return slopes
