"""`--reproducible`: a step whose bits do not depend on the number of processes.

Each global batch is cut into S logical shards: sample p of the epoch's order belongs to shard p mod S. A shard's
gradient is computed with the same kernels and shapes wherever it runs, the gradients of all shards are gathered, and
every process adds them in the order of the shards (the idea of EasyScale, SC 2023), in place of
DistributedDataParallel's reduction.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mnist_dist.sampling import GlobalBatchSampler
from mnist_dist.steps import PlainStep, loss_sum


def own_shards(batches: GlobalBatchSampler, step: int, num_shards: int) -> Iterator[slice]:
    """Slices of this rank's batch, one for each logical shard that it computes: shards r, r+P, r+2P … of S.

    The rank's samples are the positions p = r mod P, and P divides S, so a shard is every (S / P)-th of them.
    """
    rank, size = batches.sampler.rank, batches.sampler.num_replicas
    start = batches.own_positions(step).start
    for shard in range(rank, num_shards, size):
        yield slice((shard - start) % num_shards // size, None, num_shards // size)


def gather_in_order(own_KX: Tensor, gather: Callable[[Tensor], Tensor], size: int) -> Tensor:
    """Rows of all ranks, [K, X] each, as [S, X] in the order of the shards: rank r's row k is shard r + k P."""
    rows = gather(own_KX).view(size, *own_KX.shape)
    return rows.transpose(0, 1).reshape(-1, own_KX.shape[1])


def add_in_order(rows_SX: Tensor) -> Tensor:
    """The sum of the rows, added one after the other."""
    total_X = rows_SX[0].clone()
    for row_X in rows_SX[1:]:
        total_X += row_X
    return total_X


class ShardedStep(PlainStep):
    """A step with the same bits on any number of processes, which divides `num_shards`."""

    kind = "sharded"

    def __init__(self, *arguments: Any, num_shards: int, is_main: bool) -> None:
        super().__init__(*arguments)
        self.parameters = list(self.model.parameters())
        self.num_shards, self.is_main = num_shards, is_main

    def take(self, step: int) -> float:
        """One optimizer step; returns the seconds waited for data. Collective."""
        asked = time.perf_counter()
        images, labels = next(self.loaded)
        waited = time.perf_counter() - asked
        rows = []
        for own in own_shards(self.batches, step, self.num_shards):
            loss = loss_sum(self.model, images[own], labels[own], self.dtype)
            gradients = torch.autograd.grad(loss, self.parameters)
            rows.append(torch.cat([loss.detach().view(1), *(gradient.flatten() for gradient in gradients)]))
        gathered_SX = gather_in_order(torch.stack(rows), self.accelerator.gather, self.accelerator.num_processes)
        total_X = add_in_order(gathered_SX)
        sizes = [parameter.numel() for parameter in self.parameters]
        parts = total_X[1:].div_(self.batches.count(step)).split(sizes)
        for parameter, gradient in zip(self.parameters, parts, strict=True):
            parameter.grad = gradient.view_as(parameter)
        self.optimizer.step()
        if self.is_main:  # the same sum is on every rank
            self.losses[step] += total_X[0]
        return waited
