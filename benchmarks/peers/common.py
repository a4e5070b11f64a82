"""What the peers share: reading their arguments and the images, timing two epochs, printing one line of JSON.

Every peer trains 784-256-10 with LeakyReLU 0.1 in float32 on MNIST scaled to [-1, 1], in a new order each epoch, with
Adam at 1e-4 on the mean cross-entropy of a batch. The first epoch warms up (and compiles); the second one is timed.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from mnist_dist.data import load
from mnist_dist.processes.launch_environment import read_launch
from mnist_dist.processes.spawn import runs_on_cpu


def start(main: Callable[..., dict[str, Any]]) -> None:
    """Call `main` with the command line, DATA_DIR BATCH_SIZE NUM_SAMPLES and further numbers; print what it returns."""
    data_dir, *numbers = sys.argv[1:]
    print(json.dumps(main(data_dir, *map(int, numbers))), flush=True)


def pick_device() -> torch.device:
    """The GPU if there is one and ACCELERATE_USE_CPU does not ask for the CPU."""
    return torch.device("cpu" if runs_on_cpu(read_launch()) else "cuda")


def bytes_in_memory(data_dir: str, num_samples: int) -> tuple[Tensor, Tensor]:
    """The first training images as uint8 [N, 784], and their labels int64 [N]."""
    train = load("mnist", data_dir).train
    check_count(num_samples, len(train))
    return train.images[:num_samples].flatten(1), train.labels[:num_samples]


def floats_in_memory(data_dir: str, num_samples: int) -> tuple[Tensor, Tensor]:
    """The first training images scaled to [-1, 1], float32 [N, 784], and their labels int64 [N]."""
    images, labels = bytes_in_memory(data_dir, num_samples)
    return images.float().div_(127.5).sub_(1.0), labels


def torchvision_mnist(data_dir: str, num_samples: int) -> Dataset:
    """The first training images as most loops have them: decoded to PIL and transformed one by one."""
    from torchvision import datasets, transforms

    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))])
    dataset = datasets.MNIST(data_dir, train=True, transform=transform)
    check_count(num_samples, len(dataset))
    return dataset if num_samples == len(dataset) else Subset(dataset, range(num_samples))


def check_count(asked: int, there: int) -> None:
    """A rate over images that are not there would be too good. Raises `ValueError`."""
    if asked > there:
        raise ValueError(f"asked to train on {asked} images, and there are {there}")


def network() -> nn.Sequential:
    """The model, from images of any shape to logits."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.LeakyReLU(0.1), nn.Linear(256, 10))


def timed(epoch: Callable[[], None], num_samples: int, version: str, device: str,
          synchronize: Callable[[], None] | None = None) -> dict[str, Any]:
    """Run `epoch` twice and return the peer's line: the second run's seconds, and the first one's as warm-up.

    `synchronize` waits for the device (and the other processes) at both ends of an epoch.
    """
    wait = synchronize or (torch.cuda.synchronize if device == "cuda" else lambda: None)
    seconds = []
    for _ in range(2):
        wait()
        begin = time.perf_counter()
        epoch()
        wait()
        seconds.append(time.perf_counter() - begin)
    return line(num_samples, seconds[1], seconds[0], version, device)


def line(samples: int, seconds: float, warmup_seconds: float, version: str, device: str, **more: float
         ) -> dict[str, Any]:
    """What a peer prints: samples over seconds is its rate."""
    return {"samples": samples, "seconds": seconds, "warmup_seconds": warmup_seconds, "version": version,
            "device": device, **more}
