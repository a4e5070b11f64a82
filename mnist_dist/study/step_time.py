"""A model of the time of a step, fitted to what a study measured. Pure functions of numbers.

    t = fixed + per_sample max(batch, floor) / speed + ring(processes of a machine) + ring(machines)
    ring(n) = 2 (n - 1) latency + 2 (n - 1) / n transfer

`batch` is the largest one of a process, and a smaller one than `floor` takes as long as that. `speed` is 1 on GPUs; on
a CPU it is the threads of a process, as a part of the most that one has. `ring` is a ring all-reduce (Thakur et al.
2005, IJHPCA 19(1)), with parameters of its own between machines; `transfer` is the time to send the whole gradient
once. Communication does not overlap with computing (Pollux, OSDI 2021, with gamma = 1), because
all gradients are one message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import compress
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize

from mnist_dist.study.statistics import LEVEL, Interval, interval_of_draws, resampled_medians

PARAMETERS = ("fixed", "per_sample", "floor", "latency", "transfer", "latency_between", "transfer_between")
FIXED, PER_SAMPLE, FLOOR, LATENCY, TRANSFER, LATENCY_BETWEEN, TRANSFER_BETWEEN = range(len(PARAMETERS))
LINEAR = [FIXED, LATENCY, TRANSFER, LATENCY_BETWEEN, TRANSFER_BETWEEN]
DRAWS = 200
F_OF_FLOOR = 6.0  # there is a floor if it makes the squared distances so much smaller: an F test at 2 to 5 %
MOST_STARTS = 8  # floors from which the search begins
OUTLIER = 0.05  # a cell that is further off the model than this part counts less


class Place(NamedTuple):
    """Where a step is timed: the largest batch of a process, the processes, the machines that they are on, and the
    speed of a process as a part of the fastest one's.
    """

    batch: int
    processes: int
    machines: int = 1
    speed: float = 1.0


@dataclass(frozen=True)
class Model:
    """A fitted model: `values` [7] in the order of PARAMETERS, in seconds (`floor` in samples), and as many `draws`
    [DRAWS, 7] of them as a bootstrap of the runs gives; `runs` are behind the cell with the fewest.

    A parameter of which the cells say nothing is 0 (`absent`). What they cannot tell apart is `undecided`: latency from
    transfer if there is one size of ring, and a floor below the smallest batch. The draws then differ by all that is
    possible, and so do the predictions.
    """

    values: np.ndarray
    draws: np.ndarray
    undecided: frozenset[int]
    absent: frozenset[int]
    runs: int

    def parameter(self, index: int) -> Interval:
        """A parameter with its interval."""
        return interval_of_draws(self.values[index], self.draws[:, index], self.runs)

    def predict(self, places: Sequence[Place]) -> list[Interval]:
        """Seconds of a step at these places."""
        return [interval_of_draws(value, draws, self.runs) for value, draws in
                zip(seconds(self.values, places), seconds(self.draws, places).T, strict=True)]

    def shares(self, place: Place) -> dict[str, float]:
        """What a step's time is made of: parts of 1."""
        communication = seconds(self.values, [place]) - seconds(self.values, [place._replace(processes=1, machines=1)])
        total, fixed = seconds(self.values, [place])[0], self.values[FIXED]
        shares = {"fixed": fixed, "communication": float(communication[0])}
        return {**{name: value / total for name, value in shares.items()},
                "computing": 1 - sum(shares.values()) / total}


def seconds(values: np.ndarray, places: Sequence[Place]) -> np.ndarray:
    """[..., places] times of a step with parameters [..., 7]."""
    return _Shape(places).seconds(values)


class _Shape:
    """The places as arrays: `batch` and `speed` [places], and `terms` [places, 5], the factors of LINEAR's."""

    def __init__(self, places: Sequence[Place]) -> None:
        self.batch, processes, machines, self.speed = np.array(places, dtype=float).reshape(-1, len(Place._fields)).T
        rings = [term for n in (processes / machines, machines) for term in (2 * (n - 1), 2 * (n - 1) / n)]
        self.terms = np.stack([np.ones(len(places)), *rings], axis=1)

    def seconds(self, values: np.ndarray) -> np.ndarray:
        computing = values[..., PER_SAMPLE, None] * np.maximum(self.batch, values[..., FLOOR, None]) / self.speed
        return values[..., LINEAR] @ self.terms.T + computing

    def slopes(self, values: np.ndarray) -> np.ndarray:
        """[places, 7] by how much the seconds change with each parameter [7]."""
        found = np.zeros((len(self.batch), len(PARAMETERS)))
        found[:, LINEAR] = self.terms
        found[:, PER_SAMPLE] = np.maximum(self.batch, values[FLOOR]) / self.speed
        found[:, FLOOR] = values[PER_SAMPLE] * (self.batch < values[FLOOR]) / self.speed
        return found


