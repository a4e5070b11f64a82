"""The loop of the 2019 tutorial: `torchvision.datasets.MNIST` with ToTensor and Normalize, a DataLoader, NLLLoss.

The tutorial takes the log of a Softmax; LogSoftmax is the same function. Nothing in the loop waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn, optim
from torch.utils.data import DataLoader

from benchmarks.peers.common import pick_device, start, timed, torchvision_mnist


def main(data_dir: str, batch_size: int, num_samples: int) -> dict[str, Any]:
    """Train two epochs; the peer's line."""
    device = pick_device()
    train_loader = DataLoader(torchvision_mnist(data_dir, num_samples), batch_size=batch_size, shuffle=True)
    model = nn.Sequential(
        nn.Linear(784, 256), nn.LeakyReLU(0.1), nn.Linear(256, 10), nn.LogSoftmax(dim=1)
    ).to(device)
    criterion = nn.NLLLoss()
    optimizer = optim.Adam(model.parameters(), lr=1e-4)

    def epoch() -> None:
        for images, labels in train_loader:
            images, labels = images.to(device), labels.to(device)
            images = images.view(images.shape[0], -1)
            optimizer.zero_grad()
            loss = criterion(model(images), labels)
            loss.backward()
            optimizer.step()

    return timed(epoch, num_samples, f"torch {torch.__version__}", device.type)


if __name__ == "__main__":
    start(main)
