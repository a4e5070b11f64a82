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

from mnist_dist.errors import UserError

NUM_CLASSES = 10


class Images(Dataset):
    """Images uint8 [N, 1, 28, 28] and labels int64 [N]; a batch of any indices is one indexing operation.

    Both are on one device, and so are the batches.
    """

    def __init__(self, images_N1HW: Tensor, labels_N: Tensor) -> None:
        self.images, self.labels = images_N1HW, labels_N

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: Tensor | Sequence[int]) -> tuple[Tensor, Tensor]:
        """What DataLoader calls with a whole batch's indices: images [B, 1, 28, 28] and labels [B].

        No copy waits for the device if the indices are where the images are.
        """
        picked = torch.as_tensor(indices, dtype=torch.int64, device=self.images.device)
        # a copy of whole rows; `self.images[picked]` takes an image apart, and five times as long on the CPU
        return self.images.index_select(0, picked), self.labels.index_select(0, picked)

    def to(self, device: torch.device) -> Images:
        """The same images in the memory of `device`. Raises `UserError` if they take more than half of a GPU's memory
        that is free.
        """
        if device.type == "cuda" and self.images.nbytes > (free := torch.cuda.mem_get_info(device)[0]) // 2:
            raise UserError(f"{len(self):,} images take {self.images.nbytes / 2**20:,.0f} MiB, and the GPU has "
                            f"{free / 2**20:,.0f} MiB free, of which half is for them: end what else runs on it, or "
                            "set ACCELERATE_USE_CPU=true")
        return Images(self.images.to(device), self.labels.to(device))


class ImageSets(NamedTuple):
    """The training and the test images of the data set `name`."""

    name: str
    train: Images
    test: Images

    def digest(self) -> str:
        """SHA-256 of all images and labels, hexadecimal: the same for the same data, however it is stored."""
        digest = hashlib.sha256()
        for part in (self.train, self.test):
            for tensor in (part.images, part.labels):
                digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()

    @property
    def summary(self) -> dict[str, str | int]:
        """The data set in `result.json`."""
        return {"name": self.name, "train": len(self.train), "test": len(self.test)}


def scale(images_B1HW: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 [B, 1, 28, 28] to [-1, 1]: (pixel / 255 - 0.5) / 0.5, the tutorial's mean and deviation."""
    return images_B1HW.to(dtype).div_(127.5).sub_(1.0)
