"""`--reproducible`: a step whose bits do not depend on the number of processes.

Each global batch is cut into S logical shards: sample p of the epoch's order belongs to shard p mod S. A shard's
gradient is computed with the same kernels and shapes wherever it runs, the gradients of all shards are gathered, and
every process adds them in the order of the shards (the idea of EasyScale, SC 2023), in place of
DistributedDataParallel's reduction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from mnist_dist.sampling import GlobalBatchSampler


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


class ShardedGradient:
    """Sets a module's gradients from its logical shards."""

    def __init__(self, module: nn.Module, num_shards: int, size: int, gather: Callable[[Tensor], Tensor]) -> None:
        self.parameters = list(module.parameters())
        self.num_shards, self.size, self.gather = num_shards, size, gather

    def set(self, shard_losses: Iterator[Tensor], count: int) -> Tensor:
        """From this rank's shards' loss sums, sets the gradient of the mean over `count` samples. Collective.

        Returns the global loss sum, the same on every rank.
        """
        rows = []
        for loss in shard_losses:
            gradients = torch.autograd.grad(loss, self.parameters)
            rows.append(torch.cat([loss.detach().view(1), *(gradient.flatten() for gradient in gradients)]))
        total_X = add_in_order(gather_in_order(torch.stack(rows), self.gather, self.size))
        sizes = [parameter.numel() for parameter in self.parameters]
        for parameter, gradient in zip(self.parameters, total_X[1:].div_(count).split(sizes), strict=True):
            parameter.grad = gradient.view_as(parameter)
        return total_X[0]
