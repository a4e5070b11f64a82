"""Models of the time of a step, fitted to what a study measured. Pure functions of numbers.

    t = fixed + computing + max(0, exchange - hidden x computing)
    computing = per_sample max(batch, floor) / speed
    exchange = law(processes of a machine) + law(machines)

`batch` is the largest one of a process, and a smaller one than `floor` takes as long as that. `speed` is 1 on GPUs; on
a CPU it is the threads of a process, as a part of the most that one has. A law has parameters of its own between
machines. There are two: a ring all-reduce, 2 (n - 1) latency + 2 (n - 1) / n transfer, where `transfer` is the time to
send the whole gradient once, and a tree, log2(n) latency (Thakur et al. 2005, IJHPCA 19(1)). `hidden` is the part of
the computing during which an exchange costs nothing (0: none, as with one message; 1: all; compare gamma in Pollux,
OSDI 2021). Each law with each of some `hidden` is a hypothesis. Those that the cells do not refute predict together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import compress
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize, stats

from mnist_dist.study.analysis.intervals import (
    CAUTIOUS,
    Estimate,
    Interval,
    draw,
    estimates,
    interval_of_draws,
    level_of_repeats,
)

PARAMETERS = ("fixed", "per_sample", "floor", "latency", "transfer", "latency_between", "transfer_between")
FIXED, PER_SAMPLE, FLOOR, LATENCY, TRANSFER, LATENCY_BETWEEN, TRANSFER_BETWEEN = range(len(PARAMETERS))
LINEAR = [LATENCY, TRANSFER, LATENCY_BETWEEN, TRANSFER_BETWEEN]
DRAWS = 200  # over all hypotheses that are left
LEAST_DRAWS = 30  # of one
F_OF_FLOOR = 6.0  # there is a floor if it makes the squared distances so much smaller: an F test at 2 to 5 %
MOST_STARTS = 4  # floors from which the search begins
MODEL_ERROR = 0.01  # of a step: what no law explains, and is no reason to refute it
WORSE = 9.0  # in squared standard errors: a hypothesis that is so much worse than the best one is refuted
REFUTED = 0.01  # no hypothesis describes the cells, if chance makes the best one so bad less often
WIDEST = 0.2  # of the half width of a band that checks something


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
    return _Shape(places, hypothesis).seconds(values)


class _Shape:
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


@dataclass(frozen=True)
class Cells:
    """The places of a study, and of each the seconds of a step in its runs."""

    places: Sequence[Place]
    runs: Sequence[np.ndarray]

    @cached_property
    def estimates(self) -> list[Estimate]:
        """Of each place the seconds of a step.

        Cells whose spreads are not pooled have at least the mean of their variances. A few runs have a small spread by
        chance, and skewed noise then also makes their mean too small.
        """
        return [replace(cell, error=max(cell.error, self._usual)) if is_alone else cell
                for cell, is_alone in zip(self._spreads, self._alone, strict=True)]

    @cached_property
    def means(self) -> np.ndarray:
        """[places] logarithms."""
        return np.array([estimate.mean for estimate in self.estimates])

    @cached_property
    def errors(self) -> np.ndarray:
        """[places] by how much a law may be off a mean: a standard error, and what no law explains. Cells whose spreads
        are not pooled weigh the same, because a weight from the spread of a few runs goes with their mean.
        """
        variances = np.where(self._alone, self._usual, [cell.error for cell in self._spreads])
        return np.sqrt(variances + MODEL_ERROR**2)

    @cached_property
    def _spreads(self) -> list[Estimate]:
        return estimates(self.runs)

    @cached_property
    def _alone(self) -> list[bool]:
        """[places] whether a cell's spread is not pooled with another's."""
        sharing = Counter(cell.pool for cell in self._spreads)
        return [sharing[cell.pool] == 1 for cell in self._spreads]

    @cached_property
    def _usual(self) -> float:
        """The mean variance of the cells whose spreads are not pooled."""
        return float(np.mean([cell.error for cell in compress(self._spreads, self._alone)] or 0.0))

    def drawn(self, count: int, random: np.random.Generator) -> np.ndarray:
        """[count, places] logarithms of what the seconds may be: within the spread, and what no law explains."""
        means = draw(self.estimates, count, random)
        return means + MODEL_ERROR * random.standard_normal(means.shape)

    def only(self, keep: Sequence[bool]) -> Cells:
        """Those for which `keep` is true."""
        return Cells(list(compress(self.places, keep)), list(compress(self.runs, keep)))


def fit(cells: Cells, ring: tuple[float, float] | None = None) -> Model | str:
    """The model of these cells; or the reason why there is none.

    `ring` has the seconds of a message and of sending the gradient once, if they were measured beside the cells: there
    the search begins, and what the cells do not decide is divided as it says.
    """
    left = _left(cells, ring)
    if isinstance(left, str):
        return left
    random = np.random.default_rng(0)
    count = max(LEAST_DRAWS, DRAWS // len(left))
    fits = [_with_undecided(cells, solved, _draws(cells, solved, count, random), random, ring) for solved in left]
    return Model(fits, _describes(cells, left[0]), min(map(len, cells.runs)),
                 max(place.processes for place in cells.places))


class _Solved(NamedTuple):
    """A hypothesis, where its search ended, and which parameters were free."""

    hypothesis: Hypothesis
    shape: _Shape
    values: np.ndarray
    free: list[int]
    distance: float


def _left(cells: Cells, ring: tuple[float, float] | None, among: Sequence[Hypothesis] = HYPOTHESES
          ) -> list[_Solved] | str:
    """The hypotheses that the cells do not refute, the closest first; or the reason why there are none."""
    if len({place.batch for place in cells.places}) < 2:
        return "it needs two or more batches per process"
    needed = max(len(_free(cells.places, law)) for law in LAWS) - (FLOOR in _free(cells.places, LAWS[0]))
    if len(cells.places) < needed:
        return f"its {needed} parameters need as many cells, and there are {len(cells.places)}"
    # without an exchange there is nothing to tell apart
    is_alone = all(place.processes == 1 for place in cells.places)
    # rounded, because two laws with one free parameter each differ by rounding alone: then the first is the closest
    solved = sorted((_solve(cells, hypothesis, ring) for hypothesis in ([PLAIN] if is_alone else among)),
                    key=lambda candidate: round(candidate.distance, 3))
    return [candidate for candidate in solved if candidate.distance <= solved[0].distance + WORSE]


def _describes(cells: Cells, solved: _Solved) -> bool:
    """Whether chance makes the closest hypothesis so far off the cells as it is; not known of single runs."""
    left = len(cells.places) - len(solved.free)
    known = [estimate.freedom for estimate in cells.estimates if estimate.freedom]
    if left < 1 or not known:
        return True
    return bool(stats.f.sf(solved.distance / left, left, max(known)) >= REFUTED)


def _solve(cells: Cells, hypothesis: Hypothesis, ring: tuple[float, float] | None) -> _Solved:
    """The parameters of a hypothesis that are closest to the cells, with a floor if that is much closer."""
    free = _free(cells.places, hypothesis.law)
    shape = _Shape(cells.places, hypothesis)
    without = [at for at in free if at != FLOOR]
    # an exchange that is hidden everywhere may be of any length up to that: a search from a short and from a long one
    starts = [_start(cells, 0.0, ring, is_long) for is_long in ((False, True) if hypothesis.hidden else (False,))]
    searches = [_search(shape, cells.means, cells.errors, start, without) for start in starts]
    best = min(searches, key=lambda search: search.cost)
    if FLOOR in free:
        inner = sorted({place.batch for place in cells.places})[1:-1]
        searched = [_search(shape, cells.means, cells.errors, _start(cells, floor, ring, False), free)
                    for floor in inner[:: -(-len(inner) // MOST_STARTS)]]
        with_floor = min(searched, key=lambda one: one.cost)
        left = len(cells.places) - len(free)
        if left > 0 and (best.cost - with_floor.cost) * left > F_OF_FLOOR * with_floor.cost and (
                best.cost - with_floor.cost) > F_OF_FLOOR / 2:
            return _Solved(hypothesis, shape, _whole(with_floor.x, free), free, 2 * with_floor.cost)
    return _Solved(hypothesis, shape, _whole(best.x, without), without, 2 * best.cost)


def _draws(cells: Cells, solved: _Solved, count: int, random: np.random.Generator) -> np.ndarray:
    """[count, 7] parameters that are closest to what the cells may be."""
    rows = []
    for means in cells.drawn(count, random):
        start = solved.values
        if solved.hypothesis.hidden:
            start = start.copy()
            start[LINEAR] *= random.choice([0.1, 1.0, 10.0])
        rows.append(_whole(_search(solved.shape, means, cells.errors, start, solved.free).x, solved.free))
    return np.stack(rows)


def _free(places: Sequence[Place], law: Law) -> list[int]:
    """The parameters that can be fitted: not those of which the places say nothing, or the same as of another."""
    free = [FIXED, PER_SAMPLE]
    if len({place.batch for place in places}) > 3:
        free.append(FLOOR)
    for latency, sizes in _sizes(places):
        free += [latency, latency + 1][: min(law.parameters, len(sizes))]
    return free


def _sizes(places: Sequence[Place]) -> list[tuple[int, set[float]]]:
    """The latency in a machine and the one between machines, each with the numbers above 1 that exchange so."""
    return [(LATENCY, {place.processes / place.machines for place in places} - {1}),
            (LATENCY_BETWEEN, {float(place.machines) for place in places} - {1})]


def _start(cells: Cells, floor: float, ring: tuple[float, float] | None, is_long: bool) -> np.ndarray:
    """Where the search begins: most of it computing, as the slowest cell has it, but for the ring if it is known."""
    shortest, longest = np.exp(cells.means.min()), np.exp(cells.means.max())
    per_sample = longest / max(place.batch for place in cells.places) / 2
    return np.array([shortest / 2, per_sample, floor, *2 * (ring or 2 * ((longest if is_long else shortest) / 20,))])


def _whole(free_values: np.ndarray, free: Sequence[int]) -> np.ndarray:
    values = np.zeros(len(PARAMETERS))
    values[free] = free_values
    return values


def _search(shape: _Shape, means: np.ndarray, errors: np.ndarray, start: np.ndarray, free: Sequence[int]) -> Any:
    """scipy's result: the free parameters, none negative, that are closest to the means in standard errors."""
    def residuals(free_values: np.ndarray) -> np.ndarray:
        return (np.log(shape.seconds(_whole(free_values, free))) - means) / errors

    def slopes(free_values: np.ndarray) -> np.ndarray:
        values = _whole(free_values, free)
        return (shape.slopes(values) / (shape.seconds(values) * errors)[:, None])[:, free]

    most = np.full(len(PARAMETERS), np.inf)
    most[FLOOR] = shape.batch.max()
    first = np.clip(start, 1e-12, most * (1 - 1e-6))[free]
    return optimize.least_squares(residuals, first, slopes, bounds=(0, most[free]), x_scale="jac", xtol=1e-6, ftol=1e-6,
                                  gtol=1e-6)


