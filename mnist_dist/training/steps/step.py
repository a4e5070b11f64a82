"""What every kind of optimizer step works on, and what it offers to the trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor

from mnist_dist.data import Images
from mnist_dist.processes.core_contention import CoreContention
from mnist_dist.processes.team import Team
from mnist_dist.training.model import MLP
from mnist_dist.training.sampling import GlobalBatchSampler


@dataclass(frozen=True)
class StepParts:
    """What a step works on. A step writes this rank's sum of losses into `sums` [3, steps of an epoch], float64.

    With `measures_noise` it also writes, in some of the steps or all, what noise_scale.py needs: the sum over this
    rank's samples of |gradient / B|^2, for a global batch of B, and on the main rank |gradient|^2 of the global batch.
    """

    team: Team
    module: MLP
    optimizer: AcceleratedOptimizer
    images: Images
    batches: GlobalBatchSampler
    sums: Tensor
    dtype: torch.dtype
    contention: CoreContention
    measures_noise: bool = False
    onednn_from: int | None = None  # least multiplications of a product that oneDNN computes; None: MKL computes all


# samples of each step over all ranks, and seconds of these steps that this rank waited for data
Lap = Callable[[Sequence[int], float], None]


def no_lap(samples: Sequence[int], waited: float) -> None:
    """For steps that are not timed."""


class Step(Protocol):
    """A kind of step. The trainer calls `begin`, then `take` for consecutive ranges of steps, with `flush` after each,
    and `pause` now and then.
    """

    kind: str
    compile_seconds: float

    def begin(self, epoch: int, steps: range) -> None:
        """Go to these steps of the epoch."""

    def take(self, steps: range, lap: Lap = no_lap) -> None:
        """Optimizer steps, without returning in between; `lap` is called after each, or after several.
        Collective."""

    def flush(self, step: int) -> None:
        """Called before step `step`: sums that are kept elsewhere go to `sums`."""

    def pause(self) -> None:
        """Called before the weights are read (checkpoint, evaluation). Collective."""
