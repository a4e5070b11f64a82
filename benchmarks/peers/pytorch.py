"""Hand-written PyTorch: float images in the device's memory, a permutation per epoch, the fused Adam."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.peers.common import floats_in_memory, network, pick_device, start, timed


def step_on(images: Tensor, labels: Tensor) -> Callable[[Tensor], None]:
    """A step on these rows of float images [N, 784] and labels [N], with a model and an optimizer of its own."""
    model = network().to(images.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)

    def step(rows_B: Tensor) -> None:
        loss = cross_entropy(model(images[rows_B]), labels[rows_B])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main(data_dir: str, batch_size: int, num_samples: int) -> dict[str, Any]:
    """Train two epochs; the peer's line."""
    device = pick_device()
    step = step_on(*(tensor.to(device) for tensor in floats_in_memory(data_dir, num_samples)))

    def epoch() -> None:
        for rows in torch.randperm(num_samples, device=device).split(batch_size):
            step(rows)

    return timed(epoch, num_samples, f"torch {torch.__version__}", device.type)


if __name__ == "__main__":
    start(main)
