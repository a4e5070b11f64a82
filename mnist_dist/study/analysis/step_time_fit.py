"""Fits the hypotheses of a step's time to the cells of a study. A model has the hypotheses that are not refuted.

Distances are those of the logarithms, in standard errors of the cells. No parameter is negative.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import compress
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize, stats

from mnist_dist.study.analysis.intervals import Estimate, draw, estimates
from mnist_dist.study.analysis.step_time import (
    FIXED,
    FLOOR,
    HYPOTHESES,
    LATENCY,
    LATENCY_BETWEEN,
    LAWS,
    LINEAR,
    PARAMETERS,
    PER_SAMPLE,
    PLAIN,
    Fit,
    Hypothesis,
    Law,
    Model,
    Place,
    Shape,
)

DRAWS = 200  # over all hypotheses that are left
LEAST_DRAWS = 30  # of one
F_OF_FLOOR = 6.0  # the F statistic from which there is a floor: a test at 2 to 5 %
MOST_STARTS = 4  # floors from which the search begins
MODEL_ERROR = 0.01  # part of a step that no law explains; it refutes none
WORSE = 9.0  # squared standard errors: a hypothesis that is worse than the best one by this is refuted
REFUTED = 0.01  # the least probability of the best distance, for a model that describes the cells


@dataclass(frozen=True)
class Cells:
    """The places of a study, and for each the seconds of a step in its runs."""

    places: Sequence[Place]
    runs: Sequence[np.ndarray]

    @cached_property
    def estimates(self) -> list[Estimate]:
        """The seconds of a step at each place.

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
    left = hypotheses_left(cells, ring)
    if isinstance(left, str):
        return left
    random = np.random.default_rng(0)
    count = max(LEAST_DRAWS, DRAWS // len(left))
    fits = [_with_undecided(cells, solved, _draws(cells, solved, count, random), random, ring) for solved in left]
    return Model(fits, _describes(cells, left[0]), min(map(len, cells.runs)),
                 max(place.processes for place in cells.places))


class Solved(NamedTuple):
    """A hypothesis, where its search ended, and which parameters were free."""

    hypothesis: Hypothesis
    shape: Shape
    values: np.ndarray
    free: list[int]
    distance: float


def hypotheses_left(cells: Cells, ring: tuple[float, float] | None, among: Sequence[Hypothesis] = HYPOTHESES
          ) -> list[Solved] | str:
    """The hypotheses that the cells do not refute, the closest first; or the reason why there are none."""
    if len({place.batch for place in cells.places}) < 2:
        return "it needs two or more batches per process"
    needed = max(len(_free(cells.places, law)) for law in LAWS) - (FLOOR in _free(cells.places, LAWS[0]))
    if len(cells.places) < needed:
        return f"its {needed} parameters need as many cells, and there are {len(cells.places)}"
    # without an exchange all laws are the same
    is_alone = all(place.processes == 1 for place in cells.places)
    # rounded, because two laws with one free parameter each differ by rounding alone: then the first is the closest
    solved = sorted((_solve(cells, hypothesis, ring) for hypothesis in ([PLAIN] if is_alone else among)),
                    key=lambda candidate: round(candidate.distance, 3))
    return [candidate for candidate in solved if candidate.distance <= solved[0].distance + WORSE]


def _describes(cells: Cells, solved: Solved) -> bool:
    """Whether chance explains the distance of the closest hypothesis; not known from single runs."""
    left = len(cells.places) - len(solved.free)
    known = [estimate.freedom for estimate in cells.estimates if estimate.freedom]
    if left < 1 or not known:
        return True
    return bool(stats.f.sf(solved.distance / left, left, max(known)) >= REFUTED)


def _solve(cells: Cells, hypothesis: Hypothesis, ring: tuple[float, float] | None) -> Solved:
    """The parameters of a hypothesis that are closest to the cells, with a floor if that is much closer."""
    free = _free(cells.places, hypothesis.law)
    shape = Shape(cells.places, hypothesis)
    without = [at for at in free if at != FLOOR]
    # a hidden exchange may be short or long: search from both
    starts = [_start(cells, 0.0, ring, is_long) for is_long in ((False, True) if hypothesis.hidden else (False,))]
    searches = [_search(shape, cells.means, cells.errors, start, without) for start in starts]
    best = min(searches, key=lambda search: search.cost)
    if FLOOR in free:
        inner = sorted({place.batch for place in cells.places})[1:-1]
        searched = [_search(shape, cells.means, cells.errors, _start(cells, floor, ring, False), free)
                    for floor in inner[:: -(-len(inner) // MOST_STARTS)]]
        with_floor = min(searched, key=lambda ended: ended.cost)
        left = len(cells.places) - len(free)
        if left > 0 and (best.cost - with_floor.cost) * left > F_OF_FLOOR * with_floor.cost and (
                best.cost - with_floor.cost) > F_OF_FLOOR / 2:
            return Solved(hypothesis, shape, _whole(with_floor.x, free), free, 2 * with_floor.cost)
    return Solved(hypothesis, shape, _whole(best.x, without), without, 2 * best.cost)


def _draws(cells: Cells, solved: Solved, count: int, random: np.random.Generator) -> np.ndarray:
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


def _search(shape: Shape, means: np.ndarray, errors: np.ndarray, start: np.ndarray, free: Sequence[int]) -> Any:
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


def _with_undecided(cells: Cells, solved: Solved, draws: np.ndarray, random: np.random.Generator,
                    ring: tuple[float, float] | None) -> Fit:
    """The fit in which each draw has another value for what the cells do not decide."""
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
