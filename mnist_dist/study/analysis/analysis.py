"""From the rows of a study to its cells, and what is wrong with a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from mnist_dist.errors import UserError
from mnist_dist.study.analysis.cells import CellMetrics, Measured, Scaling, measured
from mnist_dist.study.analysis.intervals import LEAST_CONCLUSIVE, PRECISION, Estimate, estimates, ratio
from mnist_dist.study.analysis.steadiness import LEAST_WINDOWS, Drift, drift_over_study, steadiness
from mnist_dist.study.plan.grid import Cell, cell_of
from mnist_dist.study.plan.table import SAMPLES, Row, rate_of, unit_of
from mnist_dist.text import counted

# A run is an outlier if it is OUTLIER times faster or slower than its cell's median, and FAR_OFF times as far off the
# median as the other runs are. These count as at least LEAST_SPREAD off.
OUTLIER, FAR_OFF, LEAST_SPREAD = 1.5, 10, 0.01
STRAGGLER = 1.2  # a rank's own step time over the median of all ranks
SHOWN_OF_ENVIRONMENT = ("device_name", "device", "driver", "torch", "accelerate", "mnist_dist", "git_commit", "step",
                        "num_machines")


class Analysis:
    """All metrics of a study, each computed when it is first used."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.runs = [run for row in rows if (run := measured(row))]
        cells: dict[Cell, CellMetrics] = {}
        for run in self.runs:
            if run.row["role"] == "repeat":
                cell = cell_of(run.row)
                cells.setdefault(cell, CellMetrics(cell, self.precision)).repeats.append(run)
        self.cells = {cell: cells[cell] for cell in sorted(cells, key=lambda cell: cell.place)}

    @cached_property
    def precision(self) -> float:
        """What the study's `--precision` asked for, the last time that it was run; else 5 %."""
        asked = [(row.get("study") or {}).get("precision") for row in self.rows]
        return next((value for value in asked if isinstance(value, float) and 0 < value < 1), PRECISION)

    @cached_property
    def unit(self) -> str:
        """What the rates count. Raises `UserError` if the runs do not agree on it."""
        units = sorted({unit_of(run.row) for run in self.runs})
        if len(units) > 1:
            raise UserError(f"the runs count {' and '.join(units)}: a study has one unit, so let all runs say the same")
        return units[0] if units else SAMPLES

    @cached_property
    def estimates(self) -> dict[Cell, Estimate]:
        """The throughput of each cell."""
        return dict(zip(self.cells, estimates([metrics.rates for metrics in self.cells.values()]), strict=True))

    @cached_property
    def undisturbed(self) -> dict[Cell, Estimate]:
        """The undisturbed rate of each cell whose runs have enough windows."""
        rates = {cell: metrics.undisturbed for cell, metrics in self.cells.items() if metrics.undisturbed is not None}
        return dict(zip(rates, estimates(list(rates.values())), strict=True))

    @cached_property
    def strong(self) -> dict[Cell, Scaling]:
        """Against the fewest processes at the same global batch size: the same work, shared by more."""
        return self._scaling(lambda cell, processes: cell.global_batch_size)

    @cached_property
    def weak(self) -> dict[Cell, Scaling]:
        """Against the fewest processes at the same per-device batch size: more work for more processes."""
        return self._scaling(lambda cell, processes: cell.global_batch_size * processes / cell.processes)

    def _scaling(self, batch_of_base: Any) -> dict[Cell, Scaling]:
        bases_of = {}
        for cell in self.cells:
            bases = [other for other in self.cells if other.options == cell.options
                     and other.processes < cell.processes
                     and other.global_batch_size == batch_of_base(cell, other.processes)]
            if bases:
                bases_of[cell] = min(bases, key=lambda other: other.processes)
        speed_ups = {cell: ratio([self.estimates[cell]], [self.estimates[base]], len(bases_of))
                     for cell, base in bases_of.items()}
        return {cell: Scaling(bases_of[cell], speed_up, speed_up.scaled(bases_of[cell].processes / cell.processes))
                for cell, speed_up in speed_ups.items()}

    @cached_property
    def drift(self) -> Drift | None:
        """Of the whole machine: the rates of all repeats against their order."""
        pairs = [(run.row["order"], run.rate / metrics.rate.value) for metrics in self.cells.values()
                 for run in metrics.repeats if run.row.get("order") is not None]
        return drift_over_study([order for order, _ in pairs], [rate for _, rate in pairs])

    @cached_property
    def base_runs(self) -> list[Measured]:
        """The base case's runs first and last, in their order."""
        return [run for run in self.runs if run.row["role"] in ("first", "last")]

    @cached_property
    def marks(self) -> list[tuple[Row, str]]:
        """Completed runs that are marked, with the reasons."""
        rows = []
        for row in self.rows:
            if row["status"] == "completed" and rate_of(row) is None:
                rows.append((row, "no step was measured: give more --epochs or --max-steps"))
        for run in self.runs:
            steady = steadiness(run.windows)
            if steady.kind == "jump" and steady.warmup_steps:
                rows.append((run.row, f"the warm-up needed {steady.warmup_steps:,} steps more than were left out: "
                                       f"after them a step takes {100 * steady.change:+.0f} %"))
            elif steady.kind == "jump":
                rows.append((run.row, f"the step time jumps by {100 * steady.change:+.0f} % after {steady.step:,} "
                                       "measured steps"))
            elif steady.kind == "drift":
                rows.append((run.row, f"the step time drifts by {100 * steady.change:+.0f} % over the run"))
            if 0 < (run.row["summary"].get("printed_rates") or 0) < LEAST_WINDOWS:
                rows.append((run.row, f"it printed {counted(run.row['summary']['printed_rates'], 'rate')}, too few to "
                                       f"tell which belong to the warm-up: let it print {LEAST_WINDOWS} or more"))
            if slow := straggler(run.row):
                rows.append((run.row, slow))
        return rows + [outlier for metrics in self.cells.values() for outlier in _outliers(metrics)]

    @property
    def failed(self) -> list[Row]:
        """Runs that failed, and cells that cannot run."""
        return [row for row in self.rows if row["status"] != "completed"]

    @cached_property
    def environments(self) -> dict[tuple[tuple[str, str], ...], int]:
        """Each hardware and software that runs were done on, with the number of runs. The kind of step is left out if
        the study varies it.
        """
        varied = {"step"} if any("compile" in dict(cell.options) for cell in self.cells) else set()
        shown = [name for name in SHOWN_OF_ENVIRONMENT if name not in varied]
        groups: dict[tuple[tuple[str, str], ...], int] = {}
        for run in self.runs:
            environment = run.row.get("environment") or {}
            key = tuple((name, str(environment[name])) for name in shown if environment.get(name) is not None)
            groups[key] = groups.get(key, 0) + 1
        return groups


