"""Hand-written DistributedDataParallel: images in each rank's memory, the same permutation everywhere, fused Adam.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.peers.ddp DATA_DIR BATCH_SIZE NUM_SAMPLES

BATCH_SIZE is the global one, of which each rank takes an equal share. Rank 0 prints the line.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from benchmarks.peers.common import floats_in_memory, network, pick_device, timed


def main(data_dir: str, batch_size: int, num_samples: int) -> dict[str, Any]:
    """Train two epochs; the peer's line, timed from barrier to barrier: by the slowest rank."""
    rank, size = dist.get_rank(), dist.get_world_size()
    if batch_size % size or num_samples % size:
        raise ValueError(f"{size} ranks cannot share batches of {batch_size} of {num_samples} images equally")
    device = pick_device()
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    images, labels = (tensor.to(device) for tensor in floats_in_memory(data_dir, num_samples))
    torch.manual_seed(0)
    model = DistributedDataParallel(network().to(device), gradient_as_bucket_view=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)

    def epoch() -> None:
        for rows in torch.randperm(num_samples).to(device).split(batch_size):
            share = rows[rank::size]
            loss = cross_entropy(model(images[share]), labels[share])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()

    return timed(epoch, num_samples, f"torch {torch.__version__}", device.type, synchronize)


if __name__ == "__main__":
    dist.init_process_group("gloo" if pick_device().type == "cpu" else "nccl")
    outcome = main(sys.argv[1], *map(int, sys.argv[2:]))
    if dist.get_rank() == 0:
        print(json.dumps(outcome), flush=True)
    dist.destroy_process_group()
