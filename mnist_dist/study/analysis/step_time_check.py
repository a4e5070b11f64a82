"""The model of the step time held against cells that are left out of its fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mnist_dist.study.analysis.intervals import CAUTIOUS, Interval, level_of_repeats
from mnist_dist.study.analysis.step_time import FLOOR, Model, Place, seconds
from mnist_dist.study.analysis.step_time_fit import Cells, fit, hypotheses_left

WIDEST = 0.2  # half width of a band that still is a check


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
        """Whether every measured time is in its band. Never if the bands have no width, with one run of each cell."""
        return all(ours.n > 1 and ours.low <= theirs <= ours.high
                   for ours, theirs in zip(self.predicted, self.measured, strict=True))

    @property
    def passes(self) -> bool:
        """Whether the bands hold what is measured, and are narrow enough to be a check."""
        return self.holds and self.width <= WIDEST


def check(cells: Cells, left_out: Sequence[bool], ring: tuple[float, float] | None = None) -> Check | str:
    """Fit the model without the cells that are left out, and predict them; or the reason why this is impossible."""
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
    if not kept.places:
        return "no cell is left to fit"
    left = hypotheses_left(kept, ring, [fit.hypothesis for fit in model.fits])
    if isinstance(left, str):
        return left
    if unseen := _unseen(kept.places, held.places):
        return f"they are the only ones {unseen}"
    values = left[0].values
    if FLOOR not in left[0].free:
        values[FLOOR] = min(place.batch for place in kept.places) / 2
    return seconds(values, held.places, left[0].hypothesis) / np.exp(held.means) - 1


def _unseen(fitted: Sequence[Place], asked: Sequence[Place]) -> str:
    """The communication that is in `asked` and in no cell of the fit, in words; "" if there is none."""
    for name, size in (("with several processes on a machine", lambda place: place.processes / place.machines),
                       ("on several machines", lambda place: place.machines)):
        if max(map(size, asked)) > 1 >= max(map(size, fitted)):
            return name
        if min(map(size, asked)) < min(map(size, fitted)) == max(map(size, fitted)):
            return "that tell an exchange from the rest of a step"
    return ""
