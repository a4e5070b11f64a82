"""From the rows of a study to what its report shows: the cells with their intervals, and what is wrong with a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from mnist_dist.study.grid import Cell, cell_of
from mnist_dist.study.statistics import (
    LEAST_WINDOWS,
    Drift,
    Interval,
    Runs,
    are_different,
    drift_over_study,
    factor_interval,
    median_interval,
    more_repeats,
    ratio_interval,
    steadiness,
)
from mnist_dist.study.table import Row, rate_of

STRAGGLER = 1.2  # a rank's own step time over the median of all ranks
SHOWN_OF_ENVIRONMENT = ("device_name", "device", "torch", "accelerate", "mnist_dist", "git_commit", "step",
                        "num_machines")


@dataclass(frozen=True)
class Measured:
    """A completed run: its rate in samples/s, and its windows [w, 3] of steps, samples and seconds."""

    row: Row
    rate: float
    windows: np.ndarray


@dataclass(frozen=True)
class Scaling:
    """How a cell compares with its base case: the speed-up, and the efficiency, which is ideally 1."""

    base: Cell
    speed_up: Interval
    efficiency: Interval


@dataclass
class CellFigures:
    """A cell, its repeats, and what they give."""

    cell: Cell
    repeats: list[Measured] = field(default_factory=list)

    @cached_property
    def runs(self) -> Runs:
        """The repeats as the statistics take them."""
        return Runs(np.array([run.rate for run in self.repeats]), [run.windows for run in self.repeats])

    @cached_property
    def rates(self) -> dict[str, np.ndarray | None]:
        """Of each run: the throughput, and the undisturbed rate, in samples/s; None if a run has too few windows.

        What disturbs a run makes it slower and never faster, so the fast windows tell most of the code and the hardware
        (Chen & Revels 2016, arXiv 1608.04295): the undisturbed rate is that of the 10th percentile of step times.
        """
        windows = self.runs.windows
        enough = all(len(one) >= LEAST_WINDOWS for one in windows)
        quiet = np.array([1 / np.quantile(one[:, 2] / one[:, 1], 0.1) for one in windows]) if enough else None
        return {"throughput": self.runs.rates, "undisturbed": quiet}

    @cached_property
    def rate(self) -> Interval:
        """Samples per second over all processes."""
        return median_interval(self.runs.rates)

    @cached_property
    def step_ms(self) -> Interval:
        """Milliseconds for a step on a whole global batch."""
        return median_interval(1000 * self.cell.global_batch_size / self.runs.rates)

    @property
    def per_device_batch_size(self) -> float:
        """Samples of a global batch on one process."""
        return self.cell.global_batch_size / self.cell.processes

    @property
    def environment(self) -> Mapping[str, Any]:
        """What the runs say of the machine."""
        return self.repeats[0].row.get("environment") or {}

    @property
    def threads(self) -> int:
        """Threads of a process on a CPU; on a GPU 1."""
        return (self.environment.get("num_threads") if self.environment.get("device") == "cpu" else None) or 1

    @property
    def devices(self) -> int:
        """What the cell occupies: a GPU for each process, or on a CPU a core for each thread."""
        return self.cell.processes * self.threads

    @property
    def more_repeats(self) -> int:
        """Repeats that are missing for a conclusion."""
        return more_repeats(self.rate)


def measured(row: Row) -> Measured | None:
    """The run with its rate; None if it did not complete or measured no step."""
    rate = rate_of(row)
    if rate is None:
        return None
    windows = [window for epoch in row["epochs"] for window in epoch.get("windows") or []]
    whole = [window for window in windows if len(window) == 3 and min(window) > 0]
    return Measured(row, rate, np.array(whole, dtype=float).reshape(-1, 3))


class Analysis:
    """All figures of a study, each computed when it is asked for."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.runs = [run for row in rows if (run := measured(row))]
        found: dict[Cell, CellFigures] = {}
        for run in self.runs:
            if run.row["role"] == "repeat":
                cell = cell_of(run.row)
                found.setdefault(cell, CellFigures(cell)).repeats.append(run)
        self.cells = {cell: found[cell] for cell in sorted(found, key=lambda cell: cell.place)}

    @cached_property
    def strong(self) -> dict[Cell, Scaling]:
        """Against the fewest processes at the same global batch size: the same work, shared by more."""
        return self._scaling(lambda cell, processes: cell.global_batch_size)

    @cached_property
    def weak(self) -> dict[Cell, Scaling]:
        """Against the fewest processes at the same per-device batch size: more work for more processes."""
        return self._scaling(lambda cell, processes: cell.global_batch_size * processes / cell.processes)

    def _scaling(self, batch_of_base: Any) -> dict[Cell, Scaling]:
        found = {}
        for cell, figures in self.cells.items():
            bases = [other for other in self.cells if other.options == cell.options
                     and other.processes < cell.processes
                     and other.global_batch_size == batch_of_base(cell, other.processes)]
            if not bases:
                continue
            base = min(bases, key=lambda other: other.processes)
            speed_up = ratio_interval(figures.runs, self.cells[base].runs)
            found[cell] = Scaling(base, speed_up, speed_up.scaled(base.processes / cell.processes))
        return found

    @cached_property
    def drift(self) -> Drift | None:
        """Of the whole machine: the rates of all repeats against their order."""
        pairs = [(run.row["order"], run.rate / figures.rate.value) for figures in self.cells.values()
                 for run in figures.repeats if run.row.get("order") is not None]
        return drift_over_study([order for order, _ in pairs], [rate for _, rate in pairs])

    @cached_property
    def base_runs(self) -> list[Measured]:
        """The base case's runs first and last, in their order."""
        return [run for run in self.runs if run.row["role"] in ("first", "last")]

    @cached_property
    def marks(self) -> list[tuple[Row, str]]:
        """Completed runs that are not as they should be, with what was seen."""
        found = []
        for row in self.rows:
            if row["status"] == "completed" and rate_of(row) is None:
                found.append((row, "no step was measured: give more --epochs or --max-steps"))
        for run in self.runs:
            steady = steadiness(run.windows)
            if steady.kind == "jump" and steady.warmup_steps:
                found.append((run.row, f"the warm-up needed {steady.warmup_steps:,} steps more than were left out: "
                                       f"after them a step takes {100 * steady.change:+.0f} %"))
            elif steady.kind == "jump":
                found.append((run.row, f"the step time jumps by {100 * steady.change:+.0f} % after {steady.step:,} "
                                       "measured steps"))
            elif steady.kind == "drift":
                found.append((run.row, f"the step time drifts by {100 * steady.change:+.0f} % over the run"))
            if slow := straggler(run.row):
                found.append((run.row, slow))
        return found

    @property
    def failed(self) -> list[Row]:
        """Runs that failed, and cells that cannot run."""
        return [row for row in self.rows if row["status"] != "completed"]

    @cached_property
    def environments(self) -> dict[tuple[tuple[str, str], ...], int]:
        """Each hardware and software that runs were done on, with the number of runs. The kind of step is none of it if
        the study varies that.
        """
        varied = {"step"} if any("compile" in dict(cell.options) for cell in self.cells) else set()
        shown = [name for name in SHOWN_OF_ENVIRONMENT if name not in varied]
        found: dict[tuple[tuple[str, str], ...], int] = {}
        for run in self.runs:
            own = run.row.get("environment") or {}
            key = tuple((name, str(own[name])) for name in shown if own.get(name) is not None)
            found[key] = found.get(key, 0) + 1
        return found