def _outliers(metrics: CellMetrics) -> list[tuple[Row, str]]:
    """Runs whose rate is far from those of the other repeats, with the factor."""
    if len(metrics.repeats) < LEAST_CONCLUSIVE:
        return []
    off = np.log(metrics.rates) - np.log(metrics.rate.value)
    outliers = []
    for place, run in enumerate(metrics.repeats):
        usual = max(LEAST_SPREAD, float(np.median(np.abs(np.delete(off, place)))))
        if abs(off[place]) > max(math.log(OUTLIER), FAR_OFF * usual):
            times = f"{math.exp(abs(off[place])):.2g} times {'faster' if off[place] > 0 else 'slower'}"
            outliers.append((run.row, f"the run is {times} than the median of its cell"))
    return outliers


def straggler(row: Row) -> str:
    """The rank that the others wait for in every epoch, in words; "" if there is none."""
    ranks = [epoch["ranks"] for epoch in row["epochs"] if epoch["measured_samples"] and epoch.get("ranks")]
    slowest = {rank["slowest_rank"] for rank in ranks}
    if len(slowest) != 1 or any(rank["count"] < 2 or rank["own_ms"]["max"] <= STRAGGLER * usual_own_ms(rank)
                                for rank in ranks):
        return ""
    last = ranks[-1]
    return (f"rank {last['slowest_rank']} on {last['slowest_host']} is a straggler: {last['own_ms']['max']:.2f} ms of "
            f"its own per step, the others {usual_own_ms(last):.2f} ms")


def usual_own_ms(ranks: Mapping[str, Any]) -> float:
    """The time per step, without exchange, of a rank that is no straggler. With two ranks it is the smaller time,
    because the median is the mean of both.
    """
    return ranks["own_ms"]["median" if ranks["count"] > 2 else "min"]