@dataclass(frozen=True)
class Cells:
    """The places of a study, and of each the seconds of a step in its runs."""

    places: Sequence[Place]
    runs: Sequence[np.ndarray]

    @cached_property
    def medians(self) -> np.ndarray:
        """[places] logarithms."""
        return np.array([np.median(np.log(runs)) for runs in self.runs])

    def resampled(self, random: np.random.Generator) -> np.ndarray:
        """[DRAWS, places] logarithms of the medians of runs that are drawn with replacement."""
        return resampled_medians([np.log(runs) for runs in self.runs], DRAWS, random)

    def only(self, keep: Sequence[bool]) -> Cells:
        """Those for which `keep` is true."""
        return Cells(list(compress(self.places, keep)), list(compress(self.runs, keep)))


def fit(cells: Cells, ring: tuple[float, float] | None = None) -> Model | str:
    """The model of these cells; or the reason why there is none.

    `ring` has the seconds of a message and of sending the gradient once, if they were measured beside the cells: there
    the search begins, and what the cells do not decide is divided as it says.
    """
    free = _free(cells.places)
    if len(batches := {place.batch for place in cells.places}) < 2:
        return "it needs two or more batches per process"
    if len(cells.places) < len(free):
        return f"its {len(free)} parameters need as many cells, and there are {len(cells.places)}"
    shape = _Shape(cells.places)
    best = _solved(shape, cells.medians, _start(cells, 0.0, ring), [at for at in free if at != FLOOR])
    if FLOOR in free:
        inner = sorted(batches)[1:-1]
        fits = [_solved(shape, cells.medians, _start(cells, floor, ring), free)
                for floor in inner[:: -(-len(inner) // MOST_STARTS)]]
        with_floor = min(fits, key=lambda found: found.cost)
        left = len(cells.places) - len(free)
        if left > 0 and (best.cost - with_floor.cost) * left > F_OF_FLOOR * with_floor.cost:
            best = with_floor
        else:
            free.remove(FLOOR)
    values = _whole(best.x, free)
    random = np.random.default_rng(0)
    draws = np.stack([_whole(_solved(shape, medians, values, free).x, free)
                      for medians in cells.resampled(random)])
    return _with_undecided(cells, values, draws, free, random, ring)


def _free(places: Sequence[Place]) -> list[int]:
    """The parameters that can be fitted: not those of which the places say nothing, or the same as of another."""
    free = [FIXED, PER_SAMPLE]
    if len({place.batch for place in places}) > 3:
        free.append(FLOOR)
    for latency, sizes in ((LATENCY, {place.processes / place.machines for place in places}),
                           (LATENCY_BETWEEN, {place.machines for place in places})):
        free += [latency, latency + 1][: len(sizes - {1})]
    return free


def _start(cells: Cells, floor: float, ring: tuple[float, float] | None) -> np.ndarray:
    """Where the search begins: most of it computing, as the slowest cell has it, but for the ring if it is known."""
    shortest, longest = np.exp(cells.medians.min()), np.exp(cells.medians.max())
    per_sample = longest / max(place.batch for place in cells.places) / 2
    return np.array([shortest / 2, per_sample, floor, *2 * (ring or 2 * (shortest / 20,))])


def _whole(free_values: np.ndarray, free: Sequence[int]) -> np.ndarray:
    values = np.zeros(len(PARAMETERS))
    values[free] = free_values
    return values


def _solved(shape: _Shape, medians: np.ndarray, start: np.ndarray, free: Sequence[int]) -> Any:
    """scipy's result: the free parameters, none negative, that are closest to the medians in logarithms."""
    def residuals(free_values: np.ndarray) -> np.ndarray:
        return np.log(shape.seconds(_whole(free_values, free))) - medians

    def slopes(free_values: np.ndarray) -> np.ndarray:
        values = _whole(free_values, free)
        return (shape.slopes(values) / shape.seconds(values)[:, None])[:, free]

    most = np.full(len(PARAMETERS), np.inf)
    most[FLOOR] = shape.batch.max()
    first = np.clip(start, 1e-12, most * (1 - 1e-6))[free]
    return optimize.least_squares(residuals, first, slopes, bounds=(0, most[free]), loss="soft_l1", f_scale=OUTLIER,
                                  x_scale="jac", xtol=1e-6, ftol=1e-6, gtol=1e-6)


def _with_undecided(cells: Cells, values: np.ndarray, draws: np.ndarray, free: Sequence[int],
                    random: np.random.Generator, ring: tuple[float, float] | None) -> Model:
    """The model in which each draw has a value of its own for what the cells do not decide."""
    undecided = set()
    smallest = min(place.batch for place in cells.places)
    if FLOOR not in free:
        undecided.add(FLOOR)
        values[FLOOR], draws[:, FLOOR] = smallest / 2, random.uniform(0, smallest, len(draws))
    for latency, sizes in ((LATENCY, {place.processes / place.machines for place in cells.places}),
                           (LATENCY_BETWEEN, {place.machines for place in cells.places})):
        if latency in free and latency + 1 not in free:  # any part of it may be transfer
            undecided |= {latency, latency + 1}
            (n,) = sizes - {1}
            share = ring[1] / (n * ring[0] + ring[1]) if ring else 0.5
            for found, part in ((values, share), (draws.T, random.uniform(0, 1, len(draws)))):
                found[latency + 1] = part * n * found[latency]
                found[latency] *= 1 - part
    absent = frozenset(range(len(PARAMETERS))) - {*free, *undecided}
    return Model(values, draws, frozenset(undecided), absent, min(map(len, cells.runs)))


@dataclass(frozen=True)
class Check:
    """The model held against cells that are left out of its fit: predicted and measured seconds of a step. The bands of
    the predictions together hold all medians that are measured, with a probability of LEVEL, if the model is true.
    """

    places: Sequence[Place]
    predicted: Sequence[Interval]
    measured: Sequence[float]

    @property
    def errors(self) -> list[float]:
        """Predicted over measured, less 1."""
        return [ours.value / theirs - 1 for ours, theirs in zip(self.predicted, self.measured, strict=True)]

    @property
    def passes(self) -> bool:
        """Whether every measured median is in its band. Never, if the bands have no width: one run of each cell."""
        return all(ours.n > 1 and ours.low <= theirs <= ours.high
                   for ours, theirs in zip(self.predicted, self.measured, strict=True))


def check(cells: Cells, left_out: Sequence[bool], ring: tuple[float, float] | None = None) -> Check | str:
    """Fit the model to the other cells, as `fit` does, and predict those that are left out; or the reason why it cannot
    be done.
    """
    held = cells.only(left_out)
    if not held.places:
        return "no cell is left out of the fit"
    kept = cells.only([not out for out in left_out])
    model = fit(kept, ring) if kept.places else "no cell is left to fit"
    if isinstance(model, str):
        return f"without the cells that are left out there is no model: {model}"
    if unseen := _unseen(kept.places, held.places):
        return f"the cells that are left out are the only ones {unseen}"
    predicted = np.log(seconds(model.values, held.places))
    off_predicted = np.log(seconds(model.draws, held.places)) - predicted
    off_measured = held.resampled(np.random.default_rng(1)) - held.medians
    off = off_predicted - off_measured
    spread = np.maximum(off.std(axis=0), 1e-12)
    runs = min(model.runs, *map(len, held.runs))
    width = spread * np.quantile(np.abs(off / spread).max(axis=1), LEVEL) if runs > 1 else 0 * spread
    bands = [Interval(float(np.exp(at)), float(np.exp(at - half)), float(np.exp(at + half)), LEVEL, runs)
             for at, half in zip(predicted, width, strict=True)]
    return Check(held.places, bands, list(np.exp(held.medians)))


def _unseen(fitted: Sequence[Place], asked: Sequence[Place]) -> str:
    """What communicates in `asked` and in no cell of the fit, in words; "" if there is nothing."""
    for name, size in (("with several processes on a machine", lambda place: place.processes / place.machines),
                       ("on several machines", lambda place: place.machines)):
        if max(map(size, asked)) > 1 >= max(map(size, fitted)):
            return name
    return ""
