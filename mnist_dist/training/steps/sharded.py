"""`--reproducible`: a step whose bits do not depend on the number of processes.

Each global batch is cut into S logical shards: sample p of the epoch's order belongs to shard p mod S. A shard's
gradient is computed with the same kernels and shapes wherever it runs, the gradients of all shards are gathered, and
every process adds them in the order of the shards (the idea of EasyScale, SC 2023), in place of
DistributedDataParallel's reduction.
"""

from __future__ import annotations

import time

import torch

from mnist_dist.training.metrics import add_in_order
from mnist_dist.training.steps import StepParts
from mnist_dist.training.steps.plain import PlainStep, loss_sum


class ShardedStep(PlainStep):
    """A step with the same bits on any number of ranks that divides `num_shards`."""

    kind = "sharded"
    exchanges_gradients = False  # this step gathers them itself

    def __init__(self, parts: StepParts, num_shards: int) -> None:
        super().__init__(parts)
        self.num_shards = num_shards

    def take(self, step: int) -> float:
        """One optimizer step; returns the seconds waited for data. Collective."""
        asked = time.perf_counter()
        images, labels = next(self.loaded)
        waited = time.perf_counter() - asked
        rows = []
        for own in self.batches.shards(step, self.num_shards):
            loss = loss_sum(self.model, images[own], labels[own], self.dtype)
            gradients = torch.autograd.grad(loss, self.parameters)
            rows.append(torch.cat([loss.detach().view(1), *(gradient.flatten() for gradient in gradients)]))
        total_X = add_in_order(self.team.gather(torch.stack(rows)))
        sizes = [parameter.numel() for parameter in self.parameters]
        parts = total_X[1:].div_(self.batches.count(step)).split(sizes)
        for parameter, gradient in zip(self.parameters, parts, strict=True):
            parameter.grad = gradient.view_as(parameter)
        self.optimizer.step()
        if self.team.is_main:  # the same sum is on every rank
            self.sums[0, step] += total_X[0]
        return waited
