"""Hand-written PyTorch: float images in the device's memory, a permutation per epoch, the fused Adam."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import cross_entropy

from benchmarks.peers.common import floats_in_memory, network, pick_device, start, timed


def main(data_dir: str, batch_size: int, num_samples: int) -> dict[str, Any]:
    """Train two epochs; the peer's line."""
    device = pick_device()
    images, labels = (tensor.to(device) for tensor in floats_in_memory(data_dir, num_samples))
    model = network().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)

    def epoch() -> None:
        for rows in torch.randperm(num_samples, device=device).split(batch_size):
            loss = cross_entropy(model(images[rows]), labels[rows])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return timed(epoch, num_samples, f"torch {torch.__version__}", device.type)


if __name__ == "__main__":
    start(main)
