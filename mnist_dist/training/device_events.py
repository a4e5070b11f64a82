"""Marks between steps, from which their times are read.

On the CPU a mark is the host's time after each step. For a GPU the host only queues the steps, so there a mark is an
event in the queue, every few steps. Recording an event first waits for the previous event, so the host runs at most two
events ahead.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

STEPS_PER_EVENT = 16  # at batch 1 some 0.3 ms, in which the host looks at an event and queues the next steps


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


class DeviceMarks:
    """Events in the queue of the GPU; `wait_for` waits until the GPU has come to one."""

    every = STEPS_PER_EVENT

    def __init__(self, wait_for: Callable[[torch.cuda.Event], None]) -> None:
        self.wait_for = wait_for
        self._last: torch.cuda.Event | None = None

    def mark(self) -> torch.cuda.Event:
        """An event; returns when the GPU has come to the one before."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        if self._last is not None:
            self.wait_for(self._last)
        self._last = event
        return event

    def seconds(self, before: torch.cuda.Event, after: torch.cuda.Event) -> float:
        """As the GPU has measured it."""
        return before.elapsed_time(after) / 1000
