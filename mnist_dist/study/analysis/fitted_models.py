"""From the cells of a study to models of their step time: fitted, checked, and where they forecast."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import compress
from typing import Any

from mnist_dist.study.analysis.cells import CellMetrics
from mnist_dist.study.analysis.measured_network import AllReduceTimes
from mnist_dist.study.analysis.step_time import Model, Place
from mnist_dist.study.analysis.step_time_check import Check, check, errors_without
from mnist_dist.study.analysis.step_time_fit import Cells, fit
from mnist_dist.study.plan.grid import Cell, HoldOut, Options

TAKES_NO_TIME = ("lr", "lr_rule")
FURTHER = (2, 4, 8)  # times the most processes that were run: where there is a forecast
AXES = {"processes": lambda cell: cell.processes, "batch size": lambda cell: cell.global_batch_size}


@dataclass(frozen=True)
class LeftOut:
    """The error of the model for cells with one batch size, or one number of processes, that are left out of its fit:
    predicted over measured, less 1, of the worst cell (NaN if there is none, with the reason).
    """

    axis: str
    value: int
    error: float
    reason: str = ""


def worst_of(left_out: Sequence[LeftOut]) -> LeftOut | None:
    """The worst of these predictions; None if there are none."""
    return max((check for check in left_out if not check.reason), key=lambda check: abs(check.error), default=None)


@dataclass(frozen=True)
class CheckedModel:
    """The cells with the same options, their model (or the reason why there is none), and its check with the cells that
    are `left_out`.
    """

    members: Sequence[CellMetrics]
    model: Model | str
    left_out: Sequence[Cell]
    checked: Check | str
    left_one_out: Sequence[LeftOut] = ()

    @property
    def is_trusted(self) -> bool:
        """Whether the model describes the cells, was checked, and passed."""
        return (isinstance(self.model, Model) and self.model.describes and isinstance(self.checked, Check)
                and self.checked.passes)

    @cached_property
    def places(self) -> dict[Cell, Place]:
        """Where the cells are in the model."""
        return dict(zip((member.cell for member in self.members), _places(self.members), strict=True))

    def beyond(self, batches: Sequence[int]) -> dict[int, list[Place]]:
        """Where there is a forecast for these global batches: more processes than were run, machines filled as before.
        None if one process alone was run, which says nothing of communication. Only twice as many, if the cells do not
        refute all laws of an exchange but one.

        If processes share a machine's cores, more processes have fewer threads each, and at least one.
        """
        largest = max(self.members, key=lambda member: member.cell.processes)
        place, shared = self.places[largest.cell], min(place.speed for place in self.places.values()) < 1
        further = FURTHER if isinstance(self.model, Model) and len(self.model.laws) == 1 else FURTHER[:1]
        factors = [factor for factor in further if place.processes > 1 and not (shared and factor > largest.threads)]
        return {batch: [Place(-(-batch // processes), processes, factor * place.machines if place.machines > 1 else 1,
                              place.speed / factor if shared else 1.0)
                        for factor in factors if (processes := factor * place.processes) <= batch]
                for batch in batches}

    def devices(self, place: Place) -> int:
        """GPUs, or cores of CPUs, that the processes of a place occupy."""
        return round(place.processes * place.speed * max(member.threads for member in self.members))


def judge(cells: Mapping[Cell, CellMetrics], hold_out: HoldOut, fabric: AllReduceTimes | None = None
          ) -> dict[Options, CheckedModel]:
    """For each value of the options that take time, the model of its cells; `fabric` is what the doctor has measured.
    """
    ring = fabric.ring if fabric else None
    groups: dict[Options, list[CellMetrics]] = {}
    for metrics in _merged(cells):
        groups.setdefault(metrics.cell.options, []).append(metrics)
    judged = {}
    for options, members in groups.items():
        own_cells = [metrics.cell for metrics in members]
        left_out = [hold_out.leaves_out(cell, own_cells) for cell in own_cells]
        timed = _cells(members)
        model = fit(timed, ring)
        judged[options] = CheckedModel(members, model, list(compress(own_cells, left_out)),
                                       "there is no model" if isinstance(model, str) else check(timed, left_out, ring),
                                       () if isinstance(model, str) else _leave_one_out(own_cells, timed, model, ring))
    return judged


def _leave_one_out(members: Sequence[Cell], timed: Cells, model: Model, ring: tuple[float, float] | None
                   ) -> list[LeftOut]:
    """Each batch size and each number of processes left out in turn."""
    left_out = []
    for axis, value_of in AXES.items():
        for value in sorted({value_of(cell) for cell in members}):
            errors = errors_without(timed, [value_of(cell) == value for cell in members], model, ring)
            left_out.append(LeftOut(axis, value, math.nan, errors) if isinstance(errors, str) else
                            LeftOut(axis, value, float(max(errors, key=abs))))
    return left_out


def forecasts_of(judged: CheckedModel, options: Options) -> list[dict[str, Any]]:
    """The forecasts for programs: a row for each batch size and number of processes, seconds of a step."""
    if isinstance(judged.model, str):
        return []
    ahead = judged.beyond(sorted({member.cell.global_batch_size for member in judged.members}))
    return [{"options": json.dumps(dict(options)), "batch_size": batch, "processes": place.processes,
             "step_seconds": step.value, "low": step.low, "high": step.high, "trusted": judged.is_trusted}
            for batch, places in ahead.items()
            for place, step in zip(places, judged.model.predict(places), strict=True)]


def as_timed(cell: Cell) -> Cell:
    """The cell without the options that take no time."""
    return replace(cell, options=tuple(option for option in cell.options if option[0] not in TAKES_NO_TIME))


def _merged(cells: Mapping[Cell, CellMetrics]) -> list[CellMetrics]:
    """The cells, merged if they differ only in options that take no time."""
    merged: dict[Cell, CellMetrics] = {}
    for cell, metrics in cells.items():
        timed = as_timed(cell)
        merged.setdefault(timed, CellMetrics(timed)).repeats.extend(metrics.repeats)
    return list(merged.values())


def _cells(members: Sequence[CellMetrics]) -> Cells:
    return Cells(_places(members), [member.steps_ms / 1000 for member in members])


def _places(members: Sequence[CellMetrics]) -> list[Place]:
    """Where the cells are in the model. If runs say nothing of machines and threads: on one machine, all as fast."""
    most = max(member.threads for member in members)
    return [Place(-(-member.cell.global_batch_size // member.cell.processes), member.cell.processes,
                  member.environment.get("num_machines") or 1, member.threads / most) for member in members]
