"""The loop that people write with Lightning: a LightningModule, a DataLoader of torchvision's MNIST, a Trainer.

Progress bar, logger, checkpoints and model summary are off. A callback times the epochs of one `fit`.
"""

from __future__ import annotations

import logging
import time
import warnings
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from benchmarks.peers.common import line, network, pick_device, start, torchvision_mnist


class Classifier(L.LightningModule):
    """The model, its loss and its optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """The loss of a batch."""
        images, labels = batch
        return cross_entropy(self.network(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam over all parameters."""
        return torch.optim.Adam(self.parameters(), lr=1e-4)


class Clock(L.Callback):
    """The seconds of each epoch, from a waited-for start to a waited-for end."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Start the clock."""
        self._wait(module)
        self._begin = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Stop it."""
        self._wait(module)
        self.seconds.append(time.perf_counter() - self._begin)

    def _wait(self, module: L.LightningModule) -> None:
        if module.device.type == "cuda":
            torch.cuda.synchronize()


def main(data_dir: str, batch_size: int, num_samples: int) -> dict[str, Any]:
    """Train two epochs; the peer's line."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    device, clock = pick_device(), Clock()
    loader = DataLoader(torchvision_mnist(data_dir, num_samples), batch_size=batch_size, shuffle=True)
    trainer = L.Trainer(
        max_epochs=2, accelerator="gpu" if device.type == "cuda" else "cpu", devices=1, callbacks=[clock],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )
    trainer.fit(Classifier(), loader)
    warmup, seconds = clock.seconds
    return line(num_samples, seconds, warmup, f"lightning {L.__version__}", device.type)


if __name__ == "__main__":
    start(main)
