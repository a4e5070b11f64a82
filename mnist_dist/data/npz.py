"""Reads `mnist.npz`, the form in which Keras keeps MNIST. Nothing is unpickled."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

from mnist_dist.data.idx import MOST, SIDE
from mnist_dist.disk.files import opened_regular
from mnist_dist.errors import UserError
from mnist_dist.text import cause, cut

NAMES = {("train", "images"): "x_train", ("train", "labels"): "y_train",
         ("test", "images"): "x_test", ("test", "labels"): "y_test"}
HEAD_BYTES = 1000  # of an array in the file, at most


def read_npz(path: Path) -> dict[tuple[str, str], np.ndarray]:
    """The arrays uint8 [N, 28, 28] and [N] by (split, what). Raises `UserError`."""
    remedy = f"put a file there with {', '.join(NAMES.values())}: images uint8 N x {SIDE} x {SIDE}, labels uint8 N"
    try:
        with opened_regular(path) as file:
            with zipfile.ZipFile(file) as archive:
                large = [info.filename for info in archive.infolist()
                         if info.file_size > MOST * SIDE * SIDE + HEAD_BYTES]
            if large:
                raise UserError(f"{path} says that {cut(large[0], 40)} is larger than {MOST:,} images: {remedy}")
            file.seek(0)
            loaded = np.load(file, allow_pickle=False)
            missing = [name for name in NAMES.values() if name not in loaded.files]
            if missing:
                raise UserError(f"{path} has no {', '.join(missing)}: {remedy}")
            arrays = {key: loaded[name] for key, name in NAMES.items()}
    except (OSError, EOFError, ValueError, KeyError, MemoryError, zlib.error, zipfile.BadZipFile, NotImplementedError,
            RuntimeError) as error:
        raise UserError(f"{path} cannot be read ({cause(error)}): {remedy}") from None
    for key, array in arrays.items():
        shape = (len(array), SIDE, SIDE) if key[1] == "images" and array.ndim else (array.size,)
        if array.dtype.kind not in "ui" or array.shape != shape or not 0 < len(array) <= MOST:
            raise UserError(f"{path} has {NAMES[key]} of {array.dtype} {' x '.join(map(str, array.shape))}: {remedy}")
        if array.dtype != np.uint8:
            if array.min() < 0 or array.max() > 255:
                raise UserError(f"{path} has {NAMES[key]} from {array.min()} to {array.max()}: {remedy}")
            arrays[key] = array.astype(np.uint8)
    return {key: np.ascontiguousarray(array) for key, array in arrays.items()}
