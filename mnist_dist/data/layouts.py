"""Where the files of a data set lie: the layouts in which people keep MNIST, and which known data set it is.

A folder holds the four IDX files, or `mnist.npz`, or has them below it in `raw/` or in torchvision's `MNIST/raw/`. An
IDX file may be packed (.gz), be named `train-images.idx3-ubyte`, or lie in a folder of the same name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from mnist_dist.data.idx import STEMS
from mnist_dist.disk.files import opened_regular
from mnist_dist.errors import UserError
from mnist_dist.text import cut

NPZ = "mnist.npz"  # with x_train, y_train, x_test, y_test, as Keras has it
NEEDED = (f"needed are {next(iter(STEMS.values()))} and the three other IDX files, .gz or not, there or in MNIST/raw/, "
          f"or {NPZ}")
# of sets whose files have the same names and sizes: SHA-256 of images and labels, as `ImageSets.digest` makes it
DIGESTS = {
    "mnist": "1e35582d42a90940c55b956deb61875c020b567ed20e3c5b174f52bf7809ed9b",
    "fashion-mnist": "ece172613115fb18b120bec8f6c02271af90b8b8f0a5af5c51cbd5ceed68e619",
}
# MD5 of the packed files, as torchvision has them, of the set whose digest is not in DIGESTS
ARCHIVES = {"kmnist": {
    "train-images-idx3-ubyte": "bdb82020997e1d708af4cf47b453dcf7",
    "train-labels-idx1-ubyte": "e144d726b3acfaa3e44228e80efcd344",
    "t10k-images-idx3-ubyte": "5c965bf0a639b31b8f53240b1b52f4d7",
    "t10k-labels-idx1-ubyte": "7320c461ea6c1c855c0b718fb2a4b134",
}}


class Files(NamedTuple):
    """The files of a data set: `npz`, or the path of each IDX file; the path of a missing one is where it should be."""

    folder: Path
    paths: Mapping[tuple[str, str], Path]
    npz: Path | None = None


def find(data_dir: Path, torchvision_name: str) -> Files | None:
    """The files in the folder, if there is at least one of them. Raises `UserError` if it is not a folder."""
    if data_dir.exists() and not data_dir.is_dir():
        raise UserError(f"--data-dir {data_dir} is not a folder: give a folder that contains the IDX files, or an "
                        "empty one to download into")
    for folder in (data_dir / torchvision_name / "raw", data_dir / "raw", data_dir):
        files = {key: next((path for path in _places(folder, stem) if path.is_file()), None)
                 for key, stem in STEMS.items()}
        if any(files.values()):
            return Files(folder, {key: path or folder / STEMS[key] for key, path in files.items()})
        if (folder / NPZ).is_file():
            return Files(folder, {}, folder / NPZ)
    return None


def _places(folder: Path, stem: str) -> Iterator[Path]:
    """The paths at which the file of this name may be."""
    for name in (stem, stem.replace("-idx", ".idx")):
        yield from (folder / name, folder / f"{name}.gz", folder / name / name, folder / name / f"{name}.gz")


def contents(data_dir: Path) -> str:
    """What the folder holds, for a message."""
    if not data_dir.is_dir():
        return "does not exist"
    names = sorted(path.name for path in data_dir.iterdir() if not path.name.startswith("."))
    if not names:
        return "is empty"
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"holds {', '.join(cut(name, 20) for name in names[:4])}{more}"


def known_name(digest: str, files: Files) -> str | None:
    """The name of the known data set that these files are; None if they are none."""
    for name, known in DIGESTS.items():
        if digest == known:
            return name
    for name, sums in ARCHIVES.items():
        packed = {stem: next((path for path in _places(files.folder, stem) if path.suffix == ".gz" and path.is_file()),
                             None) for stem in sums}
        if all(path and _md5(path) == sums[stem] for stem, path in packed.items()):
            return name
    return None


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with opened_regular(path) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
