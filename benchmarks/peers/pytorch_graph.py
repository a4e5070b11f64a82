"""PyTorch on a GPU: the whole step recorded as a CUDA graph, after the example of PyTorch's documentation.

The graph reads its batch from a tensor that stays in place, into which each batch's indices are copied. A smaller last
batch is an ordinary step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.peers.common import bytes_in_memory, network, pick_device, start, timed


def main(data_dir: str, batch_size: int, num_samples: int) -> dict[str, Any]:
    """Train two epochs; the peer's line."""
    device = pick_device()
    images, labels = (tensor.to(device) for tensor in bytes_in_memory(data_dir, num_samples))
    model = network().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True, capturable=True)
    batch = torch.zeros(min(batch_size, num_samples), dtype=torch.int64, device=device)

    def step(rows: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = cross_entropy(model(images[rows].float() / 127.5 - 1.0), labels[rows])
        loss.backward()
        optimizer.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # loads code, which must not happen while recording
            step(batch)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(batch)

    def epoch() -> None:
        for rows in torch.randperm(num_samples, device=device).split(batch_size):
            if len(rows) == len(batch):
                batch.copy_(rows)
                graph.replay()
            else:
                step(rows)

    return timed(epoch, num_samples, f"torch {torch.__version__}", device.type)


if __name__ == "__main__":
    start(main)
