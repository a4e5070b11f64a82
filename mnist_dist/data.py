"""Where images come from: IDX files on disk, torchvision's mirrors, or the embedded digits.

Images are held as uint8 tensors and scaled to [-1, 1] batch by batch, on the device. It knows nothing of processes: one
per machine is to fetch (`obtain`) before all load (`load`). N images in a set, B in a batch, 1 channel, H = W = 28.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mnist_dist.errors import UserError
from mnist_dist.idx import read_idx

TORCHVISION_CLASS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}
STEMS = {  # (split, what) to the file's name, less .gz
    ("train", "images"): "train-images-idx3-ubyte",
    ("train", "labels"): "train-labels-idx1-ubyte",
    ("test", "images"): "t10k-images-idx3-ubyte",
    ("test", "labels"): "t10k-labels-idx1-ubyte",
}
STALL_SECONDS = 10.0  # a mirror that sends nothing for so long is given up
NUM_CLASSES = 10


class Images(Dataset):
    """Images uint8 [N, 1, 28, 28] and labels int64 [N]; a batch of any indices is one indexing operation.

    Batches are on `device`, where the labels are; the images are too (`is_resident`), unless they are too many.
    """

    def __init__(self, images_N1HW: Tensor, labels_N: Tensor) -> None:
        self.images, self.labels = images_N1HW, labels_N

    @property
    def is_resident(self) -> bool:
        """Whether the images are where the batches are wanted."""
        return self.images.device == self.labels.device

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """What DataLoader calls with a whole batch's indices: images [B, 1, 28, 28] and labels [B]."""
        picked = torch.tensor(indices, dtype=torch.int64)
        there = picked.to(self.labels.device, non_blocking=True)
        if self.is_resident:
            return self.images[there], self.labels[there]
        # from pinned memory the copy to a GPU is asynchronous; the allocator keeps the batch until it is done
        batch = torch.empty(len(picked), *self.images.shape[1:], dtype=torch.uint8, pin_memory=True)
        torch.index_select(self.images, 0, picked, out=batch)
        return batch.to(there.device, non_blocking=True), self.labels[there]

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

    @property
    def summary(self) -> dict[str, str | int]:
        """What `result.json` says of the data."""
        return {"name": self.name, "train": len(self.train), "test": len(self.test)}


