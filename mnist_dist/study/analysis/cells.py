"""The cells of a study: the metrics of the runs of each, with their intervals."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from mnist_dist.study.analysis.intervals import PRECISION, Interval, median_interval, more_repeats
from mnist_dist.study.analysis.steadiness import LEAST_WINDOWS
from mnist_dist.study.plan.grid import Cell
from mnist_dist.study.plan.table import Row, rate_of, step_ms_of, units_per_sample


@dataclass(frozen=True)
class Measured:
    """A completed run: its rate in units/s, and its windows [w, 3] of steps, samples and seconds."""

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
class CellMetrics:
    """A cell, its repeats, and their metrics."""

    cell: Cell
    precision: float = PRECISION  # half an interval that is wider than this part of its value is too wide
    repeats: list[Measured] = field(default_factory=list)

    @cached_property
    def rates(self) -> np.ndarray:
        """The throughput of each run, in units/s."""
        return np.array([run.rate for run in self.repeats])

    @cached_property
    def undisturbed(self) -> np.ndarray | None:
        """For each run the rate of the 10th percentile of its step times; None if a run has too few windows.

        Disturbances make a run slower, never faster. So the fast windows show the code and the hardware best (Chen &
        Revels 2016, arXiv 1608.04295).
        """
        if any(len(run.windows) < LEAST_WINDOWS for run in self.repeats):
            return None
        return np.array([1 / np.quantile(run.windows[:, 2] / run.windows[:, 1], 0.1) for run in self.repeats])

    @cached_property
    def rate(self) -> Interval:
        """Units per second over all processes."""
        return median_interval(self.rates)

    @cached_property
    def step_ms(self) -> Interval:
        """Milliseconds for a step on a whole global batch."""
        return median_interval(self.steps_ms)

    @cached_property
    def steps_ms(self) -> np.ndarray:
        """[runs] milliseconds for a step on a whole global batch."""
        return np.array([step_ms_of(run.row, run.rate) for run in self.repeats])

    @property
    def peak_memory_bytes(self) -> float | None:
        """The most memory that a process used in any run; None if no run says it."""
        peaks = [epoch["peak_memory_bytes"] for run in self.repeats for epoch in run.row["epochs"]
                 if epoch.get("peak_memory_bytes")]
        return max(peaks, default=None)

    @property
    def tflops_per_process(self) -> float | None:
        """TFLOP per second of a process in the median; None if the runs do not say how many FLOP a sample takes."""
        flop = self.repeats[0].row["summary"].get("flop_per_sample")
        samples = self.rate.value / self.units_per_sample
        return samples * flop / self.cell.processes / 1e12 if flop else None

    @property
    def units_per_sample(self) -> float:
        """How many of the unit a sample has: 1, or for tokens the length of a sequence."""
        return units_per_sample(self.repeats[0].row)

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

    @cached_property
    def ranks(self) -> list[Mapping[str, Any]]:
        """The summary over ranks of the last epoch, for each run that has it."""
        return [epoch["ranks"] for run in self.repeats for epoch in run.row["epochs"][-1:]
                if isinstance(epoch.get("ranks"), Mapping)]

    @property
    def exchange_ms(self) -> float | None:
        """Milliseconds of a step for the exchange of gradients: the median over runs; None if no run has it."""
        each = [rank["step_ms"]["median"] - rank["own_ms"]["median"] for rank in self.ranks if rank.get("step_ms")]
        return statistics.median(each) if each else None

    @property
    def more_repeats(self) -> int:
        """The number of further repeats that a conclusion needs."""
        return more_repeats(self.rate, self.precision)


def measured(row: Row) -> Measured | None:
    """The run with its rate; None if it did not complete or measured no step."""
    rate = rate_of(row)
    if rate is None:
        return None
    windows = [window for epoch in row["epochs"] for window in epoch.get("windows") or []]
    return Measured(row, rate, np.array(windows, dtype=float).reshape(-1, 3))
