"""Every sample once, in the order of a single process, whatever the number of processes."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.data import DistributedSampler

from mnist_dist.data import Images
from mnist_dist.training.evaluation import add_in_order
from mnist_dist.training.sampling import NO_INDEX, GlobalBatchSampler, make_loader, share_out

SIZES = [(1, 1), (10, 3), (59, 7), (60, 7), (61, 7), (1009, 200), (97, 97), (97, 500), (40, 8)]


def batch_sampler(num_samples, batch, rank, size, passes=1, epoch=0, shuffle=True):
    sampler = DistributedSampler(range(num_samples), num_replicas=size, rank=rank, shuffle=shuffle, seed=5)
    sampler.set_epoch(epoch)
    return GlobalBatchSampler(sampler, batch, passes)


def lists_of(sampler):
    return [indices.tolist() for indices in sampler]


def batches_of(num_samples, batch, rank, size, passes=1, **options):
    """This rank's batches, the passes of each joined."""
    lists = lists_of(batch_sampler(num_samples, batch, rank, size, passes, **options))
    return [sum(lists[i : i + passes], []) for i in range(0, len(lists), passes)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize(("num_samples", "batch"), SIZES)
def test_ranks_together_have_the_batches_of_one_process(num_samples, batch, size):
    for epoch in (0, 1):
        alone = batches_of(num_samples, batch, 0, 1, epoch=epoch)
        cuts = [batches_of(num_samples, batch, rank, size, epoch=epoch) for rank in range(size)]
        assert len({len(cut) for cut in cuts}) == 1, "every rank takes as many steps"
        assert sorted(sum(alone, [])) == list(range(num_samples))
        for step, whole in enumerate(alone):
            assert sorted(sum((cut[step] for cut in cuts), [])) == sorted(whole)
            assert len(whole) == batch_sampler(num_samples, batch, 0, 1).count(step)


@pytest.mark.parametrize("passes", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [1, 3])
def test_passes_cut_a_batch_and_lose_nothing(passes, size):
    for rank in range(size):
        lists = lists_of(batch_sampler(61, 7, rank, size, passes))
        assert len(lists) == passes * 9 == len(batch_sampler(61, 7, rank, size, passes))
        assert batches_of(61, 7, rank, size, passes) == batches_of(61, 7, rank, size)


@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize(("num_samples", "batch"), SIZES)
def test_rows_are_the_lists_filled_up(num_samples, batch, size, passes, parts):
    for rank in range(size):
        sampler = batch_sampler(num_samples, batch, rank, size, passes)
        rows = sampler.rows(parts)
        assert len(rows) == parts * len(sampler)
        together = rows.view(len(sampler), -1).tolist()
        assert [[index for index in row if index != NO_INDEX] for row in together] == lists_of(sampler)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("num_samples, size", [(1, 1), (1, 5), (2, 5), (10, 3), (97, 2), (97, 1)])
def test_the_order_is_that_of_the_sampler(num_samples, size, shuffle):
    for rank in range(size):
        for epoch in (0, 1, 7):
            batches = batch_sampler(num_samples, 4, rank, size, epoch=epoch, shuffle=shuffle)
            order = list(batches.sampler)
            assert batches.order().tolist() == order
            batches.sampler.set_epoch(epoch + 1)
            assert batches.order(epoch).tolist() == order, "also of another epoch than the current one"


def test_order_depends_on_seed_and_epoch_and_nothing_else():
    first, again, later = (batches_of(100, 10, 0, 1, epoch=epoch) for epoch in (0, 0, 1))
    assert first == again != later
    assert batches_of(20, 7, 0, 1, shuffle=False) == [list(range(7)), list(range(7, 14)), list(range(14, 20))]


def test_starting_in_the_middle_gives_the_rest_of_the_epoch():
    whole = batches_of(1009, 100, 1, 3)
    sampler = batch_sampler(1009, 100, 1, 3)
    sampler.go_to(0, range(4, 9))
    assert lists_of(sampler) == whole[4:9] and len(sampler) == 5


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_prepared_loader_shows_each_sample_once(size):
    """Accelerate would shard a loader that is sharded already a second time, and lose most of it without a word."""
    num_samples = 211
    images = Images(torch.zeros(num_samples, 1, 28, 28, dtype=torch.uint8), torch.arange(num_samples))
    for epoch in (0, 3):
        seen = []
        for rank in range(size):
            loader = make_loader(images, share_out(images, 20, rank=rank, size=size, shuffle=True, seed=1))
            loader.set_epoch(epoch)
            batches = [labels for _, labels in loader]
            assert len(batches) == 11
            seen += torch.cat(batches).tolist()
            assert torch.cat(batches).tolist() == sum(
                batch_sampler_with_seed(num_samples, 20, rank, size, epoch), [])
        assert sorted(seen) == list(range(num_samples))


def batch_sampler_with_seed(num_samples, batch, rank, size, epoch):
    sampler = DistributedSampler(range(num_samples), num_replicas=size, rank=rank, shuffle=True, seed=1)
    sampler.set_epoch(epoch)
    return lists_of(GlobalBatchSampler(sampler, batch))


def test_rows_of_all_ranks_are_added_in_the_order_of_the_ranks():
    """In float32 the sum of these eight numbers depends on the order."""
    values = [1e8, 3.0, -1e8, 5.0, 1e-3, 7e7, 2.0, -7e7]
    expected = torch.zeros(1)
    for value in values:
        expected += value
    assert expected.item() != pytest.approx(math.fsum(values))
    assert torch.equal(add_in_order(torch.tensor(values).unsqueeze(1)), expected)