def scale(images_B1HW: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 [B, 1, 28, 28] to [-1, 1]: (pixel / 255 - 0.5) / 0.5, the tutorial's mean and deviation."""
    return images_B1HW.to(dtype).div_(127.5).sub_(1.0)


def obtain(dataset: str, data_dir: str, mirror: str | None, warn: Callable[[str], None]) -> str:
    """Make sure that the data set is on disk, and say its name. To be called by one process per machine.

    `mirror` is a base URL to try first. Raises `UserError` where nothing is to be had; with "auto" that is a warning,
    and "synthetic" is returned.
    """
    if dataset == "synthetic":
        _embedded(data_dir)
        return dataset
    name = "mnist" if dataset == "auto" else dataset
    if _folder_on_disk(name, Path(data_dir)) is None:
        try:
            download(name, Path(data_dir), mirror)
        except UserError as error:
            if dataset != "auto":
                raise
            warn(f"{error}; going on with the embedded digits, which are NOT MNIST")
            _embedded(data_dir)
            return "synthetic"
    return name


def load(name: str, data_dir: str) -> ImageSets:
    """The data set that `obtain` named. Raises `UserError` where a file is missing, damaged or holds other things."""
    if name == "synthetic":
        digits = _embedded(data_dir)
        arrays = dict(zip(STEMS, (digits.train_images, digits.train_labels, digits.test_images, digits.test_labels),
                          strict=True))
    else:
        folder = _folder_on_disk(name, Path(data_dir))
        if folder is None:
            raise UserError(f"no {name} files in {data_dir}: name another --data-dir, or let them be downloaded")
        arrays = {key: read_idx(_existing(folder / stem), key[1]) for key, stem in STEMS.items()}
        for split in ("train", "test"):
            _check_pair(arrays[split, "images"], arrays[split, "labels"], folder, split)
    sets = [
        Images(torch.from_numpy(arrays[split, "images"]).unsqueeze(1),
               torch.from_numpy(arrays[split, "labels"].astype(np.int64)))
        for split in ("train", "test")
    ]
    return ImageSets(name, *sets)


def _embedded(data_dir: str) -> Any:
    from mnist_dist.synthetic import load_digits

    return load_digits(Path(data_dir))


def _existing(path: Path) -> Path:
    zipped = path.with_name(path.name + ".gz")
    return path if path.is_file() or not zipped.is_file() else zipped


def _folder_on_disk(name: str, data_dir: Path) -> Path | None:
    """The folder that holds any of the four files: torchvision's layout, else `data_dir` itself; None where neither."""
    if data_dir.exists() and not data_dir.is_dir():
        raise UserError(f"--data-dir {data_dir} is not a folder: name one that holds the IDX files, or is to")
    for folder in (data_dir / TORCHVISION_CLASS[name] / "raw", data_dir):
        if any(_existing(folder / stem).is_file() for stem in STEMS.values()):
            return folder
    return None


def _check_pair(images: np.ndarray, labels: np.ndarray, folder: Path, split: str) -> None:
    stem = STEMS[split, "labels"]
    if len(images) != len(labels):
        raise UserError(
            f"{_existing(folder / stem)} has {len(labels)} labels for the {len(images)} images beside it: put files "
            "of one data set there"
        )
    if labels.max() >= NUM_CLASSES:
        raise UserError(
            f"{_existing(folder / stem)} has the label {labels.max()} at position {int(labels.argmax())}, and labels "
            f"are 0 to {NUM_CLASSES - 1}: put the original file there"
        )


def download(name: str, data_dir: Path, mirror: str | None) -> None:
    """Fetch the data set into torchvision's layout below `data_dir`: all of it, or nothing at all.

    The mirrors and MD5 sums are torchvision's, and it unpacks. The transfer is ours: torchvision's requests each file
    twice, waits for ever for a silent server, and takes what an interrupted run left for whole. Files appear in their
    place, by rename, once all are there; a lock keeps other runs from fetching the same. Raises `UserError`.
    """
    from filelock import FileLock
    from torchvision import datasets

    kind = getattr(datasets, TORCHVISION_CLASS[name])
    mirrors = [*([mirror.rstrip("/") + "/"] if mirror else []), *kind.mirrors]
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(data_dir / f".{name}.lock"):
            if _folder_on_disk(name, data_dir) is not None:
                return
            with tempfile.TemporaryDirectory(prefix=".download-", dir=data_dir) as root:
                raw = Path(root, TORCHVISION_CLASS[name], "raw")
                raw.mkdir(parents=True)
                for file_name, md5 in kind.resources:
                    _fetch_from_any(mirrors, file_name, md5, raw)
                kind(root, download=True)  # finds the archives whole: checks them, unpacks them
                for path in raw.iterdir():
                    with open(path, "rb") as file:
                        os.fsync(file.fileno())
                target = data_dir / TORCHVISION_CLASS[name]
                target.mkdir(exist_ok=True)
                os.replace(raw, target / "raw")  # fails where a folder of other files is in its place
    except OSError as error:
        raise UserError(f"{name} cannot be stored in --data-dir {data_dir} ({error}): name another") from None


def _fetch_from_any(mirrors: Sequence[str], file_name: str, md5: str, folder: Path) -> None:
    failures = []
    for mirror in mirrors:
        try:
            _fetch(mirror + file_name, md5, folder / file_name)
            return
        except (OSError, HTTPException, ValueError) as error:  # ValueError: not a URL, or damaged in transfer
            failures.append(f"{mirror}: {str(error) or type(error).__name__}")
            (folder / file_name).unlink(missing_ok=True)
    raise UserError(f"{file_name} could not be downloaded ({'; '.join(failures)}): check --mirror, or put the four "
                    "files into --data-dir")


def _fetch(url: str, md5: str, path: Path) -> None:
    from tqdm import tqdm

    digest = hashlib.md5(usedforsecurity=False)
    with (
        urllib.request.urlopen(url, timeout=STALL_SECONDS) as response,
        open(path, "wb") as file,
        tqdm(total=response.length, desc=path.name, unit="B", unit_scale=True, file=sys.stderr, leave=False,
             disable=not sys.stderr.isatty()) as progress,
    ):
        while chunk := response.read(1 << 16):
            file.write(chunk)
            digest.update(chunk)
            progress.update(len(chunk))
    if digest.hexdigest() != md5:
        raise ValueError(f"sent {path.stat().st_size} bytes whose MD5 is not {md5}")
