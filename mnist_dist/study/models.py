"""From the cells of a study to models of their step time: fitted, checked, and where they forecast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import compress

from mnist_dist.study.analysis import CellFigures
from mnist_dist.study.grid import Cell, HoldOut
from mnist_dist.study.step_time import Cells, Check, Model, Place, check, fit

Options = tuple[tuple[str, str], ...]
TAKES_NO_TIME = ("lr", "lr_rule")
FURTHER = (2, 4, 8)  # times the most processes that were run: where there is a forecast


@dataclass(frozen=True)
class Judged:
    """The cells with the same options, their model (or the reason why there is none), and how it does without the cells
    that are `left_out`.
    """

    members: Sequence[CellFigures]
    model: Model | str
    left_out: Sequence[Cell]
    checked: Check | str

    @property
    def is_trusted(self) -> bool:
        """Whether the model was checked, and passed."""
        return isinstance(self.checked, Check) and self.checked.passes

    @cached_property
    def places(self) -> dict[Cell, Place]:
        """Where the cells are in the model."""
        return dict(zip((one.cell for one in self.members), places_of(self.members), strict=True))


def judge(cells: Mapping[Cell, CellFigures], hold_out: HoldOut) -> dict[Options, Judged]:
    """For each value of the options that take time, the model of its cells."""
    groups: dict[Options, list[CellFigures]] = {}
    for figures in _as_timed(cells):
        groups.setdefault(figures.cell.options, []).append(figures)
    found = {}
    for options, members in groups.items():
        own = [figures.cell for figures in members]
        left_out = [hold_out.leaves_out(cell, own) for cell in own]
        model, checked = fit(_cells(members)), "there is no model"
        found[options] = Judged(members, model, list(compress(own, left_out)),
                                checked if isinstance(model, str) else check(_cells(members), left_out))
    return found


def as_timed(cell: Cell) -> Cell:
    """The cell without the options that take no time."""
    return replace(cell, options=tuple(option for option in cell.options if option[0] not in TAKES_NO_TIME))


def _as_timed(cells: Mapping[Cell, CellFigures]) -> list[CellFigures]:
    """The cells, of which those that differ in nothing that takes time are one."""
    found: dict[Cell, CellFigures] = {}
    for cell, figures in cells.items():
        timed = as_timed(cell)
        found.setdefault(timed, CellFigures(timed)).repeats.extend(figures.repeats)
    return list(found.values())


def _cells(members: Sequence[CellFigures]) -> Cells:
    return Cells(places_of(members), [one.cell.global_batch_size / one.runs.rates for one in members])


def places_of(members: Sequence[CellFigures]) -> list[Place]:
    """Where the cells are in the model. If runs say nothing of machines and threads: on one machine, all as fast."""
    environments = [one.repeats[0].row.get("environment") or {} for one in members]
    threads = [(own.get("num_threads") if own.get("device") == "cpu" else None) or 1 for own in environments]
    most = max(threads)
    return [Place(-(-one.cell.global_batch_size // one.cell.processes), one.cell.processes,
                  own.get("num_machines") or 1, count / most)
            for one, own, count in zip(members, environments, threads, strict=True)]


def beyond(members: Sequence[CellFigures], batches: Sequence[int]) -> dict[int, list[Place]]:
    """Where there is a forecast for these global batches: more processes than were run, machines filled as before. None
    if one process alone was run, which says nothing of communication.

    Processes that share a machine's cores have fewer threads the more they are, and one at least.
    """
    measured = places_of(members)
    largest = max(measured, key=lambda place: place.processes)
    environment = members[measured.index(largest)].repeats[0].row.get("environment") or {}
    shared, threads = min(place.speed for place in measured) < 1, environment.get("num_threads") or 1
    factors = [factor for factor in FURTHER if largest.processes > 1 and not (shared and factor > threads)]
    return {batch: [Place(-(-batch // processes), processes, factor * largest.machines if largest.machines > 1 else 1,
                          largest.speed / factor if shared else 1.0)
                    for factor in factors if (processes := factor * largest.processes) <= batch]
            for batch in batches}
