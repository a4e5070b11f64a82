"""The loss within an epoch: points for `steps.jsonl`, over all ranks, and this rank's latest loss for the screen.

The sums of losses exist for each step. Points are made when these are summed over the ranks anyway: at a checkpoint, an
evaluation, the end of an epoch. The latest loss is read without waiting for the device.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mnist_dist.config import Every, TrainConfig
from mnist_dist.console import Console
from mnist_dist.record.metrics import samples_at
from mnist_dist.training.sampling import GlobalBatchSampler

SHOW_SECONDS = 0.25  # the least time between two updates
POINTS = 50  # per epoch, unless --log-every says otherwise


def ends_of_points(every: Every | None, batches: GlobalBatchSampler, epoch: int) -> list[int]:
    """The steps of the epoch with which a point ends, the last of them the epoch's last; none if `every` is never."""
    every = every or Every(-(-batches.num_batches // POINTS), "steps")
    if not every.number:
        return []
    if every.unit == "samples":
        return [*batches.steps_of_samples(every.number, epoch), batches.num_batches]
    return [*range(every.number, batches.num_batches, every.number), batches.num_batches]


def points(ends: Sequence[int], since: int, losses: Sequence[float], step_seconds: Sequence[float], epoch: int,
           batches: GlobalBatchSampler) -> list[dict[str, Any]]:
    """The points that end after step `since` of the epoch, each as a line of `steps.jsonl` has it.

    `losses` are the sums of losses of the epoch's steps so far, in nats over all ranks. `step_seconds` are the times of
    the last of these steps on this rank. A point has no rate if a time is missing: in the warm-up, or before a resume.
    """
    first_timed, before = len(losses) - len(step_seconds), epoch * batches.num_batches
    made = []
    for begin, end in pairwise([0, *ends]):
        if since < end <= len(losses):
            samples = sum(map(batches.count, range(begin, end)))
            seconds = sum(step_seconds[begin - first_timed : end - first_timed]) if begin >= first_timed else 0.0
            done = samples_at(before + end, batches.num_samples, batches.global_batch_size)
            made.append({"step": before + end, "samples": done, "epoch": done / batches.num_samples,
                         "train_loss": sum(losses[begin:end]) / samples,
                         "samples_per_second": samples / seconds if seconds else None})
    return made


class LossLog:
    """The points of a run's loss: which are new, and which are not in the run's folder yet."""

    def __init__(self, every: Every | None, batches: GlobalBatchSampler) -> None:
        self.every, self.batches = every, batches
        self.unwritten: list[dict[str, Any]] = []
        self._step = 0  # of the run: there is no further point up to here

    def start(self, step: int) -> None:
        """The points up to this step of the run are recorded."""
        self._step = step

    def add(self, epoch: int, losses: Sequence[float], step_seconds: Sequence[float]) -> list[dict[str, Any]]:
        """The new points, which are kept as `unwritten`; the arguments are those of `points`."""
        since = self._step - epoch * self.batches.num_batches
        ends = ends_of_points(self.every, self.batches, epoch)
        new = points(ends, since, losses, step_seconds, epoch, self.batches)
        self._step = new[-1]["step"] if new else self._step
        self.unwritten += new
        return new


class RunningLoss:
    """Reads `sums` [3, steps of an epoch], in which row 0 has each step's sum of losses over this rank's samples."""

    def __init__(self, sums: Tensor, batches: GlobalBatchSampler) -> None:
        self.sums, self.batches = sums, batches
        self._step = 0  # of the epoch: those before it have been read, or are sums over all ranks
        self._copy: tuple[Tensor, torch.cuda.Event, int] | None = None  # on its way from the GPU, with its samples
        self._latest: float | None = None

    def start(self, step: int) -> None:
        """The next steps of the epoch are those from `step` on."""
        self._step = step

    def after(self, step: int) -> float | None:
        """Mean loss per sample over the steps since the last call, when `step` steps of the epoch are done. On a GPU it
        is of the last steps whose sum has arrived. None if this rank has had no sample yet.
        """
        samples, total = self.batches.own_samples(range(self._step, step)), self.sums[0, self._step : step].sum()
        self._step = step
        if not samples:
            return self._latest
        if not total.is_cuda:
            self._latest = total.item() / samples
        elif self._copy is None or self._copy[1].query():
            if self._copy is not None:
                self._latest = self._copy[0].item() / self._copy[2]
            pinned = torch.empty((), dtype=total.dtype, pin_memory=True)
            pinned.copy_(total, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._copy = pinned, event, samples
        return self._latest


class Display:
    """Shows a person how far a run has come, a few times a second: its steps, its speed and this rank's loss."""

    def __init__(self, console: Console, config: TrainConfig, batches: GlobalBatchSampler, sums: Tensor, size: int
                 ) -> None:
        self.console, self.epochs, self.batches, self.size = console, config.epochs, batches, size
        whole = config.epochs * batches.num_batches
        self.planned_steps = min(whole, config.max_steps or whole)  # a target may end the run earlier
        self.loss = RunningLoss(sums, batches)
        self._last = time.monotonic(), 0

    def start(self, step: int) -> None:
        """The next steps of the epoch are those from `step` on; the sums before are over all ranks."""
        self.loss.start(step)
        self._last = time.monotonic(), step

    def show(self, epoch: int, done: int) -> None:
        """Show that `done` steps of the epoch are done, at most every SHOW_SECONDS."""
        now, (then, before) = time.monotonic(), self._last
        if now - then < SHOW_SECONDS:
            return
        self._last = now, done
        batch = self.batches.global_batch_size
        samples = min(done * batch, self.batches.num_samples) - before * batch
        self.console.progress(epoch, self.epochs, epoch * self.batches.num_batches + done, self.planned_steps,
                              loss=self.loss.after(done), samples_per_second=samples / (now - then),
                              is_share=self.size > 1)
