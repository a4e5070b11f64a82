"""A script as a person writes it for this task: images in memory, 20 epochs, the test after each, the model saved.

    python benchmarks/peers/script.py DATA_DIR [EPOCHS [BATCH_SIZE]]

It stands alone, so that its start is that of such a script. DATA_DIR holds MNIST/raw, as torchvision has it.
"""

from __future__ import annotations

import sys

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torchvision.datasets import MNIST

data_dir, epochs, batch_size = sys.argv[1], *map(int, [*sys.argv[2:], "20", "200"][:2])
device = "cuda" if torch.cuda.is_available() else "cpu"
sets = [MNIST(data_dir, train=train) for train in (True, False)]
(images, labels), (test_images, test_labels) = (
    (split.data.flatten(1).float().div(127.5).sub(1.0).to(device), split.targets.to(device)) for split in sets)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(784, 256), nn.LeakyReLU(0.1), nn.Linear(256, 10)).to(device)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
for epoch in range(epochs):
    for rows in torch.randperm(len(images), device=device).split(batch_size):
        cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        logits = model(test_images)
        nll, accuracy = cross_entropy(logits, test_labels), (logits.argmax(1) == test_labels).float().mean()
    print(f"epoch {epoch} test NLL {nll:.5f} accuracy {accuracy:.4f}", flush=True)
torch.save(model.state_dict(), "model.pt")
