"""Images in memory: uint8 tensors, scaled to [-1, 1] batch by batch, on the device.

N images in a set, B in a batch, 1 channel, H = W = 28.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

NUM_CLASSES = 10


class Images(Dataset):
    """Images uint8 [N, 1, 28, 28] and labels int64 [N]; a batch of any indices is one indexing operation.

    Batches are on `device`, where the labels are; the images are too (`is_resident`), unless they are too many.
    """

    def __init__(self, images_N1HW: Tensor, labels_N: Tensor) -> None:
        self.images, self.labels = images_N1HW, labels_N

    @property
    def is_resident(self) -> bool:
        """Whether the images are on the same device as their batches."""
        return self.images.device == self.labels.device

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: Tensor | Sequence[int]) -> tuple[Tensor, Tensor]:
        """What DataLoader calls with a whole batch's indices: images [B, 1, 28, 28] and labels [B].

        No copy waits for the device if the indices are where the images are.
        """
        picked = torch.as_tensor(indices, dtype=torch.int64, device=self.images.device)
        if self.is_resident:
            # a copy of whole rows; `self.images[picked]` takes an image apart, and five times as long on the CPU
            return self.images.index_select(0, picked), self.labels.index_select(0, picked)
        # from pinned memory the copy to a GPU is asynchronous; the allocator keeps the batch until it is done
        batch = torch.empty(len(picked), *self.images.shape[1:], dtype=torch.uint8, pin_memory=True)
        torch.index_select(self.images, 0, picked, out=batch)
        there = picked.pin_memory().to(self.labels.device, non_blocking=True)
        return batch.to(self.labels.device, non_blocking=True), self.labels[there]

    def to(self, device: torch.device) -> Images:
        """The same images with batches on `device`, and in its memory if they take at most half of what is free."""
        labels = self.labels.to(device)
        if device.type == "cuda" and self.images.nbytes > torch.cuda.mem_get_info(device)[0] // 2:
            return Images(self.images, labels)
        return Images(self.images.to(device), labels)


class ImageSets(NamedTuple):
    """The training and the test images of the data set `name`."""

    name: str
    train: Images
    test: Images

    def digest(self) -> str:
        """SHA-256 of all images and labels, hexadecimal: the same for the same data, however it is stored."""
        found = hashlib.sha256()
        for part in (self.train, self.test):
            for tensor in (part.images, part.labels):
                found.update(tensor.contiguous().numpy().data)
        return found.hexdigest()

    @property
    def summary(self) -> dict[str, str | int]:
        """The data set in `result.json`."""
        return {"name": self.name, "train": len(self.train), "test": len(self.test)}


def scale(images_B1HW: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 [B, 1, 28, 28] to [-1, 1]: (pixel / 255 - 0.5) / 0.5, the tutorial's mean and deviation."""
    return images_B1HW.to(dtype).div_(127.5).sub_(1.0)
