"""The clock of training steps. It knows no ranks and no device, and the time is an argument. Needs no torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol


class Marks(Protocol):
    """`every`: steps from one mark to the next."""

    every: int

    def mark(self) -> Any:
        """A mark after what was done or queued so far."""

    def seconds(self, before: Any, after: Any) -> float:
        """Time between two marks. The device must have come to the later one."""


class HostMarks:
    """The host's time, after each step."""

    every = 1

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.mark = clock

    def seconds(self, before: float, after: float) -> float:
        """The difference."""
        return after - before


def in_windows(samples: Sequence[int], seconds: Sequence[float], at_most: int = 40) -> list[list[float]]:
    """At most `at_most` windows of consecutive steps, with nearly equal numbers of steps: [steps, samples, seconds] of
    each.
    """
    count = min(at_most, len(seconds))
    edges = [len(seconds) * i // count for i in range(count + 1)] if count else []
    return [[end - begin, sum(samples[begin:end]), round(sum(seconds[begin:end]), 7)] for begin, end in pairwise(edges)]


def percentile(values: Sequence[float], q: float) -> float | None:
    """The q-th percentile (0 to 100) by linear interpolation; None if there are no values."""
    import numpy as np

    return float(np.percentile(values, q)) if values else None


@dataclass
class Stopwatch:
    """Times an epoch's training steps in windows; what is done between windows does not count.

    `synchronize` waits for the device and the other ranks; it is called at both ends of a window, never inside.
    Warm-up windows (the first steps) are counted separately: their time and samples are not in the rate.
    Step times are the times between `marks` within a window; steps between two marks share their time equally.
    `exchange_clock` returns the seconds that this rank has spent exchanging tensors with other ranks.
    """

    synchronize: Callable[[], None]
    clock: Callable[[], float] = time.perf_counter
    exchange_clock: Callable[[], float] = lambda: 0.0
    marks: Marks | None = None  # default: of the clock
    seconds: float = 0.0
    samples: int = 0
    steps: int = 0
    warmup_seconds: float = 0.0
    warmup_samples: int = 0
    waited: float = 0.0  # seconds for data, in measured windows
    exchanged: float = 0.0  # seconds of exchanges with other ranks, in measured windows
    step_seconds: list[float] = field(default_factory=list)
    step_samples: list[int] = field(default_factory=list)

    @contextmanager
    def window(self, *, warmup: bool = False) -> Iterator[Window]:
        """Open a window; its steps report themselves with `lap`."""
        self.synchronize()
        exchanged = self.exchange_clock()
        marks = self.marks or HostMarks(self.clock)
        start = self.clock()
        opened = Window(marks)
        yield opened
        opened.mark()
        self.synchronize()
        elapsed = self.clock() - start
        if warmup:
            self.warmup_seconds += elapsed
            self.warmup_samples += sum(opened.samples)
            return
        self.seconds += elapsed
        self.samples += sum(opened.samples)
        self.steps += len(opened.samples)
        self.waited += opened.waited
        self.exchanged += self.exchange_clock() - exchanged
        self.step_samples += opened.samples
        for (done, upto), (before, after) in zip(pairwise(opened.marked), pairwise(opened.laps), strict=True):
            self.step_seconds += (upto - done) * [marks.seconds(before, after) / (upto - done)]

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint in the middle of an epoch; single step times are not kept."""
        names = ("seconds", "samples", "steps", "warmup_seconds", "warmup_samples", "waited", "exchanged")
        return {name: getattr(self, name) for name in names}

    def metrics(self, slowest_seconds: float, slowest_warmup: float, num_processes: int) -> dict[str, Any]:
        """The epoch's times and rates, given the times of the slowest process. A rate without measured steps is None.

        `train_seconds` is all training steps; `warmup_seconds` is the part of it that the rates leave out.
        """
        rate = self.samples / slowest_seconds if slowest_seconds > 0 and self.samples else None
        milliseconds = [1000 * seconds for seconds in self.step_seconds]
        return {
            "train_seconds": slowest_seconds + slowest_warmup,
            "warmup_seconds": slowest_warmup,
            "measured_seconds": slowest_seconds,
            "measured_samples": self.samples,
            "samples_per_second": rate,
            "samples_per_second_per_process": rate and rate / num_processes,
            "step_ms_p50": percentile(milliseconds, 50),
            "step_ms_p95": percentile(milliseconds, 95),
            "data_wait_fraction": self.waited / self.seconds if self.seconds > 0 else None,
            "windows": in_windows(self.step_samples, self.step_seconds),
        }

    def of_this_rank(self) -> dict[str, float]:
        """Mean times of a measured step on this rank, in milliseconds; 0 without measured steps."""
        per_step = 1000 / max(self.steps, 1)
        return {"step_ms": self.seconds * per_step, "own_ms": (self.seconds - self.exchanged) * per_step,
                "data_wait_ms": self.waited * per_step}


@dataclass
class Window:
    """An open window of a `Stopwatch`."""

    marks: Marks
    samples: list[int] = field(default_factory=list)  # of each step, over all processes
    laps: list[Any] = field(default_factory=list)  # marks, the first at the start
    marked: list[int] = field(default_factory=lambda: [0])  # steps done at each of them
    waited: float = 0.0

    def __post_init__(self) -> None:
        self.every = self.marks.every
        self.laps.append(self.marks.mark())

    def lap(self, samples: Sequence[int], waited: float) -> None:
        """Optimizer steps ended, each over its samples of all processes; `waited` seconds of them for data."""
        self.samples += samples
        self.waited += waited
        if len(self.samples) - self.marked[-1] >= self.every:
            self.mark()

    def mark(self) -> None:
        """Mark the steps since the last mark, if there are any."""
        if len(self.samples) > self.marked[-1]:
            self.laps.append(self.marks.mark())
            self.marked.append(len(self.samples))
