"""The loop that people write: Accelerate over `torchvision.datasets.MNIST` with ToTensor and Normalize.

    python benchmarks/plain_accelerate.py MNIST_ROOT BATCH_SIZE EPOCHS

The tutorial's model, Adam at 1e-4, shuffled. Prints the samples per second of each epoch's training as JSON.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms


def main(root: str, batch_size: int, epochs: int) -> None:
    """Train, and print each epoch's rate."""
    accelerator = Accelerator()
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))])
    loader = DataLoader(datasets.MNIST(root, transform=transform), batch_size=batch_size, shuffle=True)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.LeakyReLU(0.1), nn.Linear(256, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    loss_function = nn.CrossEntropyLoss()
    rates = []
    for _ in range(epochs):
        begin, samples = time.perf_counter(), 0
        for images, labels in loader:
            optimizer.zero_grad()
            accelerator.backward(loss_function(model(images), labels))
            optimizer.step()
            samples += len(labels)
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        rates.append(samples / (time.perf_counter() - begin))
    print(json.dumps(rates))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
