"""An optimizer step in plain PyTorch and Accelerate: the reference that every faster kind of step must agree with.

Kinds of step share `loss_sum`, and an interface: `begin` an epoch, `take` a step, `finish` a stretch of steps, `pause`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from accelerate import Accelerator
from accelerate.local_sgd import LocalSGD
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.nn.functional import nll_loss

from mnist_dist.data import Images, scale
from mnist_dist.sampling import GlobalBatchSampler, make_loader

NO_SAMPLE = -100  # the label of what fills up a batch: `nll_loss` ignores it, and so does the gradient


def loss_sum(model: Callable[[Tensor], Tensor], images_B1HW: Tensor, labels_B: Tensor, dtype: torch.dtype) -> Tensor:
    """The summed NLL, in nats, of uint8 images [B, 1, 28, 28] under `model`."""
    return nll_loss(model(scale(images_B1HW, dtype)), labels_B, reduction="sum", ignore_index=NO_SAMPLE)


class PlainStep:
    """Forward, loss, backward and Adam as people write them, with a batch from the DataLoader.

    `losses` [steps of an epoch] takes this process's loss sum of each step. `local_steps` above 1 is Local SGD.
    """

    kind = "plain"
    compile_seconds = 0.0

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: AcceleratedOptimizer, images: Images,
                 batches: GlobalBatchSampler, losses: Tensor, dtype: torch.dtype, local_steps: int = 1) -> None:
        self.accelerator, self.model, self.optimizer = accelerator, model, optimizer
        self.batches, self.losses, self.dtype = batches, losses, dtype
        self.loader = make_loader(images, batches)
        self.loaded: Iterator[tuple[Tensor, Tensor]] = iter(())
        self.local = LocalSGD(accelerator, model, local_steps, enabled=local_steps > 1)
        self.local_is_open = False

    def begin(self, epoch: int, steps: range) -> None:
        """Go to these steps of the epoch."""
        self.batches.first_step, self.batches.end_step = steps.start, steps.stop
        self.loader.set_epoch(epoch)
        self.loaded = iter(self.loader)

    def take(self, step: int) -> float:
        """One optimizer step; returns the seconds waited for data.

        DistributedDataParallel averages over P ranks and Accelerate over the passes; the ranks' shares of the batch
        differ, so the sum of the local losses is scaled to make both a mean over the batch's samples.
        """
        if not self.local_is_open:
            self.local.__enter__()
            self.local_is_open = True
        accelerator, passes, waited = self.accelerator, self.batches.passes, 0.0
        factor = accelerator.num_processes * passes / self.batches.count(step)
        for _ in range(passes):
            asked = time.perf_counter()
            images, labels = next(self.loaded)
            waited += time.perf_counter() - asked
            with accelerator.accumulate(self.model):
                loss = loss_sum(self.model, images, labels, self.dtype)
                accelerator.backward(loss * factor)
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.losses[step] += loss.detach()
        self.local.step()
        return waited

    def finish(self, step: int) -> None:
        """End a stretch before step `step`, without a pause: nothing is due."""

    def pause(self) -> None:
        """Somebody is to look at the weights: under Local SGD the processes' are averaged. Collective."""
        if self.local_is_open:
            self.local.__exit__(None, None, None)
            self.local_is_open = False
