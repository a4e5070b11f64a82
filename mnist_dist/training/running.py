"""The loss of the latest steps on this rank, for a person who watches. Reading it never waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from mnist_dist.training.sampling import GlobalBatchSampler


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
        """Mean loss per sample over the steps since the last call, `step` steps of the epoch being done; on a GPU of
        the last steps whose sum has arrived. None if this rank has had no sample yet.
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
