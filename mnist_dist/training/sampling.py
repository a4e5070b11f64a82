"""Which samples a rank sees in which step: global batches, each cut into one share per rank.

The order of an epoch is a function of (seed, epoch) alone. `DistributedSampler` gives rank r of P the positions r, r+P,
r+2P … of it. So the ranks' shares of positions [kB, (k+1)B) together are the k-th batch of a single process, for any P.
It knows nothing of the model or of collectives.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from mnist_dist.data import Images

NO_INDEX = -1  # pads the rows of `GlobalBatchSampler.rows`


class GlobalBatchSampler:
    """Yields this rank's indices of each global batch, `passes` tensors per batch (gradient accumulation), int64.

    They are parts of the epoch's order, which is copied to `device` once: a copy per step would wait for a GPU.
    The padding that `DistributedSampler` adds to even out the ranks is dropped; a rank's tensor may then be shorter
    than the others', or empty in a small last batch, but every rank yields the same number of tensors. `go_to` chooses
    the epoch and its steps.
    """

    def __init__(self, sampler: DistributedSampler, global_batch_size: int, passes: int = 1,
                 device: torch.device | str = "cpu") -> None:
        self.sampler = sampler
        self.device = device
        self.global_batch_size = global_batch_size
        self.passes = passes
        self.num_samples = len(sampler.dataset)  # type: ignore[arg-type]
        self.num_batches = -(-self.num_samples // global_batch_size)
        self.first_step, self.end_step = 0, self.num_batches

    def go_to(self, epoch: int, steps: range) -> None:
        """Yield these steps of the epoch from now on; the order is the epoch's."""
        self.sampler.set_epoch(epoch)
        self.first_step, self.end_step = steps.start, steps.stop

    def count(self, step: int) -> int:
        """Samples in global batch `step`, over all ranks, without padding."""
        return min(self.global_batch_size, self.num_samples - step * self.global_batch_size)

    def own_samples(self, steps: range) -> int:
        """Samples of these consecutive steps on this rank."""
        rank, size = self.sampler.rank, self.sampler.num_replicas
        start, stop = (min(step * self.global_batch_size, self.num_samples) for step in (steps.start, steps.stop))
        return len(range(start + (rank - start) % size, stop, size))

    def steps_of_samples(self, every: int, epoch: int) -> list[int]:
        """The steps of the epoch by which a further `every` samples of the run are done, but for its last one."""
        before, batch = epoch * self.num_samples, self.global_batch_size
        marks = range(before // every + 1, (before + self.num_samples) // every + 1)
        return sorted({step for mark in marks if (step := -(-(mark * every - before) // batch)) < self.num_batches})

    def order(self, epoch: int | None = None) -> np.ndarray:
        """This rank's share of an epoch's order (default: where `go_to` went), int64: position p of the epoch is
        element p // size.

        It is what `DistributedSampler` yields, as an array: the sampler makes lists, which takes longer.
        """
        sampler = self.sampler
        places = np.arange(self.num_samples)
        if sampler.shuffle:
            generator = torch.Generator().manual_seed(sampler.seed + (sampler.epoch if epoch is None else epoch))
            places = torch.randperm(self.num_samples, generator=generator).numpy()
        padded = np.resize(places, sampler.total_size)  # the end repeats the begin
        return np.ascontiguousarray(padded[sampler.rank :: sampler.num_replicas])

    def _cuts(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each pass of each step [steps, passes], where it begins and ends in this rank's share of the order."""
        rank, size = self.sampler.rank, self.sampler.num_replicas
        start = np.arange(self.num_batches) * self.global_batch_size
        stop = np.minimum(start + self.global_batch_size, self.num_samples)
        first = start + (rank - start) % size
        length = np.maximum((stop - first + size - 1) // size, 0)[:, None]
        cuts = (first // size)[:, None] + length * np.arange(self.passes + 1) // self.passes
        return cuts[:, :-1], cuts[:, 1:]

    def __iter__(self) -> Iterator[Tensor]:
        begin, end = (cuts[self.first_step : self.end_step].ravel() for cuts in self._cuts())
        if not len(begin):
            return iter(())
        order = torch.from_numpy(self.order()[begin[0] : end[-1]]).to(self.device)
        return iter(order.split((end - begin).tolist()))  # a pass begins where the one before ends

    def rows(self, parts: int = 1, epoch: int | None = None) -> Tensor:
        """All of an epoch's as rows of int64 [steps * passes * parts, longest], padded with `NO_INDEX`, on the host.
        Each pass is cut into `parts`; those at its end may be empty.

        By numpy, which has no threads: torch would use 16 threads for little work, which takes longer than an epoch on
        a fast GPU.
        """
        order = self.order(epoch)
        begin, end = (cuts.reshape(-1, 1) for cuts in self._cuts())
        longest = -(-(end - begin).max() // parts)
        places = begin + np.arange(parts * longest)
        rows = np.where(places < end, order[np.minimum(places, len(order) - 1)], NO_INDEX)
        return torch.from_numpy(rows.reshape(parts * len(begin), longest))

    def __len__(self) -> int:
        return (self.end_step - self.first_step) * self.passes


def share_out(images: Images, global_batch_size: int, *, rank: int, size: int, shuffle: bool = False, seed: int = 0,
              passes: int = 1) -> GlobalBatchSampler:
    """The batches of this rank's share of `images`."""
    sampler: DistributedSampler = DistributedSampler(images, num_replicas=size, rank=rank, shuffle=shuffle, seed=seed)
    return GlobalBatchSampler(sampler, global_batch_size, passes, images.images.device)


def make_loader(images: Images, batches: GlobalBatchSampler) -> DataLoader:
    """A DataLoader over `batches` of `images`, prepared by Accelerate but not sharded a second time.

    `accelerator.prepare` would shard once more: on 8 processes 1,600 of 10,000 images are then seen. The images are
    on their device already, so the loader moves nothing.
    """
    loader = DataLoader(images, batch_sampler=batches, collate_fn=_as_it_is)  # type: ignore[arg-type]
    return prepare_data_loader(loader, num_processes=1, process_index=0)


def _as_it_is(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch  # `Images.__getitems__` gives whole batches: there is nothing to collate