def _with_undecided(cells: Cells, solved: _Solved, draws: np.ndarray, random: np.random.Generator,
                    ring: tuple[float, float] | None) -> Fit:
    """The fit in which each draw has a value of its own for what the cells do not decide."""
    undecided, values, free = set(), solved.values, solved.free
    smallest = min(place.batch for place in cells.places)
    if FLOOR not in free:
        undecided.add(FLOOR)
        values[FLOOR], draws[:, FLOOR] = smallest / 2, random.uniform(0, smallest, len(draws))
    for latency, sizes in _sizes(cells.places):
        if solved.hypothesis.law.parameters == 2 and len(sizes) == 1:  # any part of it may be transfer
            undecided |= {latency, latency + 1}
            (n,) = sizes
            share = ring[1] / (n * ring[0] + ring[1]) if ring else 0.5
            for row, part in ((values, share), (draws.T, random.uniform(0, 1, len(draws)))):
                row[latency + 1] = part * n * row[latency]
                row[latency] *= 1 - part
    absent = frozenset(range(len(PARAMETERS))) - {*free, *undecided}
    return Fit(solved.hypothesis, values, draws, frozenset(undecided), absent, solved.distance)


@dataclass(frozen=True)
class Check:
    """The model held against cells that are left out of its fit: predicted and measured seconds of a step. The bands of
    the predictions together hold all that is measured with their level, if one of the hypotheses is true.
    """

    places: Sequence[Place]
    predicted: Sequence[Interval]
    measured: Sequence[float]

    @property
    def errors(self) -> list[float]:
        """Predicted over measured, less 1."""
        return [ours.value / theirs - 1 for ours, theirs in zip(self.predicted, self.measured, strict=True)]

    @property
    def width(self) -> float:
        """Half the width of a band as a part of the prediction, in the median over cells."""
        return float(np.median([band.half_width for band in self.predicted]))

    @property
    def holds(self) -> bool:
        """Whether every measured figure is in its band. Never, if the bands have no width: one run of each cell."""
        return all(ours.n > 1 and ours.low <= theirs <= ours.high
                   for ours, theirs in zip(self.predicted, self.measured, strict=True))

    @property
    def passes(self) -> bool:
        """Whether the bands hold what is measured, and are narrow enough to be a check."""
        return self.holds and self.width <= WIDEST


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
    random = np.random.default_rng(1)
    lows, highs = [], []
    for hypothesis_fit in model.fits:
        predicted = np.log(seconds(hypothesis_fit.values, held.places, hypothesis_fit.hypothesis))
        off = np.log(seconds(hypothesis_fit.draws, held.places, hypothesis_fit.hypothesis)) - predicted
        off -= held.drawn(len(off), random) - held.means
        spread = np.maximum(off.std(axis=0), 1e-12)
        width = spread * np.quantile(np.abs(off / spread).max(axis=1), CAUTIOUS)
        lows.append(predicted - width)
        highs.append(predicted + width)
    values = seconds(model.best.values, held.places, model.best.hypothesis)
    runs = min(model.runs, *map(len, held.runs))
    level = level_of_repeats(runs)
    bands = [Interval(float(value), float(np.exp(low)), float(np.exp(high)), level, runs)
             for value, low, high in zip(values, np.min(lows, axis=0), np.max(highs, axis=0), strict=True)]
    return Check(held.places, bands, list(np.exp(held.means)))


