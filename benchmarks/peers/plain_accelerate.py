"""The loop that people write with Accelerate: torchvision's MNIST in a DataLoader, everything through `prepare`."""

from __future__ import annotations

from typing import Any

import accelerate
import torch
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.peers.common import network, start, timed, torchvision_mnist


def main(data_dir: str, batch_size: int, num_samples: int) -> dict[str, Any]:
    """Train two epochs; the peer's line."""
    accelerator = accelerate.Accelerator()
    loader = DataLoader(torchvision_mnist(data_dir, num_samples), batch_size=batch_size, shuffle=True)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    loss_function = nn.CrossEntropyLoss()

    def epoch() -> None:
        for images, labels in loader:
            optimizer.zero_grad()
            accelerator.backward(loss_function(model(images), labels))
            optimizer.step()

    return timed(epoch, num_samples, f"accelerate {accelerate.__version__}", accelerator.device.type)


if __name__ == "__main__":
    start(main)
