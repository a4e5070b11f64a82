"""The source of a data set: IDX files on disk, torchvision's mirrors, or the embedded digits.

One process per machine fetches it (`obtain`), then every process loads it (`load`). It knows nothing of processes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mnist_dist.data.download import TORCHVISION_CLASS, download
from mnist_dist.data.idx import STEMS, existing, folder_on_disk, read_idx
from mnist_dist.data.images import NUM_CLASSES, Images, ImageSets
from mnist_dist.errors import UserError


def obtain(dataset: str, data_dir: str, mirror: str | None, warn: Callable[[str], None]) -> str:
    """Make sure that the data set is on disk; returns its name. One process per machine calls it.

    `mirror` is a base URL to try first. Raises `UserError` if there is no copy and no download; with "auto" that
    is a warning, and "synthetic" is returned.
    """
    if dataset == "synthetic":
        _embedded(data_dir)
        return dataset
    name = "mnist" if dataset == "auto" else dataset
    if folder_on_disk(Path(data_dir), TORCHVISION_CLASS[name]) is None:
        try:
            download(name, Path(data_dir), mirror)
        except UserError as error:
            if dataset != "auto":
                raise
            warn(f"{error}; continuing with the embedded digits, which are NOT MNIST")
            _embedded(data_dir)
            return "synthetic"
    return name


def load(name: str, data_dir: str) -> ImageSets:
    """The data set that `obtain` named. Raises `UserError` if a file is missing, damaged or holds other data."""
    if name == "synthetic":
        digits = _embedded(data_dir)
        arrays = dict(zip(STEMS, (digits.train_images, digits.train_labels, digits.test_images, digits.test_labels),
                          strict=True))
    else:
        folder = folder_on_disk(Path(data_dir), TORCHVISION_CLASS[name])
        if folder is None:
            raise UserError(f"no {name} files in {data_dir}: give another --data-dir, or start a run that downloads "
                            "them")
        arrays = {key: read_idx(existing(folder / stem), key[1]) for key, stem in STEMS.items()}
        for split in ("train", "test"):
            _check_pair(arrays[split, "images"], arrays[split, "labels"], folder, split)
    sets = [
        Images(torch.from_numpy(arrays[split, "images"]).unsqueeze(1),
               torch.from_numpy(arrays[split, "labels"].astype(np.int64)))
        for split in ("train", "test")
    ]
    return ImageSets(name, *sets)


def _embedded(data_dir: str) -> Any:
    from mnist_dist.data.synthetic import load_digits

    return load_digits(Path(data_dir))


def _check_pair(images: np.ndarray, labels: np.ndarray, folder: Path, split: str) -> None:
    stem = STEMS[split, "labels"]
    if len(images) != len(labels):
        raise UserError(
            f"{existing(folder / stem)} has {len(labels)} labels for the {len(images)} images beside it: put files "
            "of one data set there"
        )
    if labels.max() >= NUM_CLASSES:
        raise UserError(
            f"{existing(folder / stem)} has the label {labels.max()} at position {int(labels.argmax())}, and labels "
            f"are 0 to {NUM_CLASSES - 1}: put the original file there"
        )