def straggler(row: Row) -> str:
    """The rank that the others wait for in every epoch, in words; "" if there is none."""
    ranks = [epoch["ranks"] for epoch in row["epochs"] if epoch["measured_samples"] and epoch.get("ranks")]
    slowest = {one["slowest_rank"] for one in ranks}
    if len(slowest) != 1 or any(one["count"] < 2 or one["own_ms"]["max"] <= STRAGGLER * usual_own_ms(one)
                                for one in ranks):
        return ""
    last = ranks[-1]
    return (f"rank {last['slowest_rank']} on {last['slowest_host']} is a straggler: {last['own_ms']['max']:.2f} ms of "
            f"its own per step, the others {usual_own_ms(last):.2f} ms")


def usual_own_ms(ranks: Mapping[str, Any]) -> float:
    """The own time per step of a rank that is no straggler. Of two ranks the median is the mean of both, so it is the
    smaller one.
    """
    return ranks["own_ms"]["median" if ranks["count"] > 2 else "min"]


@dataclass(frozen=True)
class Factor:
    """By how much a rate differs between two studies, second over first, and whether that is a difference."""

    interval: Interval
    is_one: bool


@dataclass(frozen=True)
class Difference:
    """A cell in two studies: how its throughput and its undisturbed rate differ (None: too few windows)."""

    cell: Cell
    before: Interval
    after: Interval
    throughput: Factor
    undisturbed: Factor | None

    @property
    def is_one(self) -> bool:
        """Whether the cell differs."""
        return self.throughput.is_one or (self.undisturbed is not None and self.undisturbed.is_one)


def compare(before: Analysis, after: Analysis) -> list[Difference]:
    """Cell by cell, those that both studies have. All tests of a comparison share one false discovery rate."""
    common = [cell for cell in before.cells if cell in after.cells]
    pairs = {(cell, which): (ours, theirs) for which in ("throughput", "undisturbed") for cell in common
             if (ours := after.cells[cell].rates[which]) is not None
             and (theirs := before.cells[cell].rates[which]) is not None}
    intervals = [factor_interval(*pair) for pair in pairs.values()]
    verdicts = are_different(list(pairs.values()), intervals)
    found = {key: Factor(*factor) for key, factor in zip(pairs, zip(intervals, verdicts, strict=True), strict=True)}
    return [Difference(cell, before.cells[cell].rate, after.cells[cell].rate, found[cell, "throughput"],
                       found.get((cell, "undisturbed"))) for cell in common]
