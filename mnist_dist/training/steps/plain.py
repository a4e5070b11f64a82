"""An optimizer step in plain PyTorch and Accelerate: the reference that every faster kind of step must agree with."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.functional import nll_loss

from mnist_dist.data import scale
from mnist_dist.training.noise_scale import EVERY, EVERY_SAMPLES, SampleNorms, gradient_norm
from mnist_dist.training.sampling import make_loader
from mnist_dist.training.steps.step import Lap, StepParts, no_lap

NO_SAMPLE = -100  # the label of a padding row: `nll_loss` and its gradient ignore it


def loss_sum(model: Callable[[Tensor], Tensor], images_B1HW: Tensor, labels_B: Tensor, dtype: torch.dtype) -> Tensor:
    """The summed NLL, in nats, of uint8 images [B, 1, 28, 28] under `model`."""
    return nll_loss(model(scale(images_B1HW, dtype)), labels_B, reduction="sum", ignore_index=NO_SAMPLE)


class PlainStep:
    """Forward, loss, backward and Adam as usually written, with a batch from the DataLoader.

    `local_steps` above 1 is Local SGD (Stich 2019, arXiv 1805.09767): each rank takes this number of steps alone, then
    the weights are averaged.
    """

    kind = "plain"
    exchanges_gradients = True  # through DistributedDataParallel
    compile_seconds = 0.0

    def __init__(self, parts: StepParts, local_steps: int = 1) -> None:
        self.team, self.batches, self.sums, self.dtype = parts.team, parts.batches, parts.sums, parts.dtype
        self.accelerator = parts.team.accelerator
        # Accelerate's wrapper is needed for fp16, whose losses it scales. It looks for a package on the disk in each
        # step, which takes longer than Adam
        self.optimizer = parts.optimizer if self.accelerator.scaler else parts.optimizer.optimizer
        self.model = self.accelerator.prepare_model(parts.module, evaluation_mode=not self.exchanges_gradients)
        self.parameters = list(parts.module.parameters())
        self.gradients_ready = 0.0  # when this rank's gradients were complete, before they are exchanged
        if self.team.size > 1 and self.exchanges_gradients and not self.team.is_cuda:
            for parameter in self.parameters:
                parameter.register_post_accumulate_grad_hook(self._note_gradient)
        self.norms = SampleNorms(parts.module) if parts.measures_noise else None
        self.loader = make_loader(parts.images, parts.batches)
        self.loaded: Iterator[tuple[Tensor, Tensor]] = iter(())
        self.local_steps = local_steps if self.team.size > 1 else 1
        self.apart = 0  # steps since the ranks' weights were averaged

    def begin(self, epoch: int, steps: range) -> None:
        """Go to these steps of the epoch."""
        self.batches.go_to(epoch, steps)
        self.loader.set_epoch(epoch)  # type: ignore[attr-defined]  # Accelerate's loader sets the sampler's epoch again when it starts
        self.loaded = iter(self.loader)

    def take(self, steps: range, lap: Lap = no_lap) -> None:
        """Optimizer steps, each with a batch from the loader. Collective."""
        for step in steps:
            waited = self.take_one(step)
            lap((self.batches.count(step),), waited)

    def take_one(self, step: int) -> float:
        """One optimizer step; returns the seconds waited for data. Collective.

        DistributedDataParallel averages over P ranks and Accelerate over the passes; the ranks' shares of the batch
        differ, so the sum of the local losses is scaled to make both a mean over the batch's samples.
        """
        accelerator, passes, waited = self.accelerator, self.batches.passes, 0.0
        factor = self.team.size * passes / self.batches.count(step)
        norms = self.norms if step % EVERY_SAMPLES == 0 else None
        with accelerator.no_sync(self.model) if self.local_steps > 1 else nullcontext():
            for _ in range(passes):
                asked = time.perf_counter()
                images, labels = next(self.loaded)
                waited += time.perf_counter() - asked
                with accelerator.accumulate(self.model):
                    with norms.measuring() if norms else nullcontext():
                        loss = loss_sum(self.model, images, labels, self.dtype)
                        accelerator.backward(loss * factor)
                    if self.gradients_ready:
                        self.team.exchanged_since(self.gradients_ready)
                    if norms and norms.total is not None:
                        # of this rank's samples; DistributedDataParallel divides their gradients later
                        self.sums[1, step] += norms.total / self.team.size**2
                    if self.norms and step % EVERY == 0 and self.team.is_main and accelerator.sync_gradients:
                        self.sums[2, step] = gradient_norm([gradient for parameter in self.parameters
                                                            if (gradient := parameter.grad) is not None])
                    if accelerator.sync_gradients:
                        self.optimizer.step()
                        self.optimizer.zero_grad()
                self.sums[0, step] += loss.detach()
        self.apart += 1
        if self.apart == self.local_steps:
            self._average()
        return waited

    def _note_gradient(self, parameter: Tensor) -> None:
        """Called for each gradient before DistributedDataParallel sends it; the last call counts."""
        self.gradients_ready = time.perf_counter()

    def _average(self) -> None:
        if self.local_steps > 1 and self.apart:
            self.team.average(parameter.data for parameter in self.parameters)
        self.apart = 0

    def flush(self, step: int) -> None:
        """Nothing to do: `take` writes to `sums`."""

    def pause(self) -> None:
        """Under Local SGD, average the weights. Collective."""
        self._average()
