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
from mnist_dist.data.idx import STEMS, read_idx
from mnist_dist.data.images import NUM_CLASSES, Images, ImageSets
from mnist_dist.data.layouts import DIGESTS, NEEDED, contents, find, known_name
from mnist_dist.data.npz import read_npz
from mnist_dist.errors import UserError
from mnist_dist.text import cut


def obtain(dataset: str, data_dir: str, mirror: str | None, warn: Callable[[str], None]) -> str:
    """Make sure that the data set is on disk; returns its name. One process per machine calls it.

    `mirror` is a base URL to try first. Raises `UserError` if there is no copy and no download; with "auto" that
    is a warning, and "synthetic" is returned.
    """
    if dataset == "synthetic":
        _embedded(data_dir)
        return dataset
    name = "mnist" if dataset == "auto" else dataset
    if find(Path(data_dir), TORCHVISION_CLASS[name]) is None:
        try:
            download(name, Path(data_dir), mirror)
        except UserError as error:
            if dataset != "auto":
                raise UserError(f"--data-dir {cut(data_dir)} {contents(Path(data_dir))}, and {error}; {NEEDED}"
                                ) from None
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
        files = find(Path(data_dir), TORCHVISION_CLASS[name])
        if files is None:
            raise UserError(f"--data-dir {cut(data_dir)} {contents(Path(data_dir))}, and no {name}; {NEEDED}, or a run "
                            "that downloads them")
        arrays = read_npz(files.npz) if files.npz else {key: read_idx(path, key[1]) for key, path in
                                                        files.paths.items()}
        for split in ("train", "test"):
            _check_pair(arrays[split, "images"], arrays[split, "labels"],
                        files.npz or files.paths[split, "labels"])
    sets = [
        Images(torch.from_numpy(arrays[split, "images"]).unsqueeze(1),
               torch.from_numpy(arrays[split, "labels"].astype(np.int64)))
        for split in ("train", "test")
    ]
    return ImageSets(name, *sets)


def check_name(name: str, data_dir: str, digest: str, warn: Callable[[str], None]) -> None:
    """Raises `UserError` if the loaded data are a known data set of another name: MNIST, Fashion-MNIST and KMNIST have
    the same names of files and sizes. `warn` gets a line if they are no known one.
    """
    if name == "synthetic" or (files := find(Path(data_dir), TORCHVISION_CLASS[name])) is None:
        return
    known = known_name(digest, files)
    if known not in (name, None):
        raise UserError(f"the files in {files.folder} are {known}, not {name}: give --dataset {known}, or the "
                        "--data-dir of the other one")
    if known is None and name in DIGESTS:
        warn(f"the data in {files.folder} are not the original {name} (their SHA-256 begins with {digest[:12]})")


def _embedded(data_dir: str) -> Any:
    from mnist_dist.data.synthetic import load_digits

    return load_digits(Path(data_dir))


def _check_pair(images: np.ndarray, labels: np.ndarray, path: Path) -> None:
    """Raises `UserError` if these labels, from `path`, cannot be of these images."""
    if len(images) != len(labels):
        raise UserError(f"{path} has {len(labels)} labels for the {len(images)} images beside it: put files of one "
                        "data set there")
    if labels.max() >= NUM_CLASSES:
        raise UserError(f"{path} has the label {labels.max()} at position {int(labels.argmax())}, and labels are 0 to "
                        f"{NUM_CLASSES - 1}: put the original file there")