def errors_without(cells: Cells, left_out: Sequence[bool], model: Model, ring: tuple[float, float] | None = None
                   ) -> np.ndarray | str:
    """Predicted over measured seconds, less 1, of the cells that are left out of the fit of the closest of the model's
    hypotheses; or the reason why there are none.
    """
    held, kept = cells.only(left_out), cells.only([not out for out in left_out])
    left = (_left(kept, ring, [fit.hypothesis for fit in model.fits]) if kept.places else "no cell is left to fit")
    if isinstance(left, str):
        return left
    if unseen := _unseen(kept.places, held.places):
        return f"they are the only ones {unseen}"
    values = left[0].values
    if FLOOR not in left[0].free:
        values[FLOOR] = min(place.batch for place in kept.places) / 2
    return seconds(values, held.places, left[0].hypothesis) / np.exp(held.means) - 1


def _unseen(fitted: Sequence[Place], asked: Sequence[Place]) -> str:
    """What communicates in `asked` and in no cell of the fit, in words; "" if there is nothing."""
    for name, size in (("with several processes on a machine", lambda place: place.processes / place.machines),
                       ("on several machines", lambda place: place.machines)):
        if max(map(size, asked)) > 1 >= max(map(size, fitted)):
            return name
        if min(map(size, asked)) < min(map(size, fitted)) == max(map(size, fitted)):
            return "that tell an exchange from the rest of a step"
    return ""
