"""When a run stops taking steps for a moment: for a signal, a checkpoint, an evaluation, or a line on the screen.

All ranks must stop at the same step, so they agree about every half second. The number of steps in half a second
follows from their speed. It knows nothing of models or files.
"""

from __future__ import annotations

import functools
import math
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence

from mnist_dist.config import Every
from mnist_dist.processes.stop_signals import StopSignals
from mnist_dist.processes.team import Team

POLL_SECONDS = 0.5  # between two agreements of the ranks


class PauseSchedule:
    """Signals, the checkpoint clock and the multiples of steps, for one run of `num_batches` steps per epoch."""

    def __init__(self, every: Every, num_batches: int, team: Team, clock: Callable[[], float] = time.monotonic,
                 evaluates_after: Callable[[int], Sequence[int]] = lambda epoch: ()) -> None:
        self.every = every  # how often a checkpoint is due; a number of 0 is never
        self.num_batches, self.team, self.clock = num_batches, team, clock
        self.evaluates_after = functools.lru_cache(2)(evaluates_after)  # steps of an epoch, in their order
        self.signals = StopSignals()
        self.stop_signal = 0  # as agreed by all ranks
        self._clock_is_due = False  # as agreed by all ranks
        self._last_checkpoint = self._polled_at = clock()
        self._poll_steps = 1

    @property
    def is_on(self) -> bool:
        """Whether checkpoints are wanted at all."""
        return self.every.number > 0

    def next_stop(self, epoch: int, step: int) -> int:
        """The step of the epoch before which the ranks stop next, after `step`; the epoch may end earlier."""
        stop = step + self._poll_steps
        if self.every.unit == "steps" and self.is_on:
            stop = min(stop, step + self.every.number - (epoch * self.num_batches + step) % self.every.number)
        evaluations = self.evaluates_after(epoch)
        return min([stop, *evaluations[bisect_right(evaluations, step) :][:1]])

    def poll(self, steps_done: int = 0) -> None:
        """Agree on signals and the checkpoint clock, `steps_done` steps after the last call. Collective."""
        now = self.clock()
        per_step = (now - self._polled_at) / steps_done if steps_done else 0.0
        self._polled_at = now
        due = self.is_on and self.every.unit == "seconds" and now - self._last_checkpoint >= self.every.number
        signal, agreed, per_step = self.team.max(self.signals.number, due, per_step)
        self.stop_signal, self._clock_is_due = int(signal), bool(agreed)
        if per_step:
            # at most twice the last number: the first steps on a GPU are only queued, which takes no time
            self._poll_steps = max(1, min(2 * self._poll_steps, math.floor(POLL_SECONDS / per_step)))

    def is_evaluation_due(self, epoch: int, step: int) -> bool:
        """Whether to evaluate when `step` steps of the epoch are done."""
        return step in self.evaluates_after(epoch)

    def is_pause_due(self, epoch: int, step: int) -> bool:
        """Whether to pause when `step` steps of the epoch are done."""
        return self.is_evaluation_due(epoch, step) or self.is_checkpoint_due(epoch, step)

    def is_checkpoint_due(self, epoch: int, step: int) -> bool:
        """Whether a checkpoint is due, or a signal has come, when `step` steps of the epoch are done."""
        done = epoch * self.num_batches + step
        multiple = self.is_on and self.every.unit == "steps" and done % self.every.number == 0
        return multiple or self._clock_is_due or self.stop_signal > 0

    def is_checkpoint_due_after(self, epoch: int) -> bool:
        """Whether a checkpoint is due at the end of this epoch."""
        if self.is_on and self.every.unit == "epochs":
            return (epoch + 1) % self.every.number == 0 or self.stop_signal > 0
        return self.is_checkpoint_due(epoch, self.num_batches)

    def saved(self) -> None:
        """A checkpoint has been written."""
        self._last_checkpoint = self.clock()
