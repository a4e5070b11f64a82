"""Marks between steps, from which their times are read.

On the CPU a mark is the host's time after each step. For a GPU the host only queues the steps, so there a mark is an
event in the queue, every few steps. Recording an event first waits for the previous event, so the host runs at most two
events ahead.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

STEPS_PER_EVENT = 16  # 0.3 ms at batch 1: time for the host to check an event and queue the next steps


class DeviceMarks:
    """Events in the queue of the GPU; `wait_for` waits until the GPU reaches an event."""

    every = STEPS_PER_EVENT

    def __init__(self, wait_for: Callable[[torch.cuda.Event], None]) -> None:
        self.wait_for = wait_for
        self._last: torch.cuda.Event | None = None

    def mark(self) -> torch.cuda.Event:
        """A new event; returns when the GPU reaches the previous event."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        if self._last is not None:
            self.wait_for(self._last)
        self._last = event
        return event

    def seconds(self, before: torch.cuda.Event, after: torch.cuda.Event) -> float:
        """As the GPU has measured it."""
        return before.elapsed_time(after) / 1000
